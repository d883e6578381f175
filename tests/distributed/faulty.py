"""`gritlm verify-gradients` with an objective that has one of the field's usual faults: it must notice.

usage: faulty.py none|gather|divided|bfloat16 flags of gritlm verify-gradients ...
"""

import sys

import torch

from gritlm.cli import exit_rank, run_verb
from gritlm.distributed import all_gather, rank, world_size
from gritlm.training import engines, verify_gradients
from gritlm.training.objective import Objective

FAULT = sys.argv[1]
if FAULT == "bfloat16":  # DeepSpeed's own bf16 adds the gradients of the chunks up in bfloat16
    engines.deepspeed_precision = lambda bf16: {"bf16": {"enabled": bf16}, "data_types": {"grad_accum_dtype": "fp32"}}


def gather_own_gradient(x):
    """Gathered rows carry a gradient only where they are this rank's."""
    parts = list(all_gather(x.detach()).chunk(world_size()))
    parts[rank()] = x
    return torch.cat(parts)


def faulty(args, ranks):
    """The loss is right; its gradient is not."""
    if FAULT in ("none", "bfloat16"):
        return Objective(args, ranks)
    if FAULT == "gather":
        return Objective(args, ranks, gather=gather_own_gradient)
    right = Objective(args, ranks)

    def divided(vectors, batch):
        terms = right(vectors, batch)
        return {name: share.detach() + (share - share.detach()) / ranks.size for name, share in terms.items()}

    return divided


exit_rank(run_verb(lambda argv: verify_gradients.main(argv, make_objective=faulty), sys.argv[2:]))
