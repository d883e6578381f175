"""Embed the queries and passages of a data set with any model, to files that an interrupted run continues."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from gritlm.cli import quieten
from gritlm.data.parallel import submit_in_order
from gritlm.data.records import RecordSet
from gritlm.data.rows import text_id
from gritlm.data.vector_file import VectorFile, first_not_finite
from gritlm.errors import UserError
from gritlm.evaluation.models import Model
from gritlm.evaluation.search import nearest
from gritlm.evaluation.sets import Side
from gritlm.files import publish
from gritlm.models.text import Text

FLUSH_EVERY = 4096  # texts
SEARCHED = 1024  # queries at once


class Texts:
    """Texts by number, each read when it is needed, and an id for each."""

    def __init__(self, ids: np.ndarray, read: Callable[[int], Text]):
        self.ids, self._read = ids, read

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int, /) -> Text:
        return self._read(number)


def queries_of(records: RecordSet) -> Texts:
    """The query of each row of a data set."""
    row_texts = records.row_texts
    return Texts(row_texts.ids[row_texts.starts[:-1]], lambda row: records[row].query)


class Passages(Texts):
    """Distinct passages: of a data set, or texts of a corpus.

    Args:
        places: id -> row and number in its field, or a text of the corpus.
        field: of the rows: positives or negatives.
        candidates: how many of the first may become negatives.
    """

    def __init__(self, records: RecordSet, places: dict[int, tuple[int, int] | str], field: str, candidates: int = 0):
        self.number_of = {key: number for number, key in enumerate(places)}
        self.candidates, found = candidates, [*places.values()]

        def read(number: int) -> Text:
            place = found[number]
            return Text("", place) if isinstance(place, str) else getattr(records[place[0]], field)[place[1]]

        super().__init__(np.fromiter(places, np.int64, len(places)), read)


def passages_of(records: RecordSet, corpus: Sequence[str], corpus_only: bool) -> Passages:
    """The distinct texts of an extra corpus, then the distinct positives. Candidates are all, or the corpus only."""
    places: dict[int, tuple[int, int] | str] = {}
    for text in corpus:
        places.setdefault(text_id(text), text)
    candidates = len(places)
    for row in range(len(records)):
        for number, key in enumerate(records.positive_ids(row).tolist()):
            places.setdefault(key, (row, number))
    return Passages(records, places, "positives", candidates if corpus_only else len(places))


def other_negatives(records: RecordSet, passages: Passages) -> Passages:
    """The distinct negatives of a data set that are none of its passages."""
    places: dict[int, tuple[int, int] | str] = {}
    for row in range(len(records) if records.longest_group > 1 else 0):
        for number, key in enumerate(records[row].negative_ids):
            if key not in passages.number_of:
                places.setdefault(key, (row, number))
    return Passages(records, places, "negatives")


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
    file = VectorFile(path, len(texts), -(-len(texts) // FLUSH_EVERY))
    missing = [] if path.exists() else file.missing()
    parts = [range(n * FLUSH_EVERY, min((n + 1) * FLUSH_EVERY, len(texts))) for n in missing]
    blocks = ([texts[i] for i in part] for part in parts)
    with tqdm(total=sum(map(len, parts)), desc=f"embedding {name}", unit=" texts", delay=2) as progress:
        for number, part, vectors in zip(missing, parts, encoder.encode_blocks(blocks, side), strict=True):
            if (bad := first_not_finite(vectors)) is not None:
                text = texts[part[bad]].text
                raise UserError(f"{name}: found a vector that is not finite, of {text[:60]!r}; the model is damaged")
            file.write(number, part[0], vectors)
            progress.update(len(part))
    if not path.exists():
        publish(file.path, path)
        file.remove()
    return np.load(path, mmap_mode="r+")


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
