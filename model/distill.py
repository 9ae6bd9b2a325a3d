"""The distillation loop: on-policy generative field distillation (DanceOPD, arXiv 2606.27377, algorithm 1).

It yields; saving, logging and stopping are the caller's. All that is random in a step is known before it runs (`Plan`),
so samples are computed in whatever order, batches and processes suit the machine, at the floor of sum(j) + 1
evaluations of the student and one of the teacher's field. What a step computes is a method's (model/methods/);
model/plain.py is the paper's without any saving, for comparison.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence

import torch
from torch import nn

from data.randomness import numpy_generator
from model.checkpoint import Ema
from model.compute.execution import EvaluationCounter, networks_of
from model.compute.optimizer import SCHEDULES, Optimizers
from model.compute.parallel import ALONE, World, deal, reduce_gradients
from model.fields.base import VelocityField
from model.fields.mean import Mean
from model.methods import danceopd
from model.methods.base import Method
from model.rollout import query_indices
from model.route import Route
from model.setup import Setup
from model.step import Measured, Plan, Step, read_late


def plan_step(setup: Setup, index: int, method: Method = danceopd.METHOD, route: Route | None = None) -> Plan:
    """The plan of a step, from (seed, step, slot, purpose) alone; `route` given takes the place of the drawn ones."""
    params, seed = setup.params, setup.seed
    group = min(method.group, params.batch)
    rng, groups = numpy_generator(seed, index, 0, "route"), params.batch // group
    if route is None and params.routing == "mixed":
        taken = setup.router.deal(groups, rng)
    else:
        taken = (route or setup.router.pick(rng),) * groups
    states = params.rollout_steps if method.dense else params.query_states
    rows, query = [], []
    for slot in range(params.batch):
        leader = slot - slot % group
        examples = len(setup.buckets[taken[slot // group].capability])
        rows.append(int(numpy_generator(seed, index, leader, "row").integers(examples)))
        generator = numpy_generator(seed, index, slot, "query")
        query.append(query_indices(params.rollout_steps, params.query, states, generator))
    routes = tuple(taken[slot // group] for slot in range(params.batch))
    return Plan(index, routes, tuple(rows), tuple(query))


@read_late
def distill(
    setup: Setup,
    optimizers: Optimizers,
    ema: Ema,
    start: int = 0,
    world: World = ALONE,
    stop: Callable[[], bool] = lambda: False,
    method: Method = danceopd.METHOD,
) -> Generator[Step, None, None]:
    """Trains the student in place and yields a record after every step.

    Every draw of step i comes from (seed, i, slot, purpose): starting at `start` with the state saved after step
    `start` equals never having stopped, and neither batch sizes nor the number of processes change more than the order
    of sums. `stop` is asked in every step. Raises NotFinite when loss or gradient stop being finite, or grow beyond
    bounds; the student then still has the weights before that step. With `execution.deferred` that is noticed one step
    later, and the device withholds every step from the first bad one on.
    """
    params, student = setup.params, setup.student
    mean, schedule = _mean(setup), SCHEDULES[params.schedule]
    networks = [network for field in setup.teachers.values() for network in networks_of(field)]
    counter = EvaluationCounter([student.network, *networks])
    healthy: torch.Tensor | None = None  # where read late: 1 until a step was bad, after which nothing is applied
    begun = time.perf_counter()
    try:
        for i in range(start, params.steps):
            # The step's routes, its examples, and how far each is rolled out.
            plan = plan_step(setup, i, method)
            fields = {route.capability: mean or setup.teachers[route.teacher] for route in plan.taken}
            costs = _costs(setup, plan, method, fields)
            # This process's share of the slots: about as much work as the others have.
            slots = deal([forwards + backwards for forwards, backwards in costs], world.size)[world.rank]
            # Where the student goes, what the teacher would do there, and the gradient of the gap.
            optimizers.zero_grad()
            losses, samples = _computed(setup, plan, method, fields, slots)
            # The same over all processes, and whether it may be applied.
            seen = _costs(setup, plan, method, {name: field for name, field in fields.items() if networks_of(field)})
            formulas = sum(costs[slot][0] - seen[slot][0] for slot in slots)  # fields without a network: as asked
            numbers = _measured(setup, losses, (counter.take() + formulas, stop()), world, healthy)
            levels, floor = tuple(method.levels(setup, plan)), round(sum(forwards for forwards, _ in costs))
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
    names = dict.fromkeys(route.teacher for route in setup.router.routes)
    return Mean(tuple(setup.teachers[name] for name in names))


def _costs(setup: Setup, plan: Plan, method: Method, fields: Mapping[str, VelocityField]) -> list[tuple[float, int]]:
    """By slot, the evaluations that it makes necessary and how many of them have a backward, with the capabilities'
    `fields` for teachers; one that is not among them costs nothing."""
    params, asked = setup.params, {name: field.evaluations for name, field in fields.items()}
    reached = [max(indices) if params.states == "on_policy" else 0 for indices in plan.query]
    return [
        method.cost(params.rollout_steps, furthest, asked.get(route.capability, 0), params.query_states)
        for furthest, route in zip(reached, plan.routes, strict=True)
    ]


def _computed(
    setup: Setup, plan: Plan, method: Method, fields: Mapping[str, VelocityField], slots: Sequence[int]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What the method makes of these slots, route by route: a teacher is switched to once."""
    if method.compute is None:
        raise ValueError("a method without a step cannot be run")
    parts, samples = [], dict[str, torch.Tensor]()
    for capability, field in fields.items():
        theirs = [slot for slot in slots if plan.routes[slot].capability == capability]
        losses, named = method.compute(setup, field, plan, theirs)
        parts.append(losses)
        samples |= named
    return torch.stack(parts).sum(0), samples


def _measured(
    setup: Setup, losses: torch.Tensor, counts: tuple[float, ...], world: World, healthy: torch.Tensor | None
) -> torch.Tensor:
    """The numbers of Step.measured, from the losses and counts of this process; clips the common gradient."""
    trained, bound = list(setup.student.parameters.values()), setup.params.max_gradient_norm
    totals = torch.cat([*(torch.full((1,), float(count), device=losses.device) for count in counts), losses.flatten()])
    if world.size > 1:
        totals = reduce_gradients(trained, totals)
    loss = totals[len(counts) :].sum() / losses.numel()
    norm = nn.utils.clip_grad_norm_(trained, setup.params.clip)
    fine = torch.isfinite(loss) & torch.isfinite(norm)
    if bound:
        fine = fine & (norm <= bound)
    applied = fine.float() if healthy is None else fine * healthy
    return torch.cat([torch.stack([applied, loss.detach(), norm.detach()]), totals])
