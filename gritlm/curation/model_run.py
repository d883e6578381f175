"""What mine and filter share: their flags, the settings of a run, continuing it, and the vectors of a data set."""

import argparse
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gritlm.cli import home_expanded
from gritlm.curation.embedding import FLUSH_EVERY, Encoder, Passages, Texts, embed, queries_of
from gritlm.data.folders import describe_folder
from gritlm.data.labels import unread_notes
from gritlm.data.records import RecordSet, load_records
from gritlm.data.rows import text_id
from gritlm.data.texts import read_texts
from gritlm.errors import UserError
from gritlm.evaluation.models import BM25, find_model
from gritlm.evaluation.sets import Side
from gritlm.files import publish, write_text

# Flags that have no effect, or many spellings.
BY_CONTENT = ("input", "corpus", "output", "data_cache", "vectors", "processes", "ignore_columns")


def add_flags(parser: argparse.ArgumentParser, model_is_required: bool) -> None:
    add = parser.add_argument
    add("input", type=home_expanded, metavar="DATA", help="a file or folder, as --train_data of gritlm train")
    add("output", type=Path, metavar="OUT", help="folder for one jsonl file per data set")
    any_model = "a folder of gritlm train, or any model that sentence-transformers loads"
    add("--model", type=home_expanded, required=model_is_required, help=any_model)
    add("--corpus", nargs="+", type=Path, default=[], help="files with more passages, as for gritlm encode")
    add("--keep_instruction", action="store_true", help="embed texts with their instructions; default: without")
    add("--processes", type=int, help="how many processes embed, default one for each GPU")
    add("--vectors", type=Path, metavar="FOLDER", help="keep the vectors here for a later run; default: removed")
    add("--data_cache", type=home_expanded, help="folder for the memory-mapped data, as in gritlm train")
    add("--ignore_columns", nargs="+", default=[], help="label- or split-like keys left unread on purpose: a,b or a b")


@dataclass
class ModelRun:
    """A run of `verb` over data sets: a file for each, in the folder OUT, and a file of the run's settings."""

    verb: str
    args: argparse.Namespace
    data: list[RecordSet]
    corpus: list[str]
    encoder: Encoder | None  # None: a run without a model

    def is_done(self, records: RecordSet) -> bool:
        """Whether an earlier start has finished a data set. Says so."""
        if done := self.target(records).exists():
            print(f"{self.target(records)} exists already, skipped")
            shutil.rmtree(self.work(records), ignore_errors=True)
        return done

    def target(self, records: RecordSet) -> Path:
        return self.args.output / f"{records.name}.jsonl"

    def work(self, records: RecordSet) -> Path:
        """The folder of a data set's unfinished files."""
        folder = self.args.output / f".{records.name}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def embed(self, records: RecordSet, texts: Texts, side: Side, kind: str) -> np.ndarray:
        """The vectors of texts of a data set. A file of vectors is named by the model and the texts."""
        assert self.encoder is not None
        about: list[object] = [self.encoder.model.identity, side, self.encoder.keep_instruction, FLUSH_EVERY]
        if self.encoder.keep_instruction and side == "passage":  # the ids are without instructions
            about.append(records.fingerprint())
        key = hashlib.sha256(json.dumps(about).encode() + texts.ids.tobytes()).hexdigest()[:16]
        folder = self.args.vectors or self.work(records)
        folder.mkdir(parents=True, exist_ok=True)
        return embed(self.encoder, side, texts, folder / f"{kind}-{key}.npy", f"{records.name} {kind}")

    def vectors(self, records: RecordSet, passages: Passages) -> tuple[np.ndarray, np.ndarray]:
        queries = self.embed(records, queries_of(records), "query", "queries")
        return queries, self.embed(records, passages, "passage", "corpus")

    def finish(self, records: RecordSet, aside: Path) -> Path:
        """Publish a data set's file, and remove what it was made from."""
        publish(aside, self.target(records))
        shutil.rmtree(self.work(records))
        return self.target(records)


