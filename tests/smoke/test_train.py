"""The main job through its command line: batches, resume after kill -9, loggers, the output folder, bad input."""

import json
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator

import pytest
import torch
from helpers import DRIVER, NEEDS_A_COMPILER, ROOT, batches_of, log_of, losses, run, train, train_flags, write_jsonl
from safetensors.torch import load_file, save_file

from gritlm.data.batch_plan import MIXED
from gritlm.training.checkpoints import OPTIMIZER
from gritlm.training.reporters import WANDB_ID
from gritlm.training.run_folder import read_run_file
from gritlm.training.state_files import load_state


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
def test_killed_and_resumed_is_undisturbed(qwen3_dropout, data, tmp_path, ranks):
    """8 steps over two epochs, or killed after 7 and resumed after 6: bit for bit, with dropout and data workers.

    The rows are the same as well.
    """
    cache = tmp_path / "cache"

    def go(name: str, fault: str) -> subprocess.CompletedProcess:
        options = {"global_batch_size": 16, "max_steps": 8, "dataloader_num_workers": 2}  # 5 steps an epoch
        flags = train_flags(qwen3_dropout, data, tmp_path / name, cache, **options)
        return run(DRIVER, tmp_path / f"{name}-rows", fault, *flags, ranks=ranks)

    done = go("whole", "-")
    assert done.returncode == 0
    assert "random generators: drawn from" in done.stdout, "control of the test below: dropout draws"
    killed = go("cut", "kill:7")
    assert killed.returncode != 0
    assert not (tmp_path / "cut" / "modules.json").exists()
    saved = sorted(p.name for p in (tmp_path / "cut").glob("checkpoint-*"))
    assert saved == ["checkpoint-3", "checkpoint-6"]
    resumed = go("cut", "-")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resuming from" in resumed.stdout

    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    base = load_file(qwen3_dropout / "model.safetensors")
    assert not any(torch.equal(whole[name], base[name]) for name in whole if "proj" in name), "nothing was trained"
    optimizers = [load_state(tmp_path / n / "checkpoint-8" / OPTIMIZER) for n in ("whole", "cut")]
    moments = [[s["exp_avg"] for s in o["state"].values()] for o in optimizers]
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))

    logged = log_of(tmp_path / "cut")
    assert [entry["step"] for entry in logged] == list(range(1, 9)), "each step once"
    assert [entry["loss"] for entry in logged] == [entry["loss"] for entry in log_of(tmp_path / "whole")]
    for rank in range(ranks):
        undisturbed = batches_of(tmp_path / "whole-rows", rank)
        assert len(undisturbed) == 8
        assert batches_of(tmp_path / "cut-rows", rank) == undisturbed[:7] + undisturbed[6:]
        for dataset, rows in undisturbed:  # one data set a batch, through the real Trainer
            assert {row.split(":")[0] for row in rows} == {dataset} or dataset == MIXED
    if ranks == 2:
        sets = [[dataset for dataset, _ in batches_of(tmp_path / "whole-rows", rank)] for rank in (0, 1)]
        assert sets[0] == sets[1]
        assert len(set(sets[0])) >= 2


def test_asked_to_stop(qwen3_dropout, data, tmp_path):
    """SIGUSR1 to one rank: both end the step that they are in, save, and go on from there the next time."""
    flags = {name: train_flags(qwen3_dropout, data, tmp_path / name, tmp_path / "cache") for name in ("whole", "cut")}
    assert run(DRIVER, tmp_path / "rows", "-", *flags["whole"], ranks=2).returncode == 0
    stopped = run(DRIVER, tmp_path / "rows", "stop:1:1", *flags["cut"], ranks=2)
    assert stopped.returncode == 0, stopped.stderr[-3000:]
    assert "stopped by a signal after step 2, saved; the same command resumes from there" in stopped.stdout
    assert not (tmp_path / "cut" / "modules.json").exists()
    assert (tmp_path / "cut" / "checkpoint-2").is_dir()
    assert "resuming from" in train(*flags["cut"], ranks=2).stdout
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize("fault", ["sleep", pytest.param("freeze", marks=pytest.mark.long)])
def test_a_hang_is_named(qwen3, data, tmp_path, fault):
    """Rank 1 stands still before step 3; one asleep says so itself, one that cannot even do that is named by rank 0."""
    flags = train_flags(qwen3, data, tmp_path / "out", tmp_path / "cache", hang_timeout=4)
    done = run(DRIVER, tmp_path / "rows", f"{fault}:3:1", *flags, ranks=2, fresh=True)  # torchrun keeps the store
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "no progress for" in line]
    assert lines, done.stderr[-3000:]
    for line in lines:
        assert re.search(r"--hang_timeout\): rank 1 is at step 3, .*, the others wait for it", line), line
    if fault == "sleep":
        assert "driver.py" in done.stderr, "the stack says where"


