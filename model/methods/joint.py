"""Joint training on the data, without a teacher; buckets take turns by the routes' weights."""

from __future__ import annotations

import torch

from data.randomness import numpy_generator
from model.fields.base import VelocityField, noised, velocity_gaps
from model.methods.base import Backward, Method, by_batch
from model.setup import Batch


def flow_matching(batch: Batch, teacher: VelocityField, backward: Backward) -> torch.Tensor:
    """x_t = (1 - t) x_0 + t eps with t uniform, target eps - x_0."""
    setup = batch.setup
    draws = [numpy_generator(setup.seed, batch.plan.index, slot, "time").uniform() for slot in batch.slots]
    t = torch.tensor(draws, dtype=torch.float32, device=setup.execution.device)
    clean, noise = batch.targets(), batch.noise()
    with setup.precision():
        loss = velocity_gaps(setup.student.field(noised(clean, noise, t), t, batch.condition()), noise - clean)
    backward(loss)
    return loss.detach()


METHOD = Method(
    compute=lambda _: by_batch(flow_matching), cost=lambda steps, reached, teacher, query_states: (1.0, query_states)
)
