"""Mine hard negatives: for each query the nearest passages, by any embedding model, that are not its positives.

The candidates of a data set are its own positives, an extra corpus, or both. The rules and their names are those of
sentence-transformers' `mine_hard_negatives`.
"""

import argparse
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from gritlm.cli import home_expanded, quieten, verb_parser
from gritlm.curation.embedding import Encode, Passages, Queries, embed, load_encoder
from gritlm.curation.histogram import sparkline
from gritlm.curation.rules import Rules
from gritlm.data.records import Record, RecordSet, load_records
from gritlm.data.rows import text_id
from gritlm.data.texts import read_texts
from gritlm.errors import UserError, first_line
from gritlm.evaluation.search import nearest
from gritlm.files import content_hash, publish, written_aside
from gritlm.models.hub import ANY_MODEL, model_folder
from gritlm.models.text import Text

EXAMPLES = """examples:
  gritlm mine data/ mined/ --model Qwen/Qwen3-Embedding-0.6B
  gritlm mine pairs.jsonl mined/ --model outputs/run --corpus corpus.jsonl --num_negatives 7 --sampling_strategy random
after an interruption, the same command continues the run"""

BINS = np.linspace(-0.2, 1.0, 25)
SEARCHED = 1024  # queries at once
RUN_FILE = "mine.json"

Rescore = Callable[[str, list[str]], np.ndarray]  # query, passages -> scores


# ---- searching
# mine_hard_negatives itself holds all texts, all embeddings and a slice of scores as wide as the corpus in memory. It
# cannot continue a run, and it does not know that a query has positives in several rows.


@dataclass
class Mined:
    """The negatives of one row, as passage numbers, and the scores of its negatives and positives."""

    record: Record
    negatives: list[int]
    scores: list[float]
    positive_scores: list[float]


def search(
    records: RecordSet,
    passages: Passages,
    vectors: tuple[np.ndarray, np.ndarray],
    rules: Rules,
    rescore: Rescore | None,
    removed: Counter[str],
    keep_negatives: bool,
) -> Iterator[Mined]:
    """Mine every row, in order. `vectors` are those of the queries and of the passages."""
    queries_BD, corpus_ND = vectors
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # The query's positives and its own negatives take places among the nearest, so search for that many more.
    taken = records.most_positives + (records.longest_group - 1 if keep_negatives else 0)
    count = min(rules.range_max + taken, passages.candidates)
    progress = tqdm(total=len(records), desc="searching", unit=" queries", delay=2)
    for start in range(0, len(records), SEARCHED):
        queries = queries_BD[start : start + SEARCHED]
        scores_BK, numbers_BK = nearest(queries, corpus_ND[: passages.candidates], count, device)
        for row, (scores, numbers) in enumerate(zip(scores_BK, numbers_BK, strict=True), start=start):
            record = records[row]
            known = [passages.number_of[key] for key in record.known_positives]
            own = [passages.number_of[key] for key in record.positive_ids]
            known_scores, own_scores = corpus_ND[known] @ queries_BD[row], corpus_ND[own] @ queries_BD[row]
            others = [text_id(record.query.text), *(record.negative_ids if keep_negatives else [])]
            excluded = np.isin(numbers, [*known, *(passages.number_of.get(key, -1) for key in others)])
            if rescore is not None:
                text = record.query.text
                scores = rescore(text, [passages[number].text for number in numbers])
                order = np.argsort(-scores, kind="stable")
                scores, numbers, excluded = scores[order], numbers[order], excluded[order]
                known_scores = own_scores = rescore(text, [passage.text for passage in record.positives])
            places = rules.choose(row, scores, excluded, float(known_scores.min()), removed)
            yield Mined(record, numbers[places].tolist(), scores[places].tolist(), own_scores.tolist())
        progress.update(len(scores_BK))
    progress.close()


def load_rescorer(name: str) -> Rescore:
    from sentence_transformers import CrossEncoder

    try:
        model = CrossEncoder(model_folder(name, ANY_MODEL))
    except (OSError, ValueError) as error:
        raise UserError(f"--cross_encoder {name}: cannot be loaded: {first_line(error)}") from error
    return lambda query, texts: model.predict([(query, text) for text in texts], show_progress_bar=False)


# ---- one data set


