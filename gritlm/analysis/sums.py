"""Sums over the tokens of a pair of layers, in constant memory."""
