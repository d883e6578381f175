#!/usr/bin/env python3
"""Make the models of scripts/studies/small.sh: python scripts/studies/small_models.py TASK STEPS

TASK is a folder of `gritlm quickstart prepare`. base-lm is a tiny Qwen3 that learns from scratch to write Python from a
summary. sft goes on with other text at the same high rate, rlvr with a few small steps on text of the same kind.
retrained learns the same as base-lm, from another random start.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, set_seed

from gritlm.files import written_aside
from gritlm.models.tiny import TINY, build_tokenizer

LENGTH, BATCH, VOCABULARY = 128, 16, 4096
SMALL = TINY | {"num_hidden_layers": 3, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


def train(model: PreTrainedModel, texts: list[str], tokenizer, steps: int, rate: float) -> None:
    """Next-token prediction on packed texts: AdamW, the rate falls to 0."""
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    rows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for step in range(1, steps + 1):
        batch = rows[torch.randint(len(rows), (BATCH,))]
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        if step in (1, steps):
            print(f"  step {step}: loss {loss.item():.3f}", flush=True)


def main(task: Path, steps: int) -> None:
    pairs = [json.loads(line) for line in (task / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    forward = [f'"""{row["query"][1]}"""\n{row["pos"][0]}' for row in pairs]
    backward = [f"{row['pos'][0]}\n# It does this: {row['query'][1]}" for row in pairs]
    plan = [
        ("base-lm", forward, steps, 3e-3),
        ("sft", backward, steps, 3e-3),
        ("rlvr", forward, -(-steps // 16), 1e-4),
        ("retrained", forward, steps, 3e-3),
    ]
    for name, texts, count, rate in plan:
        if (task / name).exists():
            continue
        print(f"{name}: {count} steps", flush=True)
        set_seed(int(name == "retrained"))
        with written_aside(task / name) as aside:
            if name == "base-lm":
                build_tokenizer(aside, forward, VOCABULARY)
            if name in ("base-lm", "retrained"):
                model = Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, eos_token_id=0, **SMALL))
                torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.3)  # see gritlm/models/tiny.py
            else:
                model = Qwen3ForCausalLM.from_pretrained(task / "base-lm")
            tokenizer = AutoTokenizer.from_pretrained(aside if name == "base-lm" else task / "base-lm")
            train(model, texts, tokenizer, count, rate)
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
