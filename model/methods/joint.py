"""Joint training on the data, without a teacher: every step mixes rows of all buckets, by the routes' weights."""

from __future__ import annotations

import torch

from data.randomness import numpy_generator
from model.fields.base import VelocityField, noised, velocity_gaps
from model.methods.base import Backward, Method, by_batch
from model.setup import Batch, Setup
from model.step import Plan


def times(setup: Setup, plan: Plan) -> list[float]:
    """A uniform t by slot."""
    return [float(numpy_generator(setup.seed, plan.index, slot, "time").uniform()) for slot in range(len(plan.rows))]


def flow_matching(batch: Batch, teacher: VelocityField, backward: Backward) -> torch.Tensor:
    """x_t = (1 - t) x_0 + t eps with t uniform, target eps - x_0."""
    setup = batch.setup
    t = setup.moved(torch.tensor(times(setup, batch.plan))[batch.slots])
    clean, noise = batch.targets(), batch.noise()
    with setup.precision():
        loss = velocity_gaps(setup.student.field(noised(clean, noise, t), t, batch.condition()), noise - clean)
    backward(loss)
    return loss.detach()


METHOD = Method(
    compute=by_batch(flow_matching),
    cost=lambda steps, reached, teacher, query_states: (1.0, query_states),
    levels=times,
    routing="mixed",
)
