"""The shell scripts as a user runs them: edited variables, the embedded default, what they refuse."""

import json
import os
import re
import shutil
import subprocess
import sysconfig
import venv

import pytest
from helpers import ROOT, run, write_jsonl

from gritlm.benchmark import benchmark
from gritlm.errors import UserError

SCRIPT = "scripts/training/train_embonly.sh"
OLDEST_BASH = shutil.which("bash3.2") or shutil.which("bash4.2") or "bash"  # build one, and name it so, to test it


@pytest.fixture
def checkout(tmp_path):
    """The scripts over this checkout's own environment, with an outputs folder of their own."""
    place = tmp_path / "checkout"
    place.mkdir()
    for name in ("gritlm", "models", "scripts", "pyproject.toml", "requirements.txt"):
        (place / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "scripts", tmp_path / "copy")
    (place / "scripts").unlink()
    (tmp_path / "copy").rename(place / "scripts")
    (place / ".venv").symlink_to(ROOT / ".venv")
    (place / "rows.jsonl").write_text('{"query": "q", "pos": ["a"], "neg": []}\n')
    (place / "scripts" / "setup.sh").write_text("exit 0\n")  # its own test is below
    return place


def bash(place, script=SCRIPT, *flags: str, **env) -> subprocess.CompletedProcess:
    environment = (
        os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "hf")} | {k: str(v) for k, v in env.items()}
    )
    return subprocess.run(
        [OLDEST_BASH, script, *flags], cwd=place, env=environment, capture_output=True, text=True, timeout=300
    )


needs_venv = pytest.mark.skipif(not (ROOT / ".venv").is_dir(), reason="no .venv: run through scripts/test.sh")


@needs_venv
def test_own_model_and_data(checkout, qwen3, tmp_path):
    """In the user's own environment, which has another gritlm, and from a folder whose modules nobody wants."""
    folder, environment = tmp_path / "elsewhere", tmp_path / "environment"
    venv.create(environment)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for unwanted in (packages / "gritlm" / "__init__.py", folder / "gritlm" / "__init__.py", folder / "random.py"):
        unwanted.parent.mkdir(parents=True, exist_ok=True)
        unwanted.write_text("raise SystemExit('imported')\n")
    write_jsonl(folder / "pairs.jsonl", rows=30, negatives=2, seed=0)
    settings = {"MODEL_NAME_OR_PATH": qwen3, "TRAIN_DATA": "pairs.jsonl", "GPUS": "none"}
    settings |= {"GLOBAL_BATCH_SIZE": 8, "QUERY_MAX_LEN": 32, "PATH": f"{environment}/bin:{os.environ['PATH']}"}
    done = bash(folder, str(checkout / SCRIPT), "--max_steps", "2", "--seed", "7", **settings)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"python {environment}/bin/python3 (the active one, which has all dependencies)" in done.stdout
    assert "device: CPU, no GPU found" in done.stdout
    (out,) = (folder / "outputs").iterdir()
    assert out.name.endswith("-pairs.jsonl")
    flags = json.loads((out / "run.json").read_text())["flags"]
    assert (flags["seed"], flags["max_steps"], flags["learning_rate"], flags["train_group_size"]) == (7, 2, 2e-5, 4)
    assert (flags["query_max_len"], flags["passage_max_len"]) == (32, 512), "one is set, the other is not"
    again = bash(folder, str(checkout / SCRIPT), "--max_steps", "2", "--seed", "7", **settings)
    assert again.returncode == 2
    (line,) = [line for line in again.stderr.splitlines() if "error" in line]
    assert "holds the finished run of these flags" in line


