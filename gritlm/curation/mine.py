"""Mine hard negatives: for each query the nearest passages, by any embedding model, that are not its positives.

The candidates of a data set are its own positives, an extra corpus, or both. The rules and their names are those of
sentence-transformers' `mine_hard_negatives`.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gritlm.cli import home_expanded, quieten, verb_parser
from gritlm.curation.embedding import Passages, nearest_passages, passages_of
from gritlm.curation.histogram import histogram
from gritlm.curation.model_run import ModelRun, add_flags, open_run
from gritlm.curation.near_copies import UNSPACED, is_near_copy, normal_text
from gritlm.curation.rules import KNOWN, choose, number, share_or_none
from gritlm.data.records import Record, RecordSet
from gritlm.data.rows import text_id
from gritlm.errors import UserError, first_line
from gritlm.models.hub import ANY_MODEL, model_folder
from gritlm.models.text import Text

EXAMPLES = """examples:
  gritlm mine data/ mined/ --model Qwen/Qwen3-Embedding-0.6B
  gritlm mine pairs.jsonl mined/ --model outputs/run --corpus corpus.jsonl --num_negatives 7 --sampling_strategy random
after an interruption, the same command continues the run"""

Rescore = Callable[[str, list[str]], np.ndarray]  # query, passages -> scores


# ---- searching
# mine_hard_negatives itself holds all texts, all embeddings and a slice of scores as wide as the corpus in memory. It
# cannot continue a run, and it does not know that a query has positives in several rows.


@dataclass
class Mined:
    """The negatives of one row, and the scores of those and of its positives."""

    record: Record
    kept: list[Text]  # of its own negatives
    negatives: list[Text]
    scores: list[float]
    positive_scores: list[float]


def search(
    records: RecordSet,
    passages: Passages,
    vectors: tuple[np.ndarray, np.ndarray],
    args: argparse.Namespace,
    rescore: Rescore | None,
    removed: Counter[str],
) -> Iterator[Mined]:
    """Mine every row, in order. `vectors` are those of the queries and of the passages."""
    queries_BD, corpus_ND = vectors
    keeps_own = args.fill or args.keep_negatives
    positives_of = positives_by_normal_query(records)
    # The query's positives and its own negatives take places among the nearest, so search for that many more.
    keys = max([records.most_positives, *map(len, positives_of.values())])
    taken = keys + (records.longest_group - 1 if keeps_own else 0)
    for row, scores, numbers in nearest_passages(
        queries_BD, corpus_ND[: passages.candidates], args.range_max + taken, "searching"
    ):
        record = records[row]
        known = [passages.number_of[key] for key in sorted(positives_of.get(row, record.known_positives))]
        own = [passages.number_of[key] for key in record.positive_ids]
        known_scores, own_scores = corpus_ND[known] @ queries_BD[row], corpus_ND[own] @ queries_BD[row]
        texts = [record.query, *(passages[number] for number in known)]
        kept = [text for text in record.negatives if keeps_own and not _is_copy(text, texts)]
        others = [text_id(text.text) for text in (record.query, *kept)]
        excluded = np.isin(numbers, [*known, *(passages.number_of.get(key, -1) for key in others)])
        if rescore is not None:
            text = record.query.text
            scores = rescore(text, [passages[number].text for number in numbers])
            order = np.argsort(-scores, kind="stable")
            scores, numbers, excluded = scores[order], numbers[order], excluded[order]
            known_scores = own_scores = rescore(text, [passage.text for passage in record.positives])
        wanted = max(0, args.num_negatives - len(kept)) if args.fill else args.num_negatives
        texts += kept
        copies: list[int] = []
        while True:  # only what is chosen is compared: few texts are read
            counts: Counter[str] = Counter()
            places = choose(args, row, scores, excluded, float(known_scores.min()), counts, wanted)
            found = [place for place in places if _is_copy(passages[numbers[place]], texts)]
            if not found:
                break
            copies += found
            excluded[found] = True
        counts[KNOWN] -= len(copies)
        counts["near copy of one of these"] += len(copies)
        removed.update(counts)
        chosen = [passages[number] for number in numbers[places].tolist()]
        yield Mined(record, kept, chosen, scores[places].tolist(), own_scores.tolist())


def is_titled_copy(a: str, b: str) -> bool:
    """Whether two texts of three words or more are equal but for a title in front of one, no longer than the rest."""
    short, long = sorted((a, b), key=len)
    words = len(short.split()) + len(UNSPACED.findall(short)) / 2
    short, long = normal_text(short), normal_text(long)
    return words >= 3 and long.endswith(short) and len(long) <= 2 * len(short)


def _is_copy(passage: Text, texts: list[Text]) -> bool:
    return any(is_near_copy(passage.text, text.text) or is_titled_copy(passage.text, text.text) for text in texts)


def positives_by_normal_query(records: RecordSet) -> dict[int, set[int]]:
    """The ids of all positives of a row's query, for rows whose query others spell in another case or punctuation."""
    parts = (batch["query"] for batch in records.batches)
    ids = (text_id(f"{row['instruction']}\n{normal_text(row['text'])}") for part in parts for row in part.to_pylist())
    _, groups, counts = np.unique(np.fromiter(ids, np.int64, len(records)), return_inverse=True, return_counts=True)
    several = np.flatnonzero(counts[groups] > 1).tolist()
    found: dict[int, set[int]] = {}
    for row in several:
        found.setdefault(int(groups[row]), set()).update(records.positive_ids(row).tolist())
    return {row: found[int(groups[row])] for row in several}


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
    copies: int = 0  # own negatives that copy a positive
    negative_scores: list[float] = field(default_factory=list)
    positive_scores: list[float] = field(default_factory=list)

    def summary(self, target: Path, candidates: int, wanted: int) -> Iterator[str]:
        found, ranked = len(self.negative_scores), sum(self.removed.values()) + len(self.negative_scores)
        yield f"{target}: {self.queries.total()} queries, {candidates} passages, {found} negatives"
        short = sum(count for number, count in self.queries.items() if number < wanted)
        yield f"  {short} queries have fewer than {wanted}, {self.queries[0]} none"
        if self.copies:
            yield f"  {self.copies} negatives of the rows were near copies of their query or its positives: removed"
        yield f"  of {ranked} candidates:"
        for name, count in [*self.removed.items(), ("negatives", found)]:
            if count:
                yield f"    {name:38}{count:10d}  {count / ranked:6.1%}"
        for name, scores in (("positives", self.positive_scores), ("negatives", self.negative_scores)):
            if scores:
                yield f"  scores of {name} {histogram(scores)}"


