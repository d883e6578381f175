"""Read evaluation sets: BEIR folders, and files whose columns tell their kind.

A query and its positives, as in a file for training, make a retrieval set whose corpus is all passages of the file. Two
texts and a score make an STS set, a text and a label a classification set.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from gritlm.data.beir import BeirFolder, find_beir, is_beir, read_by_id
from gritlm.data.cells import is_null
from gritlm.data.columns import examples_of
from gritlm.data.folders import list_files
from gritlm.data.labels import is_split
from gritlm.data.qrels import read_qrels
from gritlm.data.raw import BadRows, Columns, Reading
from gritlm.data.roles import POSITIVE
from gritlm.data.rows import parse_row, text_id
from gritlm.data.tables import ENDINGS, objects, read_rows
from gritlm.errors import UserError
from gritlm.evaluation.metrics import DEPTH
from gritlm.evaluation.sets import ClassificationSet, EvaluationSet, RetrievalSet, StsSet, own_passages
from gritlm.models.text import titled

QRELS = (".tsv", ".tsv.gz")
# Usual column names, by preference.
QUERIES = ("query", "anchor", "question")
PAIRS = (("sentence1", "sentence2"), ("text1", "text2"), ("sentence_A", "sentence_B"))
SCORES = ("score", "similarity_score", "similarity", "relatedness_score", "label")
TEXTS = ("text", "sentence", "content")
LABELS = ("label", "label_text", "class", "category")
KINDS = "wanted query and pos (retrieval), sentence1, sentence2 and score (STS), or text and label (classification)"

Rows = Iterator[tuple[str, dict]]  # (file:line, row)


def read_sets(paths: list[str]) -> list[EvaluationSet]:
    """Read every set that the paths name: a BEIR folder, one of its qrels files, another file, or a folder of these.

    Raises:
        UserError: a path names no set, or something in it is wrong.
    """
    found = {place.resolve(): place for path in paths for place in _places(path)}  # each once
    places = list(found.values())
    return [
        _read_beir(place, name) if place.is_dir() or _is_qrels(place) else _read_file(place, name)
        for place, name in zip(places, _names(places), strict=True)
    ]


def _places(name: str) -> list[Path]:
    """The BEIR folders and the files that a path names."""
    path, endings = Path(name), ", ".join(ENDINGS)
    if not name.strip():  # Path("") is the working directory
        raise UserError("found an empty name of an evaluation set, wanted a file or a folder")
    if path.is_file():
        if not path.name.endswith(ENDINGS):
            raise UserError(f"{path}: found another ending, wanted one of {endings}")
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: found no such file or folder, wanted an evaluation set")
    files = [file for file in list_files(path) if file.name.endswith(ENDINGS)]
    folders = {path, *(above for file in files for above in file.parents[:2] if path in above.parents)}
    beir = {folder for folder in folders if is_beir(folder)}
    places = sorted([*beir, *(file for file in files if beir.isdisjoint(file.parents))])
    if not places:
        raise UserError(f"{path}: found no evaluation set in it, wanted BEIR folders or files ({endings})")
    return places


def _is_qrels(path: Path) -> bool:
    return path.parent.name == "qrels" and path.name.endswith(QRELS)


def _stem(path: Path) -> str:
    return next((path.name.removesuffix(ending) for ending in ENDINGS if path.name.endswith(ending)), path.name)


def _names(places: list[Path]) -> list[str]:
    """The name of each set's file or folder, with the folders above it where two sets would have one name."""
    parts = [[*(p.parent.parent if _is_qrels(p) else p.parent).absolute().parts, _stem(p.absolute())] for p in places]
    lengths = [2 if _is_qrels(place) else 1 for place in places]
    while True:
        names = ["-".join(part[-length:]) for part, length in zip(parts, lengths, strict=True)]
        twice = [number for number, name in enumerate(names) if names.count(name) > 1]
        if not twice:
            return names
        if any(lengths[number] > len(parts[number]) for number in twice):
            found = " and ".join(str(places[number]) for number in twice)
            raise UserError(f"{found}: found two sets of one name, wanted names that differ without their endings")
        lengths = [length + (number in twice) for number, length in enumerate(lengths)]


def _notes(*counts: tuple[int, str]) -> list[str]:
    return [f"{what}: {count}" for count, what in counts if count]


# ---- BEIR