@dataclass
class Tally:
    """What mining a data set gave, for the summary."""

    removed: Counter[str] = field(default_factory=Counter)  # candidates by the rule that removed them
    queries: Counter[int] = field(default_factory=Counter)  # queries by their number of negatives
    negative_scores: list[float] = field(default_factory=list)
    positive_scores: list[float] = field(default_factory=list)

    def summary(self, target: Path, candidates: int, wanted: int) -> Iterator[str]:
        found, ranked = len(self.negative_scores), sum(self.removed.values()) + len(self.negative_scores)
        yield f"{target}: {self.queries.total()} queries, {candidates} passages, {found} negatives"
        short = sum(count for number, count in self.queries.items() if number < wanted)
        yield f"  {short} queries got fewer than {wanted}, {self.queries[0]} none"
        yield f"  of {ranked} candidates:"
        for name, count in [*self.removed.items(), ("negatives", found)]:
            if count:
                yield f"    {name:38}{count:10d}  {count / ranked:6.1%}"
        for name, scores in (("positives", self.positive_scores), ("negatives", self.negative_scores)):
            if scores:
                counts, _ = np.histogram(np.clip(scores, BINS[0], BINS[-1]), BINS)
                histogram = f"|{sparkline(counts)}| from {BINS[0]:.1f} to {BINS[-1]:.1f}"
                yield f"  scores of {name} {histogram}, median {np.median(scores):.3f}"


def mine_set(
    records: RecordSet, corpus: list[str], encode: Encode, rescore: Rescore | None, args: argparse.Namespace
) -> None:
    """Write OUT/NAME.jsonl for one data set, and print how many candidates each rule removed."""
    target, work = args.output / f"{records.name}.jsonl", args.output / f".{records.name}"
    if target.exists():
        print(f"{target} exists already, skipped")
        shutil.rmtree(work, ignore_errors=True)
        return
    passages = Passages(records, corpus, args.corpus_only)
    work.mkdir(parents=True, exist_ok=True)
    vectors = (
        embed(encode, Queries(records), work / "queries.npy", f"{records.name} queries"),
        embed(encode, passages, work / "corpus.npy", f"{records.name} corpus"),
    )
    rules = Rules(**{name: getattr(args, name) for name in Rules.__dataclass_fields__})
    tally, aside = Tally(), work / "rows.jsonl"
    with open(aside, "w", encoding="utf-8") as out:
        for mined in search(records, passages, vectors, rules, rescore, tally.removed, args.keep_negatives):
            kept = mined.record.negatives if args.keep_negatives else []
            row: dict[str, object] = {
                "query": _plain(mined.record.query),
                "pos": [_plain(passage) for passage in mined.record.positives],
                "neg": [_plain(passage) for passage in [*kept, *(passages[number] for number in mined.negatives)]],
            }
            if args.output_scores:
                row["scores"] = {"pos": mined.positive_scores, "neg": [None] * len(kept) + mined.scores}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            tally.queries[len(mined.negatives)] += 1
            tally.negative_scores += mined.scores
            tally.positive_scores += mined.positive_scores
    publish(aside, target)
    shutil.rmtree(work)
    print("\n".join(tally.summary(target, passages.candidates, args.num_negatives)))


def _plain(text: Text) -> str | list[str]:
    return [text.instruction, text.text] if text.instruction else text.text


# ---- the run


def find_run_settings(args: argparse.Namespace, data: list[RecordSet], corpus: list[str]) -> dict[str, str]:
    """Everything that the result depends on: the flags, and hashes of the data, the corpus and the model's files."""
    by_content = ("input", "corpus", "output", "data_cache")  # a path has many spellings
    settings = {name: str(value) for name, value in vars(args).items() if name not in by_content}
    if Path(args.model).is_dir():
        settings["model"] = os.path.abspath(args.model)
    settings["data"] = ", ".join(f"{records.name} {records.fingerprint()}" for records in data)
    settings["corpus texts"] = _hash([text_id(text) for text in corpus])
    output = args.output.resolve()  # may be inside the model's folder
    folder = Path(model_folder(args.model, ANY_MODEL))
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and output not in path.resolve().parents]
    files = [path for path in files if not path.relative_to(folder).parts[0].startswith(("checkpoint-", "."))]
    settings["model files"] = _hash([[path.name, content_hash(path)] for path in files])
    return settings


