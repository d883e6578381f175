"""README, CONTRIBUTING and docs/: every command and Python block runs here, in order, on tiny models and data.

Hub names become tiny local models, and training gets few steps. What cannot run here is listed in `NOT_RUN` with the
reason, and its flags are still parsed. A block or a command that this file does not know fails its test.
"""

import dataclasses
import importlib
import itertools
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from flag_tables import flag_table
from helpers import ROOT, write_jsonl
from safetensors.torch import load_file
from transformers import AutoModel

from gritlm import VERBS, __version__
from gritlm.__main__ import main
from gritlm.data import batches, shapes
from gritlm.data.columns import examples_of
from gritlm.data.raw import BadRows, Columns, Reading
from gritlm.data.rows import parse_row
from gritlm.errors import UserError
from gritlm.evaluation import metrics
from gritlm.models import families, pooling
from gritlm.models.embedder import Embedder
from gritlm.models.families import FAMILIES
from gritlm.models.probe import probe_attention
from gritlm.models.text import TextContract
from gritlm.training import arguments, objective, terms
from gritlm.training.flag_parser import make_parser

DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
LANGUAGES = {"bash", "console", "python", "json", "text", "bibtex"}
SCRIPT = "scripts/training/train_embonly.sh"

# Pattern of a command -> why it does not run here. Its flags are parsed all the same.
NOT_RUN = {
    rf"bash {SCRIPT}": "minutes; tests/smoke/test_scripts.py::test_the_embedded_default runs it",
    r"bash scripts/test\.sh.*": "it runs these tests",
    r"bash scripts/download_data\.sh .*|gritlm prepare hub:.*": "it needs a network",
    r"pip install .*": "it needs a network; scripts/setup.sh installs the same package",
    r'gritlm evaluate .*("MTEB|NanoBEIR).*': "a network; tests/unit/evaluation/test_mteb_run.py runs local tasks",
    r"gritlm benchmark --.*": "minutes; tests/smoke/test_scripts.py::test_the_benchmark_beside_its_baseline runs it",
    r"(vllm|text-embeddings-router|llama-server) .*": "not installed; scripts/serving_check.sh runs what is on PyPI",
    r"bash scripts/serving_check\.sh.*": "it installs some 11 GB; the weekly workflow runs it",
    r"(from (langchain|llama_index)|import chromadb).*": "not installed; it is compiled",
    r"gritlm hrsa .*": "it runs models; tests/unit/analysis compares tiny ones",
    r"(\w+=\S+ )*bash scripts/study\.sh .*": "tests/long/test_study.py runs a study",
    r"gritlm verify-gradients .*": "it starts ranks; tests/distributed/test_ranks.py runs it",
}
# `gritlm plan` in place of a run: it checks the flags and starts nothing. The rest of such a run is tested elsewhere.
PLANNED = {
    r".*--(fsdp|deepspeed) .*": "it needs GPUs; tests/long/test_trainer_on_engines.py trains on each engine",
    r".*sbatch .*": "it needs SLURM; tests/long/test_slurm.py submits it to two nodes",
}
# Added to a verb's own flags, so that a run is small and stays in its folder.
SMALL = (
    "--global_batch_size 8 --train_group_size 3 --query_max_len 32 --passage_max_len 48 --chunk_tokens 128 "
    "--data_cache cache"
)
ADDED = {
    "train": f"{SMALL} --max_steps 2 --use_cpu True --dataloader_num_workers 0 --disable_tqdm True --report_to none "
    "--logging_steps 1",
    "plan": SMALL,
    "check-data": "--processes 1",
    "mine": "--data_cache cache",
    "filter": "--data_cache cache",
    "benchmark": "--model tiny --chunk_tokens 512",
}
EXIT_CODES = {"check-data": (0, 1)}  # 1: it found something
NUMBERS = itertools.count()  # output folders that a document does not name


@dataclasses.dataclass
class Block:
    line: int
    language: str
    heading: str
    text: str = ""


def blocks_of(text: str) -> list[Block]:
    blocks, heading, inside = [], "", False
    for number, line in enumerate(text.splitlines(), start=1):
        if inside and line == "```":
            inside = False
        elif inside:
            blocks[-1].text += line + "\n"
        elif line.startswith("```"):
            blocks.append(Block(number, line[3:], heading))
            inside = True
        elif line.startswith("#"):
            heading = line.lstrip("# ")
    assert not inside, "the last block is not closed"
    return blocks


def commands_of(block: Block) -> list[tuple[str, list[str]]]:
    """The commands of a block, each with the output that the document shows for it."""
    lines = re.sub(r"\s*\\\n\s*", " ", block.text).splitlines()
    if block.language == "bash":
        return [(line.split(" #")[0].strip(), []) for line in lines if line.strip()]
    found: list[tuple[str, list[str]]] = []
    for line in lines:
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif line != "...":
            found[-1][1].append(line)
    return found


