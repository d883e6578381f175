"""A run with --merge_last: its last saves lie in weights/, a resumed run has the same ones, and they merge."""

import json
import shutil

import numpy as np
from helpers import train_flags
from safetensors.torch import load_file

from gritlm.serving.merge import main as merge
from gritlm.training.run_folder import update_run_file
from gritlm.training.train import main as train


def test_the_last_saves_are_kept_through_a_kill_and_merged(qwen3, data, tmp_path, capfd):
    out = tmp_path / "out"
    more = {"max_steps": 4, "save_steps": 1, "save_total_limit": 9, "merge_last": 3}
    flags = train_flags(qwen3, data, out, tmp_path / "cache", **more)
    assert train(flags) == 0
    said = capfd.readouterr().out
    assert ", 3 copies of the weights, 0.2 MB each); " in said
    assert f"weights of the last 3 saves: gritlm merge {out} NEW --last 3 averages them" in said

    def kept() -> dict[str, bytes]:
        return {path.name: (path / "model.safetensors").read_bytes() for path in sorted((out / "weights").iterdir())}

    copies = kept()
    checkpoints = {n: (out / f"checkpoint-{n}" / "model.safetensors").read_bytes() for n in range(1, 5)}
    assert copies == {f"step-{n}": checkpoints[n] for n in (2, 3, 4)} and len(set(copies.values())) == 3
    assert not [path.name for path in out.glob("weights/*/*") if path.name.startswith(("optimizer", "rng", "trainer"))]
    assert merge([str(out), str(tmp_path / "merged"), "--last", "3"]) == 0
    weights = [load_file(out / "weights" / f"step-{n}" / "model.safetensors") for n in (2, 3, 4)]
    for name, found in load_file(tmp_path / "merged" / "model.safetensors").items():
        wanted = np.mean([part[name].double().numpy() for part in weights], axis=0)
        assert np.abs(found.double().numpy() - wanted).max() <= 2**-24 * np.abs(wanted).max()
    assert "| `out`, step 3 | 0.3333 | `" in (tmp_path / "merged" / "README.md").read_text()

    # Killed after step 4's copy and before its checkpoint; a copy of a later step is of another life of the run.
    shutil.rmtree(out / "checkpoint-4")
    (out / "weights" / "step-4" / "model.safetensors").write_bytes(b"")
    shutil.copytree(out / "weights" / "step-4", out / "weights" / "step-9")
    update_run_file(out, finished=False)
    assert train(flags) == 0 and json.loads((out / "run.json").read_text())["finished"]
    assert kept() == copies

    # The same flags but --merge_last: it changes nothing that is learnt.
    shutil.rmtree(out / "checkpoint-4")
    update_run_file(out, finished=False)
    assert train([*flags, "--merge_last", "0"]) == 0
    assert not kept(), "copies that the run no longer keeps would not be its last"
