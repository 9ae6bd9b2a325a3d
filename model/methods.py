"""The baselines and ablations of the paper that share the loop: each computes one step's losses and gradients in place
of model.distill.accumulate.

| method | states | loss |
|---|---|---|
| danceopd | one state of the student's rollout (or `query_states` = K of them) | mean squared velocity gap to the
routed teacher |
| offpolicy | the forward-noised target image | the same |
| diffusionopd | all N states of the student's rollout | sum over k of dt_k^2 / 2 times the squared gap, with the grid's
own dt_k |
| flowopd | all N states of a stochastic rollout, groups of one prompt | PPO with the KL between transition means as
detached reward |
| joint | the forward-noised target image | flow matching to the data, no teacher |
| merge | none | none: the student is its start, the mean of the teachers |

Every draw comes from (seed, step, slot, purpose), and nothing is drawn that the step's plan holds already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch

from data.errors import UserError
from data.randomness import numpy_generator
from model.compute.execution import Execution, moved, precision, rollout_ready
from model.distill import Accumulate, parts
from model.examples import Bucket
from model.fields.base import Condition, VelocityField, velocity_gaps
from model.networks.student import Student
from model.randomness import noise_for
from model.rollout import query_index
from model.step import LoopParams, Plan

METHODS = ("danceopd", "offpolicy", "diffusionopd", "flowopd", "joint", "merge")
QueryStates = Literal[1, 2, 4, 8, 16]  # K, the ablation's values
GROUP = 16  # rollouts of one prompt in flowopd
ETA = 0.7  # size of its noise
RATIO_CLIP = 1e-4

Losses = Callable[
    ..., torch.Tensor
]  # (_Part, backward) -> (n,): each slot's loss, its gradient added by `backward(loss of the slots, their count)`


@dataclass(frozen=True)
class _Part:
    """Slots of one latent shape that are computed together."""

    student: Student
    teacher: VelocityField
    bucket: Bucket
    plan: Plan
    slots: list[int]
    shape: tuple[int, ...]
    params: LoopParams
    grid: torch.Tensor
    seed: int
    execution: Execution

    @property
    def rows(self) -> list[int]:
        return [self.plan.rows[slot] for slot in self.slots]

    def condition(self) -> Condition:
        return moved(self.bucket.at(self.rows), self.execution.device)

    def noise(self, purpose: str = "noise") -> torch.Tensor:
        return moved(noise_for(self.seed, self.plan.index, self.slots, self.shape, purpose), self.execution.device)

    def at(self, level: float) -> torch.Tensor:
        return torch.full((len(self.slots),), level, device=self.execution.device)


def method_faults(method: str, states: str, query_states: int, start: str, batch: int) -> list[str]:
    """What is wrong with a choice of method among a run's other numbers."""
    faults = []
    if query_states > 1 and (method != "danceopd" or states != "on_policy"):
        faults.append(
            f"query_states = {query_states}: only method = 'danceopd' on its own rollout has a choice; set it to 1"
        )
    if (method == "offpolicy") != (states == "off_policy") and method in (
        "offpolicy",
        "diffusionopd",
        "flowopd",
        "joint",
    ):
        faults.append(
            f"states = {states!r}: method = {method!r} needs {'off_policy' if method == 'offpolicy' else 'on_policy'!r}"
        )
    if method == "merge" and start != "merged":
        faults.append(f"start = {start!r}: method = 'merge' is the mean of the teachers; set start: merged")
    if method == "flowopd" and batch % min(batch, GROUP):
        faults.append(
            f"batch = {batch}: method = 'flowopd' takes groups of {GROUP} rollouts; a multiple of it, or fewer"
        )
    return faults


def in_lockstep(method: str, query_states: int) -> bool:
    """Whether `Execution.lockstep` holds in its steps: model.distill.accumulate pads them to equal counts of forwards.

    "merge" has no step at all.
    """
    return method == "merge" or (method in ("danceopd", "offpolicy") and query_states == 1)


