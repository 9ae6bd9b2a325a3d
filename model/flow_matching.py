"""Training a teacher (or a base) on data: plain conditional flow matching, the loss that made the specialists the
pipeline distils.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import nn

from data.bounds import Above, Count, Decay, NotNegative, OneOf, Positive
from data.errors import UserError
from data.randomness import numpy_generator
from model.backbones import Backbone
from model.checkpoint import Ema
from model.compute.optimizer import OPTIMIZERS, Optimizers, warmup_then_linear
from model.fields.base import Condition, noised, velocity_mse
from model.randomness import noise_for


@dataclass(frozen=True)
class FlowMatchingParams:
    """Numbers of one training. prompt_dropout is the share of rows trained on the empty prompt, which makes guidance
    possible.
    """

    steps: Positive
    batch: Positive
    learning_rate: Above
    optimizer: Annotated[str, OneOf(OPTIMIZERS)]
    warmup: Count
    decay_from: NotNegative
    ema: Decay
    clip: Above
    prompt_dropout: NotNegative
    time_shift: Above


@dataclass(frozen=True)
class TrainingStep:
    index: int
    loss: float
    gradient_norm: float


def train(
    backbone: Backbone,
    network: nn.Module,
    named: dict[str, nn.Parameter],
    batch_at: Callable[[list[int]], tuple[Condition, torch.Tensor]],
    rows: int,
    optimizers: Optimizers,
    ema: Ema,
    params: FlowMatchingParams,
    seed: int,
    start: int = 0,
) -> Iterator[TrainingStep]:
    """Yields one record a step, after the step. `batch_at(rows)` gives the condition and the target latents x_0 (B, C,
    H, W) of data rows.

    x_t = (1 - t) x_0 + t eps with t uniform, shifted as the sampler's grid is; loss = mean |v - (eps - x_0)|^2.
    Raises UserError when the gradient stops being finite.
    """
    for index in range(start, params.steps):
        rng = numpy_generator(seed, index, 0, "flow_matching")
        picked = [int(row) for row in rng.integers(0, rows, size=params.batch)]
        condition, x_0 = batch_at(picked)
        dropped = torch.from_numpy(rng.random(params.batch) < params.prompt_dropout)
        empty = condition.dropped()
        condition = replace(
            condition,
            embeds=torch.where(dropped[:, None, None], empty.embeds, condition.embeds),
            pooled=torch.where(dropped[:, None], empty.pooled, condition.pooled),
        )
        uniform = torch.from_numpy(
            (rng.permutation(params.batch) + rng.random(params.batch)) / params.batch
        ).float()  # stratified over the batch
        t = params.time_shift * uniform / (1.0 + (params.time_shift - 1.0) * uniform)
        noise = noise_for(seed, index, range(params.batch), x_0.shape[1:])
        loss = velocity_mse(backbone.velocity(network, noised(x_0, noise, t), t, condition), noise - x_0)
        optimizers.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(list(named.values()), params.clip)
        if not bool(torch.isfinite(norm)):
            raise UserError(
                f"step {index}: the gradient is not finite (loss {float(loss.detach())}); lower learning_rate = {params.learning_rate} and run again"
            )
        optimizers.step(warmup_then_linear(index, params.steps, params.warmup, params.decay_from))
        ema.update(named)
        yield TrainingStep(index, float(loss.detach()), float(norm))
