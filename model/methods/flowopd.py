"""Flow-OPD: PPO on a stochastic rollout, the KL between the transitions of student and teacher as detached reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from model.fields.base import VelocityField
from model.methods.base import Backward, Method, by_batch
from model.setup import Batch, Setup
from model.step import Plan

GROUP = 16  # rollouts of one prompt
ETA = 0.7  # size of the noise
RATIO_CLIP = 1e-4


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


def policy_gradient(batch: Batch, teacher: VelocityField, backward: Backward) -> torch.Tensor:
    """At every state of a stochastic rollout the advantage -|mean_student - mean_teacher|^2 / (2 deviation^2),
    detached, and PPO's clipped ratio.

    Norms and log-densities are means over the latent's elements, as in Flow-GRPO. The policy that rolls out is the one
    that learns, so the ratio is 1 and its gradient that of the log-density. Returns the mean over the states of the KL
    (the advantage, negated).
    """
    setup, condition, levels = batch.setup, batch.condition(), batch.setup.grid.tolist()
    x, steps, total = batch.noise(), list(pairwise(levels)), batch.at(0.0)
    for k, (now, after) in enumerate(steps):
        t = batch.at(now)
        with torch.no_grad(), setup.precision():
            target = teacher(x, t, condition).float()
        with setup.precision():
            velocity = setup.student.field(x, t, condition).float()
        mean, deviation = transition(x, velocity, now, after, levels[1])
        aim, _ = transition(x, target, now, after, levels[1])
        kl = ((mean.detach() - aim).square().mean((1, 2, 3)) / (2.0 * deviation**2)).detach()
        reached = mean.detach() + deviation * batch.noise(f"transition/{k}")
        density = -(reached - mean).square().mean((1, 2, 3)) / (2.0 * deviation**2)
        ratio = torch.exp(density - density.detach())
        worst = torch.minimum(ratio * -kl, ratio.clamp(1.0 - RATIO_CLIP, 1.0 + RATIO_CLIP) * -kl)
        backward(-worst / len(steps))
        total += kl / len(steps)
        x = reached
    return total


def grouped(
    setup: Setup, teacher: VelocityField, plan: Plan, slots: Sequence[int]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`Accumulate`: the slots of a group roll out the example of its first."""
    size = min(len(plan.rows), GROUP)
    rows = tuple(plan.rows[slot - slot % size] for slot in range(len(plan.rows)))
    losses, _ = by_batch(policy_gradient)(setup, teacher, replace(plan, rows=rows), slots)
    return losses, {"rows": torch.tensor(rows)}


METHOD = Method(
    compute=lambda _: grouped,
    cost=lambda steps, reached, teacher, query_states: (steps * (teacher + 1.0), steps),
    group=GROUP,
)
