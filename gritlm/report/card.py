"""The card of a model folder: README.md, as the Hugging Face hub and sentence-transformers read it.

It says what the folder, its run and its base say. What they do not say is said to be unknown.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from gritlm import __version__
from gritlm.models.base import attention_of
from gritlm.models.embedder import PROJECTION_FOLDER
from gritlm.models.families import is_encoder
from gritlm.models.text import TextContract
from gritlm.models.tokenizer import LOADER_OPTIONS
from gritlm.report.figures import number, sparkline
from gritlm.report.markdown import code, one_line, plain, table, value_code
from gritlm.report.origin import CARD, Base, Part, parts_table, sources
from gritlm.report.run import Run, find_run
from gritlm.report.servers import Served, servers_table
from gritlm.report.usage import PASSAGES, QUERIES, usage

TASKS = {"retrieval": "information-retrieval", "sts": "semantic-similarity", "classification": "text-classification"}
LIBRARIES = ("gritlm", "torch", "transformers", "sentence-transformers", "tokenizers")
CITATION = """@article{chan2026reasoning,
  title   = {Do Reasoning Models Enhance Embedding Models?},
  author  = {Chan, Wun Yu and Chen, Shaojin and Jing, Huihao and Lau, Kwun Hang and Li, Elton Chun-Chai and Wang, Zihao
             and Li, Haoran and Song, Yangqiu},
  journal = {arXiv preprint arXiv:2601.21192},
  year    = {2026}
}"""


@dataclass(frozen=True)
class CardFacts:
    """What a card says beyond the model folder itself."""

    run: Run | None = None  # it trained the model
    step: int | None = None  # of a checkpoint; None is the model that the run has published
    changed: str = ""  # what was done to the model since, such as "cut to 256 dimensions"; evaluations are from before
    # (program, what, smallest cosine with the trainer's vectors or the reason why there is none)
    parity: Sequence[tuple[str, str, float | str]] = ()
    parity_note: str = ""  # a sentence before the parity table: the dtype, the cosine that was wanted
    scores: list[list[float]] | None = None  # what the usage code prints: `usage.QUERIES` by `usage.PASSAGES`
    name: str = "."  # what loads the model: "." in its folder, or its name on the hub
    license: str | None = None  # None is that of the base's card, where it has one
    language: Sequence[str] = ()  # of the texts it is for, as codes such as "en"
    datasets: Sequence[str] = ()  # names on the hub; empty: those that the cards of `gritlm prepare` name
    results: Sequence[dict[str, Any]] = ()  # of `gritlm evaluate` on the model
    parts: Sequence[Part] = ()  # the models that it was merged from

    def all_results(self) -> list[dict[str, Any]]:
        """The results of the run at this step, and those of `gritlm evaluate` in place of the run's on the same set."""
        of_run = self.run.results(self.step) if self.run else []
        return list({row["name"]: row for row in [*of_run, *self.results]}.values())


def read_facts(folder: str | Path) -> CardFacts:
    """The facts on the model in a run's folder, or in one of its checkpoints; none where there is no run.json.

    Raises:
        UserError: run.json is damaged.
    """
    run, step = find_run(Path(folder))
    return CardFacts(run=run, step=step)