def _read_beir(place: Path, name: str) -> RetrievalSet:
    root = place.parent.parent if _is_qrels(place) else place
    folder = find_beir(root)
    if folder is None:
        raise UserError(f"{root}: found no corpus and queries, wanted a BEIR folder")
    files = [place] if _is_qrels(place) else _choose_qrels(folder)
    queries, corpus = _read_texts(folder.queries, "queries"), _read_texts(folder.corpus, "corpus")
    qrels, grades = files[0], dict[str, dict[str, int]]()
    for where, query, passage, grade in itertools.chain.from_iterable(read_qrels(file, BadRows()) for file in files):
        if not grade.is_integer():
            raise UserError(f"{where}: found the score {grade}, wanted a whole number")
        earlier = grades.setdefault(query, {}).setdefault(passage, int(grade))
        if earlier != grade:
            found = f"the scores {earlier} and {int(grade)} for query {query!r} and passage {passage!r}"
            raise UserError(f"{where}: found {found}, wanted one")
    if not grades:
        raise UserError(f"{qrels}: found no judgement, wanted query-id, corpus-id and score a line")
    known = [query for query in grades if query in queries]
    judged = [key for query in known for key in grades[query]]
    missing = sum(key not in corpus for key in judged)
    for kind, ids, lost in (("query", grades, len(grades) - len(known)), ("passage", judged, missing)):
        if lost == len(ids):
            source = (folder.queries if kind == "query" else folder.corpus)[0]
            raise UserError(f"{qrels}: found none of its {lost} {kind} ids in {source}, wanted all of them")
    relevant = [any(grade > 0 and key in corpus for key, grade in grades[query].items()) for query in known]
    if not any(relevant):
        raise UserError(f"{qrels}: found no score above 0 for a passage of the corpus, wanted at least one")
    notes = _notes(
        (len(grades) - len(known), "queries of the qrels that the queries file lacks, left out"),
        (missing, "judged passages that the corpus lacks, counted as not found"),
        (relevant.count(False), "queries without a relevant passage in the corpus, counted as 0"),
        (sum(not text.strip() for text in corpus.values()), "blank passages"),
    )
    texts = [queries[query] for query in known]
    graded = [grades[query] for query in known]
    return _noted(RetrievalSet(name, texts, known, [*corpus.values()], [*corpus], graded, notes=notes))


def _noted(data: RetrievalSet) -> RetrievalSet:
    data.notes.extend(_notes((len(own_passages(data)), "passages that are the query itself, never counted for it")))
    if len(data.corpus) <= DEPTH:
        data.notes.append(f"passages in the corpus: {len(data.corpus)}, so recall@{DEPTH} says nothing")
    return data


def _choose_qrels(folder: BeirFolder) -> list[Path]:
    splits = folder.qrels
    for split in ("test", "dev", *(splits if len(splits) == 1 else ())):
        if split in splits:
            return splits[split]
    found = f"the splits {', '.join(splits)}" if splits else "no .tsv file"
    raise UserError(f"{folder.path / 'qrels'}: found {found}, wanted test.tsv or dev.tsv, or the path of another split")


def _read_texts(files: list[Path], kind: str) -> dict[str, str]:
    """The texts of the queries or of the corpus by id."""
    texts: dict[str, str] = {}
    for where, key, row in read_by_id(files, kind, BadRows()):
        if key in texts:
            raise UserError(f"{where}: found the _id {key!r} a second time, wanted it once")
        if kind == "queries":
            row.pop("title", None)
        texts[key] = titled(row, where)
        if kind == "queries" and not texts[key].strip():
            raise UserError(f"{where}: found an empty query, wanted a text")
    return texts


# ---- files


def _read_file(path: Path, name: str) -> EvaluationSet:
    rows = objects(read_rows(path, BadRows()), BadRows())
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path}: found no row, wanted at least one")
    columns, rows = list(first[1]), itertools.chain([first], rows)

    def usual(names: Iterable[str]) -> str | None:
        return next((name for name in names if name in columns), None)

    pair = next((pair for pair in PAIRS if {*pair} <= {*columns}), None)
    text, score, label = usual(TEXTS), usual(SCORES), usual(LABELS)
    if usual(QUERIES) and usual(POSITIVE):
        if (graded := score or label) and not usual(("pos", "positive", "positives")):
            raise UserError(f"{path}: found the column {graded} beside pairs, wanted graded pairs as a BEIR folder")
        try:
            return _read_pairs(path, name, next(filter(is_split, columns), None))
        except UserError as error:  # examples_of names flags, which gritlm evaluate lacks
            hint = " (a flag of gritlm prepare: it writes a file that is read here)" if "--" in str(error) else ""
            raise UserError(f"{error}{hint}") from error
    if pair and score:
        return _read_sts(path, name, rows, pair, score)
    if text and label:
        return _read_labels(path, name, rows, text, label)
    raise UserError(f"{path}: found the columns {', '.join(columns)}; {KINDS}")


