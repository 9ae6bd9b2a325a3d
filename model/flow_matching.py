"""Training a teacher, or a base, on data: plain conditional flow matching."""

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
    """Numbers of one training. prompt_dropout: the share of rows trained on the empty prompt, for guidance."""

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


@dataclass(frozen=True)
class Trainee:
    """A network in training; `named` are its parameters that train."""

    backbone: Backbone
    network: nn.Module
    named: dict[str, nn.Parameter]
    optimizers: Optimizers
    ema: Ema


def train(
    trainee: Trainee,
    batch_at: Callable[[list[int]], tuple[Condition, torch.Tensor]],
    rows: int,
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
        stratified = (rng.permutation(params.batch) + rng.random(params.batch)) / params.batch
        uniform = torch.from_numpy(stratified).float()
        t = params.time_shift * uniform / (1.0 + (params.time_shift - 1.0) * uniform)
        noise = noise_for(seed, index, range(params.batch), x_0.shape[1:])
        x_t = noised(x_0, noise, t)
        loss = velocity_mse(trainee.backbone.velocity(trainee.network, x_t, t, condition), noise - x_0)
        trainee.optimizers.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(list(trainee.named.values()), params.clip)
        if not bool(torch.isfinite(norm)):
            remedy = f"lower learning_rate = {params.learning_rate} and run again"
            raise UserError(f"step {index}: the gradient is not finite (loss {float(loss.detach())}); {remedy}")
        trainee.optimizers.step(warmup_then_linear(index, params.steps, params.warmup, params.decay_from))
        trainee.ema.update(trainee.named)
        yield TrainingStep(index, float(loss.detach()), float(norm))
