"""Velocity fields, one file a field. To add a field over a field: its file, and its entry in `FIELDS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from model.fields.base import VelocityField
from model.fields.guided import Guided

# Name in params.yaml -> constructor of a field over a field, with the value written there.
FIELDS: dict[str, Callable[[VelocityField, float], VelocityField]] = {"guidance": Guided}


def composed(field: VelocityField, layers: Mapping[str, float]) -> VelocityField:
    """`field` under the entries of `FIELDS` that `layers` names, applied in the order written."""
    for name, value in layers.items():
        field = FIELDS[name](field, value)
    return field
