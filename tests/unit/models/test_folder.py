"""The model folder: what it holds, that it is read back as it was, and what is refused."""

import json
import logging

import pytest
import torch
from helpers import make_embedder, make_model_folder
from safetensors.torch import save_file
from transformers import AutoTokenizer

from gritlm.errors import UserError
from gritlm.models.folder import load_model_folder, move_model_folder
from gritlm.models.text import CONTRACT_FILE, TextContract


@pytest.mark.parametrize("attn", ["bb", "cc"])
@pytest.mark.parametrize("projection", [None, 12])
def test_a_saved_folder_is_read_back_exactly(base_model, tmp_path, attn, projection):
    contract = {"pooling_method": "lasttoken", "normalized": False, "query_max_len": 64, "prompts": {"query": "Q: "}}
    saved = make_model_folder(base_model, tmp_path, attn=attn, projection=projection, **contract)
    loaded, text_tokenizer = load_model_folder(str(tmp_path))
    assert loaded.config.is_causal is (attn == "cc")
    assert loaded.contract == text_tokenizer.contract == saved.contract
    ids, lengths = torch.arange(1, 9)[None], torch.tensor([8])
    vectors = [model(ids, lengths, torch.tensor([0])) for model in (saved, loaded)]
    assert torch.equal(*vectors)
    assert vectors[0].shape == (1, projection or 32)
    control = make_embedder(base_model, "cc" if attn == "bb" else "bb", projection=projection, **contract).eval()
    assert not torch.allclose(control(ids, lengths, torch.tensor([0])), vectors[0], atol=1e-3)


def test_the_folder_tells_every_loader_what_it_needs(qwen3, tmp_path):
    make_model_folder(qwen3, tmp_path, attn="cc", projection=12)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["is_causal"] is True
    assert config["architectures"] == ["Qwen3Model"]
    listed = [module["path"] for module in json.loads((tmp_path / "modules.json").read_text())]
    assert listed == ["", "1_Pooling", "2_Dense", "3_Normalize"]
    assert all((tmp_path / path).is_dir() for path in listed)
    assert {"model.safetensors", "tokenizer.json", CONTRACT_FILE} <= {path.name for path in tmp_path.iterdir()}
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".py")]


def test_a_server_can_read_the_folder(qwen3, tmp_path, monkeypatch, caplog):
    """Every user may read each file, and a loader that is given no limit cuts where the contract does."""
    make_model_folder(qwen3, tmp_path / "out", projection=12, query_max_len=40, passage_max_len=24)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(modes.values()) == {"0o644"}, modes
    save_file({"a": torch.zeros(1)}, tmp_path / "control.safetensors")
    assert oct((tmp_path / "control.safetensors").stat().st_mode & 0o777) == "0o600", "control: safetensors' own mode"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", tokenizer_type="modernbert")
    assert len(tokenizer("river " * 99, truncation=True).input_ids) == tokenizer.model_max_length == 40
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    load_model_folder(str(tmp_path / "out"))[1].tokenizer("river " * 99)
    assert "longer than the specified maximum" not in caplog.text
    tokenizer("river " * 99)
    assert "longer than the specified maximum" in caplog.text, "control: with the limit of the folder it warns"


def test_a_bare_backbone_needs_a_contract_and_is_bidirectional(qwen3):
    with pytest.raises(UserError, match=f"found no {CONTRACT_FILE}"):
        load_model_folder(str(qwen3))
    embedder, _ = load_model_folder(str(qwen3), TextContract())
    assert embedder.config.is_causal is False


def test_a_folder_is_moved_over_an_older_one(qwen3, tmp_path):
    new, run = tmp_path / "new", tmp_path / "run"
    saved = make_model_folder(qwen3, new, projection=12)
    make_model_folder(qwen3, run)
    (run / "run.json").write_text("{}")
    (run / "1_Pooling" / "old.json").write_text("{}")
    move_model_folder(new, run)
    assert not new.exists() and not (run / "1_Pooling" / "old.json").exists()
    assert (run / "run.json").exists()
    loaded, _ = load_model_folder(str(run))
    assert torch.equal(loaded.projection.weight, saved.projection.weight)
