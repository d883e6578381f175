"""Exact gradients on one process: the two-pass step gives the gradient of the whole-batch loss, whatever the chunks."""

import gc
import weakref

import pytest
import torch
from helpers import (
    flat_gradient,
    flat_weights,
    make_builder,
    make_embedder,
    relative,
    write_equal_after_the_cut,
)
from torch import Tensor

from gritlm.data.batches import Batch
from gritlm.data.rows import text_id
from gritlm.models.chunks import ChunkConfig, make_chunks
from gritlm.models.text import Text
from gritlm.training.arguments import ObjectiveArguments
from gritlm.training.engines import Engine
from gritlm.training.gradcache import ActivationMemory, two_pass_step
from gritlm.training.objective import Objective

TEMPERATURE = 0.05
OBJECTIVE = Objective(ObjectiveArguments(temperature=TEMPERATURE))


def cut(builder, texts: list[Text], limit: int) -> list[tuple[int, ...]]:
    return [tuple(text.ids) for text in builder.text_tokenizer(texts, limit)]


def naive_loss(model, builder, epoch: int, step: int, after_the_cut: bool = True) -> Tensor:
    """The same loss, written again from the formula: no chunks, no slots, a Python loop over queries."""
    rows = builder.plan.batch(epoch, step).rows
    queries, groups, known = [], [], []
    for dataset, row in rows:
        record = builder.records[dataset][row]
        positive, negatives = builder.plan.draw(
            epoch, step, dataset, row, len(record.positives), len(record.negatives), builder.group_size - 1
        )
        queries.append(record.query)
        groups.append([record.positives[positive]] + [record.negatives[i] for i in negatives])
        known.append(set(record.known_positives))
    passages = [passage for group in groups for passage in group]
    cut_q, cut_p = cut(builder, queries, 32), cut(builder, passages, 48)
    firsts = [sum(map(len, groups[:b])) for b in range(len(groups))]
    positives = [{cut_p[firsts[other]] for other, q in enumerate(cut_q) if q == cut_q[b]} for b in range(len(groups))]

    def vectors(texts: list[Text], limit: int) -> Tensor:
        (chunk,), row_of_text = make_chunks(
            builder.text_tokenizer(texts, limit), ChunkConfig(10**9, packed=False, deduplicate=False), 0
        )
        return model(**chunk)[row_of_text]

    q, p = vectors(queries, 32), vectors(passages, 48)
    total = 0.0
    for b, first in enumerate(firsts):
        scores = q[b] @ p.T / TEMPERATURE
        others = [j for j, passage in enumerate(passages) if text_id(passage.text) not in known[b]]
        others = [j for j in others if cut_p[j] not in positives[b] or not after_the_cut]
        terms = [scores[j] for j in {first, *others}]
        total = total + torch.logsumexp(torch.stack(terms), 0) - scores[first]
    return total / len(rows)


def two_pass(model, batch: Batch, memory: ActivationMemory | None = None, engine: Engine | None = None) -> Tensor:
    engine = engine or Engine(model)
    terms = two_pass_step(engine, batch.chunks, lambda v: OBJECTIVE(v, batch.contrastive), memory=memory)
    return terms["info_nce"]


WAYS = {  # packed or padded, texts merged or not, chunks kept from pass 1: none, some, all
    "packed, recomputed": ({"packed": True, "deduplicate": True}, "0"),
    "packed, some kept": ({"packed": True, "deduplicate": True}, "0.002"),
    "packed, all kept": ({"packed": True, "deduplicate": False}, "9"),
    "padded, recomputed": ({"packed": False, "deduplicate": False}, "0"),
    "padded, all kept": ({"packed": False, "deduplicate": True}, "9"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["hard", "plain"])
@pytest.mark.parametrize("chunk_tokens", [48, 300, 10**6])
def test_chunked_is_unchunked(qwen3, data, tmp_path, name, chunk_tokens, way):
    chunking, kept = WAYS[way]
    builder = make_builder(qwen3, data / f"{name}.jsonl", tmp_path, chunk_tokens=chunk_tokens, **chunking)
    memory = ActivationMemory(kept, torch.device("cpu"))
    model, reference = make_embedder(qwen3), make_embedder(qwen3)
    sgd = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (model, reference)]
    start = flat_weights(model)
    for step in range(3):
        batch = builder[0, step]
        assert (len(batch.chunks) > 3) == (chunk_tokens < 300) or chunk_tokens == 300
        loss = two_pass(model, batch, memory)
        truth = naive_loss(reference, builder, 0, step)
        truth.backward()
        assert abs(loss - truth.detach()) / truth.detach() < 1e-5
        assert relative(flat_gradient(model), flat_gradient(reference)) < 1e-5
        for optimizer in sgd:
            optimizer.step()
            optimizer.zero_grad()
    assert relative(flat_weights(model), flat_weights(reference)) < 1e-5
    assert relative(start, flat_weights(model)) > 1e-3, "nothing was trained"
    assert (memory.bytes_per_token is not None) == (kept != "0")
    assert way != "packed, some kept" or chunk_tokens > 300 or memory.used <= memory.budget < 3 * memory.used


def test_texts_that_are_equal_after_the_cut_are_one(qwen3, tmp_path):
    write_equal_after_the_cut(tmp_path / "cut.jsonl")
    builder = make_builder(qwen3, tmp_path / "cut.jsonl", tmp_path)
    for step in range(builder.plan.steps_per_epoch):
        model, reference = make_embedder(qwen3), make_embedder(qwen3)
        loss, truth = two_pass(model, builder[0, step]), naive_loss(reference, builder, 0, step)
        truth.backward()
        assert abs(loss - truth.detach()) / truth.detach() < 1e-5
        assert relative(flat_gradient(model), flat_gradient(reference)) < 1e-5
        careless = naive_loss(reference, builder, 0, step, after_the_cut=False)
        assert careless - loss > 1e-2, "control: whole texts are compared"


