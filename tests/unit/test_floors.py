"""The walls of the house: imports run downwards only, and torch.distributed is spoken to in two places."""

import ast

import pytest
from helpers import ROOT

FLOORS = {
    "errors": 0,
    "files": 0,
    "host_memory": 0,
    "picture": 0,
    "arguments": 0,
    "distributed": 0,
    "models": 1,
    "engines": 1,
    "losses": 1,
    "data.rows": 1,
    "data.overlap": 1,
    "data.parallel": 0,
    "data.shapes": 1,
    "data.facts": 2,
    "data.records": 1,
    "data.documents": 0,
    "data.plan": 2,
    "data.collator": 2,
    "objective": 2,
    "gradcache": 2,
    "model_folder": 3,
    "evaluation": 3,
    "guards": 1,
    "run_folder": 1,
    "trainer": 4,
    "train": 5,
    "plan": 6,
    "footprint": 2,
    "encode": 4,
    "check_data": 3,
    "prepare": 3,
    "nearest": 5,
    "mine": 6,
    "quickstart": 5,
    "measure": 6,
    "sides": 7,
    "peer": 8,
    "benchmark": 9,
    "verify_gradients": 4,
}
SIBLINGS = ("models", "data")


def module_name(path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "models" if parts[0] == "models" else ".".join(parts[1:])


def imported(source: str) -> set[str]:
    """The project's modules that a source imports, anywhere in it, without the leading `gritlm.`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("gritlm.") for alias in node.names), "wanted from gritlm... import"
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gritlm":
            rest = node.module.split(".")[1:]
            found = [".".join(rest)] if rest else [alias.name for alias in node.names]
            names |= {"models" if name.startswith("models") else name for name in found}
    return names


def climbs(module: str, source: str) -> list[str]:
    def allowed(other: str) -> bool:
        sibling = module.split(".")[0] == other.split(".")[0] and other.split(".")[0] in SIBLINGS
        return FLOORS[other] < FLOORS[module] or sibling or (FLOORS[other] == FLOORS[module] == 0)

    return [other for other in imported(source) if not allowed(other)]


FILES = [
    path
    for folder in ("gritlm", "models")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name not in ("__init__.py", "__main__.py")
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path):
    assert climbs(module_name(path), path.read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_two_files_speak_to_torch_distributed(path):
    speaks = "torch.distributed" in path.read_text()
    assert speaks == (path.name in ("distributed.py", "engines.py"))


def test_control_a_climb_is_noticed():
    assert climbs("losses", "from gritlm.trainer import EmbeddingTrainer") == ["trainer"]
    assert climbs("data.plan", "from gritlm.data.records import load_records") == []
