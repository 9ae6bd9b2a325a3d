"""The step without any of its savings: batches of one, the rollout run to its end and the query picked afterwards, a
network of its own for every teacher.

This is how the method's reference implementation spends its time (performance: about 20 evaluations a sample at N = 16,
counting backward and recomputation). It gives the loss and gradients that model/distill.py must give, and the time and
memory that it is compared with.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch

from model.compute.execution import networks_of
from model.fields.base import VelocityField, plain_fields, velocity_mse
from model.rollout import euler_path
from model.setup import Batch, Setup
from model.step import Plan


def own_networks(teachers: Mapping[str, VelocityField]) -> dict[str, VelocityField]:
    """Every teacher with a deep copy of its networks, adapters included, that it shares with no other."""
    return {name: _own(field) for name, field in teachers.items()}


def _own(field: VelocityField) -> VelocityField:
    backbones = [getattr(plain, "backbone", None) for plain in plain_fields(field)]
    copied = copy.deepcopy(field, {id(backbone): backbone for backbone in backbones})
    for network in networks_of(copied):
        network.requires_grad_(False)
    return copied


def accumulate_plain(
    setup: Setup, teacher: VelocityField, plan: Plan, slots: Sequence[int]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`Accumulate`, on-policy only: one slot after the other, N evaluations of the student for its rollout whatever its
    query index."""
    if setup.params.states != "on_policy":
        raise ValueError(f"states = {setup.params.states!r}: the plain path is the on-policy method's")
    losses, field = torch.zeros(len(plan.rows), device=setup.execution.device), setup.student.field
    for slot in slots:
        batch = Batch(setup, plan, [slot])
        condition, t = batch.condition(), batch.levels(batch.index)
        with torch.no_grad(), setup.precision():
            x_t = list(euler_path(field, batch.noise(), condition, setup.grid))[int(batch.index)]
            target = teacher(x_t, t, condition)
        with setup.precision():
            loss = velocity_mse(field(x_t, t, condition), target)
        (loss / len(plan.rows)).backward()
        losses[slot] = loss.detach()
    return losses, {}
