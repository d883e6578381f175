"""Convert public data to the training format, hold out queries that do not leak into train, and write a card.

IN is a file with named columns (.csv, .tsv, .jsonl, .json, .parquet), a folder (BEIR, a clone from the hub), or
hub:NAME for a data set of the Hugging Face hub. The new folder OUT holds train/NAME.jsonl for TRAIN_DATA, held_out/ in
BEIR's format, and README.md.
"""

import argparse
import shutil
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from gritlm.cli import home_expanded, verb_parser
from gritlm.curation.held_out_rows import HeldOutRows, choose_held_out, write_held_out
from gritlm.curation.instructions import Instructions
from gritlm.curation.row_spool import RowSpool, keep_negatives, text_of
from gritlm.data.raw import BadRows, Columns, RawExample
from gritlm.data.roles import NEGATIVE, POSITIVE, QUERY
from gritlm.data.rows import parse_row, text_id
from gritlm.data.sources import SOURCE_FLAGS, open_source
from gritlm.errors import UserError
from gritlm.evaluation.prompts import TEMPLATE
from gritlm.files import written_aside

EXAMPLES = """examples:
  gritlm prepare pairs.csv out/ --instruction 'Given a question, retrieve passages that answer it'
  gritlm prepare triples.tsv out/ --no_header --held_out 1000                       MS MARCO: query, positive, negative
  gritlm prepare stsb.tsv out/ --label_column score --positive_above 3.9
  gritlm prepare stsb.tsv out/ --score_column score                  scored pairs, for --cosent_weight or --angle_weight
  gritlm prepare pairs.jsonl out/ --instruction_template 'query: ' --passage_instruction 'passage: '      as E5 has them
  gritlm prepare beir/scifact out/ --split train
  gritlm prepare hub:sentence-transformers/natural-questions out/ --licence cc-by-sa-3.0 --held_out 500"""

# ---- reading


@dataclass
class Counts:
    """What became of the rows and their texts."""

    dropped_negatives: int = 0  # they repeat a positive
    repeated_negatives: int = 0
    positives: int = 0  # of train
    negatives: array = field(default_factory=lambda: array("I"))  # of each row of train
    scores: array = field(default_factory=lambda: array("d"))  # of pairs


def training_row(example: RawExample, instructions: Instructions) -> dict:
    """An example in the training format, not yet checked."""
    positives, negatives = (
        [instructions.before_passage(text, example.where) for text in texts]
        for texts in (example.positives, example.negatives)
    )
    row: dict = {"query": instructions.before_query(example), "pos": positives, "neg": negatives}
    scores: dict = {"pos_scores": example.positive_scores, "neg_scores": example.negative_scores}
    scores["score"] = example.score
    return row | {name: values for name, values in scores.items() if values is not None}


def check_row(row: dict, where: str, counts: Counts) -> dict:
    """Check a row as training does, and remove negatives that repeat a text of the row.

    Returns:
        what `parse_row` makes of it.
    Raises:
        UserError: training would refuse the row, or its scores are not in step with its texts.
    """
    checked = parse_row(row, where)
    if checked["score_error"]:
        raise UserError(checked["score_error"])
    if checked["is_scored_pair"]:
        counts.scores.append(row["score"])
    if count := len(row["neg"]):
        first: dict[int, int] = {}
        for place, text in enumerate(row["neg"]):
            first.setdefault(text_id(text_of(text)), place)
        keep_negatives(row, [place for key, place in first.items() if key not in checked["pos_id"]])
        counts.dropped_negatives += checked["dropped_negatives"]
        counts.repeated_negatives += count - checked["dropped_negatives"] - len(row["neg"])
    return checked


