"""Velocity fields, one file a field, and the grammar that names them in params.yaml.

A route's `field` lists layers over its teacher, the innermost first: {guidance: 2.0, steps: 4} is the chord of the
guided teacher. A layer's keys are the arguments of its constructor; a bare value is the first of them. A teacher's name
stands for its field. To add a layer: its file, and its entry in `FIELDS`.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from math import isfinite
from typing import TYPE_CHECKING, Any

from data.bounds import expected, holds

if TYPE_CHECKING:  # torch only where a field is made: flows read params.yaml without it
    from model.fields.base import Sampler, VelocityField

# Name in params.yaml -> constructor of a field over a field, from the values written there (MODULE:NAME, or itself). A
# keyword-only `sampler` is how the teacher is drawn.
FIELDS: dict[str, str | Callable[..., VelocityField]] = {
    "guidance": "model.fields.guided:Guided",
    "interval": "model.fields.interval:Interval",
    "extrapolated": "model.fields.extrapolated:Extrapolated",
    "anchor": "model.fields.extrapolated:anchored",
    "mean": "model.fields.mean:mean_with",
    "steps": "model.fields.chord:chord",
}
Layers = Mapping[str, Any]


def composed(
    field: VelocityField, layers: Layers, known: Mapping[str, VelocityField], sampler: Sampler
) -> VelocityField:
    """`field` under `layers`, which `layer_faults` found good, in the order written. `known`: fields by name."""
    for name, value in layers.items():
        given = dict(_arguments(name, value))
        for key, hint in _hints(name).items():
            if key in given and _names_fields(hint):
                item = given[key]
                given[key] = known[item] if isinstance(item, str) else tuple(known[other] for other in item)
        if "sampler" in inspect.signature(_constructor(name)).parameters:
            given["sampler"] = sampler
        field = _constructor(name)(field, **given)
    return field


def layer_faults(layers: Layers, known: Collection[str] | None = None) -> list[str]:
    """What is wrong with a route's `field`, as "field.LAYER.KEY = value: ...". `known` None: names are not checked."""
    faults = []
    for name, value in layers.items():
        if name not in FIELDS:
            continue  # the reader says so, with the nearest name
        hints, given, place = _hints(name), _arguments(name, value), f"field.{name}"
        defaults = {
            of.name for of in inspect.signature(_constructor(name)).parameters.values() if of.default != of.empty
        }
        if missing := [key for key in hints if key not in given and key not in defaults]:
            faults.append(f"{place} = {value!r}: {', '.join(missing)} missing; it takes {', '.join(hints)}")
        for key, item in given.items():
            words = _fault(hints[key], item, known) if key in hints else f"unknown key; it takes {', '.join(hints)}"
            if words:
                faults.append(f"{place}{f'.{key}' if isinstance(value, Mapping) else ''} = {item!r}: {words}")
    return faults


def references(layers: Layers) -> list[str]:
    """The teachers that layers name besides the one that they lie over."""
    items = [
        item
        for name, value in layers.items()
        for key, item in _arguments(name, value).items()
        if _names_fields(_hints(name)[key])
    ]
    return [name for item in items for name in ([item] if isinstance(item, str) else item)]


def chord_steps(layers: Layers) -> int | None:
    """The steps of the grid that a route's field is made for; None where it has no chord."""
    return _arguments("steps", layers["steps"]).get("steps") if "steps" in layers else None


def _constructor(name: str) -> Callable[..., VelocityField]:
    place = FIELDS[name]
    if not isinstance(place, str):
        return place
    module, constructor = place.split(":")
    made: Callable[..., VelocityField] = getattr(import_module(module), constructor)
    return made


def _hints(name: str) -> dict[str, Any]:
    """The types of a layer's keys: those of its constructor after the field, without what params cannot give."""
    made = _constructor(name)
    types = typing.get_type_hints(made, include_extras=True)
    keys = [of.name for of in inspect.signature(made).parameters.values() if of.kind is not of.KEYWORD_ONLY]
    return {key: types[key] for key in keys[1:]}


def _arguments(name: str, value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {next(iter(_hints(name))): value}


def _names_fields(hint: Any) -> bool:
    """A velocity field, or a tuple of some: written as teachers' names."""
    return getattr(hint, "__name__", "") == "VelocityField" or typing.get_origin(hint) is tuple


def _fault(hint: Any, value: Any, known: Collection[str] | None) -> str:
    """Why a value does not fit a constructor's argument, "" where it does."""
    if _names_fields(hint):
        several = typing.get_origin(hint) is tuple
        names = value if several else [value]
        if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
            return "expected a list of teachers' names" if several else "expected a teacher's name"
        unknown = [name for name in names if known is not None and name not in known]
        return f"no such teacher as {', '.join(unknown)}; have {', '.join(sorted(known or ()))}" if unknown else ""
    kind, *rules = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind) or not isfinite(value):
        return f"expected a {'whole ' if kind is int else ''}number"
    words = [word for rule in rules if not holds(value, rule) and (word := expected(rule))]
    return f"expected {' and '.join(words)}" if words else ""
