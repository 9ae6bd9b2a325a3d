"""Which teacher answers for which capability. A step follows one route (DanceOPD, G = 1) or, mixed, holds a group of
each (G = M); a sample has one teacher either way, so that no target is ever a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.bounds import Above
from data.errors import UserErrors
from data.records import CAPABILITIES, CapabilityName


@dataclass(frozen=True)
class Route:
    """Examples of `capability` are answered by `teacher`; `weight` (above 0) is its relative share of the steps."""

    capability: CapabilityName
    teacher: str
    weight: Above


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
