"""Small untrained models: a tiny Qwen3 with its tokenizer for the quickstart, and one layer of any model for trials."""

import copy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, set_seed
from transformers.modeling_utils import set_zero3_state

from gritlm.models.families import model_options
from gritlm.models.tokenizer import save_tokenizer

END = "<|endoftext|>"
TINY: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
}


def build_tokenizer(folder: Path, texts: list[str], vocabulary: int) -> None:
    """Train a byte-level BPE of `vocabulary` tokens on the texts and save it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    save_tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END), folder)


def build_model(folder: Path, texts: list[str], vocabulary: int = 8192) -> None:
    """Save a tokenizer trained on the texts, and a tiny Qwen3 with random weights."""
    build_tokenizer(folder, texts, vocabulary)
    config = Qwen3Config(vocab_size=vocabulary, max_position_embeddings=1024, eos_token_id=0, **TINY)
    set_seed(0)
    model = AutoModel.from_config(config)
    with torch.no_grad():
        # At 0.02 the layers' output drowns the token's own embedding, and learning starts 100 steps later.
        model.embed_tokens.weight.mul_(0.3 / config.initializer_range)
    model.save_pretrained(folder)


def one_layer(config: PreTrainedConfig, kind: str | None, attn_implementation: str, **options: Any) -> PreTrainedModel:
    """The same architecture with random float32 weights, one layer and a small vocabulary. Leaves the random state.

    Args:
        kind: the layer's name in `layer_types`, of a config that has them.
    """
    config = copy.deepcopy(config)
    config.num_hidden_layers, config.vocab_size = 1, 64
    config.pad_token_id = None if config.pad_token_id is None else 0
    if kind:
        config.layer_types = [kind]
    with torch.random.fork_rng(devices=[]), set_zero3_state():
        options |= model_options(config) | {"attn_implementation": attn_implementation}
        return AutoModel.from_config(config, dtype=torch.float32, **options)
