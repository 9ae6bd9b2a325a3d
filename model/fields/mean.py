"""The mean of several fields: soft routing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.fields.base import Condition, VelocityField


@dataclass(frozen=True)
class Mean:
    """The mean of several fields: the target of soft routing (an ablation; the paper finds it worse than routing
    hard).
    """

    fields: tuple[VelocityField, ...]
    weights: tuple[float, ...]

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        total = sum(self.weights)
        return torch.stack(
            [
                field(x_t, t, condition).float() * (weight / total)
                for field, weight in zip(self.fields, self.weights, strict=True)
            ]
        ).sum(0)
