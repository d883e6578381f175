"""Texts of every kind of file, and rows without a text are named."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gritlm.data.texts import read_texts
from gritlm.errors import UserError


def test_texts_of_every_kind_of_file(tmp_path):
    rows = [{"_id": 1, "title": "a", "text": "stone"}, {"_id": 2, "title": None, "text": ""}]
    lines = "\n\n".join(map(json.dumps, rows)).encode()
    plain, zipped, parquet = (tmp_path / f"texts.{suffix}" for suffix in ("jsonl", "jsonl.gz", "parquet"))
    plain.write_bytes(lines)
    zipped.write_bytes(gzip.compress(lines))
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    assert read_texts(plain) == read_texts(zipped) == read_texts(parquet) == ["a stone", ""]
    with pytest.raises(UserError, match=r"texts\.jsonl:3: found an empty text"):
        read_texts(plain, may_be_empty=False)
    plain.write_bytes(b'{"title": "a", "text": null}')
    assert read_texts(plain) == ["a"], "a passage without text is its title"
    plain.write_bytes(b'{"title": "nan", "text": "a"}\n{"title": "Nancy", "text": "b"}')
    assert read_texts(plain) == ["a", "Nancy b"], "the word of an empty cell is no title"
    plain.write_bytes(b'{"title": "a", "text": "NULL"}')
    assert read_texts(plain) == ["a"], "and no text"
    plain.write_bytes(b'"fine"\n{"text": "NULL"}')
    with pytest.raises(UserError, match=r":2: found 'NULL', the word of an empty cell, wanted a passage"):
        read_texts(plain, may_be_empty=False)
    for content, message in (
        (b"", "found no row"),
        (b'"fine"\n{"txt": "x"}', r":2: found the keys \['txt'\], wanted"),
        (b'"fine"\nnull', ":2: found None, wanted a string"),
        (b'"fine"\n{"text": null}', ":2: text: found None and no title"),
        (b'"fine"\n{"text": ["a"], "title": ["b"]}', ":2: title: found list, wanted a string"),
        (b'{"d1": {"text": "stone"}}', r":1: found the keys \['d1'\], wanted"),
        (b'"fine"\n"\\ud800"', ":2: found half of a surrogate pair"),
        (b'"fine"\n"\xff"', ":2: found byte 0xFF"),
    ):
        plain.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_texts(plain)
