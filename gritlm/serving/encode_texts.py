"""Encode the texts of a file in blocks: on every GPU and rank, in memory that does not grow; a killed call goes on."""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Container, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from gritlm import __version__
from gritlm.cli import run_verb
from gritlm.data.rows import decode
from gritlm.data.texts import text_of, text_rows
from gritlm.data.vector_file import VectorFile, first_not_finite
from gritlm.errors import RankError, UserError
from gritlm.evaluation.compressed import cut, quantise
from gritlm.evaluation.models import fingerprint
from gritlm.files import publish, write_text, written_aside
from gritlm.gritlm import GritLM
from gritlm.models.cpu_linear import products_of, use_products
from gritlm.models.hub import DECODER, model_folder
from gritlm.strict_json import read_json_object

BLOCK_TEXTS, BLOCK_CHARACTERS = 16384, 1 << 20  # whichever a block reaches first
POLL = 0.2  # seconds between two looks for another rank's file


class Blocks:
    """The texts of a file in blocks, read anew for each use. A block's vectors depend on nothing but its texts.

    Attributes:
        bounds: the first row of each block, and the number of rows.
        fingerprint: a hash of the texts and their ids.
    """

    def __init__(self, path: Path):
        self.path, self.bounds, hashed, characters = path, [0], hashlib.sha256(), 0
        for count, raw in enumerate(text_rows(path)):
            row = self._parse(count, *raw)
            hashed.update(json.dumps(row).encode())
            if characters > BLOCK_CHARACTERS or count - self.bounds[-1] == BLOCK_TEXTS:
                self.bounds.append(count)
                characters = 0
            characters += len(row[1])
        self.bounds.append(count + 1)
        self.fingerprint = hashed.hexdigest()[:16]

    def _parse(self, count: int, number: int, raw: Any) -> tuple[str, str]:
        row = decode(self.path, number, raw)
        keys = [row[key] for key in ("_id", "id") if row.get(key) is not None] if isinstance(row, dict) else []
        return str([*keys, count][0]), text_of(self.path, number, row)

    def read(self, wanted: Container[int]) -> Iterator[list[tuple[str, str]]]:
        """The id and the text of each row of the wanted blocks. Rows of others are not decoded."""
        rows = enumerate(text_rows(self.path))
        for number, (start, end) in enumerate(pairwise(self.bounds)):
            part = list(islice(rows, end - start))
            if len(part) < end - start:
                raise UserError(f"{self.path} was changed while it was read; name another OUT and start again")
            if number in wanted:
                yield [self._parse(count, *raw) for count, raw in part]


def encode_texts(args: argparse.Namespace, rank: int, ranks: int) -> None:
    """Encode the texts of a file on all GPUs, or those of a rank. The first rank says what is in OUT.

    Raises:
        UserError: the input, the model or an option is wrong; or an unfinished OUT is of another call.
    """
    others = []
    if ranks == 1 and (ranks := args.processes or max(torch.cuda.device_count(), 1)) > 1:
        context = multiprocessing.get_context("spawn")  # a fork could not use CUDA
        others = [context.Process(target=_start_rank, args=(args, n, ranks), daemon=True) for n in range(1, ranks)]
    for process in others:
        process.start()
    blocks = Blocks(args.input)
    file = VectorFile(args.output, blocks.bounds[-1], len(blocks.bounds) - 1)
    ranges = args.output.with_name(f"{args.output.name}.ranges.npy")
    if args.precision == "int8" and ranges.exists() and not file.folder.exists():
        raise UserError(f"{ranges} exists; nothing is overwritten, name another file")
    if args.precision == "int8" and file.rows < 2:
        raise UserError("--precision int8: found one text, wanted two or more, whose vectors give the ranges")
    encode = _load(args, file, blocks.fingerprint, rank)
    own = [number for number in file.missing() if number % ranks == rank]
    total = int(np.diff(blocks.bounds)[own].sum())
    with tqdm(total=total, desc="encoding", unit=" texts", disable=rank > 0) as progress:
        for number, rows in zip(own, blocks.read(own), strict=True):
            vectors, start = encode([text for _, text in rows], progress), blocks.bounds[number]
            file.write(number, start, _stored(vectors, args.precision, file, start))
    if rank == 0:
        while file.missing():  # of other ranks
            if failed := [process.exitcode for process in others if process.exitcode]:
                raise SystemExit(failed[0])  # it has said why
            time.sleep(POLL)
        print(_finish(args.precision, file, blocks, encode(["a"]).shape[1], ranges))


