"""From one rank's vectors to its share of the global loss: each term at each width, times its weight.

Shape suffixes: T local texts, B local queries, G passages per query, S = B*G local passage slots, D and E widths of the
model and of the teacher.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gritlm.data.batches import ContrastiveBatch
from gritlm.distributed import Ranks, gather_with_gradient
from gritlm.errors import UserError
from gritlm.training.arguments import ObjectiveArguments
from gritlm.training.contrast import Contrast
from gritlm.training.objective_rules import is_on
from gritlm.training.terms import CHANGES, TERMS, found


def narrow_widths(args: ObjectiveArguments) -> list[tuple[int, float]]:
    """Each width of --matryoshka_dims, and its weight."""
    dims = args.matryoshka_dims or []
    return list(zip(dims, args.matryoshka_weights or [1.0] * len(dims), strict=True))


def needs_projection(args: ObjectiveArguments) -> bool:
    """Whether a learnt projection of the model's vectors is compared with a teacher's."""
    return args.teacher_weight > 0 and args.teacher_loss != "scores"


def without_teacher(by_set: Iterable[ObjectiveArguments]) -> list[ObjectiveArguments]:
    """The losses of an evaluation, where the model's vectors have no projection on the teacher's width."""
    return [replace(args, teacher_weight=0.0, guide_margin=None) for args in by_set]


def describe_objective(args: ObjectiveArguments, width: int) -> str:
    """A line with the terms of a run's loss, their weights, and the widths that are trained.

    Raises:
        UserError: a width of --matryoshka_dims is not below the model's.
    """
    dims = args.matryoshka_dims or []
    if dims and dims[0] >= width:
        raise UserError(f"--matryoshka_dims {dims[0]}: wanted widths below the model's, which is {width}")
    if args.angle_weight and (odd := [dim for dim in (width, *dims) if dim % 2]):
        raise UserError(f"--angle_weight: found the odd width {odd[0]}, wanted even ones")
    weights = {name: term.weight(args) for name, term in TERMS.items()}
    parts = [f"{weight:g} {name}" if weight != 1 else name for name, weight in weights.items() if weight]
    changes = [f"--{name}" for name in CHANGES if is_on(getattr(args, name), name)]
    changes += ["hard negatives only"] * (not args.in_batch_negatives)
    widths = ", ".join(f"{dim} ({weight:g})" for dim, weight in narrow_widths(args))
    return (
        f"loss: {' + '.join(parts)}"
        + (f", temperature {args.temperature:g}" if args.contrastive_weight else "")
        + (f", with {', '.join(changes)}" if changes else "")
        + (f"; also at the widths {widths} of {width}" if dims else "")
    )


@dataclass(frozen=True)
class Objective:
    """The mean loss over the global batch, as one rank sees it.

    Args:
        args: which terms there are, and their settings.
        ranks: who shares the global batch; one process by default, also inside a job of many ranks.
        gather: this rank's vectors -> all ranks', with gradient.
        by_set: the flags of each data set, where they differ; `args` holds those that are one for all.
        left_out: by rule, how many candidates of this rank's queries it left out in the last call, at the full width.
    """

    args: ObjectiveArguments
    ranks: Ranks = Ranks()
    gather: Callable[[Tensor], Tensor] = gather_with_gradient
    by_set: Sequence[ObjectiveArguments] | None = None
    left_out: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def __call__(self, vectors_TD: Tensor, batch: ContrastiveBatch) -> dict[str, Tensor]:
        """This rank's share of each term: the sum of its queries' losses over the number of queries of all ranks.

        A term at a narrower width w is named `term@w`. The global loss is the sum over ranks and terms. Scalars,
        float32, differentiable once.
        """
        vectors_TD = vectors_TD.float()  # before anything else, so that gradients of a vector add up in float32
        projected_TE = vectors_TD
        if batch.teacher_BE is not None and batch.teacher_SE is not None:
            batch = replace(batch, teacher_BE=batch.teacher_BE.float(), teacher_SE=batch.teacher_SE.float())
        if self.projects:  # each row ends in its projection on the teacher's width
            width = found(batch.teacher_BE, "teacher vectors").shape[1]
            vectors_TD, projected_TE = vectors_TD[:, :-width], vectors_TD[:, -width:]
        self.left_out.clear()
        total, shares = len(batch.text_of_query_B) * self.ranks.size, dict[str, Tensor]()
        for suffix, weight, narrow_TD in self._widths(vectors_TD):
            for args, own_B in self._losses(batch):
                contrast = self._contrast(args, narrow_TD, projected_TE, batch)
                for name, term in TERMS.items():
                    if (own := weight * term.weight(args)) and (term.every_width or not suffix):
                        share = own * (term.losses(contrast) * own_B).sum() / total
                        shares[name + suffix] = shares[name + suffix] + share if name + suffix in shares else share
                for rule, count_B in contrast.left_out.items() if not suffix else ():
                    self.left_out[rule] = (count_B * own_B).sum() + self.left_out.get(rule, 0)
        return shares

    @property
    def projects(self) -> bool:
        """Whether the vectors end in their projection on the teacher's width."""
        return any(map(needs_projection, self.by_set or [self.args]))

    def _losses(self, batch: ContrastiveBatch) -> Iterator[tuple[ObjectiveArguments, Tensor]]:
        """The flags of each loss that the global batch has, and which queries have it; alike on all ranks."""
        if not self.by_set or batch.set_B is None:
            yield self.args, torch.ones_like(batch.text_of_query_B, dtype=torch.bool)
            return
        flags = [self.by_set[number] for number in batch.sets]
        for number, args in enumerate(flags):
            if args not in flags[:number]:
                own = [other for other, its in zip(batch.sets, flags, strict=True) if its == args]
                yield args, torch.isin(batch.set_B, torch.tensor(own, device=batch.set_B.device))

    def _widths(self, vectors_TD: Tensor) -> Iterator[tuple[str, float, Tensor]]:
        """The suffix of a term's name, the weight, and the vectors at each width."""
        yield "", 1.0, vectors_TD
        for width, weight in narrow_widths(self.args):
            yield f"@{width}", weight, F.normalize(vectors_TD[:, :width], dim=1)

    def _contrast(
        self, args: ObjectiveArguments, vectors_TD: Tensor, projected_TE: Tensor, batch: ContrastiveBatch
    ) -> Contrast:
        queries_BD = vectors_TD[batch.text_of_query_B]
        used_S = batch.text_of_slot_S >= 0
        slots_SD = vectors_TD[batch.text_of_slot_S.clamp(min=0)] * used_S[:, None]
        queries_BD = queries_BD.detach() if self.args.emb_p_only else queries_BD
        slots_SD = slots_SD.detach() if self.args.emb_q_only else slots_SD
        positives_BD = slots_SD[:: len(slots_SD) // len(queries_BD)]
        vectors = queries_BD, positives_BD, slots_SD, projected_TE
        return Contrast(args, self.ranks, self.gather, batch, *vectors)
