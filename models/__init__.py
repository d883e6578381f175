"""The network: a decoder LLM made into a text encoder. Knows nothing of data, losses or ranks."""

from gritlm.models.embedder import Embedder

__all__ = ["Embedder"]
