"""Exact gradients: {1, 2, 4} ranks x engines x every loss term x {one, many chunks} x {hard, in-batch} negatives."""

import re
from pathlib import Path

import pytest
import torch
from accelerate.utils import enable_fsdp_ram_efficient_loading
from conftest import SIZES, build_model
from helpers import DEEPSPEED, NEEDS_A_COMPILER, ROOT, make_builder, make_embedder, relative, run
from processes import run_ranks
from torch.distributed.tensor import DTensor
from transformers import AutoModel, Qwen3Config

from gritlm.distributed import all_ranks, rank, world_size
from gritlm.models.backbone import load_backbone, load_config
from gritlm.training.arguments import ObjectiveArguments
from gritlm.training.engines import engine_for, whole_gradient, wrap_model
from gritlm.training.gradcache import ActivationMemory, two_pass_step
from gritlm.training.objective import Objective
from gritlm.training.terms import OPTIONS, VARIANTS

ZERO = ["zero1", "zero2", "zero3"] if DEEPSPEED else []
FAULTY = ROOT / "tests" / "distributed" / "faulty.py"
VERIFY = ("-m", "gritlm", "verify-gradients")


FIRST = [*VARIANTS][:2]


def wanted_cells(terms: list[str]) -> list[tuple[bool, str, str]]:
    """Many chunks or not, term, negatives: what the table holds of each engine."""
    cells = []
    for term in terms:
        other = "hard" if term in OPTIONS else "in-batch"
        cells += [(True, term, "hard"), (False, term, other)]
        cells += [(False, term, "hard"), (True, term, "in-batch")] if term in FIRST else []
    return cells


def cells(output: str) -> list[list[str]]:
    """The lines of the table: engine, ranks, chunks, term, negatives, three errors, verdict."""
    return [row.split() for row in output.splitlines() if row.endswith(("  ok", "  WRONG"))]


def check_table(output: str, engines: list[str], models: int = 1, terms: list[str] | None = None) -> None:
    found, wanted = cells(output), wanted_cells(terms or [*VARIANTS])
    assert [cell[0] for cell in found] == [engine for engine in engines for _ in wanted] * models
    for engine in engines:
        kinds = {(cell[2] != "1", cell[3], cell[4]) for cell in found if cell[0] == engine}
        assert kinds == set(wanted)
    assert max(float(error) for cell in found for error in cell[5:8]) <= 1e-5


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(4, marks=pytest.mark.long)])
def test_many_ranks_equal_one_process(qwen3, ranks):
    """Every term. The tests below take ZeRO."""
    engines = (["plain"] if ranks == 1 else []) + ["ddp", "fsdp2"]
    done = run(*VERIFY, "--model_name_or_path", qwen3, "--ranks", str(ranks), "--engines", *engines, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    print(done.stdout)
    check_table(done.stdout, engines)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 4])
