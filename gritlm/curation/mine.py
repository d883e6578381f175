"""Hard negatives: for each query the nearest passages that do not answer it, by any embedding model.

Each data set is mined in its own positives, an extra corpus, or both. The rules and their names are those of
sentence-transformers' `mine_hard_negatives`, whose candidates these are, too. It is not called here because it holds
all texts and a slice of scores as wide as the corpus in memory, keeps no embedding until all are done, and knows
neither our format nor known positives of other rows.
"""

import argparse
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from gritlm.cli import quieten, verb_parser
from gritlm.curation.embedding import Encode, embed, load_encoder
from gritlm.curation.histogram import sparkline
from gritlm.data.records import Record, RecordSet, load_records
from gritlm.data.rows import text_id
from gritlm.data.texts import read_texts
from gritlm.errors import UserError
from gritlm.evaluation.search import nearest
from gritlm.files import publish, written_aside
from gritlm.models.text import Text

EXAMPLES = """examples:
  gritlm mine data/ mined/ --model Qwen/Qwen3-Embedding-0.6B
  gritlm mine pairs.jsonl mined/ --model outputs/run --corpus corpus.jsonl --num_negatives 7 --sampling_strategy random
the same command goes on where it was cut off"""

BINS = np.linspace(-0.2, 1.0, 25)
ROWS = 1024  # queries searched at once
RUN_FILE = "mine.json"


class Passages(Sequence[Text]):
    """The distinct texts of extra files, then the distinct positives of a data set, each read as it is needed.

    The first `candidates` of them may become negatives: all, or only the extra ones.
    """

    def __init__(self, records: RecordSet, extra: list[str], extra_only: bool):
        self.records, self.number_of = records, {}
        self.places: list[tuple[int, int] | str] = []
        for text in extra:
            self._add(text_id(text), text)
        self.candidates = len(self)
        for row in range(len(records)):
            for number, passage in enumerate(records.positive_ids(row).tolist()):
                self._add(passage, (row, number))
        self.candidates = self.candidates if extra_only else len(self)

    def _add(self, key: int, place: tuple[int, int] | str) -> None:
        if key not in self.number_of:
            self.number_of[key] = len(self.places)
            self.places.append(place)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = self.places[index]
        return Text("", place) if isinstance(place, str) else self.records[place[0]].positives[place[1]]


class Queries(Sequence[Text]):
    def __init__(self, records: RecordSet):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.records[index].query


# ---- searching


@dataclass
class Rules:
    """Which of a query's nearest passages may be its negatives. A margin is below its worst-scored positive."""

    num_negatives: int
    range_min: int
    range_max: int
    relative_margin: float | None
    absolute_margin: float | None
    max_score: float | None
    min_score: float | None
    sampling_strategy: str
    seed: int

    def choose(self, row: int, scores: np.ndarray, out: np.ndarray, positive: float, removed: Counter) -> np.ndarray:
        """Places of the negatives among a query's candidates, best first; `out` are known not to be negatives."""
        left = ~out
        removed["known positive, own negative, the query"] += int(out.sum())
        limits = {
            "absolute_margin": self.absolute_margin is not None and scores + self.absolute_margin > positive,
            "relative_margin": self.relative_margin is not None
            and scores > positive - abs(positive) * self.relative_margin,
            "max_score": self.max_score is not None and scores > self.max_score,
            "min_score": self.min_score is not None and scores < self.min_score,
        }
        for name, beyond in limits.items():
            removed[name] += int((left & beyond).sum())
            left &= ~np.broadcast_to(beyond, left.shape)
        places = np.flatnonzero(left)
        removed["range_min"] += len(places[: self.range_min])
        places = places[self.range_min : self.range_max]
        if self.sampling_strategy == "random" and len(places) > self.num_negatives:
            rng = np.random.default_rng((self.seed, row))
            places = np.sort(rng.choice(places, self.num_negatives, replace=False))
        removed["not needed"] += len(places[self.num_negatives :])
        return places[: self.num_negatives]


@dataclass
class Mined:
    """What one query was given: passages' numbers and scores, and its positives' scores."""

    record: Record
    negatives: list[int]
    scores: list[float]
    positive_scores: list[float]


