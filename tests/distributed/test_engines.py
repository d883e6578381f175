"""Exact gradients: {1, 2, 4} ranks x engines x every loss term x {one, many chunks} x {hard, in-batch} negatives."""

import pytest
from helpers import DEEPSPEED, NEEDS_A_COMPILER, ROOT, run

from gritlm.training.objective import TERMS

ZERO = ["zero1", "zero2", "zero3"] if DEEPSPEED else []
VERIFY = ("-m", "gritlm", "verify-gradients")


def cells(output: str) -> list[list[str]]:
    """The lines of the table: engine, ranks, chunks, term, negatives, three errors, verdict."""
    return [row.split() for row in output.splitlines() if row.endswith(("  ok", "  WRONG"))]


def check_table(output: str, engines: list[str], models: int = 1) -> None:
    found = cells(output)
    assert [cell[0] for cell in found] == [engine for engine in engines for _ in range(4 * len(TERMS))] * models
    for engine in engines:
        kinds = {(cell[2] != "1", cell[3], cell[4]) for cell in found if cell[0] == engine}
        wanted = {(many, term, kind) for many in (True, False) for term in TERMS for kind in ("hard", "in-batch")}
        assert kinds == wanted
    assert max(float(error) for cell in found for error in cell[5:8]) <= 1e-5


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(4, marks=pytest.mark.long)])
def test_many_ranks_equal_one_process(qwen3, ranks):
    engines = (["plain"] if ranks == 1 else []) + ["ddp", "fsdp2", *ZERO]
    model = ("--model_name_or_path", qwen3) if ranks == 2 else ()  # else both built-in models
    done = run(*VERIFY, *model, "--ranks", str(ranks), "--engines", *engines, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    print(done.stdout)
    check_table(done.stdout, engines, models=1 if model else 2)


@pytest.mark.parametrize(
    "flags", [pytest.param(["--attn_implementation", "sdpa"], marks=pytest.mark.long), ["--activation_memory", "1"]]
)
def test_padded_and_with_kept_graphs(qwen3, flags):
    """The table above is packed and recomputes every graph; here texts are padded, or graphs are kept."""
    done = run(*VERIFY, "--model_name_or_path", qwen3, "--engines", "ddp", "fsdp2", *flags, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    check_table(done.stdout, ["ddp", "fsdp2"])


@NEEDS_A_COMPILER
@pytest.mark.long
def test_with_compiled_layers(qwen3):
    flags = ["--torch_compile", "--activation_memory", "1"]
    done = run(*VERIFY, "--model_name_or_path", qwen3, "--engines", "ddp", "fsdp2", *flags, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    check_table(done.stdout, ["ddp", "fsdp2"])


@pytest.mark.parametrize("fault", ["gather", pytest.param("divided", marks=pytest.mark.long)])
def test_controls_fail(qwen3, fault):
    engines = ["ddp", "fsdp2", *ZERO[-1:]]
    driver = ROOT / "tests" / "distributed" / "faulty.py"
    done = run(driver, fault, "--model_name_or_path", qwen3, "--engines", *engines, ranks=2)
    assert done.returncode != 0
    found = cells(done.stdout)
    assert len(found) == 4 * len(TERMS) * len(engines)
    assert {cell[-1] for cell in found} == {"WRONG"}
    assert min(float(cell[6]) for cell in found) > 1e-2, "the gradient's error"


def test_the_verb_starts_its_ranks(qwen3):
    flags = ["--ranks", "2", "--engines", "ddp", "--terms", "info_nce"]
    done = run(*VERIFY, "--model_name_or_path", qwen3, *flags)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.endswith("4 of 4 equal one process to 1e-05\n")


def test_bad_flags_are_one_line(qwen3):
    for flags, message in (
        (["--engines", "fsdp1"], "--engines: found 'fsdp1', wanted some of plain, ddp, fsdp2"),
        (["--terms", "hinge"], "--terms: found 'hinge', wanted some of info_nce, same_tower"),
        (["--attn_implementation", "nonsense"], "--attn_implementation nonsense: "),  # the ranks find it
    ):
        done = run(*VERIFY, "--model_name_or_path", qwen3, *flags, ranks=2)
        assert done.returncode == 2
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("gritlm: error: ")]
        assert line.startswith(f"gritlm: error: {message}")
        assert "Traceback" not in done.stderr
