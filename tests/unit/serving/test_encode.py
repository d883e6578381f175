"""`gritlm encode`: row i of the output is the vector of row i of the input, however often it is stopped and started."""

import json
import os
import resource
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import INSTRUCTION, make_model_folder
from processes import Ranks
from sentence_transformers import quantize_embeddings

from gritlm import GritLM
from gritlm.cli import run_verb
from gritlm.data.vector_file import VectorFile
from gritlm.errors import UserError
from gritlm.evaluation.compressed import cut
from gritlm.serving import encode_texts
from gritlm.serving.encode import main

TEXTS = [f"river {'stone ' * (number % 7)}{number}" for number in range(20)]


@pytest.fixture(scope="module")
def folder(qwen3, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    make_model_folder(qwen3, folder, prompts={"query": INSTRUCTION})
    return folder


@pytest.fixture
def command(folder, tmp_path, monkeypatch):
    """The command line without its options; its 20 texts are 5 blocks."""
    monkeypatch.setattr(encode_texts, "BLOCK_TEXTS", 4)
    rows = [{"_id": f"d{number}", "text": text} for number, text in enumerate(TEXTS)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return [str(tmp_path / "in.jsonl"), str(tmp_path / "out.npy"), "--model", str(folder)]


def in_small_blocks(command: list[str], writes: int | None = None, file_size: int | None = None) -> None:
    """A rank's `main`. It dies by kill -9 after some writes, or may write no more than some bytes to a file."""
    encode_texts.BLOCK_TEXTS, write, done = 4, VectorFile.write, []
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))

    def write_some(self, *block):
        write(self, *block)
        done.append(block[0])
        if len(done) == writes:
            os.kill(os.getpid(), signal.SIGKILL)

    VectorFile.write = write_some  # type: ignore[method-assign]
    code = run_verb(main, command)
    print("encoded blocks", done, flush=True)
    os._exit(code)


def test_a_file_is_encoded(folder, tmp_path, capsys):
    texts = ["river", {"text": "stone", "title": "a"}, {"text": "snow"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, texts)) + "\n")
    out, model, plain = tmp_path / "new" / "out.npy", GritLM(folder), ["river", "a stone", "snow"]
    command = [str(tmp_path / "in.jsonl"), str(out), "--model", str(folder)]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "3 vectors of width 32" in printed.out
    assert "encoding: 100%" in printed.err
    passages = np.load(out)
    assert passages.dtype == np.float32
    assert np.allclose(passages, model.encode_corpus(plain), atol=1e-5)
    with pytest.raises(UserError, match="nothing is overwritten"):
        main(command)
    out.unlink()
    assert main([*command, "--side", "query"]) == 0
    queries = np.load(out)
    assert np.allclose(queries, model.encode_queries(plain), atol=1e-5)
    assert not np.allclose(queries, passages, atol=1e-3)
    out.unlink()
    assert main([*command, "--side", "query", "--instruction", ""]) == 0
    assert np.allclose(np.load(out), passages, atol=1e-5)