@needs_venv
def test_the_embedded_default(checkout):
    """The whole path of a bare call, with few steps and few pairs."""
    script = (checkout / SCRIPT).read_text()
    (checkout / SCRIPT).write_text(script.replace("quickstart prepare", "quickstart prepare --max_pairs 500"))
    finished = checkout / "outputs" / "quickstart" / "run.json"
    finished.parent.mkdir(parents=True)
    finished.write_text('{"finished": true}')
    done = bash(checkout, SCRIPT, "--eval_steps", "2", MAX_STEPS=2, GPUS="none", GLOBAL_BATCH_SIZE=32)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [path.name for path in finished.parent.iterdir()] == ["run.json"], "a finished run is left alone"
    assert (checkout / "outputs" / "quickstart-2" / "modules.json").is_file()
    flags = json.loads((checkout / "outputs" / "quickstart-2" / "run.json").read_text())["flags"]
    assert (flags["query_max_len"], flags["passage_max_len"]) == (64, 64), "of the recipe"
    for word in ("recall@1", "mrr@10", "ndcg@10", "untrained", "GritLM('outputs/quickstart-2')", "->"):
        assert word in done.stdout
    assert re.findall(r"evaluation at step (\d+)  held_out ndcg@10 0", done.stdout) == ["0", "2"]
    assert "verdict: nDCG@10 0." in done.stdout
    task = checkout / "outputs" / "quickstart-task"
    rows, queries, corpus = (
        [json.loads(line) for line in (task / name).read_text().splitlines()]
        for name in ("train.jsonl", "held_out/queries.jsonl", "held_out/corpus.jsonl")
    )
    assert 800 < len(queries) == len(corpus) <= 950
    assert not {row["query"][1] for row in rows} & {row["text"] for row in queries}
    assert not {row["pos"][0] for row in rows} & {row["text"] for row in corpus}


REFUSED = {
    "half of it": ({"TRAIN_DATA": "/x.jsonl"}, "MODEL_NAME_OR_PATH is empty"),
    "other half": ({"MODEL_NAME_OR_PATH": "m"}, "TRAIN_DATA is empty"),
    "no data": ({"MODEL_NAME_OR_PATH": "m", "TRAIN_DATA": "/absent.jsonl"}, "TRAIN_DATA=/absent.jsonl: no such file"),
    "no model": (
        {"MODEL_NAME_OR_PATH": "./absent", "TRAIN_DATA": "rows.jsonl"},
        "./absent: found no config.json there",
    ),
}


@needs_venv
@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(checkout, name):
    settings, message = REFUSED[name]
    done = bash(checkout, **settings, GPUS="none")
    assert done.returncode == 2
    assert done.stderr.count("error") == 1 and message in done.stderr
    assert not (checkout / "outputs").exists()


@needs_venv
def test_a_gpu_in_use_is_refused(checkout, tmp_path):
    """No GPU here, so a Python stands in for `gritlm devices`: two GPUs, the second with few MiB left."""

    def refusal(free: str) -> str:
        python = tmp_path / "python"
        lines = f"printf '0\\tX\\t80000\\t81000\\n1\\tX\\t{free}\\t81000\\n'"
        python.write_text(
            f'#!/bin/sh\n[ "$*" = "-m gritlm devices" ] && exec {lines}\nexec "{ROOT}/.venv/bin/python" "$@"\n'
        )
        python.chmod(0o755)
        done = bash(checkout, PYTHON=python, MODEL_NAME_OR_PATH="./absent", TRAIN_DATA="rows.jsonl")
        assert done.returncode == 2
        return done.stderr

    assert "GPU 1 has 9000 of 81000 MiB free, wanted 90%" in refusal("9000")
    free = refusal("80500")
    assert "MiB free" not in free and "found no config.json" in free
    none = bash(checkout, GPUS="0", MODEL_NAME_OR_PATH="./absent", TRAIN_DATA="rows.jsonl")
    assert "found no GPU" in none.stderr


def test_a_link_to_the_checkout_is_the_same_checkout(tmp_path):
    """A .venv that was made by way of a symbolic link is not made again for the physical path."""
    place, tools = tmp_path / "place", tmp_path / "tools"
    shutil.copytree(ROOT / "scripts", place / "scripts")
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, place)
    (tmp_path / "link").symlink_to(place)
    tools.mkdir()
    for tool in (tools / "uv", tools / "pip", tools / "python"):
        tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/installs\n')
        tool.chmod(0o755)
    (place / ".venv" / "bin").mkdir(parents=True)
    for name in ("pip", "python"):
        (place / ".venv" / "bin" / name).symlink_to(tools / name)
    path = f"{tools}:{os.environ['PATH']}"
    assert bash(tmp_path / "link", "scripts/setup.sh", PATH=path, PWD=tmp_path / "link").returncode == 0
    (tmp_path / "installs").rename(tmp_path / "installed_once")
    assert bash(place, "scripts/setup.sh", PATH=path).returncode == 0
    assert not (tmp_path / "installs").exists()
    (place / "requirements.txt").write_text("torch==1\n")
    assert bash(place, "scripts/setup.sh", PATH=path).returncode == 0
    assert (tmp_path / "installs").exists(), "control"


