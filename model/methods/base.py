"""What a training method is, and what most of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from model.fields.base import Condition, VelocityField, velocity_gaps
from model.rollout import euler_path
from model.setup import Accumulate, Batch, Setup
from model.step import Plan

Backward = Callable[[torch.Tensor], None]
# (batch, the field to learn from, backward) -> (n,): the losses of its slots, their gradients added by
# `backward(losses of the slots, or terms of them)`.
Losses = Callable[[Batch, VelocityField, Backward], torch.Tensor]


@dataclass(frozen=True)
class Method:
    """An entry of `METHODS`.

    `compute`: from K = query_states, what computes a step; None: there is no step, the student is its start.
    `cost`: from (N, E[j] of the furthest query, evaluations of the teacher's field, K), the network evaluations of one
    sample, and how many of them have a backward.
    `states`: the one kind that it queries, None: either. `several`: K may be above 1. `lockstep`: with K = 1 all
    processes make equally many forwards, as a shared base needs. `start`: the one start that it takes, None: any.
    `group`: slots that belong together.
    """

    compute: Callable[[int], Accumulate] | None
    cost: Callable[[int, float, float, int], tuple[float, int]]
    states: str | None = "on_policy"
    several: bool = False
    lockstep: bool = False
    start: str | None = None
    group: int = 1


def by_batch(losses_of: Losses) -> Accumulate:
    """A step whose batches are rolled out, compared and differentiated one after the other."""

    def accumulate(
        setup: Setup, teacher: VelocityField, plan: Plan, slots: Sequence[int]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        losses = torch.zeros(len(plan.rows), device=setup.execution.device)
        for batch in setup.batches(plan, slots, setup.execution.micro_batch):
            losses[batch.slots] = losses_of(batch, teacher, lambda loss: (loss.sum() / len(plan.rows)).backward())
        return losses, {}

    return accumulate


def rollout(batch: Batch, last: int) -> list[torch.Tensor]:
    """The states x_0 (noise), ..., x_last of the student's Euler rollout, each (n, C, H, W)."""
    setup = batch.setup
    with setup.rolling_out():
        grid = setup.grid[: last + 1]
        return list(euler_path(setup.student.field, batch.noise(), batch.condition(), grid))


def gaps_to(
    teacher: VelocityField, setup: Setup, x_t: torch.Tensor, t: torch.Tensor, condition: Condition
) -> torch.Tensor:
    """(n,): mean squared velocity gap to the teacher at given states, differentiable in the student."""
    with torch.no_grad(), setup.precision():
        target = teacher(x_t, t, condition)
    with setup.precision():
        return velocity_gaps(setup.student.field(x_t, t, condition), target)
