"""A file is read by what its first bytes say, whatever its name, or refused by its kind with what to do."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import sqlite3
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from gritlm.curation import check_data
from gritlm.data.containers import FileError, file_errors, kind_of, open_parquet, open_stream
from gritlm.data.records import load_records
from gritlm.data.rows import decode, read_blocks
from gritlm.data.texts import read_texts

ROWS = [{"query": f"q{number} é 中文", "pos": [f"p{number}"], "neg": []} for number in range(1000)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
TABLE = pa.Table.from_pylist([row | {"neg": ["n"]} for row in ROWS])


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "zst": zstd, "xz": lzma.compress}


def rows_of(path: Path) -> list[dict]:
    return [decode(path, number, raw) for block in read_blocks(path) for number, raw in block]


@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_rows_are_read_in_full_or_the_file_is_damaged(tmp_path, ending):
    compress = COMPRESS[ending]
    path = tmp_path / f"a.JSONL.{ending}"
    whole = compress(LINES[:1000]) + compress(LINES[1000:])  # parts, as some programs write it
    path.write_bytes(whole)
    assert rows_of(path) == ROWS and kind_of(path) == "text"
    (records,) = load_records(path, tmp_path / "cache")
    assert (records.name, len(records), records[999].query.text) == ("a", 1000, ROWS[999]["query"])
    path.rename(tmp_path / "a")  # no name says how it is compressed
    with open_stream(tmp_path / "a") as stream:
        assert stream.read() == LINES
    for damaged in (whole[:-20], whole[: len(whole) // 2], whole[:-60] + bytes(20) + whole[-40:]):
        path.write_bytes(damaged)
        with pytest.raises(FileError, match=rf"a\.JSONL\.{ending}: cannot be read: "), file_errors(path):
            open_stream(path).read()
    path.write_bytes(whole[:-20])
    with pytest.raises(FileError, match=rf"a\.JSONL\.{ending}: cannot be read: "):  # and no bad row of half a line
        rows_of(path)
    path.write_bytes(LINES)  # decompressed on the way, as browsers do
    assert rows_of(path) == ROWS
    path.with_suffix("").write_bytes(whole)
    with pytest.raises(FileError, match=r"a\.JSONL: found \w+ data, wanted it under a name that ends in"):
        rows_of(path.with_suffix(""))


def archive(opener, add) -> bytes:
    data = io.BytesIO()
    with opener(data) as out:
        add(out)
    return data.getvalue()


def zipped(*names: str) -> bytes:
    return archive(lambda data: zipfile.ZipFile(data, "w"), lambda out: [out.writestr(name, LINES) for name in names])


def tarred(mode: str) -> bytes:
    def add(out: tarfile.TarFile) -> None:
        (info := tarfile.TarInfo("a.jsonl")).size = len(LINES)
        out.addfile(info, io.BytesIO(LINES))

    return archive(lambda data: tarfile.open(fileobj=data, mode=mode), add)


def saved(write) -> bytes:
    data = io.BytesIO()
    write(data)
    return data.getvalue()


def ipc(opener) -> bytes:
    return archive(lambda data: opener(data, TABLE.schema), lambda out: out.write_table(TABLE))


def database(folder: Path) -> bytes:
    with sqlite3.connect(folder / "it") as connection:
        connection.execute("CREATE TABLE rows (query)")
    return (folder / "it").read_bytes()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:cdcd\nsize 52113\n"
ODS = archive(
    lambda data: zipfile.ZipFile(data, "w"),
    lambda out: out.writestr("mimetype", "application/vnd.oasis.opendocument.spreadsheet"),
)
REFUSED = {  # name -> content, what is found, what to do
    "a Git LFS pointer": (LFS, "Git LFS pointer in place of the data", "git lfs pull"),
    "a git-annex pointer": (b"/annex/objects/SHA256E-s3--cdcd.jsonl\n", "git-annex pointer", "git annex get"),
    "zip": (zipped("a.jsonl"), "zip archive", "unzip"),
    "an empty zip": (zipped(), "zip archive", "unzip"),
    "xlsx": (zipped("[Content_Types].xml", "xl/workbook.xml"), "Excel workbook", "save it as CSV"),
    "ods": (ODS, "OpenDocument", "save it as CSV"),
    "npz": (saved(lambda out: np.savez(out, rows=np.zeros(3))), "NumPy", "write its rows"),
    "npy": (saved(lambda out: np.save(out, np.zeros(3))), "database or arrays", "write its rows"),
    "tar": (tarred("w"), "tar archive", "unpack"),
    "tar.gz": (tarred("w:gz"), "tar archive", "unpack"),
    "tar.xz": (tarred("w:xz"), "tar archive", "unpack"),
    "gzip twice": (gzip.compress(gzip.compress(LINES)), "compressed twice", "decompress it once"),
    "parquet": (saved(lambda out: pq.write_table(TABLE, out)), "parquet data, wanted text", r"name it \.parquet"),
    "parquet in gzip": (
        gzip.compress(saved(lambda out: pq.write_table(TABLE, out))),
        "compressed parquet data",
        "decompress it first",
    ),
    "feather": (saved(lambda out: feather.write_feather(TABLE, out)), "arrow data", "gritlm prepare reads it"),
    "arrow stream": (ipc(pa.ipc.new_stream), "arrow data", "gritlm prepare reads it"),
    "arrow file": (ipc(pa.ipc.new_file), "arrow data", "gritlm prepare reads it"),
    "pickle": (pickle.dumps(ROWS), "pickle", "write its rows"),
    "SQLite": (database, "SQLite", "write its rows"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3", "PDF", "write its rows"),
    "HTML": (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "HTML page", "download the file itself"),
    "XML": (b'\xef\xbb\xbf<?xml version="1.0"?>\n<rows/>', "XML", "write its rows"),
    "an error page": (b"Entry not found", "failed download", "download the file again"),
    "UTF-16": (LINES.decode().encode("utf-16"), "UTF-16 text", "save it as UTF-8"),
    "UTF-16 without BOM": (LINES.decode().encode("utf-16-be"), "UTF-16 text", "save it as UTF-8"),
    "UTF-32": (LINES.decode().encode("utf-32"), "UTF-32 text", "save it as UTF-8"),
    "zeros": (bytes(5000), "zero bytes", "download the file again"),
    "random bytes": (np.random.default_rng(0).bytes(5000), "binary data", "write its rows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_reader_takes_is_refused_by_its_kind(tmp_path, name):
    content, found, advice = REFUSED[name]
    data = content(tmp_path) if callable(content) else content
    paths = [tmp_path / f"a.{ending}" for ending in ("jsonl", "jsonl.gz", "csv", "parquet")]
    for path in paths[: 3 if name == "parquet" else 4]:
        path.write_bytes(data)
        readers = [rows_of, read_texts] + ([open_parquet] if path.suffix == ".parquet" else [open_stream])
        for reader in readers:
            with pytest.raises(FileError, match=rf"a\.[a-z.]+: found .*{found}.*; .*{advice}") as error:
                reader(path)
            assert "\n" not in str(error.value) and "skip_bad" not in str(error.value)


def test_check_data_has_one_finding_on_a_file_of_another_kind(tmp_path, capsys):
    for name, content, found in (
        ("a.parquet", LFS, "!! found a Git LFS pointer in place of the data, wanted parquet; run git lfs pull"),
        (
            "a.csv",
            b"Query,Positive\nwhat is rain,Water.\nwhat is snow,Ice.\n",
            "gritlm prepare makes rows for training of .csv",
        ),
    ):
        (tmp_path / name).write_bytes(content)
        assert check_data.main([str(tmp_path / name)]) == 1
        out = capsys.readouterr().out
        assert found in out and out.endswith("1 file, 0 good rows, 1 finding\n")
    (tmp_path / "a.jsonl").write_bytes(LINES)
    assert check_data.main([str(tmp_path / "a.jsonl")]) == 0, "control"


TEXTS = {
    "CSV": "\ufefforcid,query\n1,2\n",
    "like magic numbers": "ORCID,PARENT,BZh,GIF8,PAR1,LZIP\nthe old DUCK,mustard\n",
    "a question on HTML": "how does <html> start\n",
    "not found": "not found: a query\n",
    "Windows": "caf\xe9\n".encode("cp1252").decode("utf-8", "surrogateescape"),
    "Chinese": "中文\n" * 500,
    "escapes": '{"query": "a\x1b[1m bold \x07", "pos": [""]}\n' * 20,
    "empty": "",
}


@pytest.mark.parametrize("name", TEXTS)
def test_control_texts_are_taken_for_texts(tmp_path, name):
    data = TEXTS[name].encode("utf-8", "surrogateescape")
    (tmp_path / "a.csv").write_bytes(data)
    with open_stream(tmp_path / "a.csv") as stream:
        assert stream.read() == data
    with pytest.raises(FileError, match=r"a\.csv: found text, wanted parquet"):
        open_parquet(tmp_path / "a.csv")


def test_what_reading_raises_is_a_fault_of_the_file(tmp_path):
    for make, message in ((lambda path: path.mkdir(), "Is a directory"), (lambda path: None, "No such file")):
        make(tmp_path / "a.jsonl")
        for reader in (kind_of, open_stream, rows_of, open_parquet):
            with pytest.raises(FileError, match=rf"a\.jsonl: cannot be read: {message}"):
                reader(tmp_path / "a.jsonl")
        if (tmp_path / "a.jsonl").exists():
            (tmp_path / "a.jsonl").rmdir()
    os.mkfifo(tmp_path / "pipe")
    for reader in (kind_of, open_stream, rows_of, open_parquet):  # none waits for a writer
        with pytest.raises(FileError, match="pipe: found a pipe, socket or device"):
            reader(tmp_path / "pipe")
    with pytest.raises(KeyError), file_errors(tmp_path):
        raise KeyError("control: an error of the program stays one")