def test_a_failed_run_leaves_no_file(folder, tmp_path):
    (tmp_path / "in.jsonl").write_text('"river"\n')
    command = [str(tmp_path / "in.jsonl"), str(tmp_path / "out.npy"), "--model", str(folder)]
    with pytest.raises(UserError, match="'Query:' can share a token"):
        main([*command, "--instruction", "Query:"])
    with pytest.raises(UserError, match="--width 33: found vectors of 32 dimensions"):
        main([*command, "--width", "33"])
    with pytest.raises(UserError, match="--width 0: wanted 1 or more"):
        main([*command, "--width", "0"])
    with pytest.raises(UserError, match=r"found the ending '\.bin', wanted \.npy or \.parquet"):
        main([command[0], str(tmp_path / "out.bin"), *command[2:]])
    with pytest.raises(UserError, match="--precision int8: found one text"):
        main([*command, "--precision", "int8"])
    with pytest.raises(UserError, match="--width has no effect with --rows"):
        main([*command, "--rows", "--width", "8"])
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_killed_call_goes_on_and_ranks_share_the_blocks(command, folder, tmp_path):
    """kill -9 after two of five blocks. Two ranks write the rest: the same bytes as an undisturbed call."""
    out = tmp_path / "out.npy"
    assert Ranks(in_small_blocks, command, 2).wait().returncode == -signal.SIGKILL
    partial = tmp_path / "out.npy.partial"
    assert sorted(path.name for path in partial.glob("*.done")) == ["0.done", "1.done"] and not out.exists()
    for other, name in ((["--width", "8"], "width None, now 8"), (["--side", "query"], "side passage, now query")):
        with pytest.raises(UserError, match=f"an unfinished call with {name}"):
            main([*command, *other])
    input_text = (tmp_path / "in.jsonl").read_text()
    (tmp_path / "in.jsonl").write_text(input_text.replace("river", "rivers", 1))
    with pytest.raises(UserError, match="an unfinished call with texts"):
        main(command)
    (tmp_path / "in.jsonl").write_text(input_text)
    resumed = Ranks(in_small_blocks, command, ranks=2).wait()
    assert resumed.returncode == 0, resumed.stderr
    assert sorted(resumed.stdout.splitlines())[1:] == ["encoded blocks [2, 4]", "encoded blocks [3]"]
    whole = Ranks(in_small_blocks, [command[0], str(tmp_path / "whole.npy"), *command[2:]]).wait()
    assert "encoded blocks [0, 1, 2, 3, 4]" in whole.stdout
    assert out.read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert np.allclose(np.load(out), GritLM(folder).encode_corpus(TEXTS), atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.npy", "whole.npy"]


def test_a_full_disk_keeps_what_was_done(command, tmp_path):
    failed = Ranks(in_small_blocks, command, None, 128 + 13 * 32 * 4).wait()
    assert failed.returncode == 2 and failed.stderr.strip().splitlines()[-1] == (
        f"gritlm: error: {tmp_path}/out.npy: File too large; 3 of 5 blocks are in {tmp_path}/out.npy.partial, "
        "the same command goes on from there"
    )
    assert "encoded blocks [3, 4]" in Ranks(in_small_blocks, command).wait().stdout
    assert len(np.load(tmp_path / "out.npy")) == 20


def test_precisions_and_widths_are_those_of_sentence_transformers(command, folder, tmp_path, capsys):
    """The ranges of int8 are those of the first block. Values beyond them are clipped."""
    vectors = cut(np.asarray(GritLM(folder).encode_corpus(TEXTS)), 12)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    ranges = np.stack([vectors[:4].min(axis=0), vectors[:4].max(axis=0)])
    assert ((vectors < ranges[0]) | (vectors > ranges[1])).any(), "control: no value lies beyond the ranges"
    wanted = {
        "float16": vectors.astype(np.float16),
        "int8": quantize_embeddings(vectors.clip(*ranges), "int8", ranges=ranges),
        "binary": quantize_embeddings(vectors, "binary"),
    }
    out, parquet = tmp_path / "out.npy", tmp_path / "out.parquet"
    for precision, expected in wanted.items():
        more = ["--precision", precision, "--width", "12"]
        main([*command, *more])
        main([command[0], str(parquet), *command[2:], *more])
        stored, table = np.load(out, mmap_mode="r"), pq.read_table(parquet)
        assert (stored.dtype, stored.shape) == (expected.dtype, expected.shape)
        assert np.abs(stored.astype(float) - expected).max() <= {"float16": 1e-3, "int8": 1, "binary": 0}[precision]
        assert table["id"].to_pylist() == [f"d{number}" for number in range(20)]
        np.testing.assert_array_equal(np.array(table["vector"].to_pylist(), expected.dtype), stored)
        out.unlink()
        parquet.unlink()
    assert "int8 between the ranges of the first 4 vectors" in capsys.readouterr().out
    np.testing.assert_allclose(np.load(tmp_path / "out.npy.ranges.npy"), ranges, atol=1e-6)
    with pytest.raises(UserError, match=r"out.npy.ranges.npy exists; nothing is overwritten"):
        main([*command, "--precision", "int8"])


@pytest.mark.parametrize("value, precision", [(np.nan, "binary"), (np.inf, "float32"), (1e5, "float16")])
def test_a_vector_that_is_not_finite_is_refused(tmp_path, value, precision):
    vectors, file = np.array([[1, 2], [value, 3]], np.float32), VectorFile(tmp_path / "out.npy", 9, 2)
    with pytest.raises(UserError, match=r"text 5 \(from 0\): found a vector that is not finite in float"):
        encode_texts._stored(vectors, precision, file, 4)
    assert encode_texts._stored(vectors[:1], precision, file, 4).shape == (1, 1 if precision == "binary" else 2)
