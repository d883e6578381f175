"""Text in, unit vector out: the network, its tokenizer, and the folder that holds both. Imports nothing by itself."""
