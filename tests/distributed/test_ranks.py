"""Exact gradients across real gloo ranks: DDP on 2 ranks is one process, for loss, gradient and weights."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import (
    flat_gradient,
    flat_weights,
    log_of,
    losses,
    make_builder,
    make_embedder,
    relative,
    run,
    train,
    train_flags,
    write_equal_after_the_cut,
    write_jsonl,
)
from processes import run_ranks

from gritlm.distributed import (
    all_gather,
    all_ranks,
    all_reduce_max,
    all_reduce_sum,
    destroy_process_group,
    rank,
    world_size,
)
from gritlm.training.arguments import ObjectiveArguments
from gritlm.training.engines import DDPEngine, Replica, engine_for
from gritlm.training.gradcache import two_pass_step
from gritlm.training.objective import Objective

STEPS = 3


def threads_of_gloo() -> list[str]:
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def threads_around_destroy() -> tuple[list[str], list[str]]:
    all_reduce_max(rank())
    before = threads_of_gloo()
    destroy_process_group()
    return before, threads_of_gloo()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="asks Linux for the threads' names")
def test_no_thread_outlives_the_process_group():
    """One that did could ask for the interpreter while it winds down, which aborts a rank that had done its work."""
    for before, after in run_ranks(threads_around_destroy):
        assert before and not after


LEAVING = """
import atexit, gritlm.distributed as d
from gritlm.cli import exit_rank
class Cache:
    def __del__(self): print("wound down", flush=True)
d.cache = Cache()
atexit.register(print, "loggers ended")
print("done", end=" ")
exit_rank(3)
"""


@pytest.mark.parametrize("place", [{}, {"RANK": "0"}])
def test_a_rank_ends_with_its_code_and_does_not_wind_down(monkeypatch, place):
    """What keeps gloo's threads could abort it there; the loggers end all the same. Control: no rank."""
    monkeypatch.delenv("RANK", raising=False)
    ended = run("-c", LEAVING, **place)
    assert ended.returncode == 3
    assert "done loggers ended" in ended.stdout
    assert ("wound down" in ended.stdout) == (not place)


def objective_of(cross_device: bool = True, ring: bool = False) -> Objective:
    flags = ObjectiveArguments(temperature=0.05, negatives_cross_device=cross_device, negatives_ring=ring)
    return Objective(flags, all_ranks())


def one_step(engine, batch, objective) -> torch.Tensor:
    return two_pass_step(engine, batch.chunks, lambda vectors: objective(vectors, batch.contrastive))["info_nce"]


def three_steps(model_folder, data, cache, fault: str | None = None, ring: bool = False, batch: int = 8) -> dict:
    """Three SGD steps on this rank's slices; what every rank must agree on."""
    builder = make_builder(model_folder, data, cache, batch=batch, rank=rank(), ranks=world_size())
    model = make_embedder(model_folder)
    wrapped = Replica(model) if world_size() > 1 else model
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
    objective = objective_of(ring=ring)
    if fault == "gather without gradient":
        objective = replace(objective, gather=all_gather_own_gradient)
    seen = {"loss": [], "gradient": [], "chunks": []}
    for step in range(STEPS):
        item = builder[0, step]
        engine = engine_for(wrapped)
        if fault == "divided by the world size":
            engine.loss_scale = 1 / world_size()
        loss = one_step(engine, item, objective)
        seen["loss"].append(all_reduce_sum(loss))
        seen["gradient"].append(flat_gradient(model).clone())
        seen["chunks"].append(len(item.chunks))
        sgd.step()
        sgd.zero_grad()
    return seen | {"weights": flat_weights(model)}


def all_gather_own_gradient(x):
    """The field's usual fault: gathered passages carry a gradient only where they are this rank's own."""
    parts = list(all_gather(x.detach()).chunk(world_size()))
    parts[rank()] = x
    return torch.cat(parts)


def error(many: dict, one: dict) -> dict[str, float]:
    return {
        "loss": max(abs(a - b) / b for a, b in zip(many["loss"], one["loss"], strict=True)).item(),
        "gradient": max(relative(a, b) for a, b in zip(many["gradient"], one["gradient"], strict=True)),
        "weights": relative(many["weights"], one["weights"]),
    }


@pytest.mark.parametrize("name", ["hard", "plain", "equal after the cut"])
def test_two_ranks_are_one_process(qwen3, data, tmp_path, name):
    rows = data / f"{name}.jsonl"
    if not rows.exists():
        rows = tmp_path / "cut.jsonl"
        write_equal_after_the_cut(rows)
    one = three_steps(qwen3, rows, tmp_path)
    for many in run_ranks(three_steps, qwen3, rows, tmp_path):
        assert max(error(many, one).values()) < 1e-5, error(many, one)
    assert max(one["chunks"]) > 3


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_ring_is_a_gather(qwen3, tmp_path, ranks):
    write_jsonl(tmp_path / "data.jsonl", rows=48, negatives=3, seed=1)
    arguments = (qwen3, tmp_path / "data.jsonl", tmp_path)
    one = three_steps(*arguments, batch=12)
    for many in run_ranks(functools.partial(three_steps, batch=12), *arguments, None, True, ranks=ranks):
        assert max(error(many, one).values()) < 1e-5, error(many, one)


@pytest.mark.parametrize("fault", ["gather without gradient", "divided by the world size"])
def test_controls(qwen3, data, tmp_path, fault):
    one = three_steps(qwen3, data / "hard.jsonl", tmp_path)
    for many in run_ranks(three_steps, qwen3, data / "hard.jsonl", tmp_path, fault):
        assert error(many, one)["gradient"] > 1e-2


