"""Training methods, one file a method: the paper's, its baselines and ablations, which share the loop.

| method | states | loss |
|---|---|---|
| danceopd | one state of the student's rollout, or K of them | mean squared velocity gap to the routed teacher |
| offpolicy | the forward-noised target image | the same |
| diffusionopd | all N states of the student's rollout | sum over k of dt_k^2 / 2 times the squared gap |
| flowopd | all N states of a stochastic rollout, groups of one prompt | PPO, the KL of transitions as reward |
| joint | the forward-noised target image | flow matching to the data, no teacher |
| merge | none | none: the student is its start, the mean of the teachers |

Every draw comes from (seed, step, slot, purpose), and nothing is drawn that the step's plan holds already.
To add a method: its file, and its entry in `METHODS`.
"""

from __future__ import annotations

from model.methods import danceopd, diffusionopd, flowopd, joint, merge, offpolicy
from model.methods.base import Method

METHODS: dict[str, Method] = {
    "danceopd": danceopd.METHOD,
    "offpolicy": offpolicy.METHOD,
    "diffusionopd": diffusionopd.METHOD,
    "flowopd": flowopd.METHOD,
    "joint": joint.METHOD,
    "merge": merge.METHOD,
}


def method_faults(name: str, states: str, query_states: int, start: str, batch: int) -> list[str]:
    """What is wrong with a choice of method among a run's other numbers."""
    method, faults = METHODS[name], []
    if query_states > 1 and not (method.several and states == "on_policy"):
        several = " or ".join(repr(other) for other in METHODS if METHODS[other].several)
        faults.append(
            f"query_states = {query_states}: only method = {several} on its own rollout has a choice; set it to 1"
        )
    if method.states not in (None, states):
        faults.append(f"states = {states!r}: method = {name!r} needs {method.states!r}")
    if method.start not in (None, start):
        faults.append(f"start = {start!r}: method = {name!r} takes no other start; set start: {method.start}")
    if batch % min(batch, method.group):
        group = f"groups of {method.group} rollouts"
        faults.append(f"batch = {batch}: method = {name!r} takes {group}; a multiple of it, or fewer")
    return faults
