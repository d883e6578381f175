"""`gritlm encode`: row i of the output is the vector of row i of the input."""

import json

import numpy as np
import pytest
from helpers import INSTRUCTION, make_model_folder

from gritlm import GritLM
from gritlm.errors import UserError
from gritlm.serving.encode import main


@pytest.fixture(scope="module")
def folder(qwen3, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    make_model_folder(qwen3, folder, prompts={"query": INSTRUCTION})
    return folder


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
    with pytest.raises(UserError, match="'Query:' can share a token"):
        main([str(tmp_path / "in.jsonl"), str(tmp_path / "out.npy"), "--model", str(folder), "--instruction", "Query:"])
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
