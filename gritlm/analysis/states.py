"""The states of every layer of a model on texts, at the same positions for two models."""
