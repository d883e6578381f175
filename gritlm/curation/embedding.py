"""Embed the queries and passages of a data set with any model, to files that an interrupted run continues."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from gritlm.data.records import RecordSet
from gritlm.data.rows import text_id
from gritlm.errors import UserError, first_line
from gritlm.files import written_aside
from gritlm.gritlm import GritLM
from gritlm.models.hub import ANY_MODEL, model_folder
from gritlm.models.text import CONTRACT_FILE, Text

FLUSH_EVERY = 4096  # texts

Encode = Callable[[list[Text]], np.ndarray]  # texts -> float32 (N, D), unit vectors


class Texts(Protocol):
    """Texts by number; each is read when it is needed."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> Text: ...


class Queries:
    """The query of each row of a data set."""

    def __init__(self, records: RecordSet):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int, /) -> Text:
        return self.records[number].query


class Passages:
    """The distinct texts of an extra corpus, followed by the distinct positives of a data set.

    The first `candidates` passages may become negatives: all of them, or only those of the corpus.
    """

    def __init__(self, records: RecordSet, corpus: Sequence[str], corpus_only: bool):
        self.records = records
        self.number_of: dict[int, int] = {}  # text id -> the passage's number
        self.places: list[tuple[int, int] | str] = []  # (row, number of its positive), or a text of the corpus
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
        return Text("", place) if isinstance(place, str) else self.records[place[0]].positives[place[1]]


def load_encoder(model: str, keep_instruction: bool) -> Encode:
    """Load a model folder of `gritlm train`, or any model that sentence-transformers loads.

    Raises:
        UserError: neither loads it.
    """
    folder = model_folder(model, ANY_MODEL)
    load = _load_gritlm if (Path(folder) / CONTRACT_FILE).is_file() else _load_sentence_transformer
    encode = load(folder)
    if keep_instruction:
        return encode
    return lambda texts: encode([Text("", text.text) for text in texts])


def _load_gritlm(name: str) -> Encode:
    model = GritLM(name)

    def encode(texts: list[Text]) -> np.ndarray:
        vectors = np.empty((len(texts), model.model.embedding_dim), dtype=np.float32)
        for instruction in {text.instruction for text in texts}:
            rows = [i for i, text in enumerate(texts) if text.instruction == instruction]
            vectors[rows] = model.encode([texts[i].text for i in rows], instruction=instruction)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return encode


def _load_sentence_transformer(name: str) -> Encode:
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(name)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--model {name}: cannot be loaded: {first_line(error)}") from error

    def encode(texts: list[Text]) -> np.ndarray:
        joined = [text.instruction + text.text for text in texts]
        # The model's own prompt would be a second instruction.
        return model.encode(joined, prompt="", normalize_embeddings=True, show_progress_bar=False)

    return encode


def embed(encode: Encode, texts: Texts, path: Path, name: str) -> np.ndarray:
    """The vectors of the texts, (N, D), memory-mapped from `path`. Those already in the file are not computed again.

    Raises:
        UserError: a vector is not finite.
    """
    counter = path.with_suffix(".done")
    done = int(counter.read_text(encoding="utf-8")) if counter.exists() else 0
    vectors = np.load(path, mmap_mode="r+") if done else None
    with tqdm(total=len(texts), initial=done, desc=f"embedding {name}", unit=" texts", delay=2) as progress:
        for start in range(done, len(texts), FLUSH_EVERY):
            block = [texts[i] for i in range(start, min(start + FLUSH_EVERY, len(texts)))]
            part = encode(block)
            if not (finite := np.isfinite(part).all(axis=1)).all():
                text = block[int(np.flatnonzero(~finite)[0])].text
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
