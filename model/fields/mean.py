"""The mean of several fields: soft routing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.fields.base import Condition, VelocityField


@dataclass(frozen=True)
class Mean(VelocityField):
    """The weighted mean of `fields`: the target of soft routing (an ablation; the paper finds it worse than hard)."""

    fields: tuple[VelocityField, ...]
    weights: tuple[float, ...]

    @property
    def members(self) -> tuple[VelocityField, ...]:
        return self.fields

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        total = sum(self.weights)
        shares = [weight / total for weight in self.weights]
        terms = [field(x_t, t, condition).float() * share for field, share in zip(self.fields, shares, strict=True)]
        return torch.stack(terms).sum(0)