def write_card(folder: Path, facts: CardFacts) -> None:
    """Write README.md into a model folder, in the place of one that is there."""
    run, parts = facts.run, facts.parts
    bases = [part.base for part in parts] or [Base(str((run.flags if run else {}).get("model_name_or_path") or ""))]
    licence = bases[0].licence if all(base.licence == bases[0].licence for base in bases) else {}
    names = list(dict.fromkeys(name for base in bases for name in base.names))
    datasets = sorted({name for found in (run, *(part.run for part in parts)) for name in sources(found)})
    title = facts.name.rpartition("/")[2].strip(".") or (run.name if run else "") or "Text-embedding model"
    results = [] if facts.changed else _model_index(facts.all_results())
    data = ModelCardData(
        base_model=names[0] if len(names) == 1 else names or None,
        **({"license": facts.license} if facts.license else licence),
        language=list(facts.language) or None,
        datasets=list(facts.datasets) or datasets or None,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "sentence-similarity", "gritlm"],
        model_name=title if results else None,  # the hub wants both or none
        eval_results=results or None,
    )
    sections = {
        "": _introduction(folder, facts, bases),
        "Merged from": parts_table(parts),
        "Use": _usage(folder, facts),
        "Text contract": _contract(TextContract.load(folder)),
        "Parity": [facts.parity_note, "", *parity_table(facts.parity)] if facts.parity else [],
        "Servers": _servers(folder),
        "Evaluation": _evaluation(facts),
        "Training": _training(facts),
        "Training data": _data(facts),
        "Versions": _versions(facts),
        "Citation": ["```bibtex", CITATION, "```"],
    }
    text = [f"# {plain(title)}", ""]
    for heading, lines in sections.items():
        text += [*([f"## {heading}", ""] if heading and lines else []), *lines, *([""] if lines else [])]
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(text)).save(folder / CARD)


# ---- sections


def _introduction(folder: Path, facts: CardFacts, bases: Sequence[Base]) -> list[str]:
    config, contract = json.loads((folder / "config.json").read_text(encoding="utf-8")), TextContract.load(folder)
    dense, width = folder / PROJECTION_FOLDER / "config.json", config.get("hidden_size")
    if dense.is_file():
        width = json.loads(dense.read_text(encoding="utf-8"))["out_features"]
    decoder, causal = not is_encoder(config.get("model_type", "")), attention_of(config, "cc") == "cc"
    silently = "" if causal else " and give other vectors without a warning"
    licences = {base.licence_name for base in bases}
    license_text = facts.license or (licences.pop() if len(licences) == 1 else "")
    source = "" if facts.license or not license_text else ", that of the base"
    options = ", ".join(f'{key}="{value}"' for key, value in LOADER_OPTIONS.items())
    return [
        f"{'Causal' if causal else 'Bidirectional'} {config.get('model_type')} backbone, {contract.pooling_method} "
        f"pooling, {'normalised' if contract.normalized else 'not normalised'}, {width} dimensions"
        f"{', ' + str(config['dtype']) if config.get('dtype') else ''}. "
        f"Trained with gritlm{f', step {facts.step}' if facts.step is not None else ''}{_adapter(facts.run)}."
        f"{f' After training: {facts.changed}.' if facts.changed else ''}",
        "",
        f"- Base: {'; '.join(dict.fromkeys(base.called for base in bases))}.",
        f"- Licence: {plain(license_text) + source if license_text else 'unknown; look up those of base and data'}.",
        f"- Languages: {', '.join(facts.language) or 'unknown'}.",
        "- Needs transformers 5.2 or newer."
        + (f" Older versions ignore `is_causal` in config.json{silently}." if decoder else ""),
        f"- `AutoTokenizer.from_pretrained` needs `{options}`; sentence-transformers passes it by itself.",
    ]


def _adapter(run: Run | None) -> str:
    flags = run.flags if run else {}
    kind = "QLoRA" if flags.get("qlora") else "LoRA" if flags.get("lora") else ""
    return f", as {kind} of rank {flags.get('lora_r')}, which is merged into the base" if kind else ""


def _usage(folder: Path, facts: CardFacts) -> list[str]:
    lines = ["Run the code in the model folder, which `.` names." if facts.name == "." else "", ""]
    for library, text in usage(folder, facts.name).items():
        lines += [f"With {library}:", "", "```python", text, "```", ""]
    if facts.scores:
        rows = [", ".join(f"{value:.4f}" for value in row) for row in facts.scores]
        texts = f"the {len(QUERIES)} query with the {len(PASSAGES)} passages"
        lines += [f"Each prints the scores of {texts}, but for rounding: {'; '.join(rows)}.", ""]
    return lines[:-1]


