"""Time of a training step on real texts of unequal lengths, and, in the same process, of a peer doing the same work."""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from gritlm.data.collator import BatchBuilder, TextContract, TextEncoder, load_tokenizer
from gritlm.data.plan import Plan
from gritlm.data.records import RecordSet, load_records
from gritlm.engines import SingleEngine
from gritlm.errors import UserError, run_verb
from gritlm.gradcache import two_pass_step
from gritlm.model_folder import save_model_folder
from gritlm.models.backbone import load_backbone, load_config
from gritlm.models.embedder import Embedder
from gritlm.objective import ContrastiveBatch, Objective
from gritlm.quickstart import build_model, collect

EXAMPLES = """examples:
  gritlm benchmark
  gritlm benchmark --compare sentence-transformers --rounds 5"""

TEMPERATURE = 0.05


def make_task(folder: Path, rows: int, group: int, max_len: int) -> tuple[RecordSet, TextEncoder, Embedder]:
    """Docstring -> code pairs of the standard library with other code as hard negatives; Qwen3 of 4 layers x 256."""
    pairs, _ = collect(max_pairs=0)
    pairs = pairs[:: max(1, len(pairs) // (rows * group))][: rows * group]
    with open(folder / "pairs.jsonl", "w") as out:
        for i, (summary, code) in enumerate(pairs[:rows]):
            # Each text stands once: the peer does not mask identical texts, and the losses are to be compared.
            negatives = [negative for _, negative in pairs[rows + i :: rows]]
            out.write(json.dumps({"query": summary, "pos": [code], "neg": negatives}) + "\n")
    size = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8}
    build_model(folder / "model", [text for pair in pairs for text in pair], **size, num_key_value_heads=4)
    contract = TextContract(query_max_len=max_len, passage_max_len=max_len)
    encoder = TextEncoder(load_tokenizer(str(folder / "model"), contract), contract)
    embedder = Embedder(load_backbone(str(folder / "model"), load_config(str(folder / "model"))))
    (records,) = load_records(folder / "pairs.jsonl", folder / "cache")
    return records, encoder, embedder


def our_step(builder: BatchBuilder, embedder: Embedder) -> Callable[[], torch.Tensor]:
    """One step as the trainer takes it, tokenisation included; leaves the gradient in `.grad`, returns the loss."""
    engine, objective = SingleEngine(embedder), Objective(TEMPERATURE)

    def step() -> torch.Tensor:
        embedder.zero_grad()
        batch = builder[0, 0]
        layout = ContrastiveBatch(**batch["layout"])
        return two_pass_step(engine, batch["chunks"], lambda vectors: objective(vectors, layout)).loss

    return step


def peer_step(builder: BatchBuilder, folder: Path, **options) -> tuple[Callable[[], torch.Tensor], torch.nn.Module]:
    """The same batch through sentence-transformers' CachedMultipleNegativesRankingLoss, tokenisation included."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss

    model = SentenceTransformer(str(folder), device="cpu")
    loss = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, **options)
    rows = [builder.records[d][r] for d, r in builder.plan.batch(0, 0).rows]
    draws = [
        builder.plan.draw(0, 0, d, r, 1, len(row.negatives), builder.group_size - 1)[1]
        for (d, r), row in zip(builder.plan.batch(0, 0).rows, rows, strict=True)
    ]
    columns = [[row.query.text for row in rows], [row.positives[0].text for row in rows]]
    columns += [
        [row.negatives[draw[k]].text for row, draw in zip(rows, draws, strict=True)]
        for k in range(builder.group_size - 1)
    ]

    def step() -> torch.Tensor:
        model.zero_grad()
        value = loss([model.preprocess(column) for column in columns], None)
        value.backward()
        return value.detach()

    return step, model


def timed(step: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    started = time.perf_counter()
    loss = step()
    return time.perf_counter() - started, loss


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="gritlm benchmark",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--queries", type=int, default=64, help="default 64")
    parser.add_argument("--group", type=int, default=4, help="passages per query, default 4")
    parser.add_argument("--max_len", type=int, default=512, help="tokens, default 512")
    parser.add_argument("--chunk_tokens", type=int, default=2048, help="default 2048")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, default 5; medians are reported")
    parser.add_argument("--compare", choices=("sentence-transformers",), help="time the peer in the same rounds")
    parser.add_argument("--mini_batch_size", type=int, default=16, help="the peer's, default 16")
    arguments = parser.parse_args(argv)
    if not (2 <= arguments.queries <= 256 and 1 <= arguments.group <= 5 and arguments.rounds > 0):
        raise UserError("wanted 2 to 256 --queries, 1 to 5 passages a --group, and at least 1 of --rounds")
    transformers.utils.logging.disable_progress_bar()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records, encoder, embedder = make_task(folder, 4 * arguments.queries, arguments.group, arguments.max_len)
        save_model_folder(embedder, encoder, folder / "served")
        plan = Plan([records.name], [len(records)], arguments.queries, seed=0)
        builder = BatchBuilder(plan, [records], encoder, arguments.group, arguments.chunk_tokens)
        steps = {"gritlm": our_step(builder, embedder)}
        if arguments.compare:
            options = {"mini_batch_size": arguments.mini_batch_size}
            steps[arguments.compare], peer = peer_step(builder, folder / "served", **options)
        seconds, losses = {name: [] for name in steps}, {}
        for number in range(arguments.rounds + 1):
            for name, step in steps.items():
                taken, losses[name] = timed(step)
                if number:  # the first round warms up
                    seconds[name].append(taken)

        batch = builder[0, 0]
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
        print(f"{arguments.queries} queries x {arguments.group} passages, {batch['real_tokens']} tokens")
        for name, times in seconds.items():
            median = statistics.median(times)
            print(
                f"  {name:22} {median:7.2f} s/step  (min {min(times):.2f}, max {max(times):.2f})"
                f"  {batch['real_tokens'] / median:8.0f} tokens/s  loss {losses[name].item():.6f}"
            )
        if arguments.compare:
            ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
            ours = torch.cat([p.grad.flatten() for p in embedder.parameters()])
            theirs = torch.cat([p.grad.flatten() for p in peer.parameters()])
            print(
                f"  ratio, paired, median {statistics.median(ratios):.2f}; gradients agree to "
                f"{((ours - theirs).norm() / theirs.norm()).item():.1e} in relative norm"
            )
    return 0


if __name__ == "__main__":
    sys.exit(run_verb(main))
