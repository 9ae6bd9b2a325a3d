"""Guidance within an interval of noise levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le

from model.fields.base import Condition, VelocityField
from model.fields.guided import branches

Level = Annotated[float, Ge(0), Le(1)]


@dataclass(frozen=True)
class Interval(VelocityField):
    """Guided(field, scale) where low <= t <= high, the field itself elsewhere (arXiv 2404.07724).

    Rows outside the interval cost two evaluations as well: to leave them out, the host would have to wait for t.
    """

    field: VelocityField
    scale: Annotated[float, Ge(1)]
    low: Level = 0.0
    high: Level = 1.0

    @property
    def members(self) -> tuple[VelocityField, ...]:
        return (self.field,)

    @property
    def evaluations(self) -> int:
        return 2 * self.field.evaluations

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        empty, full = branches(self.field, x_t, t, condition)
        inside = ((t >= self.low) & (t <= self.high)).reshape(-1, 1, 1, 1)
        return torch.where(inside, empty + self.scale * (full - empty), full)