def test_setup_says_what_is_missing(tmp_path):
    place = tmp_path / "place"
    shutil.copytree(ROOT / "scripts", place / "scripts")
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, place)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "cat", "cksum", "mktemp", "grep", "tail", "rm"):
        (tools / name).symlink_to(shutil.which(name))
    no_python = bash(place, "scripts/setup.sh", PATH=tools)
    assert no_python.returncode == 2
    assert no_python.stderr == "setup: error: found no Python 3.11 or newer on PATH; install one and run this again\n"
    no_network = bash(
        place,
        "scripts/setup.sh",
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_CONFIG_FILE="/dev/null",
        PIP_FIND_LINKS="",
        PIP_EXTRA_INDEX_URL="",
        PIP_RETRIES="0",
        PATH=f"{os.path.dirname(os.path.realpath(shutil.which('python3')))}:/usr/bin:/bin",
    )
    assert no_network.returncode == 2
    assert no_network.stderr.count("\n") == 1 and "the package index cannot be reached" in no_network.stderr
    assert not (place / ".venv" / ".installed").exists()


def test_a_wheel_holds_everything(tmp_path):
    """`models/` becomes `gritlm.models`; what is imported comes from the wheel and not from this checkout."""
    done = run("-m", "pip", "wheel", ROOT, "--no-deps", "--quiet", "--wheel-dir", tmp_path / "wheel")
    if done.returncode and "setuptools" in done.stderr:
        pytest.skip("the build tool cannot be fetched without a network")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    code = "import gritlm.models.backbone as b, gritlm.data.batch_plan as p; print(b.__file__); print(p.__file__)"
    done = run("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert done.stdout.split() == [
        str(tmp_path / "site" / "gritlm" / name) for name in ("models/backbone.py", "data/batch_plan.py")
    ]
    held = {path.name for path in (tmp_path / "site" / "gritlm" / "evaluation").glob("*.json")}
    assert held == {path.name for path in (ROOT / "gritlm" / "evaluation").glob("*.json")} >= {"prompts.json"}


@pytest.mark.long
def test_the_benchmark_beside_its_baseline(tmp_path):
    """All contestants take the same step: equal losses and gradients. Times are for benchmarks.md, not for a test."""
    flags = ["--queries", "4", "--max_len", "64", "--rounds", "1", "--activation_memory", "0", "1"]
    done = run("-m", "gritlm", "benchmark", *flags, "--compare", "sentence-transformers", "--json", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    contestants = json.loads((tmp_path / "out").read_text())["contestants"]
    (baseline,) = [found for name, found in contestants.items() if name.startswith("sentence-transformers")]
    ours = [found for name, found in contestants.items() if name.startswith("gritlm packed")]
    assert len(ours) == 2
    assert baseline["gradient_difference"] < 1e-5
    assert all(abs(found["loss"] - baseline["loss"]) < 1e-5 for found in ours)
    assert set(ours[0]["parts"]) == {"data", "pass_1", "loss", "pass_2"}


def test_the_benchmark_of_the_loss_and_of_encoding(tmp_path):
    flags = ["loss", "--queries", "300", "--passages", "5000", "--width", "16", "--rounds", "1"]
    assert benchmark.main([*flags, "--json", str(tmp_path / "loss")]) == 0
    assert max(json.loads((tmp_path / "loss").read_text())["tiled"]["errors"]) < 1e-5
    flags = ["encode", "--queries", "3", "--rounds", "1", "--compare", "sentence-transformers"]
    assert benchmark.main([*flags, "--json", str(tmp_path / "encode")]) == 0
    contestants = json.loads((tmp_path / "encode").read_text())
    baseline = [found for name, found in contestants.items() if name.startswith("sentence-transformers")]
    assert baseline
    assert min(found["min_cosine"] for found in baseline) > 0.9999


def test_the_benchmark_of_the_sums_of_hrsa(tmp_path):
    flags = ["hrsa", "--layers", "2", "--width", "16", "--tokens", "8192", "--json", str(tmp_path / "hrsa")]
    assert benchmark.main([*flags, "--sample", "5000"]) == 0
    found = json.loads((tmp_path / "hrsa").read_text())
    assert all(found[name]["seconds"] > 0 for name in ("streamed", "all", "held"))
    with pytest.raises(UserError, match="--sample of 4096 or more"):
        benchmark.main([*flags, "--sample", "100"])
