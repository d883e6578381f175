"""The floors of the house: imports run downwards only, and torch.distributed is used in two files."""

import ast

import pytest
from helpers import ROOT

# A room or a file on top, floor by floor. Files of one room may import one another, without a circle.
FLOORS = (
    ("__init__", "errors", "files", "distributed"),
    ("models", "cli", "strict_json"),
    ("data", "report", "gritlm", "devices"),
    ("evaluation",),
    ("serving", "training", "curation", "analysis", "quickstart"),
    ("benchmark", "__main__"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted([*(ROOT / "gritlm").rglob("*.py"), *(ROOT / "models").rglob("*.py")])


def module_of(path) -> str:
    """The module's name without the leading `gritlm.`, such as `data.rows`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "models" else parts[1:])


def imported(source: str) -> set[str]:
    """The project's modules that a source imports anywhere in it, without the leading `gritlm.`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("gritlm.") for alias in node.names), "wanted from gritlm... import"
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gritlm":
            inner = node.module.removeprefix("gritlm").lstrip(".")
            candidates = [f"{inner}.{alias.name}".lstrip(".") for alias in node.names]
            names |= {name if name in MODULES else inner or "__init__" for name in candidates}
    return names


MODULES = {module_of(path) for path in FILES}
IMPORTS = {module_of(path): imported(path.read_text()) for path in FILES}


def climbs(module: str, others: set[str]) -> list[str]:
    """Imports of another room that does not lie on a lower floor."""
    room = module.split(".")[0]
    rooms = {other.split(".")[0] for other in others} - {room}
    return sorted(other for other in rooms if FLOOR[other] >= FLOOR[room])


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle; empty where there is none."""
    left = dict(imports)
    while left:
        free = [module for module, others in left.items() if not (others & left.keys()) - {module}]
        if not free:
            return sorted(left)
        for module in free:
            del left[module]
    return []


# Both are imported on demand, inside a function: the package names its class, and main() its verbs.
ON_DEMAND = {("__init__", "gritlm")}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_downwards(module):
    others = {other for other in IMPORTS[module] if (module, other) not in ON_DEMAND}
    assert climbs(module, others) == []


def test_no_module_imports_itself_by_way_of_others():
    assert circle(IMPORTS | {"__init__": set()}) == []


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_two_files_use_torch_distributed(path):
    uses = "torch.distributed" in path.read_text().replace("torch.distributed.run", "")
    assert uses == (path.name in ("distributed.py", "engines.py"))


def test_control_a_climb_and_a_circle_are_noticed():
    assert climbs("data.rows", {"training.trainer", "data.records", "errors"}) == ["training"]
    assert climbs("serving.encode", {"curation.mine"}) == ["curation"], "one floor"
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "d"]
