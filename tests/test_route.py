"""Property: a step follows exactly one route, in the configured shares, and a routing that cannot work is refused with
every fault.
"""

from __future__ import annotations

import numpy as np
import pytest

from data.errors import UserErrors
from data.randomness import numpy_generator
from model.route import Route, Router, route_faults, router

GOOD = (Route("t2i", "base", 1.0), Route("local_edit", "local", 2.0), Route("global_edit", "global", 1.0))


def test_routes_are_taken_in_their_shares() -> None:
    picked = [Router(GOOD).pick(numpy_generator(0, step, 0, "route")).capability for step in range(4000)]
    shares = [picked.count(route.capability) / len(picked) for route in GOOD]
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.04)  # five standard errors


def test_only_relative_weights_count() -> None:
    scaled = Router(tuple(Route(route.capability, route.teacher, 10.0 * route.weight) for route in GOOD))
    for step in range(200):
        assert (
            Router(GOOD).pick(numpy_generator(1, step, 0, "route")).capability
            == scaled.pick(numpy_generator(1, step, 0, "route")).capability
        )


def test_a_good_routing_passes() -> None:
    assert route_faults(GOOD, ["base", "local", "global"]) == []
    assert router(GOOD).routes == GOOD


def test_every_fault_is_named_at_once() -> None:
    bad = [
        Route("t2i", "base", 1.0),
        Route("t2i", "bsae", 0.0),
        Route("upscale", "local", -1.0),
        Route("local_edit", "local", float("nan")),
    ]
    with pytest.raises(UserErrors) as caught:
        router(bad, ["base", "local"])
    text = str(caught.value)
    for part in (
        "'upscale'",
        "'bsae'",
        "routes[1].weight",
        "routes[2].weight",
        "routes[3].weight",
        "'t2i' is routed 2 times",
    ):
        assert part in text
    assert len(caught.value.faults) == 6


def test_no_route_at_all_is_a_fault() -> None:
    with pytest.raises(UserErrors, match="routes: empty"):
        router([])
