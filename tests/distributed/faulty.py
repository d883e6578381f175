"""`gritlm verify-gradients` with one of the field's usual faults planted: it must notice.

usage: faulty.py gather|divided flags of gritlm verify-gradients ...
"""

import sys

import torch

from gritlm.cli import run_verb
from gritlm.distributed import all_gather, rank, world_size
from gritlm.training import engines, objective, verify_gradients


def gather_own_gradient(x):
    """Gathered passages carry a gradient only where they are this rank's own."""
    parts = list(all_gather(x.detach()).chunk(world_size()))
    parts[rank()] = x
    return torch.cat(parts)


def divided(model):
    engine = engines.engine_for(model)
    engine.loss_scale = 1.0
    return engine


if sys.argv[1] == "gather":
    objective.gather_with_gradient = gather_own_gradient
else:
    verify_gradients.engine_for = divided
sys.exit(run_verb(verify_gradients.main, sys.argv[2:]))
