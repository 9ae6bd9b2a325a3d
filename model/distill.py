"""The distillation loop: on-policy generative field distillation (DanceOPD, arXiv 2606.27377, algorithm 1).

It yields; saving, logging and stopping are the caller's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from data.errors import UserError
from data.randomness import numpy_generator
from model.checkpoint import Ema
from model.examples import Bucket as Bucket
from model.field import Condition, Mean, VelocityField, evaluations, velocity_mse
from model.optimizer import OPTIMIZERS, Optimizers, warmup_then_linear
from model.randomness import noise_for
from model.rollout import QUERY_BIAS, Query, query_index, roll_out_to_query
from model.route import Router
from model.student import Student

STATES = ("on_policy", "off_policy")
ROUTING = ("hard", "soft")


@dataclass(frozen=True)
class LoopParams:
    """Numbers of one distillation. `rollout_steps` is N of the student's Euler grid, `query` the bias of the query index.

    `states`: "on_policy" queries the student's own rollout, "off_policy" the forward-noised data.
    `routing`: "hard" takes one teacher a step, "soft" the mean of all.
    """

    steps: int
    batch: int
    learning_rate: float
    optimizer: str
    warmup: int
    decay_from: float
    ema: float
    clip: float
    rollout_steps: int
    query: str
    states: str
    routing: str

    def faults(self) -> list[str]:
        found = [f"{name} = {getattr(self, name)}: expected 1 or more" for name in ("steps", "batch", "rollout_steps") if getattr(self, name) < 1]
        for name, known in (("optimizer", sorted(OPTIMIZERS)), ("query", sorted(QUERY_BIAS)), ("states", STATES), ("routing", ROUTING)):
            if getattr(self, name) not in known:
                found.append(f"{name} = {getattr(self, name)!r}: choose one of {list(known)}")
        if not 0 <= self.ema < 1:
            found.append(f"ema = {self.ema}: expected 0 or more and below 1")
        for name in ("learning_rate", "clip"):
            if getattr(self, name) <= 0:
                found.append(f"{name} = {getattr(self, name)}: expected above 0")
        return found


@dataclass(frozen=True)
class Step:
    """One optimizer step: mean loss and mean queried t over the batch.

    `evaluations` counts single samples: rollout, one by the teacher's field, one by the student; the backward is not among them.
    """

    index: int
    route: str
    teacher: str
    loss: float
    t: float
    gradient_norm: float
    evaluations: int
    seconds: float


def _query(
    student: VelocityField, bucket: Bucket, condition: Condition, rows: list[int], noise: torch.Tensor, grid: torch.Tensor, index: torch.Tensor, states: str
) -> Query:
    if states == "on_policy":
        return roll_out_to_query(student, noise, condition, grid, index)
    t = grid[index]
    weight = t.reshape(-1, 1, 1, 1)
    return Query((1.0 - weight) * bucket.targets(rows) + weight * noise, t, index)


def distill(
    student: Student,
    teachers: Mapping[str, VelocityField],
    buckets: Mapping[str, Bucket],
    router: Router,
    optimizers: Optimizers,
    ema: Ema,
    params: LoopParams,
    grid: torch.Tensor,
    seed: int,
    start: int = 0,
) -> Iterator[Step]:
    """Trains the student in place and yields a record after every step.

    Every draw of step i comes from (seed, i, slot, purpose): starting at `start` with the state saved after step `start` equals never having stopped.
    `grid` (N + 1,) holds the noise levels of the rollout. Raises UserError when loss or gradient stop being finite;
    the student then still has its last finite weights.
    """
    shape = student.backbone.latent_shape
    soft = Mean(tuple(teachers[route.teacher] for route in router.routes), tuple(route.weight for route in router.routes)) if params.routing == "soft" else None
    slots = range(params.batch)
    for i in range(start, params.steps):
        begun = time.perf_counter()
        # One route for the whole step, and its examples.
        route = router.pick(numpy_generator(seed, i, 0, "route"))
        bucket = buckets[route.capability]
        rows = [int(numpy_generator(seed, i, slot, "row").integers(len(bucket))) for slot in slots]
        condition = bucket.at(rows)
        # Where the student goes: one state of its own rollout, no gradient.
        index = torch.tensor([query_index(params.rollout_steps, params.query, numpy_generator(seed, i, slot, "query")) for slot in slots])
        query = _query(student.field, bucket, condition, rows, noise_for(seed, i, slots, shape), grid, index, params.states)
        # What the teacher would do there.
        teacher = soft or teachers[route.teacher]
        with torch.no_grad():
            target = teacher(query.x_t, query.t, condition)
        loss = velocity_mse(student.field(query.x_t, query.t, condition), target)
        # One step towards it.
        optimizers.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(list(student.parameters.values()), params.clip)
        if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
            raise UserError(
                f"step {i} (route {route.capability}): loss {float(loss.detach())} or gradient norm {float(norm)} is not finite; "
                f"lower learning_rate = {params.learning_rate} and run again"
            )
        optimizers.step(warmup_then_linear(i, params.steps, params.warmup, params.decay_from))
        ema.update(student.parameters)
        spent = (int(index.sum()) if params.states == "on_policy" else 0) + params.batch * (1 + evaluations(teacher))
        yield Step(i, route.capability, route.teacher, float(loss.detach()), float(query.t.mean()), float(norm), spent, time.perf_counter() - begun)