def test_a_nan_on_one_rank_is_named_and_not_saved(qwen3, data, tmp_path):
    flags = train_flags(qwen3, data, tmp_path / "out", tmp_path / "cache", save_steps=1, save_total_limit=9)
    done = run(DRIVER, tmp_path / "rows", "nan:3:1", *flags, ranks=2)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("gritlm: error:")]
    dataset, rows = batches_of(tmp_path / "rows", 1)[2]
    assert line == f"gritlm: error: step 3: the loss is nan; data set {dataset}, rows {', '.join(rows)}"
    assert sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_out_of_memory_says_what_to_lower(qwen3, data, tmp_path):
    flags = train_flags(qwen3, data, tmp_path / "out", tmp_path / "cache")
    done = run(DRIVER, tmp_path / "rows", "oom:2:1", *flags, ranks=2)  # only the second rank: it speaks for itself
    assert done.returncode != 0
    assert (
        "gritlm: error: step 2, rank 1: CUDA out of memory. Tried to allocate 20.00 MiB. "
        "Try: lower --chunk_tokens (now 128), or --activation_memory 0, or --gradient_checkpointing True, "
        "or --fsdp, which shards the model\n"
    ) in done.stderr


@NEEDS_A_COMPILER
@pytest.mark.long
@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True, "bf16": True}], ids=["plain", "checkpointed"])
def test_compiled_layers_give_the_same_curve(qwen3, data, tmp_path, more):
    curves = {}
    for compiled in (False, True):
        out = tmp_path / str(compiled)
        flags = train_flags(qwen3, data, out, tmp_path / "cache", torch_compile=compiled, **more)
        done = train(*flags, ranks=2)
        assert "training without it" not in done.stdout
        curves[compiled] = losses(out)
    tolerance = 2e-2 if more else 1e-4
    assert max(abs(a - b) / a for a, b in zip(*curves.values(), strict=True)) < tolerance, curves


@pytest.mark.long
def test_a_compiler_that_fails_is_said_once(qwen3, data, tmp_path):
    flags = train_flags(qwen3, data, tmp_path / "out", tmp_path / "cache", torch_compile=True, max_steps=1)
    command = ("-m", "gritlm", "train", *flags)
    done = run(*command, ranks=2, fresh=True, CXX="/nowhere/g++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "compiled"))
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if "WARNING --torch_compile: training without it." in line]
    assert len(lines) == 1, done.stdout
    assert (tmp_path / "out" / "modules.json").exists()


