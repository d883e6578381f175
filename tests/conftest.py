"""What many tests need: tiny models from configs, small data, the shared data where it is there."""

import json
import logging
import os
import signal
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may look for anything on a hub

import pytest
import torch
import transformers
from helpers import ROOT, WORDS, write_jsonl
from transformers import AutoModel, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config, set_seed

from gritlm.models.tiny import END
from gritlm.models.tokenizer import save_tokenizer

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny models: with more, threads mostly wait for each other

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 600,
    "max_position_embeddings": 1024,
    "eos_token_id": 0,
    "initializer_range": 0.1,
}


def build_tokenizer(folder: Path) -> None:
    """Qwen's own pre-tokenization over a small vocabulary, under Qwen's tokenizer class."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    save_tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END), folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}))


def build_model(folder: Path, config) -> Path:
    set_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    build_tokenizer(folder)
    return folder


SIGNALS = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)}


@pytest.fixture(autouse=True)
def signals_as_at_the_start():
    """A run in this process ends with signals ignored, and what a later test starts would inherit that."""
    for number, handler in SIGNALS.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory) -> Path:
    return build_model(tmp_path_factory.mktemp("qwen3"), Qwen3Config(**SIZES, head_dim=8))


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory) -> Path:
    return build_model(tmp_path_factory.mktemp("qwen2"), Qwen2Config(**SIZES))


@pytest.fixture(params=["qwen2", "qwen3"])
def base_model(request) -> Path:
    """Each supported family in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def qwen3_dropout(tmp_path_factory) -> Path:
    return build_model(tmp_path_factory.mktemp("dropout"), Qwen3Config(**SIZES, head_dim=8, attention_dropout=0.3))


@pytest.fixture
def logged(caplog, monkeypatch) -> pytest.LogCaptureFixture:
    """What is logged, also where another test has set logging up."""
    monkeypatch.setattr(logging.getLogger("gritlm"), "propagate", True)
    return caplog


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Two sets: one with hard negatives of unequal number, repeated texts and queries; one without negatives."""
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "hard.jsonl", rows=40, negatives=3, seed=1)
    write_jsonl(folder / "plain.jsonl", rows=48, negatives=0, seed=2)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real and malformed data, kept beside the repository where there is any."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no shared data beside this repository")
    return path
