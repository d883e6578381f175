"""The shape of one model's space."""
