"""The function level: linear probes."""
