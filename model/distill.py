"""The distillation loop: on-policy generative field distillation (DanceOPD, arXiv 2606.27377, algorithm 1).

It yields; saving, logging and stopping are the caller's. All that is random in a step is known before it runs (`Plan`),
so samples are computed in whatever order, batches and processes suit the machine, at the floor of sum(j) + 1
evaluations of the student and one of the teacher's field. model/plain.py is the same step without any of this, for
comparison.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from data.errors import UserError
from data.randomness import numpy_generator
from model.checkpoint import Ema
from model.compute.execution import (
    WHOLE_BATCH,
    EvaluationCounter,
    Execution,
    moved,
    networks_of,
    precision,
    rollout_ready,
)
from model.compute.optimizer import SCHEDULES, Optimizers
from model.compute.parallel import ALONE, World, deal, most, reduce_gradients
from model.examples import Bucket
from model.fields.base import Condition, VelocityField, velocity_gaps
from model.fields.cost import evaluations
from model.fields.mean import Mean
from model.networks.student import Student
from model.randomness import noise_for
from model.rollout import query_index, roll_out_to_query
from model.route import Route, Router
from model.step import LoopParams, Measured, Plan, Step

Accumulate = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]  # `accumulate`, or model.plain's


def plan_step(
    params: LoopParams, router: Router, buckets: Mapping[str, Bucket], seed: int, index: int, route: Route | None = None
) -> Plan:
    """The plan of a step, from (seed, step, slot, purpose) alone; `route` given takes the place of the drawn one."""
    route = route or router.pick(numpy_generator(seed, index, 0, "route"))
    rows = len(buckets[route.capability]) - params.held_out
    if rows < 1:
        raise UserError(
            f"held_out = {params.held_out}: nothing of {route.capability} ({len(buckets[route.capability])} rows) is left to train on"
        )
    slots = range(params.batch)
    return Plan(
        index,
        route,
        tuple(int(numpy_generator(seed, index, slot, "row").integers(rows)) for slot in slots),
        tuple(
            query_index(params.rollout_steps, params.query, numpy_generator(seed, index, slot, "query"))
            for slot in slots
        ),
    )


def parts(
    slots: Sequence[int], shapes: Mapping[int, tuple[int, ...]], size: int, order: Callable[[int], int] | None = None
) -> Iterator[list[int]]:
    """The slots in batches of at most `size`, each of one latent shape; within a shape sorted by `order` where there is
    more than one batch.
    """
    for shape in dict.fromkeys(shapes[slot] for slot in slots):
        group = [slot for slot in slots if shapes[slot] == shape]
        if order is not None and len(group) > size:
            group.sort(key=order)
        for first in range(0, len(group), size):
            yield group[first : first + size]


def accumulate(
    student: Student,
    teacher: VelocityField,
    bucket: Bucket,
    plan: Plan,
    slots: Sequence[int],
    params: LoopParams,
    grid: torch.Tensor,
    seed: int,
    execution: Execution,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Adds the gradient of the step's mean loss, as far as `slots` go, to the student's. Returns every slot's loss
    (B,), 0 for the others, and the samples.

    Rollouts come first and leave nothing but their last states; then the teacher and after it the student answer on the
    very same micro-batches, so that equal weights answer equal bits.
    """
    device, count = execution.device, len(plan.rows)
    shapes = {slot: bucket.shape_of(plan.rows[slot]) or student.backbone.latent_shape for slot in slots}
    states: dict[int, torch.Tensor] = {}
    rolled = list(parts(slots, shapes, execution.rollout_batch, lambda slot: -plan.query[slot]))
    asked = list(parts(slots, shapes, execution.micro_batch))
    extra, idle = [0, 0], list[tuple[torch.Tensor, torch.Tensor, Condition]]()
    if execution.lockstep:
        own = [
            sum(max(plan.query[slot] for slot in part) for part in rolled) if params.states == "on_policy" else 0,
            len(asked),
        ]
        extra = [longest - count for longest, count in zip(most(own), own, strict=True)]
        shape = bucket.shape_of(plan.rows[0]) or student.backbone.latent_shape
        idle = [
            (
                torch.zeros(1, *shape, device=device),
                torch.ones(1, device=device),
                moved(bucket.at([plan.rows[0]]), device),
            )
        ]
    with (
        torch.no_grad(),
        rollout_ready(student.network, student.adapter, execution),
        precision(device, execution.dtype, execution.attention),
    ):
        for part in rolled:
            noise, index = (
                moved(noise_for(seed, plan.index, part, shapes[part[0]]), device),
                torch.tensor([plan.query[slot] for slot in part]),
            )
            rows = [plan.rows[slot] for slot in part]
            if params.states == "on_policy":
                x_t = roll_out_to_query(student.field, noise, moved(bucket.at(rows), device), grid, index).x_t
            else:
                weight = moved(grid[index], device).reshape(-1, 1, 1, 1)
                x_t = (1.0 - weight) * moved(bucket.targets(rows), device) + weight * noise
            states.update(zip(part, x_t.unbind(), strict=True))
        for _ in range(extra[0]):
            student.field(*idle[0])
    batches = []
    for (
        part
    ) in asked:  # the teacher first for all of them: switching adapters to and fro costs as much as a small forward
        x_t, t = torch.stack([states[slot] for slot in part]), moved(grid[[plan.query[slot] for slot in part]], device)
        condition = moved(bucket.at([plan.rows[slot] for slot in part]), device)
        batches.append((x_t, t, condition))
    batches += idle * extra[1]
    with torch.no_grad(), precision(device, execution.dtype, execution.attention):
        targets = [teacher(*batch) for batch in batches]
    gaps = []
    for number, (batch, target) in enumerate(zip(batches, targets, strict=True)):
        with precision(device, execution.dtype, execution.attention):
            gap = velocity_gaps(student.field(*batch), target)
        (gap.sum() * (1.0 / count if number < len(asked) else 0.0)).backward()
        gaps.append(gap.detach())
    order = [slot for part in asked for slot in part]
    losses = torch.zeros(count, device=device)
    if order:
        losses.index_copy_(0, moved(torch.tensor(order), device), torch.cat(gaps[: len(asked)]))
    return losses, _samples(order, states, targets[: len(asked)], plan)


