"""Input of any length as calls of the model."""