def not_run(line: str) -> bool:
    return any(re.fullmatch(pattern, line) for pattern in NOT_RUN)


def shape(line: str) -> str:
    """A line of output up to its first colon, without its numbers."""
    return re.sub(r"[\d.]+(e[-+]\d+)?", "N", line.split(":")[0]).strip()


def verb_of(command: str, exported: dict[str, str]) -> tuple[str, list[str]]:
    """The verb of `gritlm` that a command line runs, and its arguments; no verb for an unknown command."""
    words, variables = shlex.split(command), dict(exported)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, value = words.pop(0).split("=", 1)
        variables[name] = value
    if SCRIPT in words:
        known = re.findall(r"^([A-Z_]+)=\$\{\1:-", (ROOT / SCRIPT).read_text(), re.MULTILINE)
        assert variables.keys() <= set(known), f"found variables {list(variables)}, wanted some of {known}"
        if recipe := variables.pop("RECIPE", ""):
            assert (ROOT / f"scripts/training/recipes/{recipe}.sh").is_file(), f"found no recipe {recipe}"
        more = words[words.index(SCRIPT) + 1 :]
        if not variables and not more:
            return "train", []
        variables.setdefault("OUTPUT_DIR", f"outputs/{next(NUMBERS)}")
        flags = [(f"--{name.lower()}", value) for name, value in variables.items() if name != "GPUS"]
        return "train", [part for flag in flags for part in flag] + more
    if words[:2] == ["bash", "scripts/download_data.sh"]:
        return "prepare", [f"hub:{words[2]}", *words[3:]]
    if words[0] == "torchrun":
        words = words[words.index("gritlm") :]
    return (words[1], words[2:]) if words[0] == "gritlm" and words[1] in (*VERBS, "--help") else ("", [])


def gritlm(verb: str, argv: list[str]) -> int:
    """`gritlm VERB ...` in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gritlm", verb, *argv])
        try:
            return main()
        except SystemExit as end:
            return end.code


class Reader:
    """Does what a document says, in its order, in the current folder."""

    def __init__(self, models: dict[str, Path], capsys):
        self.models, self.capsys = models, capsys
        self.exported: dict[str, str] = {}

    def read(self, text: str) -> None:
        for block in blocks_of(text):
            for pattern, model in self.models.items():
                block.text = re.sub(pattern, str(model), block.text)
            try:
                self.do(block)
            except (Exception, SystemExit) as error:
                pytest.fail(f"line {block.line}: {type(error).__name__}: {error}", pytrace=False)

    def do(self, block: Block) -> None:
        assert block.language in LANGUAGES, f"found the language {block.language!r}, wanted one of {LANGUAGES}"
        if block.language == "json":
            for line in block.text.splitlines():
                row = json.loads(line)
                assert "query" not in row or parse_row(row, "docs")
        elif block.language == "python" and block.heading in EXAMPLES:
            EXAMPLES[block.heading](block.text)
        elif block.language == "python":
            code = compile(block.text, "docs", "exec")
            if not not_run(block.text.split("\n", 1)[0]):
                exec(code, {})
        elif block.language in ("bash", "console"):
            for command, shown in commands_of(block):
                self.run(command, shown)

    def run(self, command: str, shown: list[str]) -> None:
        if command.startswith("export "):
            self.exported |= dict(word.split("=", 1) for word in shlex.split(command)[1:])
            return
        verb, argv = verb_of(command, self.exported)
        if not_run(command):
            if verb and argv:
                importlib.import_module(VERBS[verb]).parse(argv)
            return
        assert verb, f"no test knows how to run {command!r}"
        verb = "plan" if any(re.fullmatch(pattern, command) for pattern in PLANNED) else verb
        self.capsys.readouterr()
        code = gritlm(verb, argv + ADDED.get(verb, "").split())
        said = self.capsys.readouterr()
        if code not in EXIT_CODES.get(verb, (0,)):
            raise RuntimeError(f"{command}: exit code {code}: {said.err[-1000:]}")
        for line in shown:
            if shape(line) not in {shape(line) for line in said.out.splitlines()}:
                raise RuntimeError(f"{command} does not print {line!r} but {said.out[-2000:]}")


# ---- the examples of CONTRIBUTING: each runs in the namespace of the file that it belongs to


def check_flag(code: str) -> None:
    names = dict(vars(arguments))
    exec(code, names)
    fields = [(name, kind, names[name]) for name, kind in names["__annotations__"].items()]
    group = dataclasses.make_dataclass("More", fields, bases=(arguments.ObjectiveArguments,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arguments, "GROUPS", (group,))
        parsed = make_parser("train", (group,), "").parse_args(["--alignment", "0.1"])
        assert parsed.alignment == 0.1
        assert arguments.fixed_flags()["alignment"] == 0.0
        assert "| `--alignment` | `0.0` |" in flag_table()


def check_loss(code: str) -> None:
    group = dataclasses.make_dataclass("More", [("alignment", float, 0.0)], bases=(arguments.ObjectiveArguments,))
    vectors = torch.nn.functional.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    places = torch.arange(4)
    ids = places + 4
    batch = batches.ContrastiveBatch(places, ids, places, ids, ids, ids[:, None], torch.ones(4, 1, dtype=torch.bool))
    table = dict(terms.TERMS)
    with pytest.MonkeyPatch.context() as patch:
        for module in (terms, objective):
            patch.setattr(module, "TERMS", table)
        exec(code, dict(vars(terms)))
        without, found = (objective.Objective(group(alignment=weight))(vectors, batch) for weight in (0.0, 0.1))
    wanted = 0.1 * (vectors[:4] - vectors[4:]).square().sum(1).mean()
    torch.testing.assert_close(found["alignment"], wanted)
    assert without.keys() == {"info_nce"}, "control"


def check_metric(code: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "METRICS", dict(metrics.METRICS))
        exec(code, dict(vars(metrics)))
        found = metrics.query_metrics(np.array([1.0, 3, -1, *[0] * 10, 1]), np.array([3.0, 1, 1]))
    assert found["precision@10"] == 2 / 10
    assert "precision@10" not in metrics.METRICS, "control"


def check_pooling(code: str) -> None:
    states, lengths, prompt_lengths = torch.randn(7, 4), torch.tensor([3, 4]), torch.tensor([1, 0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooling, "POOLING", dict(pooling.POOLING))
        exec(code, dict(vars(pooling)))
        found = pooling.pool(states, lengths, prompt_lengths, "max")
    assert torch.equal(found, torch.stack([states[1:3].amax(0), states[3:].amax(0)]))
    assert not torch.equal(found[0], states[:3].amax(0)), "control: with the prompt"


def check_family(code: str) -> None:
    """A row is enough to build a tiny model of the family, which passes the probe packed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "FAMILIES", added := dict(families.FAMILIES))
        exec(code, {"Family": families.Family, "FAMILIES": added})
        (family,) = added.keys() - FAMILIES.keys()
        config = families.tiny_config(family)
        model = Embedder(AutoModel.from_config(config, attn_implementation="packed"), TextContract())
        assert probe_attention(model, model, torch.device("cpu"), "bb")["packed_long"] < 1e-5