def _hash(value: list) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def check_output(args: argparse.Namespace, run_settings: dict[str, str], data: list[RecordSet]) -> None:
    """Refuse an OUT inside DATA, an OUT with files of other programs, and an OUT of a run with other settings."""
    if args.output.resolve().is_relative_to(Path(args.input).resolve()):
        raise UserError(f"OUT {args.output} is in DATA, and would be read as data; name a folder elsewhere")
    path = args.output / RUN_FILE
    if not path.exists():
        for target in (args.output / f"{records.name}.jsonl" for records in data):
            if target.exists():
                raise UserError(f"{target} exists without the {RUN_FILE} of its run; name another folder")
        return
    try:
        earlier = dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{path}: found a damaged file ({error}); name another folder") from error
    for name, value in run_settings.items():
        if value != earlier.get(name):
            raise UserError(
                f"{args.output} was mined with {name} {earlier.get(name)}, now {value}; name another folder"
            )


# ---- the verb


def parse(argv: list[str]) -> argparse.Namespace:
    parser = verb_parser("mine", __doc__, EXAMPLES)
    add = parser.add_argument
    add("input", type=home_expanded, metavar="DATA", help="a file or folder, as --train_data of gritlm train")
    add("output", type=Path, metavar="OUT", help="folder for one jsonl file per data set")
    add(
        "--model",
        type=home_expanded,
        required=True,
        help="a folder of gritlm train, or any model that sentence-transformers loads",
    )
    add("--corpus", nargs="+", type=Path, default=[], help="files with more passages, as for gritlm encode")
    add("--corpus_only", action="store_true", help="take negatives from --corpus only, not from the data's positives")
    add("--num_negatives", type=int, default=3, help="negatives per query, default 3")
    add("--range_min", type=int, default=0, help="skip this many of the nearest candidates, default 0")
    add("--range_max", type=int, default=100, help="choose among this many of the nearest candidates, default 100")
    add(
        "--relative_margin",
        type=lambda text: None if text == "none" else float(text),
        default=0.05,
        help="default 0.05: a negative scores at most 95%% of the lowest-scored positive; none: no such rule",
    )
    add("--absolute_margin", type=float, help="a negative scores at least this much below the lowest-scored positive")
    add("--max_score", type=float, help="a negative scores at most this")
    add("--min_score", type=float, help="a negative scores at least this")
    add(
        "--sampling_strategy",
        choices=("top", "random"),
        default="top",
        help="nearest first, or a random draw; default top",
    )
    add("--seed", type=int, default=0, help="seed of random sampling, default 0")
    add("--keep_instruction", action="store_true", help="embed texts with their instructions; default: without")
    add("--keep_negatives", action="store_true", help="add to the negatives of a row; default: replace them")
    add(
        "--cross_encoder",
        type=home_expanded,
        help="score the candidates of each query again with this model before the rules apply",
    )
    add("--output_scores", action="store_true", help='write "scores": {"pos": [...], "neg": [...]} into each row')
    add("--data_cache", type=home_expanded, help="folder for the memory-mapped data, as in gritlm train")
    args = parser.parse_args(argv)
    if not 0 <= args.range_min < args.range_max or not 1 <= args.num_negatives <= args.range_max - args.range_min:
        raise UserError(
            f"--range_min {args.range_min} --range_max {args.range_max}: wanted room for --num_negatives "
            f"{args.num_negatives}, at least 1"
        )
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: wanted 0 or more")
    if args.corpus_only and not args.corpus:
        raise UserError("--corpus_only without --corpus leaves no passage to choose from")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    quieten()
    data = load_records(args.input, args.data_cache)
    corpus = [text for path in args.corpus for text in read_texts(path, may_be_empty=False)]
    run_settings = find_run_settings(args, data, corpus)
    check_output(args, run_settings, data)
    encode = load_encoder(args.model, args.keep_instruction)
    rescore = load_rescorer(args.cross_encoder) if args.cross_encoder else None
    with written_aside(args.output / RUN_FILE) as aside:
        aside.write_text(json.dumps(run_settings, indent=2) + "\n", encoding="utf-8")
    for records in data:
        mine_set(records, corpus, encode, rescore, args)
    return 0
