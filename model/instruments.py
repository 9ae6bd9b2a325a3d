"""What is looked at while a student trains: its gap to the teachers on examples it never trains on, pictures of them,
and how far teachers' gradients agree.

None of it changes the run: weights come back as they were, and draws have purposes of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations

import torch
from torch import nn

from data.randomness import numpy_generator
from model.distill import plan_step
from model.fields.base import velocity_gaps
from model.methods import danceopd
from model.networks.student import Student
from model.rollout import query_index, roll_out_to_query, sample
from model.setup import Batch, Setup
from model.step import Plan

T_BINS = 4  # [0, 1/4), [1/4, 1/2), ...; t0 is the low-noise end


def t_bin(t: float) -> int:
    return min(int(t * T_BINS), T_BINS - 1)


def binned(losses: Sequence[float], levels: Sequence[float]) -> dict[str, float]:
    """Mean loss by bin of the queried t: {"t0": ..., "t3": ...}, bins without a sample left out."""
    by_bin: dict[str, list[float]] = {}
    for loss, t in zip(losses, levels, strict=True):
        by_bin.setdefault(f"t{t_bin(t)}", []).append(loss)
    return {name: sum(values) / len(values) for name, values in sorted(by_bin.items())}


@contextmanager
def weights_of(student: Student, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The student with other values of its trainables, for a while."""
    before = {name: parameter.detach().clone() for name, parameter in student.parameters.items()}
    student.load(values)
    try:
        yield
    finally:
        student.load(before)


def _on_held_out(setup: Setup) -> tuple[Setup, list[Plan]]:
    """The setup on its held-out rows, and each route's plan: all of them, with the same queries every time."""
    setup, params, plans = replace(setup, buckets=setup.held_out), setup.params, []
    for route in setup.router.routes:
        rows = range(len(setup.buckets[route.capability]))
        generators = [numpy_generator(setup.seed, 0, slot, "held_out_query") for slot in rows]
        query = [(query_index(params.rollout_steps, params.query, generator),) for generator in generators]
        plans.append(Plan(0, (route,) * len(rows), tuple(rows), tuple(query)))
    return setup, plans


@torch.no_grad()
def held_out_gaps(setup: Setup) -> dict[str, float]:
    """Mean squared velocity gap to each route's teacher on `Setup.held_out`, at queries of the student's own rollout;
    by capability.

    Noise and query indices are the same every time, so that two gaps of one run differ by the student alone.
    """
    gaps, field, (setup, plans) = {}, setup.student.field, _on_held_out(setup)
    for route, plan in zip(setup.router.routes, plans, strict=True):
        total = 0.0
        for batch in setup.batches(plan, range(len(plan.rows)), setup.execution.micro_batch):
            condition, noise = batch.condition(), batch.noise("held_out")
            with setup.precision():
                query = roll_out_to_query(field, noise, condition, setup.grid, batch.index)
                target = setup.teachers[route.teacher](query.x_t, query.t, condition)
                total += float(velocity_gaps(field(query.x_t, query.t, condition), target).sum())
        gaps[route.capability] = total / len(plan.rows)
    return gaps


@torch.no_grad()
def held_out_pictures(setup: Setup, count: int) -> dict[str, torch.Tensor]:
    """By capability, up to `count` of `Setup.held_out` as the student draws them: (rows, n, 3, H, W) in [0, 1]; an
    edit's first row holds the sources.

    Rows of another latent shape than the first are left out.
    """
    pictures, decode, (setup, plans) = {}, setup.student.backbone.decode, _on_held_out(setup)
    for route, plan in zip(setup.router.routes, plans, strict=True):
        shapes = [setup.shape_of(route.capability, row) for row in plan.rows[:count]]
        batch = Batch(setup, plan, [slot for slot, shape in enumerate(shapes) if shape == shapes[0]])
        condition, noise = batch.condition(), batch.noise("pictures")
        with setup.precision():
            latents = sample(setup.student.field, noise, condition, setup.grid)
        shown = [latents] if condition.source is None else [condition.source, latents]
        # Picture by picture: a VAE in fp32 needs several GB for each of 1024 px.
        pictures[route.capability] = torch.stack(
            [torch.cat([decode(picture[None]) for picture in row.cpu()]) for row in shown]
        )
    return pictures


def gradient_cosines(setup: Setup, index: int) -> dict[tuple[str, str], float]:
    """The cosine between the gradients that each pair of routes would give the student as it is, each from a batch of
    its own.

    Costs a whole step's evaluations for every route. The student's gradients are left as they were.
    """
    parameters = list(setup.student.parameters.values())
    before, vectors = [parameter.grad for parameter in parameters], {}
    for route in setup.router.routes:
        for parameter in parameters:
            parameter.grad = None
        plan = plan_step(setup, index, route=route)
        danceopd.compute(setup, setup.teachers[route.teacher], plan, range(setup.params.batch))
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        vectors[route.capability] = torch.cat([gradient.flatten() for gradient in gradients])
    for parameter, gradient in zip(parameters, before, strict=True):
        parameter.grad = gradient
    cosine = nn.functional.cosine_similarity
    return {(a, b): float(cosine(vectors[a], vectors[b], dim=0)) for a, b in combinations(vectors, 2)}