def test_one_chunk_left_out_is_noticed(qwen3, data, tmp_path):
    """Control: the comparison fails when the second pass misses a chunk."""
    builder = make_builder(qwen3, data / "hard.jsonl", tmp_path)
    model, reference = make_embedder(qwen3), make_embedder(qwen3)
    batch = builder[0, 0]
    forgetful = Engine(model)
    seconds = iter(range(99))
    forgetful.wrapped = lambda **chunk: model(**chunk) * (0.0 if next(seconds) == 0 else 1.0)
    two_pass(model, batch, engine=forgetful)
    naive_loss(reference, builder, 0, 0).backward()
    assert relative(flat_gradient(model), flat_gradient(reference)) > 1e-3


def test_what_is_kept_stands_before_what_is_made_again(qwen3):
    """So it is gone, and its memory free, when pass 2 makes the first graph again."""
    memory = ActivationMemory("1", torch.device("cpu"))
    memory.bytes_per_token = 1e6
    for _ in range(2):
        memory.begin(make_embedder(qwen3))
        assert [memory.fits(tokens) for tokens in (600, 300, 300, 50)] == [True, True, False, False]
        assert memory.used == 900e6, "control: the last would have fitted"


@pytest.mark.parametrize("mended", [True, False], ids=["", "control: the tensor itself is saved"])
def test_a_measured_graph_that_is_given_up_is_freed(qwen3, data, tmp_path, mended, monkeypatch):
    """As after an out-of-memory error, when the step is taken again and keeps less."""
    if not mended:
        monkeypatch.setattr(torch.Tensor, "detach", lambda self: self)
    (chunk, *_) = make_builder(qwen3, data / "hard.jsonl", tmp_path)[0, 0].chunks
    model, memory, states = make_embedder(qwen3), ActivationMemory("9", torch.device("cpu")), []
    model.backbone.layers[0].mlp.act_fn.register_forward_hook(lambda *call: states.append(weakref.ref(call[-1])))
    memory.begin(model)
    assert memory.fits(chunk["input_ids"].numel())
    with memory.watched():
        vectors = model(**chunk)
    assert memory.used > 0
    del vectors
    gc.collect()
    assert (states[0]() is None) == mended


@pytest.mark.parametrize("pooling", ["mean", "weightedmean", "lasttoken", "cls"])
def test_every_pooling_and_the_projection(qwen2, data, tmp_path, pooling):
    builder = make_builder(qwen2, data / "hard.jsonl", tmp_path, pooling_method=pooling)
    torch.manual_seed(0)
    model = make_embedder(qwen2, pooling_method=pooling, projection=16)
    torch.manual_seed(0)
    reference = make_embedder(qwen2, pooling_method=pooling, projection=16)
    loss = two_pass(model, builder[0, 0])
    truth = naive_loss(reference, builder, 0, 0)
    truth.backward()
    assert abs(loss - truth.detach()) / truth.detach() < 1e-5
    assert relative(flat_gradient(model), flat_gradient(reference)) < 1e-5


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kept", ["0", "0.002"], ids=["recomputed", "some kept"])
@pytest.mark.parametrize("replay", [True, False], ids=["replayed", "control: not replayed"])
def test_dropout(qwen3_dropout, data, tmp_path, replay, kept, packed, monkeypatch):
    """With dropout, two passes over the chunks are one pass over the same chunks that keeps its graphs."""
    import contextlib

    from gritlm.training import gradcache

    if not replay:
        monkeypatch.setattr(gradcache.RandomState, "replayed", lambda self: contextlib.nullcontext())
    builder = make_builder(qwen3_dropout, data / "hard.jsonl", tmp_path, packed=packed, deduplicate=False)
    memory = ActivationMemory(kept, torch.device("cpu"))
    model, reference = make_embedder(qwen3_dropout).train(), make_embedder(qwen3_dropout).train()
    batch = builder[0, 0]
    assert len(batch.chunks) > 3
    torch.manual_seed(5)
    loss = two_pass(model, batch, memory)
    torch.manual_seed(5)
    kept = torch.cat([reference(**chunk) for chunk in batch.chunks])
    truth = OBJECTIVE(kept, batch.contrastive)["info_nce"]
    truth.backward()
    assert abs(loss - truth.detach()) / truth.detach() < 1e-6
    error = relative(flat_gradient(model), flat_gradient(reference))
    assert (error < 1e-5) == replay
    torch.manual_seed(6)
    assert abs(two_pass(model, batch) - loss) > 1e-4, "dropout was not on"


def test_the_budget_of_a_gpu_leaves_room_for_the_gradient_and_for_attention(monkeypatch):
    """Without a GPU: what torch reports of one is given."""
    for name, value in {"mem_get_info": (8e9, 20e9), "memory_reserved": 3e9, "memory_allocated": 1e9}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    memory, model = ActivationMemory("auto", torch.device("cuda")), torch.nn.Linear(10**5, 10**4, device="meta")
    memory.begin(model)
    assert memory.budget == 0, "the optimizer's state is not there yet"
    gradient = 4 * (10**9 + 10**4)
    for shards, reserved in ((1, 0), (8, 0), (1, 2e9)):
        memory.reserved = reserved
        memory.begin(model, shards)
        assert memory.budget == pytest.approx(0.8 * (10e9 - gradient / shards - reserved))
