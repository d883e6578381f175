"""The texts of `gritlm hrsa`, and their labels."""
