"""Mathematics on tensors, formula first."""
