"""Texts to vectors: the network, its tokenizer, and the folder that holds both. This file imports nothing."""