def search(
    records: RecordSet,
    passages: Passages,
    vectors: tuple[np.ndarray, np.ndarray],
    rules: Rules,
    rescore: Callable[[str, list[str]], np.ndarray] | None,
    removed: Counter,
    keep_negatives: bool,
) -> Iterator[Mined]:
    """Mine every row, in order."""
    queries_BD, corpus_ND = vectors
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Room for those that are no candidates: the query's positives (as sentence-transformers has it), its own negatives.
    taken = records.most_positives + (records.longest_group - 1 if keep_negatives else 0)
    count = min(rules.range_max + taken, passages.candidates)
    progress = tqdm(total=len(records), desc="searching", unit=" queries", delay=2)
    for start in range(0, len(records), ROWS):
        scores_BK, numbers_BK = nearest(
            queries_BD[start : start + ROWS], corpus_ND[: passages.candidates], count, device
        )
        for row, (scores, numbers) in enumerate(zip(scores_BK, numbers_BK, strict=True), start=start):
            record = records[row]
            known = [passages.number_of[key] for key in record.known_positives]
            own = [passages.number_of[text_id(text.text)] for text in record.positives]
            positives = corpus_ND[known] @ queries_BD[row]
            own_scores = (corpus_ND[own] @ queries_BD[row]).tolist()
            itself = passages.number_of.get(text_id(record.query.text), -1)
            has = (
                [passages.number_of.get(text_id(text.text), -1) for text in record.negatives] if keep_negatives else []
            )
            out = np.isin(numbers, [*known, itself, *has])
            if rescore is not None:
                text = record.query.text
                scores = rescore(text, [passages[number].text for number in numbers])
                order = np.argsort(-scores, kind="stable")
                scores, numbers, out = scores[order], numbers[order], out[order]
                positives = rescore(text, [passage.text for passage in record.positives])
                own_scores = positives.tolist()
            places = rules.choose(row, scores, out, float(positives.min()), removed)
            yield Mined(record, numbers[places].tolist(), [float(s) for s in scores[places]], own_scores)
        progress.update(len(scores_BK))
    progress.close()


