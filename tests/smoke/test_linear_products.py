"""A resumed run takes its linear layers' products from where its checkpoint's did, or says that it cannot."""

import json

import pytest
from conftest import SIZES, build_model
from helpers import train, train_flags
from transformers import Qwen3Config

from gritlm.training.checkpoints import MANIFEST, read_manifest
from gritlm.training.run_folder import read_run_file

LINE = "will not be bit-identical"


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_resumed_run_has_its_checkpoints_products(data, tmp_path, ranks):
    base = build_model(tmp_path / "base", Qwen3Config(**SIZES | {"hidden_size": 64, "intermediate_size": 64}))

    def go(name: str, *more: str) -> str:
        flags = train_flags(base, data, tmp_path / name, tmp_path / "cache", max_steps=2, save_steps=1)
        return train(*flags, *more, ranks=ranks).stdout

    said = go("whole")
    checkpoint = tmp_path / "whole" / "checkpoint-1"
    assert "linear layers: oneDNN for" in said
    measured = read_run_file(tmp_path / "whole")["onednn"]
    assert read_manifest(checkpoint)["onednn"] == measured

    manifest = read_manifest(checkpoint)
    for recorded, taken in ((["input gradient"], ["input gradient"]), (["of another version"], [])):
        (checkpoint / MANIFEST).write_text(json.dumps(manifest | {"onednn": recorded}))
        name = f"resumed with {len(taken)}"
        said = go(name, "--resume_from_checkpoint", str(checkpoint))
        assert read_run_file(tmp_path / name)["onednn"] == taken
        assert (LINE in said) == (recorded != taken)
