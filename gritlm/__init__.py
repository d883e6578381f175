"""Train text-embedding models from decoder LLMs, and use them."""

__version__ = "0.1.0"
__all__ = ["GritLM"]


def __getattr__(name: str):
    # On demand, so that `gritlm --help` and the pure-maths modules do not wait for transformers.
    if name == "GritLM":
        from gritlm.encode import GritLM

        return GritLM
    raise AttributeError(name)
