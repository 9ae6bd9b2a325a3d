"""The mean of several fields: soft routing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.fields.base import Condition, VelocityField


@dataclass(frozen=True)
class Mean(VelocityField):
    """The plain mean of `fields`: the target of soft routing (an ablation; the paper finds it worse than hard)."""

    fields: tuple[VelocityField, ...]

    @property
    def members(self) -> tuple[VelocityField, ...]:
        return self.fields

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        return torch.stack([field(x_t, t, condition).float() for field in self.fields]).mean(0)
