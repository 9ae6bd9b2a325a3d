"""What a field costs: evaluations of a network a sample."""

from __future__ import annotations

from model.fields.base import VelocityField
from model.fields.guided import Guided
from model.fields.mean import Mean


def evaluations(field: VelocityField) -> int:
    """How many evaluations of a network one sample of this field costs."""
    if isinstance(field, Guided):
        return evaluations(field.field) * (1 if field.scale == 1.0 else 2)
    return sum(evaluations(member) for member in field.fields) if isinstance(field, Mean) else 1
