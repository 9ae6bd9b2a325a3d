"""Classifier-free guidance as a field."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.fields.base import Condition, VelocityField, concatenate


@dataclass(frozen=True)
class Guided:
    """Classifier-free guidance as one more field: v(empty) + scale (v(c) - v(empty)); DanceOPD, the CFG field. Scale 1
    is the field itself, exactly.
    """

    field: VelocityField
    scale: float

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        if self.scale == 1.0:
            return self.field(x_t, t, condition)
        both = self.field(
            torch.cat([x_t, x_t]), torch.cat([t, t]), concatenate([condition.dropped(), condition])
        ).float()  # (2B, C, H, W)
        empty, full = both.chunk(2)
        return empty + self.scale * (full - empty)
