"""Which texts of an evaluation set a model was trained on, as far as its run.json and the files it names tell."""

import os
from collections.abc import Sequence, Set
from pathlib import Path

import numpy as np

from gritlm.data.records import RecordSet, load_records
from gritlm.data.rows import text_id
from gritlm.errors import UserError, first_line
from gritlm.evaluation.models import BM25, Model
from gritlm.evaluation.sets import EvaluationSet, RetrievalSet, StsSet
from gritlm.strict_json import read_json_object

UNKNOWN = "whether it has seen the sets' texts is not known"


def find_training_data(model: Model) -> tuple[list[RecordSet], list[str]]:
    """The training data of a model and of the models it was trained from; and lines on what is not known of them."""
    if model.kind in (BM25, "backbone") or model.folder is None:
        return [], []
    records: list[RecordSet] = []
    notes: list[str] = []
    folder, seen = model.folder.resolve(), set()
    while folder not in seen:
        seen.add(folder)
        file = next((path for path in (folder / "run.json", folder.parent / "run.json") if path.is_file()), None)
        if file is None or (file.parent != folder and not folder.name.startswith("checkpoint-")):
            break
        run = read_json_object(str(file))
        flags = {**run.get("flags", {}), **run.get("resolved", {})}
        path = os.path.join((run.get("starts") or [{}])[0].get("folder", ""), str(flags.get("train_data")))
        try:
            found = load_records(path, flags.get("data_cache"))
            rows = [f"{len(part)} rows, {part.fingerprint()}" for part in found]
            if rows != run.get("flags", {}).get("data", rows):
                notes.append(f"{model.name}: its training data {path} has changed since it was trained")
            if flags.get("eval_held_out"):
                notes.append(f"{model.name}: its run held rows of {path} out; here they count as trained on")
            records += found
        except (UserError, OSError) as error:
            why = f"cannot be read ({first_line(error)})" if os.path.exists(path) else "is not there"
            notes.append(f"{model.name}: its training data {path} {why}; {UNKNOWN}")
        folder = Path(str(flags.get("model_name_or_path"))).resolve()
    if len(seen) == 1 and not records and not notes:
        notes.append(f"{model.name}: found no run.json that names its training data; {UNKNOWN}")
    return records, notes


def count_trained_on(data: EvaluationSet, records: list[RecordSet], held_out: Set[int] = frozenset()) -> str:
    """How many queries, and how many relevant passages, are queries or positives of the training data; "" for none.

    Texts that are equal up to trailing white space count. `gritlm check-data --eval` also finds nearly equal ones.

    Args:
        held_out: ids of texts, without instructions, that are in the files and are not trained on.
    """
    passages: Sequence[str] = ()
    if isinstance(data, RetrievalSet):
        relevant = {key for grades in data.grades for key, grade in grades.items() if grade > 0}
        passages = [text for key, text in zip(data.corpus_ids, data.corpus, strict=True) if key in relevant]
        queries: Sequence[str] = data.queries
    else:
        queries = [*data.first, *data.second] if isinstance(data, StsSet) else data.test_texts
    left_out = np.array(list(held_out), dtype=np.int64)
    known = np.setdiff1d(np.concatenate([part.row_texts.ids for part in records]), left_out)
    instructions = {instruction for part in records for instruction in part.instructions}
    seen = _is_known(queries, known)
    for instruction in instructions:  # a query's id is of its instruction, too
        seen |= _is_known([f"{instruction}\n{query}" for query in queries], known)
    seen &= ~_is_known(queries, left_out)
    counts = [(int(seen.sum()), len(queries), "queries" if isinstance(data, RetrievalSet) else "texts")]
    if passages:
        counts.append((int(_is_known(passages, known).sum()), len(passages), "relevant passages"))
    if not any(count for count, _, _ in counts):
        return ""
    return " and ".join(f"{count} of {all_} {name}" for count, all_, name in counts) + " are in the training data"


def _is_known(texts: Sequence[str], known: np.ndarray) -> np.ndarray:
    return np.isin(np.array([text_id(text) for text in texts], dtype=np.int64), known)