def test_epochs_differ_and_data_loader_workers_change_nothing(qwen3, data, tmp_path):
    flags = {"global_batch_size": 16, "max_steps": -1, "num_train_epochs": 2, "save_strategy": "no"}
    for workers in (0, 2):
        out = tmp_path / str(workers)
        done = run(
            DRIVER,
            tmp_path / f"rows{workers}",
            "-",
            *train_flags(qwen3, data, out, tmp_path / "cache", dataloader_num_workers=workers, **flags),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "random generators: left alone" in done.stdout
    assert batches_of(tmp_path / "rows0", 0) == batches_of(tmp_path / "rows2", 0)
    first, second = (batches_of(tmp_path / "rows0", 0)[i : i + 5] for i in (0, 5))
    assert sorted(b[0] for b in first) == sorted(b[0] for b in second)
    assert first != second
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("0", "2")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def records_of(file) -> Iterator:
    """The records that wandb has written offline: a LevelDB log after seven bytes of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, block = file.read_bytes(), 7, [], 32 << 10
    while at + 7 <= len(data):
        if block - at % block < 7:  # no room for a header
            at += block - at % block
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])  # after a checksum
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def test_tensorboard(qwen3, data, tmp_path):
    """For real: a run that was killed and resumed is one run, with each step once, and all flags."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"max_steps": 5, "save_steps": 2, "report_to": "tensorboard"}
    for fault in ("kill:3", "-"):
        flags = train_flags(qwen3, data, tmp_path / "out", tmp_path / "cache", **options)
        done = run(DRIVER, tmp_path / "rows", fault, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    assert "flags/text_summary" in events.Tags()["tensors"]
    wanted = {"loss", "grad_norm", "tokens_per_second", "real_token_share"}
    wanted |= {f"time_share/{part}" for part in ("data", "pass_1", "loss", "pass_2", "optimizer")}
    assert {f"train/{name}" for name in wanted} <= set(events.Tags()["scalars"])


@pytest.mark.long
def test_wandb(qwen3, data, tmp_path):
    """Offline, for real: a run that was stopped and resumed is one run, with each step once, and all flags."""
    options = {"max_steps": 5, "save_steps": 2, "report_to": "wandb", "run_name": "mine"}
    for fault in ("stop:3", "-"):
        flags = train_flags(qwen3, data, tmp_path / "out", tmp_path / "cache", **options)
        environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
        done = run(DRIVER, tmp_path / "rows", fault, *flags, fresh=True, **environment)
        assert done.returncode == 0, done.stderr[-3000:]
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    records = [record for file in files for record in records_of(file)]
    assert len(files) == 2
    assert {r.run.run_id for r in records if r.HasField("run")} == {read_run_file(tmp_path / "out")[WANDB_ID]}
    assert {r.run.display_name for r in records if r.HasField("run")} == {"mine"}
    steps = []
    for record in records:
        entry = {item.nested_key[0] if item.nested_key else item.key: item.value_json for item in record.history.item}
        steps += [int(entry["train/global_step"])] if "train/loss" in entry else []
    assert steps == [1, 2, 3, 4, 5]
    config = {item.key or item.nested_key[0] for r in records for item in [*r.config.update, *r.run.config.update]}
    assert {"temperature", "model_name_or_path", "global_batch_size", "weight_decay"} <= config


def test_gradient_checkpointing_and_bf16(qwen3, data, tmp_path):
    """Recomputed activations change no bit; bf16 autocast keeps float32 weights."""
    weights, calls = [], []
    for kind in ("", "gradient_checkpointing", "selective_checkpointing"):
        out = tmp_path / f"kind-{kind}"
        more = {"max_steps": 2, "activation_memory": 0} | ({kind: True} if kind else {})
        done = run(DRIVER, tmp_path / "rows", "count", *train_flags(qwen3, data, out, tmp_path / "cache", **more))
        assert done.returncode == 0, done.stderr[-3000:]
        weights.append(load_file(out / "model.safetensors"))
        calls += [int(number) for number in re.findall(r"calls: (\d+)", done.stdout)]
    assert all(torch.equal(weights[0][name], other[name]) for other in weights for name in weights[0])
    assert calls[1] == calls[2], "selectively, a layer is called once more, too, but its products are not repeated"
    assert calls[1] / calls[0] == 3 / 2, "pass 1, pass 2, and once more within pass 2"
    flags = train_flags(qwen3, data, tmp_path / "bf16", tmp_path / "cache", max_steps=2, bf16=True)
    done = run(DRIVER, tmp_path / "rows", "count", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "copies kept: False" in done.stdout, "of the weights, until a forward ends"
    bf16 = load_file(tmp_path / "bf16" / "model.safetensors")
    assert all(value.dtype == torch.float32 for value in bf16.values())
    assert not all(torch.equal(bf16[name], weights[0][name]) for name in bf16)


# ---- the output folder, bad input


@pytest.fixture(scope="module")
def finished(qwen3, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    done = train(*train_flags(qwen3, data, folder / "out", folder / "cache", max_steps=2, save_steps=1))
    return folder, done.stdout


def refused(*flags: str) -> str:
    done = run("-m", "gritlm", "train", *flags)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("gritlm: error:")]
    return line


def test_what_a_run_says_at_its_start(finished):
    _, said = finished
    assert "each query sees 11.7 negatives: 0.6 hard (--train_group_size 3 asks for 2), 11.1 in-batch" in said
    assert said.count(" tokens: [") == 6
    assert "attention probe: passed" in said


def test_a_plan_says_what_a_run_would_do(qwen3, data, tmp_path):
    """As for four ranks on one process, DeepSpeed asked for; nothing is made."""
    flags = train_flags(qwen3, data, tmp_path / "out", tmp_path / "cache")
    engine = ["--deepspeed", ROOT / "scripts/parallel/zero2.json"]
    done = run("-m", "gritlm", "plan", *flags, *engine, "--ranks", "4", "--batches", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "plan: 11 steps an epoch of 8 queries on 4 rank(s)" in done.stdout
    assert "1.6 in-batch, 9.5 from other ranks (mean of 88 queries of 11 batches)" in done.stdout
    assert "disk: the run needs 2.3 MB at its fullest (one checkpoint 0.8 MB, 2 kept, one being" in done.stdout
    assert "6 steps in all" in done.stdout
    assert len(re.findall(r"^batch [12], (hard|plain): rows ", done.stdout, re.MULTILINE)) == 2
    assert not (tmp_path / "out").exists()
    assert "not a multiple of the 3 ranks" in run("-m", "gritlm", "plan", *flags, "--ranks", "3").stderr


def test_a_finished_run_is_never_touched(finished, qwen3, data):
    folder, _ = finished
    flags = {"max_steps": 2, "save_steps": 1}
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*")}
    out = folder / "out"
    assert "finished run" in refused(*train_flags(qwen3, data, out, folder / "cache", **flags))
    line = refused(*train_flags(qwen3, data, out, folder / "cache", **flags, temperature=0.5))
    assert "temperature was 0.02, now 0.5" in line
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_killed_while_the_model_was_published(finished, qwen3, data, tmp_path):
    """Nothing is left to train then: the weights are the last checkpoint's, with no step more."""
    out = shutil.copytree(finished[0] / "out", tmp_path / "out")
    for name in ("modules.json", "model.safetensors"):
        (out / name).unlink()
    (out / "run.json").write_text((out / "run.json").read_text().replace('"finished": true', '"finished": false'))
    train(*train_flags(qwen3, data, out, finished[0] / "cache", max_steps=2, save_steps=1))
    published, whole = (load_file(folder / "out" / "model.safetensors") for folder in (tmp_path, finished[0]))
    assert all(torch.equal(published[name], whole[name]) for name in whole)
    assert [p.name for p in sorted(out.glob("checkpoint-*"))] == ["checkpoint-1", "checkpoint-2"]
    assert json.loads((out / "run.json").read_text())["finished"]


def test_a_folder_that_is_not_ours_is_refused(qwen3, data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert "not empty" in refused(*train_flags(qwen3, data, tmp_path / "out", tmp_path / "cache"))


def test_an_instruction_on_passages_becomes_the_document_prompt(qwen3, tmp_path):
    from sentence_transformers import SentenceTransformer

    rows = [{"query": ["query: ", f"stone {n}"], "pos": [["passage: ", f"river {n}"]], "neg": []} for n in range(8)]
    (tmp_path / "e5.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(*train_flags(qwen3, tmp_path / "e5.jsonl", tmp_path / "out", tmp_path / "cache", max_steps=1))
    prompts = SentenceTransformer(str(tmp_path / "out"), device="cpu").prompts
    assert prompts == {"e5": "query: ", "query": "query: ", "document": "passage: "}
    rows[3]["pos"] = [["passage:", "glued"]]
    (tmp_path / "e5.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = refused(*train_flags(qwen3, tmp_path / "e5.jsonl", tmp_path / "other", tmp_path / "cache"))
    assert "the instruction 'passage:' can share a token with the text behind it" in line


def test_bad_data_ends_in_one_line(qwen3, tmp_path):
    path = tmp_path / "data.jsonl"
    write_jsonl(path, 5, 1, 0)
    with open(path, "a") as out:
        out.write('{"query": "q", "pos": "p", "neg": []}\n')
    line = refused(*train_flags(qwen3, path, tmp_path / "out", tmp_path / "cache"))
    assert line == f"gritlm: error: {path}:6: pos: found a string, wanted a list of passages"
    write_jsonl(path, 5, 1, 0)
    line = refused(*train_flags(qwen3, path, tmp_path / "out", tmp_path / "cache"))
    assert "--global_batch_size 8 is larger than the data: found 5 rows" in line
    assert not (tmp_path / "out").exists()


def test_a_nan_stops_the_run_and_is_named(qwen3, data, tmp_path):
    flags = train_flags(qwen3, data, tmp_path / "out", tmp_path / "cache", learning_rate=1e30, warmup_steps=0)
    line = refused(*flags)
    assert re.search(r"step [23]: the loss is nan; data set (hard|plain), rows (hard|plain):\d+, ", line)
    assert not (tmp_path / "out" / "modules.json").exists()


def test_broken_weights_are_noticed_before_the_first_step(qwen3, data, tmp_path):
    broken = shutil.copytree(qwen3, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["layers.1.mlp.down_proj.weight"][0, 0] = float("inf")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    line = refused(*train_flags(broken, data, tmp_path / "out", tmp_path / "cache"))
    assert "found states that are not finite" in line