def _samples(
    order: list[int], states: dict[int, torch.Tensor], targets: list[torch.Tensor], plan: Plan
) -> dict[str, torch.Tensor]:
    """The step's samples by slot, for whoever must look at them later: views, no copies."""
    answers = [row for target in targets for row in target.unbind()]
    named = {f"x_t.{slot:03d}": states[slot] for slot in order} | {
        f"target.{slot:03d}": answer for slot, answer in zip(order, answers, strict=True)
    }
    return {**named, "rows": torch.tensor(plan.rows), "query": torch.tensor(plan.query)}


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
    execution: Execution = WHOLE_BATCH,
    world: World = ALONE,
    stop: Callable[[], bool] = bool,
    compute: Accumulate | None = None,
) -> Iterator[Step]:
    """Trains the student in place and yields a record after every step.

    Every draw of step i comes from (seed, i, slot, purpose): starting at `start` with the state saved after step
    `start` equals never having stopped, and neither batch sizes nor the number of processes change more than the order
    of sums. `grid` (N + 1,), on the host, holds the noise levels of the rollout.
    `stop` is asked in every step; `compute` takes the place of `accumulate`. Raises NotFinite when loss or gradient
    stop being finite, or grow beyond bounds; the student then still has the weights before that step. With
    `execution.deferred` that is noticed one step later, and the device withholds every step from the first bad one on.
    """
    soft = (
        Mean(tuple(teachers[route.teacher] for route in router.routes), tuple(route.weight for route in router.routes))
        if params.routing == "soft"
        else None
    )
    trained, schedule = list(student.parameters.values()), SCHEDULES[params.schedule]
    networks = [student.network, *(network for field in teachers.values() for network in networks_of(field))]
    counter = EvaluationCounter(networks)
    levels = [float(level) for level in grid]
    ok: torch.Tensor | None = None  # of all steps since `start`: once bad, nothing is applied any more
    before: Step | None = None
    begun = time.perf_counter()
    try:
        for i in range(start, params.steps):
            # One route for the whole step, its examples, and how far each is rolled out.
            plan = plan_step(params, router, buckets, seed, i)
            teacher = soft or teachers[plan.route.teacher]
            each = evaluations(teacher)
            slots = deal([index + each + 2 for index in plan.query], world.size)[world.rank]
            # Where the student goes, what the teacher would do there, and the gradient of the gap.
            optimizers.zero_grad()
            losses, batch = (compute or accumulate)(
                student, teacher, buckets[plan.route.capability], plan, slots, params, grid, seed, execution
            )
            counted = counter.take() + (
                0 if networks_of(teacher) else each * len(slots)
            )  # a field that is a formula counts as asked
            others = torch.cat(
                [
                    torch.full((1,), float(counted), device=losses.device),
                    torch.full((1,), float(stop()), device=losses.device),
                    losses,
                ]
            )
            if world.size > 1:
                others = reduce_gradients(trained, others)
            loss, norm = others[2:].sum() / params.batch, nn.utils.clip_grad_norm_(trained, params.clip)
            fine = torch.isfinite(loss) & torch.isfinite(norm)
            if params.max_gradient_norm:
                fine = fine & (norm <= params.max_gradient_norm)
            fine = fine.float() if ok is None else fine * ok
            factor = schedule(i, params.steps, params.warmup, params.decay_from)
            queried = tuple(levels[index] for index in plan.query)
            floor = (sum(plan.query) if params.states == "on_policy" else 0) + params.batch * (1 + each)
            measured = Measured(torch.cat([torch.stack([fine, loss.detach(), norm.detach()]), others]))
            now = time.perf_counter()
            mean_t = sum(queried) / len(queried)
            step = Step(
                plan,
                plan.route.teacher,
                mean_t,
                queried,
                floor,
                factor * params.learning_rate,
                now - begun,
                measured,
                batch,
                params,
            )
            # One step towards it.
            if execution.deferred:
                optimizers.step(factor, fine)
                ema.update(student.parameters, fine)
                ok = fine
                if before is not None:
                    before._read()
                before = step
            else:
                step._read()
                optimizers.step(factor)
                ema.update(student.parameters)
            yield step
            begun = time.perf_counter()
            counter.take()  # what the caller asked in between is not the step's
        if before is not None:
            before._read()
    finally:
        counter.close()
