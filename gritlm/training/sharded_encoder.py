"""Encode texts on all ranks of a run, under any engine: each rank encodes its share, and all get all vectors."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gritlm.distributed import all_reduce_sum, rank, world_size
from gritlm.evaluation.sets import Side
from gritlm.models.chunks import ChunkConfig, make_chunks, to_device
from gritlm.models.text import Text
from gritlm.models.tokenizer import TextTokenizer, Tokens
from gritlm.training.engines import Engine
from gritlm.training.gradcache import first_text, is_out_of_memory
from gritlm.training.run_log import log

TEXTS_AT_ONCE = 4096  # of a rank
GATHERED = 1 << 27  # numbers of vectors that are gathered at once, at most


class ShardedEncoder:
    """An `Encode` that shares the texts out over the ranks; every rank gets all vectors. All ranks must call it.

    Args:
        chunking: how a rank's share is cut into chunks.
        alive: called after each chunk.
    """

    engine: Engine

    def __init__(
        self,
        text_tokenizer: TextTokenizer,
        chunking: ChunkConfig,
        width: int,
        device: torch.device,
        alive: Callable[[], None],
    ):
        self.text_tokenizer, self.width, self.device, self.alive = text_tokenizer, width, device, alive
        self.chunking = replace(chunking, deduplicate=True)  # no dropout in an evaluation

    def __call__(self, texts: Sequence[str], side: Side, instructions: Sequence[str] | None = None) -> np.ndarray:
        """float32 (N, D), unit vectors."""
        contract = self.text_tokenizer.contract
        limit = contract.query_max_len if side == "query" else contract.passage_max_len
        prompt = contract.prompts.get("query" if side == "query" else "document", "")
        place: dict[Text, int] = {}
        pairs = zip(instructions or [prompt] * len(texts), texts, strict=True)
        row_of = [place.setdefault(Text(*pair), len(place)) for pair in pairs]
        distinct = list(place)
        order = sorted(range(len(distinct)), key=lambda i: -len(distinct[i].text))
        vectors_ND = np.empty((len(distinct), self.width), dtype=np.float32)
        step = min(TEXTS_AT_ONCE * world_size(), max(GATHERED // self.width, 1))
        for start in range(0, len(order), step):
            part = order[start : start + step]

            def tokens_of(numbers: list[int], part: list[int] = part) -> list[Tokens]:
                return self.text_tokenizer([distinct[part[i]] for i in numbers], limit)

            vectors_ND[part] = self.vectors(len(part), tokens_of).cpu().numpy()
        return (vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True).clip(1e-12))[row_of]

    def vectors(self, count: int, tokens_of: Callable[[list[int]], list[Tokens]]) -> Tensor:
        """float32 (count, D): the vectors of numbered texts, longest first. Each rank makes the tokens of its share."""
        own = list(range(count))[rank() :: world_size()]
        vectors_OD = self._forward(tokens_of(own or [0]))
        if world_size() == 1:
            return vectors_OD
        gathered_ND = torch.zeros(count, self.width, device=self.device)
        gathered_ND[own] = vectors_OD[: len(own)]
        return all_reduce_sum(gathered_ND)

    def _forward(self, tokens: list[Tokens]) -> Tensor:
        """The vectors of this rank's texts. Out of memory, with smaller chunks, unless other ranks take part."""
        pad_id, longest = self.text_tokenizer.tokenizer.pad_token_id, max(len(text.ids) for text in tokens)
        while True:
            chunks, row_of_text = make_chunks(tokens, self.chunking, pad_id)
            idle = self.engine.rounds(len(chunks)) - len(chunks)
            try:
                parts = []
                for chunk in [*chunks, *[first_text(chunks[-1])] * idle]:
                    parts.append(self.engine.model(**to_device(chunk, self.device)).float())
                    self.alive()
                return torch.cat(parts[: len(chunks)])[row_of_text.to(self.device)]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.engine.collective or self.chunking.tokens <= longest:
                    raise
            parts = []
            self.chunking = replace(self.chunking, tokens=self.chunking.tokens // 2)
            gc.collect()
            torch.cuda.empty_cache()
            where = f"rank {rank()}: " if world_size() > 1 else ""
            log.warning("%sout of memory: the evaluation goes on in chunks of %d tokens", where, self.chunking.tokens)
