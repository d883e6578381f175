"""Random texts for `gritlm verify-gradients`: one global batch, whole or in slices."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gritlm.data.batches import Chunk, ContrastiveBatch, build_contrastive_batch
from gritlm.models.chunks import ChunkConfig, to_device
from gritlm.models.tokenizer import Tokens

TEACHER_WIDTH = 24


@dataclass
class RandomTexts:
    """The texts of one global batch: tokens of long-tailed lengths, and ids. Some texts appear more than once.

    scores_QG, teacher_QE, teacher_QGE: what a teacher says of them, float32.
    """

    queries: list[Tokens]
    groups: list[list[Tokens]]
    group_ids: list[list[int]]
    known_positives: list[list[int]]
    scores_QG: Tensor
    teacher_QE: Tensor
    teacher_QGE: Tensor

    @classmethod
    def draw(cls, step: int, queries: int, group: int, longest: int, vocabulary: int) -> "RandomTexts":
        generator = torch.Generator().manual_seed(step)

        def text() -> Tokens:
            length = 1 + int((longest - 1) * torch.rand((), generator=generator) ** 3)
            return Tokens(torch.randint(0, vocabulary, (length,), generator=generator).tolist(), 0)

        groups = [[text() for _ in range(group)] for _ in range(queries)]
        ids = [[query * group + number for number in range(group)] for query in range(queries)]
        known = [[row[0]] for row in ids]
        texts = [text() for _ in range(queries)]
        for query in range(1, queries, 3):  # the previous query's positive is among this one's passages
            groups[query][-1], ids[query][-1] = groups[query - 1][0], ids[query - 1][0]
            known[query][0] = ids[query][0]
        for query in range(2, queries, 4):  # the previous query's positive is known to answer this one, too
            known[query].append(ids[query - 1][0])
        if queries > 3:  # one query twice
            texts[3] = texts[2]
            known[2] = known[3] = [*known[2], *known[3]]
        scores_QG = torch.rand(queries, group, generator=generator)
        teacher_QGE = F.normalize(torch.randn(queries, 1 + group, TEACHER_WIDTH, generator=generator), dim=2)
        return cls(texts, groups, ids, known, scores_QG, teacher_QGE[:, 0], teacher_QGE[:, 1:])

    def batch(self, rows: slice, chunking: ChunkConfig, device: torch.device) -> tuple[list[Chunk], ContrastiveBatch]:
        chunks, batch = build_contrastive_batch(
            self.queries[rows],
            self.groups[rows],
            self.group_ids[rows],
            self.known_positives[rows],
            len(self.groups[0]),
            chunking,
            pad_id=0,
        )
        batch.scores_S = self.scores_QG[rows].flatten().float()  # float64 for the reference in float64
        batch.teacher_BE = self.teacher_QE[rows].float()
        batch.teacher_SE = self.teacher_QGE[rows].flatten(0, 1).float()
        return [to_device(chunk, device) for chunk in chunks], ContrastiveBatch(**to_device(vars(batch), device))