def mine_set(run: ModelRun, records: RecordSet, rescore: Rescore | None) -> None:
    """Write OUT/NAME.jsonl for one data set, and print how many candidates each rule removed."""
    if run.is_done(records):
        return
    args = run.args
    passages = passages_of(records, run.corpus, args.corpus_only)
    vectors = run.vectors(records, passages)
    tally, aside = Tally(), run.work(records) / "rows.jsonl"
    with open(aside, "w", encoding="utf-8") as out:
        for mined in search(records, passages, vectors, args, rescore, tally.removed):
            record, negatives = mined.record, [*mined.kept, *mined.negatives]
            row: dict[str, object] = {"query": _plain(record.query)}
            row |= {"pos": [*map(_plain, record.positives)], "neg": [*map(_plain, negatives)]}
            if args.output_scores:
                row["scores"] = {"pos": mined.positive_scores, "neg": [None] * len(mined.kept) + mined.scores}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            tally.queries[len(mined.negatives) + (len(mined.kept) if args.fill else 0)] += 1
            if args.fill or args.keep_negatives:
                tally.copies += len(record.negatives) - len(mined.kept)
            tally.negative_scores += mined.scores
            tally.positive_scores += mined.positive_scores
    print("\n".join(tally.summary(run.finish(records, aside), passages.candidates, args.num_negatives)))


def _plain(text: Text) -> str | list[str]:
    return [text.instruction, text.text] if text.instruction else text.text


# ---- the verb


def parse(argv: list[str]) -> argparse.Namespace:
    parser = verb_parser("mine", __doc__, EXAMPLES)
    add_flags(parser, model_is_required=True)
    add = parser.add_argument
    add("--corpus_only", action="store_true", help="take negatives from --corpus only, not from the data's positives")
    add("--num_negatives", type=int, default=3, help="negatives per query, default 3")
    add("--range_min", type=int, default=0, help="skip this many of the nearest candidates, default 0")
    add("--range_max", type=int, default=100, help="choose among this many of the nearest candidates, default 100")
    add(
        "--relative_margin",
        type=share_or_none,
        default=0.05,
        help="default 0.05: a negative scores at most 95%% of the lowest-scored positive; none: no such rule",
    )
    add("--absolute_margin", type=number, help="a negative scores at least this much below the lowest-scored positive")
    add("--max_score", type=number, help="a negative scores at most this")
    add("--min_score", type=number, help="a negative scores at least this")
    add(
        "--sampling_strategy",
        choices=("top", "random"),
        default="top",
        help="nearest first, or a random draw; default top",
    )
    add("--seed", type=int, default=0, help="seed of random sampling, default 0")
    add("--keep_negatives", action="store_true", help="add to the negatives of a row; default: replace them")
    add("--fill", action="store_true", help="keep the negatives of a row, and add only up to --num_negatives")
    add(
        "--cross_encoder",
        type=home_expanded,
        help="score the candidates of each query again with this model before the rules apply",
    )
    add("--output_scores", action="store_true", help='write "scores": {"pos": [...], "neg": [...]} into each row')
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
    rescore = load_rescorer(args.cross_encoder) if args.cross_encoder else None
    run = open_run("mine", args)
    for records in run.data:
        mine_set(run, records, rescore)
    return 0
