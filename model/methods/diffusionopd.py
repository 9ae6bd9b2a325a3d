"""DiffusionOPD: the squared gap at all N states of the student's rollout, weighted by dt_k^2 / 2; every step holds a
group of each route."""

from __future__ import annotations

from itertools import pairwise

import torch

from model.fields.base import VelocityField
from model.methods.base import Backward, Method, by_batch, gaps_to, rollout
from model.setup import Batch


def all_states(batch: Batch, teacher: VelocityField, backward: Backward) -> torch.Tensor:
    """Sum over the N states of dt_k^2 / 2 times the squared gap. dt_k are the grid's: at shift 3 and N = 16 they differ
    up to 7.7 times. Returns (n, N): N times the terms, so that their mean is the sum."""
    setup, condition, levels = batch.setup, batch.condition(), batch.setup.grid.tolist()
    steps, terms = list(pairwise(levels)), []
    for x_t, (now, after) in zip(rollout(batch, len(steps) - 1), steps, strict=True):
        term = 0.5 * (after - now) ** 2 * gaps_to(teacher, setup, x_t, batch.at(now), condition)
        backward(term)
        terms.append(term.detach())
    return len(steps) * torch.stack(terms, dim=1)


METHOD = Method(
    compute=by_batch(all_states),
    cost=lambda steps, reached, teacher, query_states: (steps - 1 + steps * (teacher + 1.0), steps),
    routing="mixed",
    dense=True,
)
