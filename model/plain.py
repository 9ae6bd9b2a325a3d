"""The step without any of its savings: batches of one, the rollout run to its end and the query picked afterwards, a
network of its own for every teacher.

This is how the method's reference implementation spends its time (performance: about 20 evaluations a sample at N = 16,
counting backward and recomputation). It gives the loss and gradients that model/distill.py must give, and the time and
memory that it is compared with.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch

from model.compute.execution import Execution, moved, precision
from model.examples import Bucket
from model.fields.base import VelocityField, velocity_mse
from model.fields.guided import Guided
from model.fields.mean import Mean
from model.networks.network import NetworkField
from model.networks.student import Student
from model.randomness import noise_for
from model.step import LoopParams, Plan


def own_networks(teachers: Mapping[str, VelocityField]) -> dict[str, VelocityField]:
    """Every teacher with a deep copy of its network, adapters included, that it shares with no one."""
    return {name: _own(field) for name, field in teachers.items()}


def _own(field: VelocityField) -> VelocityField:
    if isinstance(field, Guided):
        return Guided(_own(field.field), field.scale)
    if isinstance(field, Mean):
        return Mean(tuple(_own(member) for member in field.fields), field.weights)
    if not isinstance(field, NetworkField):
        return field
    network = copy.deepcopy(field.network)
    network.requires_grad_(False)
    return NetworkField(field.backbone, network, field.adapter)


def accumulate_plain(
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
    """As model.distill.accumulate, on-policy only: one slot after the other, N evaluations of the student for its
    rollout whatever its query index.
    """
    if params.states != "on_policy":
        raise ValueError(f"states = {params.states!r}: the plain path is the on-policy method's")
    device = execution.device
    losses = torch.zeros(len(plan.rows), device=device)
    for slot in slots:
        row, j = plan.rows[slot], plan.query[slot]
        condition = moved(bucket.at([row]), device)
        shape = bucket.shape_of(row) or student.backbone.latent_shape
        x = moved(noise_for(seed, plan.index, [slot], shape), device)
        with torch.no_grad(), precision(device, execution.dtype, execution.attention):
            states = [x]
            for now, after in pairwise(grid.tolist()):
                x = x + (after - now) * student.field(x, torch.full((1,), now, device=device), condition).float()
                states.append(x)
            x_t, t = states[j], torch.full((1,), float(grid[j]), device=device)
            target = teacher(x_t, t, condition)
        with precision(device, execution.dtype, execution.attention):
            loss = velocity_mse(student.field(x_t, t, condition), target)
        (loss / len(plan.rows)).backward()
        losses[slot] = loss.detach()
    return losses, {}
