"""An evaluation shared out over ranks gives the numbers of one process, on every engine that runs on gloo."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import make_embedder
from processes import run_ranks

from gritlm.data.batch_plan import Plan
from gritlm.data.batches import BatchBuilder
from gritlm.data.held_out import hold_out
from gritlm.data.no_repeats import RowTexts
from gritlm.data.records import load_records
from gritlm.distributed import rank
from gritlm.evaluation.sets import ClassificationSet, StsSet
from gritlm.models.chunks import ChunkConfig
from gritlm.models.text import TextContract
from gritlm.models.tokenizer import TextTokenizer, load_tokenizer
from gritlm.training import sharded_encoder
from gritlm.training.arguments import ObjectiveArguments
from gritlm.training.engines import engine_for, wrap_model
from gritlm.training.evaluation import RunEvaluation
from gritlm.training.evaluation_data import EvaluationData, _loss_batches, slice_of
from gritlm.training.objective import Objective
from gritlm.training.sharded_encoder import ShardedEncoder

CPU = torch.device("cpu")


def evaluated(model: Path, data: Path, folder: Path, engine: str, fault: str = "") -> tuple[dict, float]:
    """The numbers of an evaluation, and the tokens of a chunk after it.

    fault: "alone" (no rank gets the others' vectors), or "memory" (it is short on the last rank).
    """
    records = load_records(data, folder / "cache")
    sizes = list(map(len, records))
    held = hold_out(RowTexts.concatenate([r.texts_without_instructions for r in records]), sizes, [9, 10], 1)
    plan = Plan([r.name for r in records], sizes, 8, seed=3, held_out=held)
    contract = TextContract(query_max_len=32, passage_max_len=48)
    tokenizer = TextTokenizer(load_tokenizer(str(model), contract), contract)
    words = [r[i].query.text for r in records for i in range(20)]
    sts = StsSet("sts", words[:11], words[11:22], [float(i % 5) for i in range(11)])
    labels = ["long" if len(text) > 30 else "short" for text in words]
    probe = ClassificationSet("probe", words[::2], labels[::2], words[1::2], labels[1::2], "Classify: ")
    sets = [slice_of(plan, records, 0), slice_of(plan, records, 1), sts, probe]
    builder = BatchBuilder(plan, records, tokenizer, 3, ChunkConfig(64))
    evaluation = RunEvaluation(
        EvaluationData(sets, list(_loss_batches(plan, [True] * len(plan.sizes)))),
        builder,
        Objective(ObjectiveArguments()),
        folder,
        {},
    )
    embedder = make_embedder(model)
    wrapped, _ = wrap_model(embedder, torch.optim.SGD(embedder.parameters()), engine, CPU)
    encode = ShardedEncoder(tokenizer, ChunkConfig(200), embedder.embedding_dim, CPU, lambda: None)
    encode.engine = engine_for(wrapped)
    gathered = sharded_encoder.all_reduce_sum
    if fault == "alone":
        sharded_encoder.all_reduce_sum = lambda vectors: vectors + (vectors == 0)
    if fault == "memory" and rank() == 1:

        def short(module, args, inputs: dict) -> None:
            if inputs["input_ids"].numel() > 70:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        embedder.register_forward_pre_hook(short, with_kwargs=True)
    try:
        numbers, _ = evaluation(encode, 0, lambda what: None)
    finally:
        sharded_encoder.all_reduce_sum = gathered
    return numbers, encode.chunking.tokens


def all_cells(model: Path, data: Path, folder: Path) -> dict:
    cells = {engine: evaluated(model, data, folder, engine) for engine in ("ddp", "fsdp2")}
    cells["memory"] = evaluated(model, data, folder, "ddp", "memory")
    cells["alone"] = evaluated(model, data, folder, "ddp", "alone")
    return cells


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.long)])
def test_many_ranks_are_one_process(qwen3, data, tmp_path, ranks):
    one, _ = evaluated(qwen3, data, tmp_path, "plain")
    assert {"eval_mean", "eval_loss", "eval_sts_spearman", "eval_probe_accuracy"} < one.keys()
    assert 0 < one["eval_hard_held_out_ndcg@10"] < 1 and one["eval_loss"] > 0
    for number, cells in enumerate(run_ranks(all_cells, qwen3, data, tmp_path, ranks=ranks)):
        for name in ("ddp", "fsdp2", "memory"):
            assert cells[name][0] == pytest.approx(one, abs=1e-6, rel=1e-6), name
        assert cells["memory"][1] == (50 if number == 1 else 200), "only the rank that is short of memory"
        assert cells["alone"][0] != pytest.approx(one, abs=1e-3), "control: vectors of this rank's texts alone"


def test_out_of_memory_in_a_collective_forward_ends_the_run(qwen3, data, tmp_path, monkeypatch):
    """The other ranks would wait for a forward that is not repeated."""
    monkeypatch.setattr("test_sharded_evaluation.rank", lambda: 1)
    assert evaluated(qwen3, data, tmp_path, "plain", "memory")[1] == 50, "control"
    monkeypatch.setattr("gritlm.training.engines.Engine.collective", True)
    with pytest.raises(torch.OutOfMemoryError):
        evaluated(qwen3, data, tmp_path, "plain", "memory")


def test_texts_are_encoded_once(qwen3):
    """Equal texts have one vector, in whatever order they come; another instruction makes another text."""
    contract = TextContract(prompts={"query": "Query: "})
    tokenizer = TextTokenizer(load_tokenizer(str(qwen3), contract), contract)
    embedder = make_embedder(qwen3).eval()
    lengths = []
    embedder.register_forward_pre_hook(lambda m, a, inputs: lengths.append(len(inputs["lengths"])), with_kwargs=True)
    encode = ShardedEncoder(tokenizer, ChunkConfig(64), embedder.embedding_dim, CPU, lambda: None)
    encode.engine = engine_for(embedder)
    texts = ["river stone", "a much longer text of snow", "river stone", "snow"] * 3
    with torch.no_grad():
        vectors = encode(texts, "query", None)
        assert sum(lengths) == 3
        again = encode(texts[::-1], "query", ["Query: "] * 12)
        other = encode(["river stone"], "query", ["Other: "])
        passage = encode(["river stone"], "passage", None)
    assert (vectors == again[::-1]).all() and (vectors[0] == vectors[2]).all()
    assert abs(vectors[0] - other[0]).max() > 1e-3 and abs(vectors[0] - passage[0]).max() > 1e-3
    assert replace(encode.chunking) == ChunkConfig(64)