def check_data_shape(code: str) -> None:
    names = dict(vars(shapes))
    exec(code, names)
    rows = [("f:1", {"turns": ["first query", "its passage"], "id": 7})]
    with pytest.raises(UserError, match="found the columns turns, id"):
        next(examples_of(rows, "f", Columns(), BadRows(), Reading()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "SHAPES", names["SHAPES"])
        reading = Reading()
        (example,) = examples_of(rows, "f", Columns(), BadRows(), reading)
    assert (example.query, example.positives) == ("first query", ["its passage"])
    assert reading.lines() == ["turns of a dialogue: query <- turns, positive <- turns; not read: id"]


# The heading above a block -> its check.
EXAMPLES = {
    "Add a flag": check_flag,
    "Add a loss": check_loss,
    "Add a metric": check_metric,
    "Add a pooling": check_pooling,
    "Add a family": check_family,
    "Add a data shape": check_data_shape,
}


# ---- the documents


def write_lines(path: Path, *rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """The repository's scripts, and the data that the documents speak of."""
    place = tmp_path_factory.mktemp("docs")
    (place / "scripts").symlink_to(ROOT / "scripts")
    (place / "data").mkdir()
    for seed, name in enumerate(("gsm8k", "nl2bash")):
        write_jsonl(place / "data" / f"{name}.jsonl", rows=40, negatives=2, seed=seed)
    claims = [{"_id": str(n), "text": f"claim number {n} of a river"} for n in range(150)]
    write_lines(place / "beir/scifact/queries.jsonl", *claims)
    write_lines(place / "beir/scifact/corpus.jsonl", *(claim | {"text": claim["text"] + "!"} for claim in claims))
    (place / "beir/scifact/qrels").mkdir()
    for split, numbers in (("train", range(140)), ("test", range(140, 150))):
        lines = ["query-id\tcorpus-id\tscore", *(f"{n}\t{n}\t1" for n in numbers)]
        (place / f"beir/scifact/qrels/{split}.tsv").write_text("\n".join(lines) + "\n")
    (place / "triples.tsv").write_text("".join(f"question {n}\tanswer {n}\tother {n}\n" for n in range(5)))
    write_lines(place / "corpus.jsonl", "a text", {"title": "Rain", "text": "It rained."})
    write_lines(place / "queries.jsonl", "who wrote it")
    pairs = [f"a river {n},a lake {n},{n % 6}" for n in range(12)]
    (place / "sts.csv").write_text("\n".join(["sentence1,sentence2,score", *pairs]) + "\n")
    write_lines(place / "topics.jsonl", *({"text": f"text {n}", "label": "ab"[n % 2]} for n in range(12)))
    return place


@pytest.fixture(scope="module")
def with_model(workplace, qwen3) -> Path:
    """The same with a trained model in outputs/mine, and a checkpoint as the original writes it."""
    old = shutil.copytree(qwen3, workplace / "old" / "checkpoint")
    state = {f"model.{name}": weight for name, weight in load_file(old / "model.safetensors").items()}
    torch.save(state, old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    flags = f"--model_name_or_path {qwen3} --train_data data/ --output_dir outputs/mine {ADDED['train']}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        assert gritlm("train", flags.split()) == 0
    return workplace


@pytest.fixture
def reader(qwen3, qwen2, capsys) -> Reader:
    models = {r"Qwen/Qwen3-Embedding-[\d.]+B": Path("outputs/mine"), r"Qwen/Qwen3[\w.-]*": qwen3}
    return Reader(models | {r"Qwen/Qwen2[\w.-]*": qwen2}, capsys)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_a_document_says_works(document, reader, workplace, request, tmp_path, monkeypatch):
    trains = document == "README.md"
    place = workplace if trains else request.getfixturevalue("with_model")
    ignored = shutil.ignore_patterns("outputs") if trains else None
    shutil.copytree(place, tmp_path / "here", symlinks=True, ignore=ignored)
    monkeypatch.chdir(tmp_path / "here")
    reader.read((ROOT / document).read_text())


WRONG = {
    "an unknown command": ("bash", "make install", "no test knows how to run 'make install'"),
    "an unknown language": ("yaml", "a: 1", "found the language 'yaml'"),
    "an unknown flag": ("bash", "gritlm plan --no_such_flag 1", "exit code 2"),
    "an unknown flag of what is not run": ("bash", "gritlm benchmark --no_such_flag 1", "SystemExit|UserError"),
    "an unknown variable": ("bash", f"MODEL=x bash {SCRIPT} --seed 1", r"found variables \['MODEL'\]"),
    "an unknown recipe": ("bash", f"RECIPE=absent bash {SCRIPT}", "found no recipe absent"),
    "another output": ("console", "$ gritlm --help\nno such line", "does not print 'no such line'"),
    "code that fails": ("python", "1 / 0", "ZeroDivisionError"),
    "a bad row": ("json", '{"query": "q", "pos": "p", "neg": []}', "pos: found a string"),
}


@pytest.mark.parametrize("name", WRONG)
def test_control_a_wrong_document_is_noticed(name, reader):
    language, text, message = WRONG[name]
    with pytest.raises(pytest.fail.Exception, match=message):
        reader.read(f"# Title\n\n```{language}\n{text}\n```\n")


# ---- what else documents promise


def test_links_lead_somewhere():
    for document in (*DOCUMENTS, "benchmarks.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(((?!https?:)[^)]+)\)", (ROOT / document).read_text()):
            path, _, anchor = target.partition("#")
            text = ((ROOT / document).parent / path).read_text()
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            anchors = {re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in headings}
            assert not anchor or anchor in anchors, target


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_tour_names_every_file():
    tour = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"^ +(\w+\.py) ", tour, re.MULTILINE)
    files = (path for folder in ("gritlm", "models") for path in (ROOT / folder).rglob("*.py"))
    assert sorted(named) == sorted(
        path.name for path in files if path.parent.name == "gritlm" or path.stem != "__init__"
    )


def test_what_is_not_run_is_run_elsewhere():
    for reason in (NOT_RUN | PLANNED).values():
        for path, test in re.findall(r"(tests/\S+\.py)(?:::(\w+))?", reason):
            assert f"def {test}" in (ROOT / path).read_text()


def test_the_files_of_the_repository_are_well_formed():
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    scripts = re.findall(r"scripts/\S+\.sh", " ".join(commands))
    assert scripts and [script for script in scripts if not (ROOT / script).is_file()] == []
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"].split()[:2] for hook in hooks] == [[".venv/bin/ruff", "check"], [".venv/bin/ruff", "format"]]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())["body"]
    assert {"command", "run", "log"} <= {field["id"] for field in form}
