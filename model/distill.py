"""The distillation loop: on-policy generative field distillation (DanceOPD, arXiv 2606.27377, algorithm 1).

It yields; saving, logging and stopping are the caller's. All that is random in a step is known before it runs (`Plan`),
so samples are computed in whatever order, batches and processes suit the machine, at the floor of sum(j) + 1
evaluations of the student and one of the teacher's field. What a step computes is a method's (model/methods/);
model/plain.py is the paper's without any saving, for comparison.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator

import torch
from torch import nn

from data.randomness import numpy_generator
from model.checkpoint import Ema
from model.compute.execution import EvaluationCounter, networks_of
from model.compute.optimizer import SCHEDULES, Optimizers
from model.compute.parallel import ALONE, World, deal, reduce_gradients
from model.fields.base import VelocityField
from model.fields.mean import Mean
from model.methods.danceopd import accumulate
from model.rollout import query_index
from model.route import Route
from model.setup import Accumulate, Setup
from model.step import Measured, Plan, Step, read_late


def plan_step(setup: Setup, index: int, route: Route | None = None) -> Plan:
    """The plan of a step, from (seed, step, slot, purpose) alone; `route` given takes the place of the drawn one."""
    params, seed, slots = setup.params, setup.seed, range(setup.params.batch)
    route = route or setup.router.pick(numpy_generator(seed, index, 0, "route"))
    rows = len(setup.buckets[route.capability])
    picked = [int(numpy_generator(seed, index, slot, "row").integers(rows)) for slot in slots]
    generators = [numpy_generator(seed, index, slot, "query") for slot in slots]
    query = [query_index(params.rollout_steps, params.query, generator) for generator in generators]
    return Plan(index, route, tuple(picked), tuple(query))


@read_late
def distill(
    setup: Setup,
    optimizers: Optimizers,
    ema: Ema,
    start: int = 0,
    world: World = ALONE,
    stop: Callable[[], bool] = lambda: False,
    compute: Accumulate = accumulate,
) -> Generator[Step, None, None]:
    """Trains the student in place and yields a record after every step.

    Every draw of step i comes from (seed, i, slot, purpose): starting at `start` with the state saved after step
    `start` equals never having stopped, and neither batch sizes nor the number of processes change more than the order
    of sums. `stop` is asked in every step; `compute` is the method's. Raises NotFinite when loss or gradient stop being
    finite, or grow beyond bounds; the student then still has the weights before that step. With `execution.deferred`
    that is noticed one step later, and the device withholds every step from the first bad one on.
    """
    params, student = setup.params, setup.student
    mean, schedule = _mean(setup), SCHEDULES[params.schedule]
    networks = [network for field in setup.teachers.values() for network in networks_of(field)]
    counter = EvaluationCounter([student.network, *networks])
    healthy: torch.Tensor | None = None  # where read late: 1 until a step was bad, after which nothing is applied
    begun = time.perf_counter()
    try:
        for i in range(start, params.steps):
            # One route for the whole step, its examples, and how far each is rolled out.
            plan = plan_step(setup, i)
            teacher = mean or setup.teachers[plan.route.teacher]
            # This process's share of the slots: about as much work as the others have.
            slots = deal([index + teacher.evaluations + 2 for index in plan.query], world.size)[world.rank]
            # Where the student goes, what the teacher would do there, and the gradient of the gap.
            optimizers.zero_grad()
            losses, samples = compute(setup, teacher, plan, slots)
            # The same over all processes, and whether it may be applied.
            formula = 0 if networks_of(teacher) else teacher.evaluations * len(slots)  # counts as asked
            numbers = _measured(setup, losses, (counter.take() + formula, stop()), world, healthy)
            levels, floor = tuple(setup.grid[list(plan.query)].tolist()), _floor(setup, plan, teacher)
            factor = schedule(i, params.steps, params.warmup, params.decay_from)
            rate, seconds = factor * params.learning_rate, time.perf_counter() - begun
            step = Step(plan, levels, floor, rate, seconds, Measured(numbers), samples, params)
            # One step towards the teacher.
            if setup.execution.deferred:
                healthy = numbers[0]
            else:
                step.read()
            optimizers.step(factor, healthy)
            ema.update(student.parameters, healthy)
            yield step
            begun = time.perf_counter()
            counter.take()  # what the caller asked in between is not the step's
    finally:
        counter.close()


def _mean(setup: Setup) -> Mean | None:
    """The one field of soft routing."""
    if setup.params.routing != "soft":
        return None
    return Mean(tuple(setup.teachers[route.teacher] for route in setup.router.routes))


def _measured(
    setup: Setup, losses: torch.Tensor, counts: tuple[float, ...], world: World, healthy: torch.Tensor | None
) -> torch.Tensor:
    """The numbers of Step.measured, from losses (B,) and counts of this process; clips the common gradient."""
    trained, bound = list(setup.student.parameters.values()), setup.params.max_gradient_norm
    totals = torch.cat([*(torch.full((1,), float(count), device=losses.device) for count in counts), losses])
    if world.size > 1:
        totals = reduce_gradients(trained, totals)
    loss = totals[len(counts) :].sum() / setup.params.batch
    norm = nn.utils.clip_grad_norm_(trained, setup.params.clip)
    fine = torch.isfinite(loss) & torch.isfinite(norm)
    if bound:
        fine = fine & (norm <= bound)
    applied = fine.float() if healthy is None else fine * healthy
    return torch.cat([torch.stack([applied, loss.detach(), norm.detach()]), totals])


def _floor(setup: Setup, plan: Plan, teacher: VelocityField) -> int:
    """Step.floor."""
    path = sum(plan.query) if setup.params.states == "on_policy" else 0
    return path + setup.params.batch * (1 + teacher.evaluations)