def own_negatives_only(model_folder, data, cache) -> tuple:
    """Without cross-device negatives a rank's share is its own half batch's mean loss, over the ranks."""
    builder = make_builder(model_folder, data, cache, rank=rank(), ranks=world_size())
    batch = builder[0, 0]
    model = make_embedder(model_folder)
    vectors = torch.cat([model(**chunk) for chunk in batch.chunks])
    shares = [objective_of(cross)(vectors, batch.contrastive)["info_nce"].detach() for cross in (False, True)]
    return shares, vectors.detach(), batch.contrastive


def test_negatives_of_the_own_rank_only(qwen3, data, tmp_path):
    for (own, cross), vectors, contrastive in run_ranks(own_negatives_only, qwen3, data / "hard.jsonl", tmp_path):
        alone = Objective(ObjectiveArguments(temperature=0.05))(vectors, contrastive)["info_nce"].detach()
        assert torch.allclose(own, alone / 2)
        assert cross > own


def count_collectives(model_folder, data, cache, batch: int) -> dict:
    """Every collective of one step: its name and the bytes that this rank hands over, as they are called."""
    calls: list[tuple[str, int]] = []

    def counted(name: str, given: int):
        function = getattr(dist, name)

        def call(*args, **kwargs):
            calls.append((name, args[given].nbytes))
            return function(*args, **kwargs)

        return call

    builder = make_builder(model_folder, data, cache, batch=batch, rank=rank(), ranks=world_size())
    model = Replica(make_embedder(model_folder))
    engine = engine_for(model)
    assert isinstance(engine, DDPEngine)
    names = {"all_gather_single": 1, "reduce_scatter_single": 1, "all_reduce": 0, "batch_isend_irecv": 0}
    for step in range(2):
        item = builder[0, step]
        calls.clear()
        with pytest.MonkeyPatch.context() as patch:
            for name, given in names.items():
                patch.setattr(dist, name, counted(name, given))
            one_step(engine, item, objective_of())
    weights, tensors = sum(p.nbytes for p in model.parameters()), len([*model.parameters()])
    return {
        "calls": calls,
        "chunks": len(item.chunks),
        "slots": len(item.contrastive.text_of_slot_S),
        "known": item.contrastive.known_positives_BK.shape[1],
        "weights": weights,
        "tensors": tensors,
    }


@pytest.mark.parametrize("ranks, batch", [(2, 8), (2, 16), pytest.param(4, 16, marks=pytest.mark.long)])
def test_one_gather_and_one_reduction_a_step(qwen3, data, tmp_path, ranks, batch):
    """Whatever the chunks. What a rank gives grows with its own batch, what it gets with the global one."""
    width = 32
    all_found = run_ranks(count_collectives, qwen3, data / "hard.jsonl", tmp_path, batch, ranks=ranks)
    known = max(found["known"] for found in all_found)
    for found in all_found:
        slots = batch // ranks * 3
        assert found["chunks"] > 2
        assert found["slots"] == slots
        assert sorted(found["calls"]) == sorted(
            [
                ("all_gather_single", batch // ranks * (2 + known) * 8),  # each query, its known positives, its tokens
                ("all_reduce", 8),  # how many known positives a query has at most
                ("all_gather_single", slots * 3 * 8),  # of each passage: its text, its tokens, its query
                ("all_gather_single", slots * width * 4),  # their vectors
                ("all_reduce", 8 * found["tensors"]),  # which weights have a gradient
                ("all_reduce", found["weights"]),  # the weights' gradient
                ("reduce_scatter_single", ranks * slots * width * 4),  # the gradient of all ranks' vectors
            ]
        )


def test_the_trainer_gives_one_curve_on_one_and_two_ranks(qwen3, data, tmp_path):
    """AdamW through the real Trainer and torchrun; each batch from one data set, the same rows on both."""
    from gritlm.data.batch_plan import MIXED

    cache = tmp_path / "cache"
    flags = {"max_steps": 8, "save_steps": 8, "global_batch_size": 8}
    for ranks in (1, 2):
        train(*train_flags(qwen3, data, tmp_path / str(ranks), cache, **flags), ranks=ranks)
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == 8
    assert max(abs(a - b) / a for a, b in zip(one, two, strict=True)) < 1e-4, (one, two)
    assert one[0] > 0

    builder = make_builder(qwen3, data, cache)
    for step in range(builder.plan.steps_per_epoch):
        halves = [make_builder(qwen3, data, cache, rank=r, ranks=2)[0, step].rows for r in (0, 1)]
        whole = builder[0, step]
        assert halves[0] + halves[1] == whole.rows
        assert whole.dataset != MIXED
    wanted = {"tokens_per_second", "real_token_share", "time_share/pass_1", "grad_norm", "info_nce", "loss/hard"}
    assert wanted <= set().union(*log_of(tmp_path / "2"))


def summed_gradients() -> list[list[torch.Tensor | None]]:
    """Of a weight that both ranks use, a transposed one, one that only the second uses, and one that none does."""
    found = []
    for bucket_bytes in (1, 50, 10**6):
        module = torch.nn.ParameterList([torch.full((2, 3), float(rank())) for _ in range(4)])
        replica = Replica(module)
        assert not any(weight.any() for weight in module), "the first rank's weights"
        replica.bucket_bytes = bucket_bytes
        module[1].grad = torch.ones(3, 2).t()
        used = list(module)[: 2 + rank()]
        loss = sum(weight.sum() for weight in used) * (rank() + 1)
        engine_for(replica).backward([lambda loss=loss: loss.clone()])
        found.append([weight.grad for weight in module])
    return found


def test_ranks_sum_the_gradients_of_all_weights_that_any_of_them_uses():
    for found in run_ranks(summed_gradients):
        for gradients in found:
            seen = [None if gradient is None else gradient.unique().tolist() for gradient in gradients]
            assert seen == [[3.0], [5.0], [2.0], None]
