"""Which teacher answers for which capability. A step follows one route (DanceOPD, G = 1) or, mixed, holds a group of
each (G = M); a sample has one teacher either way, so that no target is ever a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np

from data.bounds import OPTIONAL, Above, OneOf
from data.errors import UserErrors
from data.records import CAPABILITIES, CapabilityName
from model.fields import FIELDS, chord_steps, layer_faults, references


@dataclass(frozen=True)
class Route:
    """Examples of `capability` are answered by `teacher`; `weight` (above 0) is its relative share of the steps.

    `field`: layers over the teacher, the innermost first, as model/fields/ has them: {guidance: 2.0, steps: 4}.
    """

    capability: CapabilityName
    teacher: str
    weight: Above
    field: dict[Annotated[str, OneOf(FIELDS)], Any] = field(default_factory=dict, metadata=OPTIONAL)

    def faults(self) -> list[str]:
        return layer_faults(self.field)

    @property
    def asked(self) -> str:
        """The teacher with its layers in words; the bare name where there is none."""
        return " ".join([self.teacher, *(f"{name}={value}" for name, value in self.field.items())])

    def facts(self) -> list[Any]:
        """As JSON, in which the order of layers counts."""
        return [self.capability, self.teacher, self.weight, list(self.field.items())]


@dataclass(frozen=True)
class Router:
    routes: tuple[Route, ...]

    def pick(self, rng: np.random.Generator) -> Route:
        weights = np.array([route.weight for route in self.routes], dtype=np.float64)
        return self.routes[int(rng.choice(len(self.routes), p=weights / weights.sum()))]

    def deal(self, count: int, rng: np.random.Generator) -> tuple[Route, ...]:
        """The routes of `count` groups of one step, in order. A route has its share of them, rounded up or down at
        random (systematic sampling): exactly its share on average, and exactly one group each for equal weights and as
        many groups as routes."""
        ends = np.cumsum([route.weight for route in self.routes])
        places = (np.arange(count) + rng.random()) / count
        return tuple(self.routes[int(index)] for index in np.searchsorted(ends[:-1] / ends[-1], places, side="right"))


def route_faults(routes: Sequence[Route], teachers: Sequence[str] | None = None) -> list[str]:
    """Every fault of a list of routes, in words; empty when there is none. `teachers` None skips the check of their
    names."""
    faults = [] if routes else ["routes: empty; name at least one capability and its teacher"]
    for index, route in enumerate(routes):
        key = f"routes[{index}]"
        if route.capability not in CAPABILITIES:
            faults.append(f"{key}.capability = {route.capability!r}: unknown; choose one of {sorted(CAPABILITIES)}")
        if teachers is not None and route.teacher not in teachers:
            faults.append(f"{key}.teacher = {route.teacher!r}: no such teacher; have {sorted(teachers)}")
        if not route.weight > 0:
            faults.append(f"{key}.weight = {route.weight}: must be above 0")
        if teachers is not None:
            faults += [f"{key}.{fault}" for fault in layer_faults(route.field, teachers)]
    names = [route.capability for route in routes]
    for name in sorted({name for name in names if names.count(name) > 1}):
        faults.append(
            f"routes: capability {name!r} is routed {names.count(name)} times; a sample has exactly one teacher"
        )
    return faults


def router(routes: Sequence[Route], teachers: Sequence[str] | None = None) -> Router:
    """Raises UserErrors with all faults at once."""
    faults = route_faults(routes, teachers)
    if faults:
        raise UserErrors("routes cannot be used:", faults)
    return Router(tuple(routes))


def asked_of(routes: Sequence[Route]) -> list[str]:
    """Every field that routes name, once: their teachers and those that layers refer to."""
    return list(dict.fromkeys(name for route in routes for name in (route.teacher, *references(route.field))))


def drawn_in(routes: Sequence[Route]) -> int | None:
    """The steps in which a student of these routes is drawn: those of their chords; None where they have none."""
    return next((steps for route in routes if (steps := chord_steps(route.field))), None)


def grid_faults(routes: Sequence[Route], rollout_steps: int) -> list[str]:
    """Chords over a grid that the student's states do not lie on."""
    return [
        f"routes[{index}].field.steps = {steps}: with rollout_steps = {rollout_steps} the student's states are not on "
        f"its grid; set rollout_steps: {steps}"
        for index, route in enumerate(routes)
        if (steps := chord_steps(route.field)) and steps % rollout_steps
    ]
