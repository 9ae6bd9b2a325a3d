"""Velocity fields and the one convention that everything above the backbones keeps.

t = 1 is noise and t = 0 the image: x_t = (1 - t) x_0 + t eps, v = dx/dt = eps - x_0, and an Euler step is x += (t_next - t) v. This `t` is diffusers' `sigma`.
A backbone whose network counts otherwise converts inside its own file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch


@dataclass(frozen=True)
class Condition:
    """What a field is conditioned on.

    embeds (B, L, D) and pooled (B, P) encode the prompts, empty_embeds (L, D) and empty_pooled (P) the empty prompt; source (B, C, H, W) holds the clean
    latents of the image to edit, None for T2I.
    """

    embeds: torch.Tensor
    pooled: torch.Tensor
    empty_embeds: torch.Tensor
    empty_pooled: torch.Tensor
    source: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeds)

    def dropped(self) -> Condition:
        """The unconditional one: the prompt is emptied, the source image of an edit stays."""
        return replace(self, embeds=self.empty_embeds.expand_as(self.embeds), pooled=self.empty_pooled.expand_as(self.pooled))

    def __getitem__(self, rows: slice | torch.Tensor) -> Condition:
        return replace(self, embeds=self.embeds[rows], pooled=self.pooled[rows], source=None if self.source is None else self.source[rows])


def concatenate(conditions: Sequence[Condition]) -> Condition:
    """Conditions of one kind (all with or all without a source) as one batch."""
    first = conditions[0]
    source = None if first.source is None else torch.cat([c.source for c in conditions if c.source is not None])
    return replace(first, embeds=torch.cat([c.embeds for c in conditions]), pooled=torch.cat([c.pooled for c in conditions]), source=source)


class VelocityField(Protocol):
    """Teacher, student, guided field: (x_t (B, C, H, W), t (B,) in [0, 1], condition of B) -> v (B, C, H, W), all float32."""

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor: ...


@dataclass(frozen=True)
class Guided:
    """Classifier-free guidance as one more field: v(empty) + scale (v(c) - v(empty)); DanceOPD, the CFG field. Scale 1 is the field itself, exactly."""

    field: VelocityField
    scale: float

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        if self.scale == 1.0:
            return self.field(x_t, t, condition)
        both = self.field(torch.cat([x_t, x_t]), torch.cat([t, t]), concatenate([condition.dropped(), condition])).float()  # (2B, C, H, W)
        empty, full = both.chunk(2)
        return empty + self.scale * (full - empty)


@dataclass(frozen=True)
class Mean:
    """The mean of several fields: the target of soft routing (an ablation; the paper finds it worse than routing hard)."""

    fields: tuple[VelocityField, ...]
    weights: tuple[float, ...]

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        total = sum(self.weights)
        return torch.stack([field(x_t, t, condition).float() * (weight / total) for field, weight in zip(self.fields, self.weights, strict=True)]).sum(0)


def evaluations(field: VelocityField) -> int:
    """How many evaluations of a network one sample of this field costs."""
    if isinstance(field, Guided):
        return evaluations(field.field) * (1 if field.scale == 1.0 else 2)
    return sum(evaluations(member) for member in field.fields) if isinstance(field, Mean) else 1


def velocity_mse(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over all elements of the squared velocity gap; both (B, C, H, W), returns a scalar (DanceOPD, the distillation loss)."""
    return (prediction.float() - target.float()).square().mean()


def velocity_gaps(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The squared velocity gap of each sample, its mean over channels and pixels: (B, C, H, W) twice -> (B,) fp32. Their mean is `velocity_mse`."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)