def spool_rows(
    examples: Iterable[RawExample], instructions: Instructions, bad: BadRows, spool: RowSpool, counts: Counts
) -> None:
    """Check all examples and keep the good ones.

    Raises:
        UserError: at the first bad row, unless bad rows are skipped.
    """
    for example in tqdm(examples, "reading", unit=" rows", delay=2):
        row = training_row(example, instructions)
        try:
            checked = check_row(row, example.where, counts)
        except UserError as error:
            bad.add(error)
        else:
            spool.add(row, checked["query_id"], checked["pos_id"])
    spool.finish()


# ---- writing


def write_train(path: Path, spool: RowSpool, held: HeldOutRows, counts: Counts) -> None:
    path.parent.mkdir(parents=True)
    with open(path, "wb") as out:
        for line, positives, negatives in held.train_lines(spool):
            out.write(line)
            counts.negatives.append(negatives)
            counts.positives += positives


def card(
    args: argparse.Namespace, reading: list[str], counts: Counts, spool: RowSpool, held: HeldOutRows, bad: BadRows
) -> str:
    """The README of the data set. `reading`: lines about the columns and the instructions."""
    copies = []
    if held.rows:
        queries = len({text_id(text_of(row["query"])) for row in held.rows.values()})
        copies = [
            f"held out: {queries} queries in `held_out/` (BEIR format); neither they nor their positives are in train, "
            "whatever their case, punctuation and spacing",
            f"left out of train for that, or since at most one word in 12 differs: {held.dropped_rows} rows and "
            f"{held.dropped_negatives} negatives",
        ]
    scores, negatives = counts.scores, counts.negatives
    lines = [
        f"source: {args.source or args.input}",
        f"licence: {args.licence or 'unknown; look it up before you share anything made from it'}",
        *reading,
        f"train: {len(negatives)} rows in `train/{args.name}.jsonl`, {counts.positives} positives, "
        f"{min(negatives)} to {max(negatives)} negatives per row",
        *([f"scores: {min(scores):g} to {max(scores):g}; a higher one means more alike"] if scores else []),
        *copies,
        f"left out: {spool.repeated} repeated rows; {counts.dropped_negatives} negatives that repeat a positive of "
        f"their row; {counts.repeated_negatives} repeated negatives; {len(bad.messages)} bad rows"
        + (" (`skipped.txt`)" if bad.messages else ""),
        f"merged: {spool.merged} rows into an earlier row with the same query and positives",
        f"made by: `gritlm prepare`, seed {args.seed}",
    ]
    return "\n".join([f"# {args.name}", "", *(f"- {line}" for line in lines)]) + "\n"


# ---- the verb


