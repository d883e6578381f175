"""Write the good rows of checked files to a new folder, and list every change in dropped.tsv.

A row keeps all that it has: other keys or columns, letters, line end. Its scores stay in step with its negatives.
"""

import json
import re
from collections.abc import Iterator
from itertools import compress
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from gritlm.curation.file_stats import KINDS, FileReport
from gritlm.curation.row_spool import text_of
from gritlm.data.containers import file_errors, open_parquet
from gritlm.data.folders import stem
from gritlm.data.rows import decode, is_parquet, read_blocks
from gritlm.errors import UserError
from gritlm.files import written_aside

LOG = "dropped.tsv"  # file, line, what was done, why
IN_STEP = re.compile("neg|score|logit", re.IGNORECASE)  # keys that may hold a value for each negative


def fix(reports: list[FileReport], folder: Path, roots: list[Path]) -> list[str]:
    """Write the good rows of each file to the same sub-folder and name in `folder`. Returns a line on each file."""
    lines, taken = [], set()
    with written_aside(folder) as aside:
        aside.mkdir(parents=True)
        with open(aside / LOG, "w", encoding="utf-8") as log:
            for report, root in zip(reports, roots, strict=True):
                name = report.path.relative_to(root if root.is_dir() else root.parent)
                base = target = name.with_name(stem(name))
                number = 2
                while target in taken:
                    target, number = base.with_name(f"{base.name}-{number}"), number + 1
                taken.add(target)
                target = target.with_name(target.name + (".parquet" if is_parquet(report.path) else ".jsonl"))
                kept = write_good_rows(report, aside / target, log)
                if not kept:
                    (aside / target).unlink(missing_ok=True)
                lines.append(f"{report.path}: {kept} of {report.rows} rows" + f" in {folder / target}" * bool(kept))
    return lines


def write_good_rows(report: FileReport, path: Path, log: TextIO) -> int:
    """Write the good rows, without negatives that repeat a positive, and log every change. Returns their number."""
    dropped = {line: why for line, kind, why in report.stats.found if KINDS[kind].fix == "drops"}
    changed = {
        line: why for line, kind, why in report.stats.found if KINDS[kind].fix == "changes" and line not in dropped
    }
    kept = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        for count in (_parquet_rows if is_parquet(report.path) else _lines)(report, path, dropped, changed):
            kept += count
    except UserError:
        if not report.ended:
            raise
    entries = [(line, "dropped", why) for line, why in dropped.items()]
    entries += [(line, "changed", why) for line, why in changed.items()]
    log.writelines(f"{report.path}\t{line}\t{what}\t{why}\n" for line, what, why in sorted(entries))
    if report.ended:
        log.write(f"{report.path}\t0\tcut off\t{report.ended}\n")
    return kept


def _lines(report: FileReport, path: Path, dropped: dict[int, str], changed: dict[int, str]) -> Iterator[int]:
    with open(path, "xb") as out:
        for block in read_blocks(report.path):
            for number, raw in block:
                if number in dropped:
                    continue
                if number in changed:
                    row, lost = without_repeats(decode(report.path, number, raw))
                    changed[number] += lost
                    # Half a surrogate pair, in a key that is not read, stays an escape.
                    text = json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace")
                    raw = text + raw[len(raw.rstrip(b"\r\n")) :]
                out.write(raw)
                yield 1


def _parquet_rows(report: FileReport, path: Path, dropped: dict[int, str], changed: dict[int, str]) -> Iterator[int]:
    """Decodes only the columns that change: another may hold what Python cannot, such as a date of the year 10000."""
    file, number, last = open_parquet(report.path), 0, report.rows
    schema = file.schema_arrow
    for index, field in enumerate(schema):
        if changed and pa.types.is_fixed_size_list(field.type) and IN_STEP.search(field.name):
            schema = schema.set(index, field.with_type(pa.list_(field.type.value_field)))
    with file_errors(report.path), pq.ParquetWriter(path, schema) as out:
        for batch in (batch.cast(schema) for batch in file.iter_batches(1000)):
            numbers = range(number + 1, number + 1 + len(batch))
            number += len(batch)
            columns: dict[str, list] = {}
            for index, line in enumerate(numbers):
                if line not in changed:
                    continue
                names = [name for name in batch.schema.names if name == "pos" or IN_STEP.search(name)]
                row, lost = without_repeats({name: batch[name][index].as_py() for name in names})
                changed[line] += lost
                for name in set(names) - {"pos"}:
                    if name not in columns:
                        columns[name] = batch[name].to_pylist()
                    columns[name][index] = row[name]
            for name, values in columns.items():
                column = batch.schema.get_field_index(name)
                field = batch.schema.field(column)
                batch = batch.set_column(column, field, pa.array(values, field.type))
            kept = [line not in dropped and line <= last for line in numbers]
            out.write_batch(batch.filter(pa.array(kept)))
            yield sum(kept)


def without_repeats(row: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A row without the negatives that repeat a positive, and without their scores: see `keep_negatives`."""
    positives = {text_of(text).rstrip() for text in row["pos"]}
    return keep_negatives(row, [text_of(text).rstrip() not in positives for text in row["neg"]])


def keep_negatives(row: dict[str, Any], kept: list[bool]) -> tuple[dict[str, Any], str]:
    """A row with some of its negatives, and with the scores of these.

    A list under a key such as neg_scores or scores.neg has a value for each negative; one under a key such as scores
    may have a value for each positive, then each negative. Numbers for the negatives that are too many or too few are
    removed.

    Returns:
        the row, and a note on the removed numbers.
    """
    lost = []

    def in_step(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: in_step(f"{key}.{name}", part) for name, part in value.items()}
        if not isinstance(value, list) or not IN_STEP.search(key) or not value:
            return value
        negatives = "neg" in key.lower()
        if len(value) == len(kept) and (negatives or "pos" not in key.lower()):
            return list(compress(value, kept))
        if not negatives and len(value) == len(row["pos"]) + len(kept):
            return list(compress(value, [True] * len(row["pos"]) + kept))
        if not negatives or isinstance(value[0], str | list):
            return value
        lost.append(f"; {key} emptied: found {len(value)} for {len(kept)} negatives")
        return []

    return {key: in_step(key, value) for key, value in row.items()}, "".join(lost)