def _contract(contract: TextContract) -> list[str]:
    pooled = "yes" if contract.pool_instruction else "no"
    end = "yes" if contract.append_eos else "no"
    prompts = [contract.prompts.get(side, "") for side in ("query", "document")]
    rows = [
        ("Prompt, directly before the text", *(value_code(prompt) if prompt else "none" for prompt in prompts)),
        ("Longest text in tokens, prompt included", str(contract.query_max_len), str(contract.passage_max_len)),
        ("Tokens of the prompt are pooled", pooled, pooled),
        ("An end token is added", end, end),
    ]
    named = {name: prompt for name, prompt in contract.prompts.items() if name not in ("query", "document")}
    more = (
        ["", *table(["Prompt name", "prompt"], [(plain(n), value_code(p)) for n, p in named.items()])] if named else []
    )
    return [*table(["", "queries", "passages"], rows), *more]


def parity_table(rows: Sequence[tuple[str, str, float | str]]) -> list[str]:
    """A line for each kind of text, a column for each program; below, why a program was not run."""
    cells = {(what, program): found for program, what, found in rows}
    apart = {program: found for program, what, found in rows if what == "all" and isinstance(found, str)}
    programs = [program for program in dict.fromkeys(program for program, *_ in rows) if program not in apart]
    lines = [
        (plain(what), *(f"{x:.6f}" if isinstance(x := cells.get((what, name), ""), float) else x for name in programs))
        for what in dict.fromkeys(what for program, what, _ in rows if program not in apart)
    ]
    return [*table(["Texts", *map(plain, programs)], lines), *(f"\n{name}: {why}." for name, why in apart.items())]


def _servers(folder: Path) -> list[str]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    causal, projection = attention_of(config, "cc") == "cc", (folder / PROJECTION_FOLDER).is_dir()
    model = Served(TextContract.load(folder), config.get("model_type", ""), causal, projection)
    return table(["Program", "gives these vectors", "with", "known from"], servers_table(model))


def interval(result: dict[str, Any]) -> str:
    """The 95% interval of a set's main metric over its queries, or "" where they do not tell it.

    Of a mean: by its standard error. Of Spearman's correlation: by Fisher's z (Bonett & Wright, 2000).
    """
    value, values = float(result["metrics"][result["main"]]), [float(v) for v in result.get("values") or []]
    count = len(values)
    if count < 4:
        return ""
    if result.get("gold") is not None:
        if abs(value) >= 1:
            return ""
        error = 1.96 * math.sqrt((1 + value**2 / 2) / (count - 3))
        low, high = math.tanh(math.atanh(value) - error), math.tanh(math.atanh(value) + error)
    else:
        mean = sum(values) / count
        error = 1.96 * math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1) / count)
        if not error:  # all queries alike: the error is not zero, it is unknown
            return ""
        low, high = max(0.0, mean - error), min(1.0, mean + error)
    return f"[{low:.3f}, {high:.3f}]"