def open_run(verb: str, args: argparse.Namespace, **more_settings: str) -> ModelRun:
    """Read the data, load the model, and check that OUT is new or that of the same run.

    Raises:
        UserError: one of these fails; nothing is written then.
    """
    if args.processes is not None and args.processes < 1:
        raise UserError(f"--processes {args.processes}: wanted 1 or more")
    data = load_records(args.input, args.data_cache)
    if left_out := describe_folder(args.input):
        print(f"{args.input}:", *left_out, sep="\n")
    ignored = {name for names in args.ignore_columns for name in names.split(",")}
    for records in data:
        for line in _unread_keys(verb, records, ignored):
            print(line)
    corpus = [text for path in args.corpus for text in read_texts(path, may_be_empty=False)]
    settings = {name: str(value) for name, value in vars(args).items() if name not in BY_CONTENT} | more_settings
    settings["data"] = ", ".join(f"{records.name} {records.fingerprint()}" for records in data)
    settings["corpus texts"] = hash_of([text_id(text) for text in corpus])
    encoder = None
    if args.model:
        model = find_model(args.model, None, None, None, args.output)
        if model.kind == BM25:
            raise UserError(f"--model {BM25}: found no vectors, wanted an embedding model")
        print(*model.notes, sep="\n", end="\n" * bool(model.notes))
        if Path(args.model).is_dir():
            settings["model"] = os.path.abspath(args.model)
        settings["model files"] = model.identity["files"]
        encoder = Encoder(model, args.keep_instruction, args.processes or max(torch.cuda.device_count(), 1))
    path = args.output / f"{verb}.json"
    _check_output(path, args, settings, data)
    if encoder and not all((args.output / f"{records.name}.jsonl").exists() for records in data):
        encoder.load()
    write_text(path, json.dumps(settings, indent=2) + "\n")
    return ModelRun(verb, args, data, corpus, encoder)


def _unread_keys(verb: str, records: RecordSet, ignored: Collection[str]) -> Iterator[str]:
    """A line on the keys that the verb does not read, and mine does not write.

    Raises:
        UserError: one of them seems to be a label or a split: mined rows would all be positives.
    """
    keys = Counter(records.unread)
    if verb == "mine":  # writes the scores that it finds
        scored, pairs = records.scored_rows
        keys += Counter(score=pairs, scores=scored - pairs)  # leaves out those of no row
    names, unclear = unread_notes(keys)
    if unclear := [name for name in unclear if name not in ignored]:
        raise UserError(
            f"{records.name}: found the key {unclear[0]!r} in {keys[unclear[0]]} rows, which seems to tell positives "
            f"from others, or train from test; {verb} does not read it. gritlm prepare does (--label_column, "
            f"--split); --ignore_columns {','.join(unclear)} takes all rows"
        )
    if names:
        does = "left out of the output" if verb == "mine" else "not read, but kept"
        found = ", ".join(f"{name!r} ({keys[name]} rows)" for name in names)
        yield f"{records.name}: keys that are {does}: {found}"


def hash_of(value: list) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def _check_output(path: Path, args: argparse.Namespace, settings: dict[str, str], data: list[RecordSet]) -> None:
    """Refuse an OUT inside DATA, an OUT with files of other programs, and an OUT of a run with other settings."""
    if args.output.resolve().is_relative_to(Path(args.input).resolve()):
        raise UserError(f"OUT {args.output} is in DATA, and would be read as data; name a folder elsewhere")
    if not path.exists():
        for target in (args.output / f"{records.name}.jsonl" for records in data):
            if target.exists():
                raise UserError(f"{target} exists without the {path.name} of its run; name another folder")
        return
    try:
        earlier = dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{path}: found a damaged file ({error}); name another folder") from error
    for name in settings | earlier:
        now, before = settings.get(name), earlier.get(name)
        if now != before:
            raise UserError(
                f"{args.output} was made by {path.stem} with {name} {before}, now {now}; name another folder"
            )