def load_rescorer(name: str) -> Callable[[str, list[str]], np.ndarray]:
    from sentence_transformers import CrossEncoder

    try:
        model = CrossEncoder(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--cross_encoder {name}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    return lambda query, texts: model.predict([(query, text) for text in texts], show_progress_bar=False)


# ---- one data set


def mine_set(records: RecordSet, extra: list[str], encode: Encode, rescore, args: argparse.Namespace) -> None:
    """Write OUT/<set>.jsonl, and say what every rule removed."""
    target, work = args.output / f"{records.name}.jsonl", args.output / f".{records.name}"
    if target.exists():
        print(f"{target} is there already")
        shutil.rmtree(work, ignore_errors=True)
        return
    passages = Passages(records, extra, args.corpus_only)
    work.mkdir(parents=True, exist_ok=True)
    vectors = (
        embed(encode, Queries(records), work / "queries.npy", f"{records.name} queries"),
        embed(encode, passages, work / "corpus.npy", f"{records.name} corpus"),
    )
    rules = Rules(**{name: getattr(args, name) for name in Rules.__dataclass_fields__})
    removed, counts, chosen, own = Counter(), Counter(), [], []
    aside = work / "rows.jsonl"
    with open(aside, "w", encoding="utf-8") as out:
        for mined in search(records, passages, vectors, rules, rescore, removed, args.keep_negatives):
            record = mined.record
            negatives = [passages[number] for number in mined.negatives]
            kept = record.negatives if args.keep_negatives else []
            row = {"query": _plain(record.query), "pos": [_plain(p) for p in record.positives]}
            row["neg"] = [_plain(passage) for passage in [*kept, *negatives]]
            if args.output_scores:
                row["scores"] = {"pos": mined.positive_scores, "neg": [None] * len(kept) + mined.scores}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            counts[len(negatives)] += 1
            chosen += mined.scores
            own += mined.positive_scores
    publish(aside, target)
    shutil.rmtree(work)
    print("\n".join(summary(target, passages.candidates, removed, counts, chosen, own, args.num_negatives)))


def run_settings_of(args: argparse.Namespace, data: list[RecordSet], extra: list[str]) -> dict[str, str]:
    """The flags, and what was read: all that the result depends on."""
    run_settings = {name: str(value) for name, value in vars(args).items() if name not in ("output", "data_cache")}
    run_settings |= {"input": str(Path(args.input)), "corpus": " ".join(map(str, args.corpus))}
    run_settings["data"] = ", ".join(f"{records.name} {records.fingerprint()}" for records in data)
    run_settings["corpus texts"] = _hash([text_id(text) for text in extra])
    own = args.output.resolve()  # it may be in the model's folder
    files = [p for p in sorted(Path(args.model).rglob("*")) if p.is_file() and own not in p.resolve().parents]
    run_settings["model files"] = _hash([[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files])
    return run_settings


def _hash(value: list) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def check_output(args: argparse.Namespace, run_settings: dict[str, str], data: list[RecordSet]) -> None:
    """Refuse an OUT that is in DATA, or that was mined with other flags or data, or holds others' files."""
    if args.output.resolve().is_relative_to(Path(args.input).resolve()):
        raise UserError(f"OUT {args.output} is in DATA, and would be read as data; name a folder elsewhere")
    path = args.output / RUN_FILE
    if not path.exists():
        for target in (args.output / f"{records.name}.jsonl" for records in data):
            if target.exists():
                raise UserError(f"{target} is there, and no {RUN_FILE} of the run that made it; name another folder")
        return
    try:
        earlier = dict(json.loads(path.read_text()))
    except ValueError as error:
        raise UserError(f"{path}: found a damaged file ({error}); name another folder") from error
    for name in run_settings:
        if run_settings[name] != earlier.get(name):
            raise UserError(
                f"{args.output} was mined with {name} {earlier.get(name)}, now {run_settings[name]}; "
                "name another folder"
            )


def _plain(text: Text) -> str | list[str]:
    return [text.instruction, text.text] if text.instruction else text.text


def summary(
    target: Path, corpus: int, removed: Counter, counts: Counter, chosen: list, own: list, wanted: int
) -> Iterator[str]:
    rows, candidates = counts.total(), sum(removed.values()) + len(chosen)
    yield f"{target}: {rows} queries, {corpus} passages, {len(chosen)} negatives"
    short = sum(count for number, count in counts.items() if number < wanted)
    yield f"  {short} queries got fewer than {wanted}, {counts[0]} none"
    yield f"  of {candidates} candidates:"
    for name, count in [*removed.items(), ("negatives", len(chosen))]:
        if count:
            yield f"    {name:38}{count:10d}  {count / candidates:6.1%}"
    for name, scores in (("positives", own), ("negatives", chosen)):
        if scores:
            counted, _ = np.histogram(np.clip(scores, BINS[0], BINS[-1]), BINS)
            picture = f"|{sparkline(counted)}| from {BINS[0]:.1f} to {BINS[-1]:.1f}"
            yield f"  scores of {name} {picture}, median {np.median(scores):.3f}"


# ---- the verb


def parse(argv: list[str]) -> argparse.Namespace:
    parser = verb_parser("mine", __doc__, EXAMPLES)
    add = parser.add_argument
    add("input", metavar="DATA", help="as --train_data of gritlm train")
    add("output", type=Path, metavar="OUT", help="folder for one jsonl file per data set")
    add("--model", required=True, help="a model folder, or what sentence-transformers loads")
    add("--corpus", nargs="+", type=Path, default=[], help="files of more passages (as for gritlm encode)")
    add("--corpus_only", action="store_true", help="look for negatives in --corpus only, not in the positives")
    add("--num_negatives", type=int, default=3, help="per query, default 3")
    add("--range_min", type=int, default=0, help="skip so many of the nearest that are left, default 0")
    add("--range_max", type=int, default=100, help="look at so many of the nearest, default 100")
    add(
        "--relative_margin",
        type=lambda text: None if text == "none" else float(text),
        default=0.05,
        help="default 0.05: at most 95%% of the positive's score; none: no such rule",
    )
    add("--absolute_margin", type=float, help="at most the positive's score less this")
    add("--max_score", type=float)
    add("--min_score", type=float)
    add("--sampling_strategy", choices=("top", "random"), default="top", help="default top")
    add("--seed", type=int, default=0, help="of random sampling")
    add("--keep_instruction", action="store_true", help="embed the instructions, too; by default only the texts")
    add("--keep_negatives", action="store_true", help="add to a row's own negatives; by default in their place")
    add("--cross_encoder", help="score each query's candidates again with this model, before the rules")
    add("--output_scores", action="store_true", help='write "scores": {"pos": [...], "neg": [...]} into each row')
    add("--data_cache", help="as of gritlm train")
    args = parser.parse_args(argv)
    if not 0 <= args.range_min < args.range_max or not 1 <= args.num_negatives <= args.range_max - args.range_min:
        raise UserError(
            f"--range_min {args.range_min} --range_max {args.range_max}: wanted room for --num_negatives "
            f"{args.num_negatives}, at least 1"
        )
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: wanted 0 or more")
    if args.corpus_only and not args.corpus:
        raise UserError("--corpus_only without --corpus leaves nothing to look in")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    quieten()
    data = load_records(args.input, args.data_cache)
    extra = [text for path in args.corpus for text in read_texts(path, may_be_empty=False)]
    run_settings = run_settings_of(args, data, extra)
    check_output(args, run_settings, data)
    encode = load_encoder(args.model, args.keep_instruction)
    rescore = load_rescorer(args.cross_encoder) if args.cross_encoder else None
    with written_aside(args.output / RUN_FILE) as aside:
        aside.write_text(json.dumps(run_settings, indent=2) + "\n")
    for records in data:
        mine_set(records, extra, encode, rescore, args)
    return 0
