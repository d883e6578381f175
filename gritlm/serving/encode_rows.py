"""Encode every distinct text of training data once: the vectors of a teacher, or of a guide, for `gritlm train`."""

import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gritlm import __version__
from gritlm.data.records import RecordSet, load_records
from gritlm.data.teacher_vectors import ABOUT, IDS, VECTORS
from gritlm.errors import UserError
from gritlm.evaluation.models import BM25, Model, find_model
from gritlm.evaluation.sets import Side
from gritlm.files import written_aside
from gritlm.models.text import Text

BLOCK = 4096  # texts read and encoded together


def encode_rows(data: Path, folder: Path, name: str, keep_instruction: bool, chunk_tokens: int | None) -> str:
    """Write the folder of a teacher's vectors. Returns a line that says what is in it.

    Args:
        data: a file or folder, as --train_data of `gritlm train`.
        name: a folder of `gritlm train`, or any model that sentence-transformers loads.
        keep_instruction: encode texts with the instructions of their rows, in place of the model's own prompts.
    Raises:
        UserError: the data or the model cannot be read, or a vector is not finite.
    """
    records = load_records(data)
    model = find_model(name, None, None, chunk_tokens, folder)
    if model.kind == BM25:
        raise UserError(f"--model {BM25}: found no vectors, wanted an embedding model")
    texts = DistinctTexts(records)
    model.load()
    with written_aside(folder) as aside:
        aside.mkdir(parents=True)
        np.save(aside / IDS, texts.ids)
        vectors: np.memmap | None = None
        with tqdm(total=len(texts.ids), desc="encoding", unit=" texts", delay=2) as progress:
            for start in range(0, len(texts.ids), BLOCK):
                part = _encode(model, texts.block(start), keep_instruction)
                if vectors is None:
                    shape = len(texts.ids), part.shape[1]
                    vectors = np.lib.format.open_memmap(aside / VECTORS, "w+", np.float16, shape)
                vectors[start : start + len(part)] = part
                progress.update(len(part))
        assert vectors is not None
        vectors.flush()
        about = {
            "model": model.name,
            "model files": model.identity["files"],
            "instructions": "of the rows" if keep_instruction else "of the model",
            "data": {record_set.name: record_set.fingerprint() for record_set in records},
            "gritlm": __version__,
        }
        (aside / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return f"{len(vectors)} vectors of width {vectors.shape[1]} in {folder}, of all texts of {len(records)} data sets"


def _encode(model: Model, texts: list[tuple[Side, Text]], keep_instruction: bool) -> np.ndarray:
    """Unit vectors of a block, in order."""
    found: np.ndarray | None = None
    for side in ("query", "passage"):
        rows = [row for row, (own, _) in enumerate(texts) if own == side]
        if not rows:
            continue
        instructions = [texts[row][1].instruction for row in rows] if keep_instruction else None
        part = model.encode([texts[row][1].text for row in rows], side, instructions)
        if found is None:
            found = np.empty((len(texts), part.shape[1]), np.float32)
        found[rows] = part
    assert found is not None
    norms = np.linalg.norm(found, axis=1, keepdims=True)
    if not np.isfinite(norms).all() or not norms.all():
        text = texts[int(np.flatnonzero(~(np.isfinite(norms) & (norms > 0)).ravel())[0])][1].text
        raise UserError(f"found a vector that is zero or not finite, of {text[:60]!r}; the model is damaged")
    return found / norms


class DistinctTexts:
    """The texts of data sets by their ids, in rising order: queries by `query_id`, passages by `text_id`."""

    def __init__(self, records: list[RecordSet]):
        self.records = records
        parts = [record_set.text_places() for record_set in records]
        self.ids, first = np.unique(np.concatenate([ids for ids, *_ in parts]), return_index=True)
        numbers = np.repeat(np.arange(len(parts)), [len(ids) for ids, *_ in parts])
        places = [np.concatenate(columns) for columns in list(zip(*parts, strict=True))[1:]]
        self.places = [column[first] for column in (numbers, *places)]  # data set, row, field, number in the field

    def block(self, start: int) -> list[tuple[Side, Text]]:
        """The texts from a place in `ids` on, each with its side."""
        found: list[tuple[Side, Text]] = []
        for number, row, field, index in zip(*(column[start : start + BLOCK] for column in self.places), strict=True):
            raw = self.records[number].raw(int(row))
            if field == 0:
                found.append(("query", Text(**raw["query"])))
            else:
                texts = raw["pos" if field == 1 else "neg"]
                found.append(("passage", Text(texts["instruction"][index], texts["text"][index])))
        return found
