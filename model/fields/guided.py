"""Classifier-free guidance as a field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge

from model.fields.base import Condition, VelocityField, concatenate


@dataclass(frozen=True)
class Guided(VelocityField):
    """v(empty) + scale (v(c) - v(empty)); DanceOPD, the CFG field. Scale 1 is the field itself, exactly."""

    field: VelocityField
    scale: Annotated[float, Ge(1)]

    @property
    def members(self) -> tuple[VelocityField, ...]:
        return (self.field,)

    @property
    def evaluations(self) -> int:
        return self.field.evaluations * (1 if self.scale == 1.0 else 2)

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        if self.scale == 1.0:
            return self.field(x_t, t, condition)
        empty, full = branches(self.field, x_t, t, condition)
        return empty + self.scale * (full - empty)


def branches(
    field: VelocityField, x_t: torch.Tensor, t: torch.Tensor, condition: Condition
) -> tuple[torch.Tensor, torch.Tensor]:
    """v(empty) and v(c), each (B, C, H, W), of one evaluation of 2B rows."""
    both = concatenate([condition.dropped(), condition])
    empty, full = field(torch.cat([x_t, x_t]), torch.cat([t, t]), both).float().chunk(2)
    return empty, full
