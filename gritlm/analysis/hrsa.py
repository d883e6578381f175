"""Compare the states of two models, layer by layer, on three levels, with controls: `gritlm hrsa A B --texts FILE`.

The levels are those of arXiv 2601.21192: representation (correlation, Procrustes), geometry (CKA, neighbours), function
(probes). Each figure has its controls: a ceiling (another seed), floors (an unrelated model, shuffled positions, random
weights), intervals over documents.
"""

import argparse
import importlib.util
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gritlm.analysis.controls import BLOCKS, halves_and_blocks, jackknife
from gritlm.analysis.metrics import JOBS, METRICS, PAIR, POOLED, ROWS, Pair
from gritlm.analysis.states import Positions, Spool, StateModel, stream
from gritlm.analysis.sums import Sums
from gritlm.analysis.texts import Texts, read
from gritlm.cli import home_expanded, quieten, verb_parser
from gritlm.devices import chosen_device
from gritlm.errors import UserError
from gritlm.files import content_hash, written_aside
from gritlm.strict_json import read_json_object

REQUEST, METRIC_FOLDER, WORK = "request.json", "metrics", "work"
RANDOM_WEIGHTS = 1_000_003  # + --seed: a seed that no training from random weights has used
SPECIAL_TOKENS = 4  # by which the texts of two models with one tokenizer may differ, where they are cut
# Flags that decide the numbers, in request.json.
OPTIONS = ("text_column", "label_column", "where", "max_texts", "max_length", "k", "sample", "dtype", "bf16", "seed")
EXAMPLES = """examples:
  gritlm hrsa Qwen/Qwen3-0.6B-Base Qwen/Qwen3-0.6B --texts texts.txt --output_dir outputs/hrsa
  gritlm hrsa Qwen/Qwen3-0.6B outputs/seed1 --ceiling outputs/seed2 --unrelated Qwen/Qwen2.5-0.5B --texts t.jsonl ...
  gritlm hrsa base reasoning --texts traces.jsonl --text_column trace --label_column topic --where correct=true ...
  gritlm hrsa base outputs/mine --checkpoints outputs/mine --texts texts.txt --output_dir outputs/realignment
The ceiling, the floors and --more are compared with the first model. The same command goes on where a run broke off."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = verb_parser("hrsa", __doc__, EXAMPLES)
    add = parser.add_argument
    add("a", metavar="MODEL_A", type=home_expanded, help="a folder, or a name on the hub")
    add("b", metavar="MODEL_B", type=home_expanded, help="what is compared with A")
    add("--more", nargs="+", default=[], metavar="NAME=MODEL", help="compare these with A, too")
    add("--checkpoints", type=Path, metavar="RUN", help="compare each checkpoint of a run with A, too")
    add("--ceiling", type=home_expanded, metavar="MODEL", help="as near to A as can be: another seed of its training")
    add("--unrelated", type=home_expanded, metavar="MODEL", help="a model that has nothing to do with A")
    add("--texts", type=Path, required=True, metavar="FILE", help="a .txt (a text a line), or a table of rows")
    add("--text_column", default="text", metavar="NAME", help="column of the text; default text")
    add("--label_column", metavar="NAME", help="column of the label: for probes, and neighbours by label")
    add("--where", nargs="+", default=[], metavar="COLUMN=VALUE", help="use only these rows")
    add("--max_texts", type=int, default=2000, help="draw as many texts at most; 0: all; default 2000")
    add("--max_length", type=int, default=512, help="tokens of a text; default 512")
    add("--output_dir", type=Path, required=True, metavar="OUT", help="the folder of the results")
    add("--k", type=int, nargs="+", default=[5, 10, 50], help="numbers of nearest neighbours; default 5 10 50")
    sampled = f"tokens for all but the sums (for neighbours of at most {ROWS}); default 10000"
    add("--sample", type=int, default=10_000, help=sampled)
    add("--dtype", choices=("float32", "float64"), default="float32", help="of products; they are summed in float64")
    add("--bf16", action="store_true", help="run the models in bfloat16; default float32")
    add("--device", help="default: a GPU where there is one")
    add("--chunk_tokens", type=int, help="tokens of texts at once; default 4096, on a GPU 16384")
    add("--seed", type=int, default=0, help="of samples, halves, resamples and random weights; default 0")
    args = parser.parse_args(argv)
    args.k = sorted(set(args.k))
    given = vars(args) | {"k": args.k[0]}
    for flag, least in {"max_texts": 0, "max_length": 8, "sample": 100, "k": 1, "chunk_tokens": 1, "seed": 0}.items():
        if given[flag] is not None and given[flag] < least:
            raise UserError(f"--{flag}: found {given[flag]}, wanted at least {least}")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    quieten()
    try:
        run(args)
    except UserError as error:  # without the flag under which training is given a model
        raise UserError(str(error).removeprefix("--model_name_or_path ")) from error
    return 0


def run(args: argparse.Namespace) -> None:
    """Write the results of a request to its folder.

    Raises:
        UserError: the request cannot be met, or the folder holds something else.
    """
    from gritlm.analysis.page import write

    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("found no matplotlib, wanted it for the figures: pip install 'gritlm[study]'")
    study = Study(args)
    study.check_folder()
    print("\n".join(study.heading()), flush=True)
    metrics = study.publish()
    write(args.output_dir)
    print("\n".join(table(metrics)))
    print(f"{args.output_dir}: {len(metrics)} metrics; the page is index.html")


def named_models(args: argparse.Namespace) -> dict[str, str]:
    """The path of each model by the key of its comparison, a first.

    Raises:
        UserError: a name is given twice or is none, or a run has no checkpoint.
    """
    found = {"a": args.a, PAIR: args.b, "ceiling": args.ceiling, "unrelated": args.unrelated, "random": args.b}
    found = {key: path for key, path in found.items() if path}
    for item in args.more:
        name, _, path = item.partition("=")
        if not path or not re.fullmatch(r"[\w.-]+", name) or f"more:{name}" in found:
            raise UserError(f"--more: found {item!r}, wanted NAME=MODEL, each name once, of letters, digits, . _ and -")
        found[f"more:{name}"] = home_expanded(path)
    if args.checkpoints:
        folders = [path.parent for path in args.checkpoints.glob("checkpoint-*/config.json")]
        if not folders:
            raise UserError(f"--checkpoints {args.checkpoints}: found no checkpoint-N with a model in it")
        for path in sorted(folders, key=lambda path: (len(path.name), path.name)):
            found[f"more:{path.name}"] = str(path)
    return found


class Study:
    """A request: which models are compared on which texts, and its folder. Loads no weights."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder, given = args, args.output_dir, read(args)
        self.models = {
            key: StateModel(path, args.max_length, args.output_dir, random=key == "random")
            for key, path in named_models(args).items()
        }
        first = {
            ids.tobytes(): number for number, ids in reversed([*enumerate(self.models["a"].tokenize(given.texts))])
        }
        kept = sorted(first.values())
        texts, self.count = [given.texts[number] for number in kept], len(kept)
        self.labels = None if given.labels is None else given.labels[kept]
        if self.count < max(2 * BLOCKS, args.k[-1] + 1):
            wanted = f"at least {2 * BLOCKS}, and more than --k {args.k[-1]}"
            raise UserError(f"--texts {args.texts}: found {self.count} distinct texts, wanted {wanted}")
        self.ids = {key: model.tokenize(texts) for key, model in self.models.items()}
        content = {key: [self.models[key].content(ids) for ids in own] for key, own in self.ids.items()}
        if empty := [text for own in content.values() for ids, text in zip(own, texts, strict=True) if not len(ids)]:
            raise UserError(f"--texts {args.texts}: found no token in the text {empty[0][:40]!r}, wanted at least one")
        self.alike = {key for key, own in content.items() if all(map(_same_start, content["a"], own))}
        lengths = np.min([list(map(len, content[key])) for key in self.alike], axis=0)
        own = [ids[:length] for ids, length in zip(content["a"], lengths, strict=True)]
        self.positions = Positions(own, args.sample, args.seed)
        self.halves, self.blocks = halves_and_blocks(self.count, args.seed)
        self.device = torch.device(chosen_device(args.device))
        self.request = self._request(given, int(lengths.sum()))

    def _request(self, given: Texts, tokens: int) -> dict[str, dict[str, Any]]:
        """What request.json holds."""
        args, count = self.args, self.count
        about = {"path": str(args.texts), "fingerprint": content_hash(args.texts)[:16], "rows": given.rows}
        options = {name: getattr(args, name) for name in OPTIONS} | {"sampled_tokens": len(self.positions.places)}
        intervals = f"95%, over documents: bootstrap of means; of the rest jackknife, {BLOCKS} blocks, on the sample"
        once = {"repeated_texts": given.repeats, "texts_equal_when_cut": len(given.texts) - count}
        return {
            "models": {"b" if k == PAIR else k: model.about(k in self.alike) for k, model in self.models.items()},
            "texts": about | {"documents": count, "distinct_documents": count, "tokens": tokens},
            "options": options | {"intervals": intervals},
            "states_counted_once": once | {"unsampled_tokens_with_a_repeated_prefix": self.positions.repeated},
        }

    def heading(self) -> list[str]:
        """What is compared, a line each."""
        lines = [
            f"{key}: " + ", ".join(f"{k} {v}" for k, v in about.items())
            for key, about in self.request["models"].items()
        ]
        said = self.request["texts"] | self.request["states_counted_once"]
        return [*lines, "texts: " + ", ".join(f"{name} {value}" for name, value in said.items())]

    def check_folder(self) -> None:
        """Begin the folder, or make sure that it is of this request and whole.

        Raises:
            UserError: it is not.
        """
        path = self.folder / REQUEST
        if not path.is_file():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise UserError(f"--output_dir {self.folder}: found files but no {REQUEST}, wanted a new folder")
            _write(path, self.request)
        found, wanted = _read(path), json.loads(json.dumps(self.request))
        for part, values in wanted.items():
            if differing := [name for name, value in values.items() if found.get(part, {}).get(name) != value]:
                before, now = found.get(part, {}).get(differing[0]), values[differing[0]]
                hint = f"{part}, {differing[0]}: {before}; now {now}"
                raise UserError(
                    f"--output_dir {self.folder}: found another request there ({hint}), wanted a new folder"
                )
        for file in [*(self.folder / METRIC_FOLDER).glob("*.json"), *(self.folder / WORK).glob("*.json")]:
            _read(file)

    # ---- the work

    def publish(self) -> dict[str, dict[str, Any]]:
        """Do what is not done, and write each metric from its parts."""
        paths = {name: self.folder / METRIC_FOLDER / f"{name}.json" for name in METRICS}
        if not all(path.is_file() for path in paths.values()):
            parts = [self._parts(key) for key in self.models if key != "a"]
            for name, path in paths.items():
                _write(path, self._assemble(name, parts))
        shutil.rmtree(self.folder / WORK, ignore_errors=True)
        return {name: _read(path) for name, path in paths.items()}

    def _parts(self, key: str) -> dict[str, Any]:
        """What the jobs of a comparison give, by job. What is done is read."""
        jobs = {job: self.folder / WORK / f"{job}.{key.replace(':', '-')}.json" for job in JOBS}
        if key != PAIR:
            del jobs["matrix"]
        left = [job for job, path in jobs.items() if not path.is_file()]
        states = self.folder / WORK / "states"
        shutil.rmtree(states, ignore_errors=True)
        if left:
            pair = self._pass(key, states)
            for job in left:
                started = time.monotonic()
                _write(jobs[job], JOBS[job].run(pair))
                print(f"{key}: {job} in {time.monotonic() - started:.0f} s", flush=True)
        return {job: _read(path) for job, path in jobs.items()}

    def _pass(self, key: str, folder: Path) -> Pair:
        """Run both models over the texts: the sums of each layer, and the states that go to disk."""
        started, args, alike = time.monotonic(), self.args, key in self.alike
        models = self.models["a"], self.models[key]
        for model in models:
            if model.embedder is None:
                model.load(self.device, RANDOM_WEIGHTS + args.seed, torch.bfloat16 if args.bf16 else torch.float32)
        own = self.positions if alike else None
        spools = [Spool(folder / side, model, self.count, own) for side, model in zip("ab", models, strict=True)]
        counts, sums, dtype = [model.layers for model in models], list[Sums](), getattr(torch, args.dtype)
        if alike and counts[0] == counts[1]:
            shuffles = [torch.Generator().manual_seed(args.seed) if key == PAIR else None for _ in range(counts[0])]
            sums = [Sums(dtype, shuffle) for shuffle in shuffles]

        def use(numbers: np.ndarray, states: list[list[list[torch.Tensor]]]) -> None:
            lengths = self.positions.lengths[numbers].tolist()
            second = torch.from_numpy(np.repeat(self.halves[numbers], lengths)).to(self.device)
            for of_layer, *sides in zip(sums, *states, strict=False):
                x, y = (torch.cat([rows[:n] for rows, n in zip(side, lengths, strict=True)]) for side in sides)
                of_layer.add(x, y, second)

        chunk = args.chunk_tokens or (4096 if self.device.type == "cpu" else 16384)
        stream(models, [self.ids["a"], self.ids[key]], spools, chunk, use)
        models[1].unload()
        print(f"{key}: the states of both models in {time.monotonic() - started:.0f} s", flush=True)
        unlike = f"found {counts[0] - 1} and {counts[1] - 1} layers, wanted as many to compare layer by layer"
        why = None if counts[0] == counts[1] else unlike
        own_data = (self.labels, self.halves, self.blocks, args.k, args.seed, dtype, self.device)
        return Pair(key, (spools[0], spools[1]), alike, sums, why, *own_data)

    def _assemble(self, name: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """The file of a metric."""
        job = next(job for job, own in JOBS.items() if name in own.metrics)
        found: dict[str, dict[str, Any]] = {}
        for part, key in zip(parts, list(self.models)[1:], strict=True):
            unit = METRICS[name].unit_of_analysis if key in self.alike else "documents"
            found |= {other: body | {"unit": unit} for other, body in part[job][name].items()}
        matrix = parts[0]["matrix"].get(name, {}).get(PAIR, {})
        if "values" in matrix:
            found[PAIR]["matrix"] = matrix
        found |= {
            flag: {"why": f"--{flag} was not given"} for flag in ("ceiling", "unrelated") if flag not in self.models
        }
        _set_minus_ceiling(found)
        empty = {"layers": None, "matrix": None, "histograms": None, "why": None, "p_value": None}
        found = {key: empty | body for key, body in found.items()}
        first = found.get(PAIR, found.get("a", empty))
        rows = _rows(first)
        whys = [first["why"], *(row.get("why") for row in rows)]
        why = None if any(row["value"] is not None for row in rows) else next(filter(None, whys), None)
        about = METRICS[name]._asdict() | {"unit_of_analysis": first.get("unit")}
        return {"metric": name} | about | {"comparisons": found, "why": why}


def _set_minus_ceiling(found: dict[str, dict[str, Any]]) -> None:
    """Give each layer of the pair its difference to the ceiling, from the same blocks of documents left out."""
    rows = {key: {row["layer"]: row for row in body.get("layers") or []} for key, body in found.items()}
    left_out = {key: {layer: row.pop("left_out", None) for layer, row in own.items()} for key, own in rows.items()}
    for layer, row in rows.get(PAIR, {}).items():
        ceiling = rows.get("ceiling", {}).get(layer, {}).get("value")
        own, other = left_out[PAIR][layer], left_out.get("ceiling", {}).get(layer)
        if row["value"] is not None and ceiling is not None and own and other:
            pairs = [None if None in both else both[0] - both[1] for both in zip(own, other, strict=True)]
            difference = row["value"] - ceiling
            low, high = jackknife(difference, pairs)
            row["minus_ceiling"] = {"value": difference, "low": low, "high": high}


def _rows(body: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each layer of a comparison. A metric with several k gives the rows of the first k."""
    return next(iter(body["series"].values())) if body.get("series") else body["layers"] or []


def table(metrics: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each comparison: the values of the first, middle and last layer, and of the pooled vectors."""
    lines = [f"{'':34}{'first':>9}{'middle':>9}{'last':>9}{'pooled':>9}"]
    for name, metric in metrics.items():
        for key, body in metric["comparisons"].items():
            values = {row["layer"]: row["value"] for row in _rows(body)}
            own = [value for layer, value in values.items() if layer != POOLED] or [None]
            chosen = [own[0], own[len(own) // 2], own[-1], values.get(POOLED)]
            cells = "".join(f"{'-' if value is None else f'{value:.3f}':>9}" for value in chosen)
            lines.append(f"{name:21} {key:12}{cells if values else '  ' + (body['why'] or '')}")
    return lines


def _same_start(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two lists of tokens are the same, but for what one model's special tokens cut off."""
    length = min(len(one), len(other))
    return abs(len(one) - len(other)) <= SPECIAL_TOKENS and np.array_equal(one[:length], other[:length])


def _write(path: Path, content: dict[str, Any]) -> None:
    with written_aside(path) as aside:
        aside.write_text(json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(str(path))
    except UserError as error:
        raise UserError(f"{error}; delete this damaged file, and what it holds is computed again") from error
