"""What stands in the place of a target where there is none."""

# As in transformers and in torch's cross entropy, whose default it is.
IGNORED = -100
