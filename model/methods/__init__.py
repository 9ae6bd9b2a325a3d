"""Training methods, one file a method: the paper's, its baselines and ablations, which share the loop.

| method | states | loss |
|---|---|---|
| danceopd | one state of the student's rollout, or K of them | mean squared velocity gap to the routed teacher |
| offpolicy | the forward-noised target image | the same |
| diffusionopd | all N states of the student's rollout | sum over k of dt_k^2 / 2 times the squared gap |
| flowopd_published | all N states of a stochastic rollout, groups of one prompt | policy gradient whose mean is 0 |
| flowopd_reached | the same | policy gradient of the KL between transitions |
| flowopd_kl | the same | that KL itself |
| joint | the forward-noised target image | flow matching to the data, no teacher |
| merge | none | none: the student is its start, the mean of the routed teachers |

Every draw comes from (seed, step, slot, purpose), and nothing is drawn that the step's plan holds already.
To add a method: its file, and its entry in `METHODS`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from model.methods import danceopd, diffusionopd, flowopd, joint, merge, offpolicy
from model.methods.base import Method
from model.route import Route
from model.step import LoopParams

METHODS: dict[str, Method] = {
    "danceopd": danceopd.METHOD,
    "offpolicy": offpolicy.METHOD,
    "diffusionopd": diffusionopd.METHOD,
    "flowopd_published": flowopd.PUBLISHED,
    "flowopd_reached": flowopd.REACHED,
    "flowopd_kl": flowopd.KL,
    "joint": joint.METHOD,
    "merge": merge.METHOD,
}


def method_faults(name: str, loop: LoopParams, start: str, routes: Sequence[Route]) -> list[str]:
    """What is wrong with a choice of method among a run's other choices."""
    method, faults, several = METHODS[name], [], loop.query_states
    if several > 1 and not (method.several and loop.states == "on_policy"):
        able = " or ".join(repr(other) for other in METHODS if METHODS[other].several)
        faults.append(f"query_states = {several}: only method = {able} on its own rollout has a choice; set it to 1")
    if several > loop.rollout_steps:
        count = f"rollout_steps = {loop.rollout_steps}"
        faults.append(f"query_states = {several}: a rollout of {count} has no more states than that")
    if method.states not in (None, loop.states):
        faults.append(f"states = {loop.states!r}: method = {name!r} needs {method.states!r}")
    if method.routing not in (None, loop.routing):
        faults.append(f"routes_taken = {loop.routing!r}: method = {name!r} needs {method.routing!r}")
    if method.start not in (None, start):
        faults.append(f"start = {start!r}: method = {name!r} takes no other start; set start: {method.start}")
    return faults + _batch_faults(name, loop, routes)


def _batch_faults(name: str, loop: LoopParams, routes: Sequence[Route]) -> list[str]:
    """A batch is whole groups, and one that mixes routes holds a group of each."""
    group = min(loop.batch, METHODS[name].group)
    if loop.batch % group:
        groups = f"groups of {group} rollouts"
        return [f"batch = {loop.batch}: method = {name!r} takes {groups}; a multiple of it, or fewer"]
    if loop.routing != "mixed" or not routes:
        return []
    needed = math.ceil(sum(route.weight for route in routes) / min(route.weight for route in routes) - 1e-9)
    if loop.batch // group >= needed:
        return []
    size = METHODS[name].group
    each = "a sample" if size == 1 else f"a group of {size} rollouts"
    return [f"batch = {loop.batch}: every step takes {each} or more of each route; by their weights {needed * size}"]
