"""Exact gradients: {1, 2, 4} ranks x {plain, DDP, FSDP2, ZeRO-1/2/3} x {one, many chunks} x {negatives}."""

import pytest
from helpers import DEEPSPEED, NEEDS_A_COMPILER, ROOT, run

ZERO = ["zero1", "zero2", "zero3"] if DEEPSPEED else []


def table(output: str) -> list[list[str]]:
    """The cells that were printed: engine, ranks, chunks, negatives, three errors, verdict."""
    return [row.split() for row in output.splitlines() if row.endswith(("  ok", "  WRONG"))]


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(4, marks=pytest.mark.long)])
def test_many_ranks_are_one_process(qwen3, ranks):
    engines = (["plain"] if ranks == 1 else []) + ["ddp", "fsdp2", *ZERO]
    done = run(
        *("-m", "gritlm", "verify-gradients", "--model_name_or_path", qwen3, "--ranks", str(ranks)),
        *("--engines", *engines),
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    print(done.stdout)
    cells = table(done.stdout)
    assert [cell[0] for cell in cells] == [engine for engine in engines for _ in range(4)]
    for engine in engines:
        kinds = {(cell[2] != "1", cell[3]) for cell in cells if cell[0] == engine}
        assert kinds == {(many, negatives) for many in (True, False) for negatives in ("hard", "in-batch")}
    assert max(float(error) for cell in cells for error in cell[4:7]) <= 1e-5


@pytest.mark.parametrize(
    "flags", [pytest.param(["--attn_implementation", "sdpa"], marks=pytest.mark.long), ["--activation_memory", "1"]]
)
def test_padded_and_with_kept_graphs(qwen3, flags):
    """The table above is without padding and keeps nothing of pass 1; here padded, or kept as far as an engine may."""
    command = ["-m", "gritlm", "verify-gradients", "--model_name_or_path", qwen3, "--ranks", "2"]
    done = run(*command, "--engines", "ddp", "fsdp2", *flags)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert len(table(done.stdout)) == 8


@NEEDS_A_COMPILER
@pytest.mark.long
def test_with_compiled_layers(qwen3):
    command = ["-m", "gritlm", "verify-gradients", "--model_name_or_path", qwen3, "--ranks", "2", "--torch_compile"]
    done = run(*command, "--engines", "ddp", "fsdp2", "--activation_memory", "1")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert len(table(done.stdout)) == 8


@pytest.mark.parametrize("fault", ["gather", pytest.param("divided", marks=pytest.mark.long)])
def test_controls_fail(qwen3, fault):
    engines = ["ddp", "fsdp2", *ZERO[-1:]]
    command = [
        ROOT / "tests" / "distributed" / "faulty.py",
        fault,
        "--model_name_or_path",
        qwen3,
        "--engines",
        *engines,
    ]
    done = run(*command, ranks=2)
    assert done.returncode != 0
    cells = table(done.stdout)
    assert len(cells) == 4 * len(engines)
    assert {cell[-1] for cell in cells} == {"WRONG"}
    assert min(float(cell[5]) for cell in cells) > 1e-2, "the gradient's error"


def test_bad_flags_are_refused(qwen3):
    done = run("-m", "gritlm", "verify-gradients", "--model_name_or_path", qwen3, "--engines", "fsdp1")
    assert done.returncode == 2
    assert "--engines: found 'fsdp1', wanted some of plain, ddp, fsdp2" in done.stderr


def test_what_the_ranks_find_is_one_line(qwen3):
    done = run("-m", "gritlm", "verify-gradients", "--model_name_or_path", qwen3, "--attn_implementation", "nonsense")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()[-1:]
    assert line.startswith("gritlm: error: --attn_implementation nonsense: ")
    assert "Traceback" not in done.stderr
