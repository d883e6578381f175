"""The representation level: correlation of dimensions, orthogonal Procrustes."""
