"""Embed the queries and passages of a data set with any model, to files that an interrupted run continues."""

import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from gritlm.cli import quieten
from gritlm.data.parallel import submit_in_order
from gritlm.data.records import RecordSet
from gritlm.data.rows import text_id
from gritlm.errors import UserError
from gritlm.evaluation.models import Model
from gritlm.evaluation.search import nearest
from gritlm.evaluation.sets import Side
from gritlm.files import written_aside
from gritlm.models.text import Text

FLUSH_EVERY = 4096  # texts
SEARCHED = 1024  # queries at once


class Texts(Protocol):
    """Texts by number; each is read when it is needed."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> Text: ...
    def ids(self) -> np.ndarray: ...  # one for each text


class Queries:
    """The query of each row of a data set."""

    def __init__(self, records: RecordSet):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int, /) -> Text:
        return self.records[number].query

    def ids(self) -> np.ndarray:
        row_texts = self.records.row_texts
        return row_texts.ids[row_texts.starts[:-1]]


class Passages:
    """The distinct texts of an extra corpus, followed by the distinct positives of a data set.

    The first `candidates` passages may become negatives: all of them, or only those of the corpus.
    """

    field = "positives"

    def __init__(self, records: RecordSet, corpus: Sequence[str], corpus_only: bool):
        self.records = records
        self.number_of: dict[int, int] = {}  # text id -> the passage's number
        self.places: list[tuple[int, int] | str] = []  # (row, number in its field), or a text of the corpus
        for text in corpus:
            self._add(text_id(text), text)
        self.candidates = len(self)
        for row in range(len(records)):
            for number, key in enumerate(records.positive_ids(row).tolist()):
                self._add(key, (row, number))
        self.candidates = self.candidates if corpus_only else len(self)

    def _add(self, key: int, place: tuple[int, int] | str) -> None:
        if key not in self.number_of:
            self.number_of[key] = len(self.places)
            self.places.append(place)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int, /) -> Text:
        place = self.places[number]
        if isinstance(place, str):
            return Text("", place)
        return getattr(self.records[place[0]], self.field)[place[1]]

    def ids(self) -> np.ndarray:
        return np.fromiter(self.number_of, np.int64, len(self))


class OtherNegatives(Passages):
    """The distinct negatives of a data set that are none of its passages."""

    field = "negatives"

    def __init__(self, records: RecordSet, passages: Passages):
        self.records, self.number_of, self.places = records, {}, []
        for row in range(len(records) if records.longest_group > 1 else 0):
            for number, key in enumerate(records[row].negative_ids):
                if key not in passages.number_of:
                    self._add(key, (row, number))


class Encoder:
    """A model that encodes blocks of texts, in this process or in several.

    Args:
        model: as `find_model` found it.
        keep_instruction: encode each text with its instruction. Without it, no instruction is used at all.
        processes: how many encode, each on a GPU of its own if there are as many.
    """

    def __init__(self, model: Model, keep_instruction: bool, processes: int = 1):
        self.model, self.keep_instruction, self.processes = model, keep_instruction, processes
        model.show_progress = False
        if processes > 1:  # a fork of this process would hang in the threads of torch, and could not use CUDA
            context = multiprocessing.get_context("forkserver")
            self.pool = ProcessPoolExecutor(processes, context, _take_device, (model, keep_instruction))

    def load(self) -> None:
        """Load the model here, or in a first process.

        Raises:
            UserError: it does not load.
        """
        if self.processes < 2:
            self.model.load()
        else:
            self.pool.submit(_encode, [Text("", "a")], "query").result()

    def encode(self, texts: list[Text], side: Side) -> np.ndarray:
        """The vectors of texts, float32 (N, D)."""
        self.model.load()
        instructions = [text.instruction if self.keep_instruction else "" for text in texts]
        return self.model.encode([text.text for text in texts], side, instructions)

    def encode_blocks(self, blocks: Iterable[list[Text]], side: Side) -> Iterator[np.ndarray]:
        """`encode` of each block, in order. A block gives the same vectors in any process."""
        if self.processes < 2:
            yield from (self.encode(block, side) for block in blocks)
        else:
            yield from submit_in_order(self.pool, _encode, ((block, side) for block in blocks), self.processes)


_worker: Encoder


def _take_device(model: Model, keep_instruction: bool) -> None:
    global _worker
    _worker = Encoder(model, keep_instruction)
    quieten()
    if gpus := torch.cuda.device_count():
        number = int(multiprocessing.current_process().name.rpartition("-")[2])  # processes are numbered in order
        torch.cuda.set_device(number % gpus)


def _encode(texts: list[Text], side: Side) -> np.ndarray:
    return _worker.encode(texts, side)


def embed(encoder: Encoder, side: Side, texts: Texts, path: Path, name: str) -> np.ndarray:
    """The vectors of the texts, (N, D), memory-mapped from `path`. Those already in the file are not computed again.

    Raises:
        UserError: a vector is not finite.
    """
    counter = path.with_suffix(".done")
    done = int(counter.read_text(encoding="utf-8")) if counter.exists() else 0
    vectors = np.load(path, mmap_mode="r+") if done else None
    starts = range(done, len(texts), FLUSH_EVERY)
    blocks = ([texts[i] for i in range(start, min(start + FLUSH_EVERY, len(texts)))] for start in starts)
    with tqdm(total=len(texts), initial=done, desc=f"embedding {name}", unit=" texts", delay=2) as progress:
        for start, part in zip(starts, encoder.encode_blocks(blocks, side), strict=True):
            if not (finite := np.isfinite(part).all(axis=1)).all():
                text = texts[start + int(np.flatnonzero(~finite)[0])].text
                raise UserError(f"{name}: found a vector that is not finite, of {text[:60]!r}; the model is damaged")
            if vectors is None:
                vectors = np.lib.format.open_memmap(path, "w+", np.float32, (len(texts), part.shape[1]))
            vectors[start : start + len(part)] = part
            vectors.flush()
            with written_aside(counter) as aside:
                aside.write_text(str(start + len(part)), encoding="utf-8")
            progress.update(len(part))
    assert vectors is not None, "wanted at least one text"
    return vectors


def nearest_passages(
    queries_BD: np.ndarray, corpus_ND: np.ndarray, count: int, name: str
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each query, in order: its row, the scores of its `count` nearest passages and their numbers, best first."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tqdm(total=len(queries_BD), desc=name, unit=" queries", delay=2) as progress:
        for start in range(0, len(queries_BD), SEARCHED):
            queries = queries_BD[start : start + SEARCHED]
            scores_BK, numbers_BK = nearest(queries, corpus_ND, min(count, len(corpus_ND)), device)
            for row, (scores, numbers) in enumerate(zip(scores_BK, numbers_BK, strict=True), start=start):
                yield row, scores, numbers
            progress.update(len(queries))
