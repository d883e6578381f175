"""Intervals and permutation tests over documents."""