def _evaluation(facts: CardFacts) -> list[str]:
    results = facts.all_results()
    if not results:
        return ["Unknown: this run has evaluated no model at this step."]
    before = {(row["name"], str(row.get("ids"))): row["metrics"] for row in facts.run.results(0)} if facts.run else {}
    rows, forms = [], []
    for row in results:
        name, main = plain(row["name"]), row["main"]
        base = before.get((row["name"], str(row.get("ids"))), {}).get(main)
        cells = (name, plain(main), "unknown" if base is None else f"{base:.3f}", f"{row['metrics'][main]:.3f}")
        rows.append((*cells, interval(row) or "unknown", str(len(row["values"]) or "unknown")))
        for form in row["compressed"]:
            size = (str(form[key]) for key in ("width", "precision", "bytes"))
            forms.append((name, *size, *(f"{form[of]:.3f}" for of in ("metrics", "metrics of float32 queries"))))
    stored = table(["Set", "dimensions", "stored as", "bytes", "nDCG@10", "nDCG@10 of float32 queries"], forms)
    sources = {"during training": len(results) > len(facts.results), "with gritlm evaluate": facts.results}
    verdict = (facts.run.settings.get("evaluation") or {}).get("verdict") if facts.run and facts.step is None else None
    return [
        *table(["Set", "metric", "base", "trained", "95% interval", "queries"], rows),
        "",
        f"Measured {' or '.join(how for how, found in sources.items() if found)}"
        f"{f', before the model was {facts.changed}' if facts.changed else ''}. "
        "The interval is over queries, not over seeds.",
        *([f"Against the base: {plain(verdict)}."] if verdict else []),
        *(["", "Vectors cut, and quantised as sentence-transformers does:", "", *stored] if stored else []),
    ]


def _model_index(results: list[dict[str, Any]]) -> list[EvalResult]:
    kinds = [TASKS.get(row.get("kind", ""), "feature-extraction") for row in results]
    return [
        EvalResult(kind, "unknown", one_line(row["name"]), metric, round(value, 6))
        for kind, row in zip(kinds, results, strict=True)
        for metric, value in row["metrics"].items()
    ]


def _training(facts: CardFacts) -> list[str]:
    """The flags that decide what is learnt, and the last losses."""
    if facts.parts:
        return ["That of the models it was merged from; their cards tell it."]
    if not facts.run:
        return ["Unknown: no run.json lies beside the model."]
    run, start = facts.run, facts.run.starts[-1]
    recipe = {
        name: value
        for name, value in (run.settings.get("flags") or {}).items()
        if name in run.flags and name != "model_name_or_path"
        if name in (start.get("given") or {}) or not (value is None or value is False or value in ({}, ""))
    }
    return [
        *table(["Flag", "value"], [(f"`--{name}`", value_code(value)) for name, value in recipe.items()]),
        "",
        f"{start.get('ranks', 'An unknown number of')} × {plain(start.get('device') or 'unknown device')}.",
        "",
        *(_curves(run, facts.step) or ["No loss is logged."]),
    ]


def _curves(run: Run, step: int | None) -> list[str]:
    """The losses and the evaluations of a run up to a step, each as a line of blocks with its first and last value."""
    found = {name: run.curves.get(name, {}) for name in ("loss", *(run.terms if len(run.terms) > 1 else ()))}
    found |= {f"loss of {name}": curve for name, curve in run.under("loss/").items()}
    found |= {"loss of held-out rows": run.curves.get("eval_loss", {})} | run.evaluation_curves()
    last, rows = run.published_step if step is None else step, []
    for name, curve in found.items():
        if points := [(at, value) for at, value in curve.items() if at <= last]:
            ends = (f"{number(value)} (step {at})" for at, value in (points[0], points[-1]))
            rows.append((plain(name), sparkline([value for _, value in points]), *ends))
    return table(["Curve", "from lowest to highest", "first", "last"], rows)


def _data(facts: CardFacts) -> list[str]:
    runs = filter(None, (facts.run, *(part.run for part in facts.parts)))
    rows = [row for run in runs for row in run.data_sets()]
    found = [(plain(row["name"] or "name unknown"), str(row["rows"]), code(row["fingerprint"])) for row in rows]
    return table(["Data set", "rows", "fingerprint of all rows in order"], dict.fromkeys(found)) or ["Unknown."]


def _versions(facts: CardFacts) -> list[str]:
    trained = facts.run.starts[-1].get("versions") or {} if facts.run else {}
    here = {"gritlm": __version__} | {name: version(name) for name in LIBRARIES[1:]}
    rows = [(plain(n), plain(trained.get(n, "unknown")), here.get(n, "")) for n in here | trained]
    return table(["", "trained with", "card written with"], rows)