def parse(argv: list[str]) -> argparse.Namespace:
    parser = verb_parser("prepare", __doc__, EXAMPLES)
    add = parser.add_argument
    add("input", type=home_expanded, metavar="IN", help="a file with named columns, a folder, or hub:NAME")
    add("output", type=Path, metavar="OUT", help="a new folder")
    add("--name", help="name of the data set; default: the name of IN")
    add("--instruction", default="", help=f"the task in one sentence; prepended to the queries as {TEMPLATE!r}")
    add(
        "--instruction_template",
        help="another form of that; one without {instruction} is prepended as it is: 'query: '",
    )
    add("--passage_instruction", default="", help="prepended to positives and negatives as it is: 'passage: '")
    add("--query_column", help=f"default: the first of {', '.join(QUERY)} in the file")
    add("--positive_column", help=f"one passage or a list; default: the first of {', '.join(POSITIVE)}")
    add("--negative_columns", nargs="+", help=f"default: all of {', '.join(NEGATIVE)}, negative_1, ...")
    add("--label_column", help="the column that tells whether the positive is one, such as a score or a class")
    add("--positive_above", type=float, help="number in --label_column above which it is one")
    add("--positive_labels", nargs="+", help="values in --label_column for which it is one, such as entailment")
    add("--score_column", help="the column of numbers that tells how alike the two texts of a pair are; kept as score")
    add("--ignore_columns", nargs="+", default=[], help="label-like columns left unread on purpose: a,b or a b")
    add("--accept_numbers", action="store_true", help="columns of numbers are texts, not ids")
    add("--no_header", action="store_true", help=".csv, .tsv: the columns are query, positive[, negative]")
    add("--split", help="split of a folder, of a hub data set or of a column named split; default train")
    add("--config", help="configuration (subset) of a hub data set")
    add("--held_out", type=int, default=0, help="number of rows to hold out for evaluation, default 0")
    add("--seed", type=int, default=0, help="seed of the random choice of held-out rows, default 0")
    add("--skip_bad", action="store_true", help="leave bad rows out and list them in skipped.txt")
    add("--source", help="the source named in the card; default: IN")
    add("--licence", help="the licence named in the card")
    args = parser.parse_args(argv)
    for name in ("held_out", "seed"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} {getattr(args, name)}: wanted 0 or more")
    if args.score_column and (args.label_column or args.held_out):
        other = "label_column" if args.label_column else "held_out"
        raise UserError(f"--score_column with --{other}: scored pairs have no positives; give one of the two")
    args.ignore_columns = [name for names in args.ignore_columns for name in names.split(",") if name]
    args.name = args.name or Path(args.input.removeprefix("hub:")).resolve().name.lstrip(".").split(".")[0]
    if not args.name or "/" in args.name or args.name.startswith("."):
        raise UserError(f"--name {args.name!r}: wanted a file name")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.output.exists():
        raise UserError(f"{args.output} exists; nothing is overwritten, name a new folder")
    instructions = Instructions(args.instruction, args.instruction_template, args.passage_instruction)
    names = (args.query_column, args.positive_column, args.negative_columns)
    label = (args.label_column, args.positive_above, args.positive_labels)
    columns = Columns(*names, *label, args.score_column, args.ignore_columns, args.accept_numbers)
    bad, counts = BadRows(args.skip_bad, " (--skip_bad leaves such rows out and lists them)"), Counts()
    source = open_source(args.input, columns, bad, args.split, args.config, args.no_header)
    for name in sorted(SOURCE_FLAGS - source.used):
        if not any(getattr(args, name) is unset for unset in (None, False)) and getattr(args, name) != []:
            raise UserError(f"--{name} has no effect on {args.input}, which is another kind of input")
    with written_aside(args.output) as aside:
        (temporary := aside / "temporary").mkdir(parents=True)
        spool = RowSpool(temporary)
        spool_rows(source.examples, instructions, bad, spool, counts)
        if not len(spool):
            raise UserError(f"{args.input}: found no good row to train on")
        if counts.scores and min(counts.scores) == max(counts.scores):
            found = f"found {counts.scores[0]:g} in all rows"
            raise UserError(f"--score_column {args.score_column}: {found}, wanted two values")
        held = choose_held_out(spool, args.held_out, args.seed)
        write_train(aside / "train" / f"{args.name}.jsonl", spool, held, counts)
        if not counts.negatives or (args.held_out and not held.rows):
            found = "no row that shares no query and no positive with others, nor near copies of them"
            if held.rows:
                found = f"no row left to train on, without {held.dropped_rows} near copies of held-out rows"
            raise UserError(f"--held_out {args.held_out}: found {found} ({len(spool)} rows in all)")
        shutil.rmtree(temporary)
        if held.rows:
            write_held_out(aside / "held_out", held.rows.values())
        if bad.messages:
            skipped = "\n".join(bad.messages) + "\n"
            (aside / "skipped.txt").write_text(skipped, encoding="utf-8", errors="backslashreplace")
        reading = [*source.reading.lines(), *instructions.lines()]
        # A column's name may hold half a surrogate pair.
        text = card(args, reading, counts, spool, held, bad)
        (aside / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")
    print((args.output / "README.md").read_text(encoding="utf-8"), end="")
    flags = " with --contrastive_weight 0 --cosent_weight 1" if args.score_column else ""
    print(f"to train on it: TRAIN_DATA={args.output / 'train'}{flags}")
    return 0
