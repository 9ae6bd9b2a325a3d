"""Beyond a teacher, or short of it, seen from another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge

from model.fields.base import Condition, VelocityField


@dataclass(frozen=True)
class Extrapolated(VelocityField):
    """v_ref + factor (v - v_ref): below 1 it softens what the field adds to the reference, above 1 it goes beyond the
    field (ExOPD, arXiv 2602.12125, for language models). Factor 1 is the field itself, exactly."""

    field: VelocityField
    reference: VelocityField
    factor: Annotated[float, Ge(0)]

    @property
    def members(self) -> tuple[VelocityField, ...]:
        return (self.field,) if self.factor == 1.0 else (self.field, self.reference)

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        own = self.field(x_t, t, condition)
        if self.factor == 1.0:
            return own
        reference = self.reference(x_t, t, condition).float()
        return reference + self.factor * (own.float() - reference)


def anchored(field: VelocityField, reference: VelocityField, weight: Annotated[float, Ge(0)]) -> Extrapolated:
    """The target of the loss |v - v_field|^2 + weight |v - v_reference|^2, which holds the student near the reference.

    That loss is (1 + weight) |v - target|^2 and a constant, so the anchor is a field like any other.
    """
    return Extrapolated(field, reference, 1.0 / (1.0 + weight))