def test_both_built_in_models(ranks):
    engines = (["plain"] if ranks == 1 else []) + ["ddp", "fsdp2", *ZERO]
    done = run(*VERIFY, "--ranks", str(ranks), "--engines", *engines, "--terms", *FIRST, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    check_table(done.stdout, engines, models=2, terms=FIRST)


@pytest.mark.parametrize(
    ("engines", "flags"),
    [
        (ZERO, []),
        pytest.param(["ddp", "fsdp2"], ["--attn_implementation", "sdpa"], marks=pytest.mark.long),
        (["ddp", "fsdp2"], ["--activation_memory", "1"]),
        pytest.param(ZERO, ["--activation_memory", "1"], marks=pytest.mark.long),
        pytest.param(ZERO[1:], ["--activation_memory", "1", "--sync_each_chunk"], marks=pytest.mark.long),
    ],
    ids=["ZeRO", "padded", "kept graphs", "kept graphs on ZeRO", "summed each chunk"],
)
def test_the_first_terms_in_other_ways(qwen3, engines, flags):
    """The table above is packed and recomputes every graph; here texts are padded, or graphs are kept."""
    if not engines:
        pytest.skip("DeepSpeed is not installed")
    done = run(*VERIFY, "--model_name_or_path", qwen3, "--engines", *engines, "--terms", *FIRST, *flags, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    check_table(done.stdout, engines, terms=FIRST)


def has_gradient(model: torch.nn.Module) -> bool:
    """Whether a shard has a gradient. After a forward the root's weights are whole, with their gradient so far."""
    return any(isinstance(weight.grad, DTensor) for weight in model.parameters())


def gradients(folder, data, cache) -> tuple[int, dict[str, tuple[torch.Tensor, list[bool]]]]:
    """Number of chunks; by what is kept, the gradient of a step, and for each forward whether a shard had a gradient.

    Ranks are unlike.
    """
    batch = make_builder(folder, data, cache, batch=16, rank=rank(), ranks=world_size(), chunk_tokens=(96, 48)[rank()])[
        0, 0
    ]
    objective, device = Objective(ObjectiveArguments(temperature=0.05), all_ranks()), torch.device("cpu")
    found = {}
    budgets = {"ddp": "99", "nothing": "00", "all": "99", "some": ("9", "1e-6"), "one forgotten": "99"}
    budgets |= {"summed each chunk": "00", "summed each chunk, all": "99"}
    for name, kept in budgets.items():
        model, forwards = make_embedder(folder).train(), []
        model.register_forward_hook(lambda *_, own=model, forwards=forwards: forwards.append(has_gradient(own)))
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        wrapped, _ = wrap_model(model, sgd, "ddp" if name == "ddp" else "fsdp2", device)
        engine = engine_for(wrapped, sync_each_chunk=name.startswith("summed"))
        if name == "one forgotten":
            engine.backward = lambda surrogates, whole=engine.backward: whole(surrogates[1:])
        memory = ActivationMemory(kept[rank()], device)
        two_pass_step(engine, batch.chunks, lambda vectors: objective(vectors, batch.contrastive), memory=memory)
        parts = [whole_gradient(wrapped, weight) for weight in model.parameters()]
        found[name] = torch.cat([part.flatten() for part in parts]), forwards
    return len(batch.chunks), found


def test_ranks_with_unlike_chunks_and_budgets_keep_the_same_graphs(qwen3, data, tmp_path):
    """The second rank has more chunks and, for "some", no room after the first one. Control: a graph is forgotten."""
    (few, first), (rounds, second) = run_ranks(gradients, qwen3, data / "hard.jsonl", tmp_path)
    assert 2 < few < rounds
    wanted = {"nothing": 2 * rounds, "all": rounds, "some": 2 * rounds - 1}
    wanted |= {"summed each chunk": 2 * rounds, "summed each chunk, all": rounds}
    for found in (first, second):
        assert {name: len(found[name][1]) for name in wanted} == wanted
        assert sum(found["summed each chunk"][1]) == rounds - 1, "the first chunk's sum is there before the second's"
        assert not any(found["nothing"][1]), "control: the gradient is whole until the last chunk"
        errors = {name: relative(found[name][0], found["ddp"][0]) for name in (*wanted, "one forgotten")}
        assert errors.pop("one forgotten") > 1e-3
        assert max(errors.values()) < 1e-5


@pytest.mark.parametrize(
    ("ranks", "engines"),
    [
        (2, ["ddp", "fsdp2"]),
        pytest.param(1, ["plain", "ddp", "fsdp2", *ZERO], marks=pytest.mark.long),
        pytest.param(2, ZERO, marks=pytest.mark.long),
        pytest.param(4, ["ddp", "fsdp2", *ZERO], marks=pytest.mark.long),
    ],
)
def test_lora(qwen3, ranks, engines):
    """Loss, gradient and weights are the adapter's alone."""
    flags = ["--model_name_or_path", qwen3, "--lora", "--terms", *FIRST[:1], "--activation_memory", "1"]
    done = run(*VERIFY, *flags, "--ranks", str(ranks), "--engines", *engines, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    print(done.stdout)
    check_table(done.stdout, engines, terms=FIRST[:1])
    assert ", LoRA" in done.stdout


@pytest.mark.long
def test_every_term_on_zero(qwen3):
    if not ZERO:
        pytest.skip("DeepSpeed is not installed")
    done = run(*VERIFY, "--model_name_or_path", qwen3, "--engines", *ZERO, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    print(done.stdout)
    check_table(done.stdout, ZERO)


@NEEDS_A_COMPILER
@pytest.mark.long
def test_with_compiled_layers(qwen3):
    flags = ["--torch_compile", "--activation_memory", "1", "--terms", *FIRST]
    done = run(*VERIFY, "--model_name_or_path", qwen3, "--engines", "ddp", "fsdp2", *flags, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    check_table(done.stdout, ["ddp", "fsdp2"], terms=FIRST)


LOW = ["--temperatures", "0.02", "0.01"]


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_term_at_low_temperatures(qwen3, ranks):
    """At most three times the error of one process in float32, against float64."""
    flags = ["--model_name_or_path", qwen3, "--ranks", str(ranks), "--engines", "ddp", "fsdp2", *LOW]
    done = run(*VERIFY, *flags, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    print(done.stdout)
    assert len(cells(done.stdout)) == 2 * 2 * len(wanted_cells([*VARIANTS]))


@pytest.mark.parametrize("fault", ["none", "gather"])
def test_the_first_term_at_a_low_temperature(qwen3, fault):
    """Control: a fault in the gradient shows there, too."""
    flags = ["--model_name_or_path", qwen3, "--engines", "ddp", "--terms", "info_nce", *LOW[:2]]
    done = run(FAULTY, fault, *flags, ranks=2)
    found = cells(done.stdout)
    assert len(found) == 4 and {cell[-1] for cell in found} == {"ok" if fault == "none" else "WRONG"}, done.stdout
    assert done.returncode == (fault != "none")


CONTROLLED = ["info_nce", "cosent"]  # what is gathered carries all of the gradient


@pytest.mark.parametrize("fault", ["gather", pytest.param("divided", marks=pytest.mark.long)])
def test_controls_fail(qwen3, fault):
    engines = ["ddp", "fsdp2", *ZERO[-1:]]
    done = run(FAULTY, fault, "--model_name_or_path", qwen3, "--engines", *engines, "--terms", *CONTROLLED, ranks=2)
    assert done.returncode != 0
    found = cells(done.stdout)
    assert len(found) == len(wanted_cells(CONTROLLED)) * len(engines)
    assert {cell[-1] for cell in found} == {"WRONG"}
    assert min(float(cell[6]) for cell in found) > 1e-2, "the gradient's error"


@pytest.fixture(scope="session")
def calm(tmp_path_factory) -> Path:
    """One layer with small weights: bfloat16 rounds its gradient little, so that a bfloat16 sum stands out."""
    config = Qwen3Config(**SIZES | {"initializer_range": 0.02, "num_hidden_layers": 1}, head_dim=8)
    return build_model(tmp_path_factory.mktemp("calm"), config)


LONG = pytest.param(["ddp", "fsdp2", *ZERO], ["16", "300"], marks=pytest.mark.long)


@pytest.mark.parametrize(("engines", "chunks"), [(ZERO[1:2] or ["ddp"], ["300"]), LONG])
def test_under_bf16_the_error_does_not_grow_with_the_chunks(calm, engines, chunks):
    flags = ["--model_name_or_path", calm, "--max_len", "16", "--num_layers", "1", "--bf16", "--chunks", *chunks]
    done = run(*VERIFY, *flags, "--engines", *engines, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    print(done.stdout)
    found = cells(done.stdout)
    assert [(cell[0], cell[2]) for cell in found] == [(engine, count) for engine in engines for count in chunks]
    of_one = [float(row.split()[6]) for row in done.stdout.splitlines() if row.endswith("the measure")]
    for engine, _, _, _, _, _, gradient, *_ in found:
        factor = 2.0 if engine == "fsdp2" else 1.1
        assert 0 < float(gradient) < factor * max(of_one), done.stdout


@pytest.mark.skipif(not DEEPSPEED, reason="no DeepSpeed, or no g++ for its CPU communication")
@pytest.mark.long
def test_control_gradients_that_are_added_up_in_bfloat16(calm):
    flags = ["--model_name_or_path", calm, "--max_len", "16", "--num_layers", "1", "--bf16", "--chunks", "300"]
    done = run(FAULTY, "bfloat16", *flags, "--engines", "zero2", ranks=2)
    assert done.returncode == 1, done.stdout + done.stderr[-3000:]
    assert [cell[-1] for cell in cells(done.stdout)] == ["WRONG"]


def memory_of_loading(folder, reset: bool, shared: bool) -> tuple[int, int]:
    """The bytes of all weights, and how far this process has grown when it has loaded them."""
    if shared:
        enable_fsdp_ram_efficient_loading()

    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])

    before = resident()
    backbone = load_backbone(str(folder), load_config(str(folder), "bb"), reset_weight=reset)
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in backbone.parameters())
    return sum(p.nbytes for p in backbone.parameters()), resident() - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the resident memory")
@pytest.mark.parametrize("reset", [False, True])
def test_a_node_holds_the_weights_once(tmp_path, reset):
    """As FSDP2 loads them. Control: as DDP does, where each rank holds its own."""
    config = Qwen3Config(**SIZES | {"vocab_size": 300_000}, head_dim=8)
    AutoModel.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    for shared in (True, False):
        (weights, first), (_, second) = run_ranks(memory_of_loading, tmp_path, reset, shared)
        assert first > 0.9 * weights
        assert (second < 0.2 * weights) if shared else (second > 0.9 * weights)


def test_the_verb_starts_its_ranks(qwen3):
    flags = ["--ranks", "2", "--engines", "ddp", "--terms", "info_nce"]
    done = run(*VERIFY, "--model_name_or_path", qwen3, *flags)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.endswith("4 of 4 equal one process to 1e-05\n")


def test_bad_flags_are_one_line(qwen3):
    for flags, message in (
        (["--engines", "fsdp1"], "--engines: found 'fsdp1', wanted some of plain, ddp, fsdp2"),
        (["--bf16", "--chunks", "2"], "--chunks: found 2, wanted 8 or more"),
        (["--temperatures", "0"], "--temperatures: found 0.0, wanted numbers above 0"),
        (["--temperatures", "0.02", "--bf16"], "--temperatures with --bf16: not supported"),
        (["--terms", "hinge"], "--terms: found 'hinge', wanted some of info_nce, same_tower"),
        (["--attn_implementation", "nonsense"], "--attn_implementation nonsense: "),  # the ranks find it
    ):
        done = run(*VERIFY, "--model_name_or_path", qwen3, *flags, ranks=2)
        assert done.returncode == 2
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("gritlm: error: ")]
        assert line.startswith(f"gritlm: error: {message}")
        assert "Traceback" not in done.stderr