def _read_pairs(path: Path, name: str, split: str | None) -> RetrievalSet:
    """The id of a text is its hash, so that a passage with a query's text has the query's id.

    Args:
        split: a column that names splits, of which the rows of test are read.
    """
    queries: dict[int, tuple[str, str]] = {}  # hash of instruction and text -> both
    corpus: dict[str, str] = {}
    grades: dict[int, dict[str, int]] = defaultdict(dict)
    columns, reading = Columns(ignore=["*"], accept_numbers=True, split="test" if split else None), Reading()
    for example in examples_of(read_rows(path, BadRows()), str(path), columns, BadRows(), reading):
        raw = {"query": example.query, "pos": example.positives, "neg": example.negatives}
        row = parse_row(raw, example.where)
        queries.setdefault(row["query_id"], (row["query"]["instruction"], row["query"]["text"]))
        grades[row["query_id"]] |= {_hex(key): 1 for key in row["pos_id"]}
        for field in ("pos", "neg"):
            for key, *parts in zip(row[f"{field}_id"], row[field]["instruction"], row[field]["text"], strict=True):
                corpus.setdefault(_hex(key), "".join(parts))
    instructions, texts = (list(column) for column in zip(*queries.values(), strict=True))
    ids = [_hex(text_id(text)) for text in texts]
    several = {key for key, count in Counter(ids).items() if count > 1}  # one text after several instructions
    ids = [f"{key}-{_hex(query)}" if key in several else key for key, query in zip(ids, queries, strict=True)]
    prompts = instructions if any(instructions) else None
    data = RetrievalSet(name, texts, ids, [*corpus.values()], [*corpus], [*grades.values()], prompts)
    data.notes.extend(_notes(*((count, note) for note, count in reading.notes.items() if "left out whose" in note)))
    return _noted(data)


def _hex(key: int) -> str:
    return f"{key % 2**64:016x}"


def _read_sts(path: Path, name: str, rows: Rows, pair: tuple[str, str], column: str) -> StsSet:
    first, second, scores = [], [], []
    for where, row in rows:
        first.append(_text(row, pair[0], where))
        second.append(_text(row, pair[1], where))
        try:
            scores.append(float(row[column]))
        except (KeyError, TypeError, ValueError):
            scores.append(math.nan)
        if not math.isfinite(scores[-1]):
            raise UserError(f"{where}: {column}: found {row.get(column)!r}, wanted a number")
    if len(set(scores)) == 1:
        raise UserError(f"{path}: found the {column} {scores[0]:g} in all {len(scores)} rows, wanted at least two")
    return StsSet(name, first, second, scores)


def _text(row: dict, column: str, where: str) -> str:
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: {column}: found {str(text)[:60]!r}, wanted a text")
    if is_null(text):
        raise UserError(f"{where}: {column}: found {text!r}, the word of an empty cell, wanted a text")
    return titled(text, f"{where}: {column}")


def _read_labels(path: Path, name: str, rows: Rows, column: str, label_column: str) -> ClassificationSet:
    examples: list[tuple[str, str]] = []
    parts: dict[str, list[int]] = defaultdict(list)  # split -> numbers of its examples
    for where, row in rows:
        label = row.get(label_column)
        if label in (None, "") or isinstance(label, list | dict):
            raise UserError(f"{where}: {label_column}: found {label!r}, wanted a label")
        parts[str(row.get("split", ""))].append(len(examples))
        examples.append((_text(row, column, where), str(label)))
    if [*parts] == [""]:
        parts = _halves([label for _, label in examples], path)
    if not {"train", "test"} <= {*parts}:
        raise UserError(f"{path}: split: found {', '.join(sorted(parts))}, wanted train and test")
    (train_texts, train_labels), (test_texts, test_labels) = (
        (list(column) for column in zip(*(examples[i] for i in parts[part]), strict=True)) for part in ("train", "test")
    )
    if len({*train_labels}) < 2:
        found = f"the label {train_labels[0]!r} in all {len(train_labels)} rows"
        raise UserError(f"{path}: found {found} to train on, wanted at least two labels")
    if unknown := {*test_labels} - {*train_labels}:
        raise UserError(f"{path}: found the label {min(unknown)!r} in test rows only, wanted it in train rows too")
    seen = {*train_texts}
    notes = _notes(
        (len(examples) - len(train_texts) - len(test_texts), "rows that are neither train nor test, left out"),
        (sum(text in seen for text in test_texts), "test texts that are train texts too"),
    )
    return ClassificationSet(name, train_texts, train_labels, test_texts, test_labels, notes=notes)


def _halves(labels: list[str], path: Path) -> dict[str, list[int]]:
    """Half of each label's examples to train on, drawn with a fixed seed."""
    rng, parts = np.random.default_rng(0), defaultdict[str, list[int]](list)
    numbers = defaultdict[str, list[int]](list)
    for number, label in enumerate(labels):
        numbers[label].append(number)
    for label, own in numbers.items():
        if len(own) < 2:
            raise UserError(f"{path}: found one row with the label {label!r}, wanted at least two of each label")
        shuffled = rng.permutation(own).tolist()
        parts["train"] += shuffled[::2]
        parts["test"] += shuffled[1::2]
    return parts
