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
# (batch, the field to learn from, backward) -> (n,) or (n, K): the losses of its slots, or of their K states (whose
# mean is the slot's). `backward(losses of the slots, or terms of them)` adds their gradients.
Losses = Callable[[Batch, VelocityField, Backward], torch.Tensor]


def queried(setup: Setup, plan: Plan) -> list[float]:
    """The noise levels of a plan's query indices, by slot and state."""
    return [level for indices in plan.query for level in setup.grid[list(indices)].tolist()]


@dataclass(frozen=True)
class Method:
    """An entry of `METHODS`.

    `compute`: what computes a step; None: there is no step, the student is its start. `cost`: from (N, the furthest
    query index, evaluations of the teacher's field, K), the network evaluations of one sample, and how many of them
    have a backward. `levels`: the t at which student and target meet, as Step.levels.

    `states`, `routing`, `start`: the one choice that it takes, None: any. `dense`: it compares all N states. `several`:
    K may be above 1. `lockstep`: with K = 1 all processes make equally many forwards, as a shared base needs. `group`:
    so many slots share an example.
    """

    compute: Accumulate | None
    cost: Callable[[int, float, float, int], tuple[float, int]]
    levels: Callable[[Setup, Plan], list[float]] = queried
    states: str | None = "on_policy"
    routing: str | None = None
    start: str | None = None
    dense: bool = False
    several: bool = False
    lockstep: bool = False
    group: int = 1


def by_batch(losses_of: Losses) -> Accumulate:
    """A step whose batches are rolled out, compared and differentiated one after the other."""

    def accumulate(
        setup: Setup, teacher: VelocityField, plan: Plan, slots: Sequence[int]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        count = len(plan.rows)
        losses = torch.zeros(count, len(plan.query[0]), device=setup.execution.device)
        for batch in setup.batches(plan, slots, setup.execution.micro_batch):
            answer = losses_of(batch, teacher, lambda loss: (loss.sum() / count).backward())
            losses[batch.slots] = answer.reshape(len(batch.slots), -1)
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