def compute_of(method: str, query_states: int) -> Accumulate | None:
    """What computes a step of the method; None where the loop's own does. Raises UserError for "merge", which has no
    step.
    """
    if method == "merge":
        raise UserError("method = 'merge': nothing is trained")
    if method in ("danceopd", "offpolicy"):
        return partial(_accumulate, several_states(query_states)) if query_states > 1 else None
    return partial(
        _accumulate, {"diffusionopd": all_states, "flowopd": policy_gradient, "joint": flow_matching}[method]
    )


def _accumulate(
    losses_of: Losses,
    student: Student,
    teacher: VelocityField,
    bucket: Bucket,
    plan: Plan,
    slots: Sequence[int],
    params: LoopParams,
    grid: torch.Tensor,
    seed: int,
    execution: Execution,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """As model.distill.accumulate: adds the gradient of the step's mean loss, as far as `slots` go; returns every
    slot's loss (B,).
    """
    if losses_of is policy_gradient:  # one prompt a group, many rollouts
        size = min(len(plan.rows), GROUP)
        plan = Plan(
            plan.index, plan.route, tuple(plan.rows[slot - slot % size] for slot in range(len(plan.rows))), plan.query
        )
    shapes = {slot: bucket.shape_of(plan.rows[slot]) or student.backbone.latent_shape for slot in slots}
    losses = torch.zeros(len(plan.rows), device=execution.device)
    for part in parts(slots, shapes, execution.micro_batch):
        made = _Part(student, teacher, bucket, plan, part, shapes[part[0]], params, grid, seed, execution)
        losses[part] = losses_of(made, lambda loss: (loss.sum() / len(plan.rows)).backward())
    return losses, {"rows": torch.tensor(plan.rows), "query": torch.tensor(plan.query)}


@torch.no_grad()
def _rollout(part: _Part, last: int) -> list[torch.Tensor]:
    """The states x_0 (noise), ..., x_last of the student's Euler rollout, each (n, C, H, W)."""
    execution, student = part.execution, part.student
    x, condition, levels = part.noise(), part.condition(), part.grid.tolist()
    states = [x]
    with (
        rollout_ready(student.network, student.adapter, execution),
        precision(execution.device, execution.dtype, execution.attention),
    ):
        for now, after in list(pairwise(levels))[:last]:
            x = x + (after - now) * student.field(x, part.at(now), condition).float()
            states.append(x)
    return states


def _gap(part: _Part, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
    """(n,): mean squared velocity gap to the teacher at given states, differentiable in the student."""
    execution = part.execution
    with torch.no_grad(), precision(execution.device, execution.dtype, execution.attention):
        target = part.teacher(x_t, t, condition)
    with precision(execution.device, execution.dtype, execution.attention):
        return velocity_gaps(part.student.field(x_t, t, condition), target)


def all_states(part: _Part, backward: Callable[[torch.Tensor], None]) -> torch.Tensor:
    """DiffusionOPD: sum over the N states of dt_k^2 / 2 times the squared gap. dt_k are the grid's own: at shift 3 and
    N = 16 they differ up to 7.7 times.
    """
    states, condition, levels = _rollout(part, len(part.grid) - 2), part.condition(), part.grid.tolist()
    total = torch.zeros(len(part.slots), device=part.execution.device)
    for x_t, (now, after) in zip(states, pairwise(levels), strict=True):
        loss = 0.5 * (after - now) ** 2 * _gap(part, x_t, part.at(now), condition)
        backward(loss)
        total += loss.detach()
    return total


def several_states(count: int) -> Losses:
    """K query states of one rollout, each drawn as the one is: the mean of their losses (DanceOPD's ablation of K)."""

    def losses(part: _Part, backward: Callable[[torch.Tensor], None]) -> torch.Tensor:
        drawn = [
            [part.plan.query[slot], *(_extra_index(part, slot, k) for k in range(1, count))] for slot in part.slots
        ]
        states, condition, total = (
            _rollout(part, max(map(max, drawn))),
            part.condition(),
            torch.zeros(len(part.slots), device=part.execution.device),
        )
        for k in range(count):
            index = torch.tensor([each[k] for each in drawn])
            x_t = torch.stack([states[int(j)][row] for row, j in enumerate(index)])
            loss = _gap(part, x_t, moved(part.grid[index], part.execution.device), condition) / count
            backward(loss)
            total += loss.detach()
        return total

    return losses


def _extra_index(part: _Part, slot: int, k: int) -> int:
    return query_index(
        part.params.rollout_steps, part.params.query, numpy_generator(part.seed, part.plan.index, slot, f"query/{k}")
    )


def flow_matching(part: _Part, backward: Callable[[torch.Tensor], None]) -> torch.Tensor:
    """Joint training on the data: x_t = (1 - t) x_0 + t eps with t uniform, target eps - x_0; no teacher. Buckets take
    turns by the routes' weights.
    """
    draws = [numpy_generator(part.seed, part.plan.index, slot, "time").uniform() for slot in part.slots]
    t, noise = torch.tensor(draws, dtype=torch.float32, device=part.execution.device), part.noise()
    clean, weight = moved(part.bucket.targets(part.rows), part.execution.device), t.reshape(-1, 1, 1, 1)
    with precision(part.execution.device, part.execution.dtype, part.execution.attention):
        loss = velocity_gaps(
            part.student.field((1.0 - weight) * clean + weight * noise, t, part.condition()), noise - clean
        )
    backward(loss)
    return loss.detach()


def transition(
    x: torch.Tensor, velocity: torch.Tensor, now: float, after: float, highest: float
) -> tuple[torch.Tensor, float]:
    """Mean and standard deviation of one stochastic step from noise level `now` to `after`, with the marginals of the
    Euler path.

    With s = eta sqrt(sigma / (1 - sigma)) and dt = after - now < 0: mean = x (1 + s^2 dt / (2 sigma)) + v (1 + s^2 (1 -
    sigma) / (2 sigma)) dt, deviation s sqrt(-dt) (Flow-GRPO, arXiv 2505.05470, equation 9, as Flow-OPD uses it). At
    sigma = 1, s has no value: `highest`, the level after the first step, is taken for it there.
    """
    dt, inside = after - now, min(now, highest)
    s = ETA * (inside / (1.0 - inside)) ** 0.5
    mean = x * (1.0 + s * s * dt / (2.0 * now)) + velocity * (1.0 + s * s * (1.0 - now) / (2.0 * now)) * dt
    return mean, s * (-dt) ** 0.5


def policy_gradient(part: _Part, backward: Callable[[torch.Tensor], None]) -> torch.Tensor:
    """Flow-OPD: at every state of a stochastic rollout the advantage -|mean_student - mean_teacher|^2 / (2
    deviation^2), detached, and PPO's clipped ratio.

    Norms and log-densities are means over the latent's elements, as in Flow-GRPO. The policy that rolls out is the one
    that learns, so the ratio is 1 and its gradient that of the log-density. Returns the mean over the states of the KL
    (the advantage, negated).
    """
    execution, condition, levels = part.execution, part.condition(), part.grid.tolist()
    x, steps = part.noise(), list(pairwise(levels))
    total = torch.zeros(len(part.slots), device=execution.device)
    for k, (now, after) in enumerate(steps):
        t = part.at(now)
        with torch.no_grad(), precision(execution.device, execution.dtype, execution.attention):
            target = part.teacher(x, t, condition).float()
        with precision(execution.device, execution.dtype, execution.attention):
            velocity = part.student.field(x, t, condition).float()
        mean, deviation = transition(x, velocity, now, after, levels[1])
        aim, _ = transition(x, target, now, after, levels[1])
        kl = ((mean.detach() - aim).square().mean((1, 2, 3)) / (2.0 * deviation**2)).detach()
        reached = mean.detach() + deviation * part.noise(f"transition/{k}")
        density = -(reached - mean).square().mean((1, 2, 3)) / (2.0 * deviation**2)
        ratio = torch.exp(density - density.detach())
        worst = torch.minimum(ratio * -kl, ratio.clamp(1.0 - RATIO_CLIP, 1.0 + RATIO_CLIP) * -kl)
        backward(-worst / len(steps))
        total += kl / len(steps)
        x = reached
    return total