def _start_rank(args: argparse.Namespace, rank: int, ranks: int) -> None:
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # it may be killed
    raise SystemExit(run_verb(lambda _: encode_texts(args, rank, ranks), []))


def _load(args: argparse.Namespace, file: VectorFile, texts: str, rank: int) -> Callable[..., np.ndarray]:
    """Load the model with the options of the call, once it is clear that these are those of an unfinished OUT."""
    if gpus := torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % gpus)
    request = {name: getattr(args, name) for name in ("side", "instruction", "chunk_tokens", "precision", "width")}
    request |= {"texts": texts, "gritlm": __version__, "torch": torch.__version__, "GPU": gpus > 0}
    request |= {"model files": fingerprint(Path(model_folder(args.model, DECODER)), file.folder)}
    path = file.folder / "request.json"
    if rank > 0:
        _wait(path, file)
    before = read_json_object(str(path)) if path.exists() else request
    for name in request:
        if before.get(name) != request[name]:
            found = f"found an unfinished call with {name} {before.get(name)}, now {request[name]}"
            raise UserError(f"{file.folder}: {found}; repeat that call, name another OUT, or remove the folder")
    model = GritLM(args.model)
    products = before.get("products", products_of(model.model))
    use_products(model.model, products)  # as the first start measured them; others round otherwise
    options = {"chunk_tokens": args.chunk_tokens}
    options |= {} if args.instruction is None else {"instruction": args.instruction}
    encode = model.encode_queries if args.side == "query" else model.encode_corpus
    full = np.asarray(encode(["a"], **options)).shape[1]  # an instruction that does not fit is an error here
    if args.width and args.width > full:
        raise UserError(f"--width {args.width}: found vectors of {full} dimensions, wanted no more")
    if rank == 0:
        write_text(path, json.dumps(request | {"products": products}, indent=2) + "\n")
    return lambda part, bar=False: cut(np.asarray(encode(part, show_progress=bar, **options)), args.width or full)


def _wait(path: Path, file: VectorFile) -> None:
    """Wait for a file of the first rank."""
    while not path.exists():
        if file.target.exists():  # it found all blocks there
            raise SystemExit(0)
        time.sleep(POLL)


def _stored(vectors_NW: np.ndarray, precision: str, file: VectorFile, start: int) -> np.ndarray:
    """The vectors as they are stored. int8 takes the ranges of the first block, which the first rank encodes first."""
    with np.errstate(over="ignore"):
        floats = vectors_NW.astype("float16" if precision == "float16" else "float32")
    if (bad := first_not_finite(floats)) is not None:
        raise RankError(f"text {start + bad} (from 0): found a vector that is not finite in {floats.dtype}")
    if precision == "binary":
        return (np.packbits(floats > 0, axis=1) - 128).astype(np.int8)
    if precision != "int8":
        return floats
    path = file.folder / "ranges.npy"
    if start == 0 and not path.exists():
        with written_aside(path) as aside, open(aside, "wb") as stream:
            np.save(stream, np.stack([floats.min(axis=0), floats.max(axis=0)]))
    _wait(path, file)
    return quantise(floats, "int8", np.load(path))


def _finish(precision: str, file: VectorFile, blocks: Blocks, width: int, ranges: Path) -> str:
    about = f"{file.rows} vectors of width {width} in {file.target}"
    if precision == "int8":
        shutil.copyfile(file.folder / "ranges.npy", ranges)
        about += f"; int8 between the ranges of the first {blocks.bounds[1]} vectors, which are in {ranges}"
    if file.target.suffix.lower() == ".parquet":
        _write_parquet(file, blocks)
    else:
        publish(file.path, file.target)
    file.remove()
    return about


def _write_parquet(file: VectorFile, blocks: Blocks) -> None:
    vectors = np.load(file.path, mmap_mode="r")
    kind = pa.list_(pa.from_numpy_dtype(vectors.dtype), vectors.shape[1])
    schema = pa.schema({"id": pa.string(), "vector": kind})
    with written_aside(file.target) as aside, pq.ParquetWriter(aside, schema) as writer:
        for start, rows in zip(blocks.bounds, blocks.read(range(file.blocks)), strict=False):
            flat = pa.array(vectors[start : start + len(rows)].ravel())
            columns = [[key for key, _ in rows], pa.FixedSizeListArray.from_arrays(flat, type=kind)]
            writer.write_table(pa.table(columns, schema))
