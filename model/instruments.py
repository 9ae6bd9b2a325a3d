"""What is looked at while a student trains: its gap to the teachers on examples it never trains on, pictures of them,
and how far teachers' gradients agree.

None of it changes the run: weights come back as they were, and draws have purposes of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from data.errors import UserError
from data.randomness import numpy_generator
from model.compute.execution import Execution, moved, precision
from model.distill import accumulate, parts, plan_step
from model.examples import Bucket
from model.fields.base import VelocityField, velocity_gaps
from model.networks.student import Student
from model.randomness import noise_for
from model.rollout import query_index, roll_out_to_query, sample
from model.route import Router
from model.step import LoopParams

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
    own = {name: parameter.detach().clone() for name, parameter in student.parameters.items()}
    student.load(values)
    try:
        yield
    finally:
        student.load(own)


def _held_out(bucket: Bucket, params: LoopParams, capability: str, wanted: int) -> list[int]:
    rows = min(params.held_out, wanted)
    if rows < 1 or len(bucket) <= params.held_out:
        raise UserError(
            f"held_out = {params.held_out}: {capability} has {len(bucket)} rows; choose 1 or more, and fewer than there are"
        )
    return list(range(len(bucket) - params.held_out, len(bucket) - params.held_out + rows))


@torch.no_grad()
def held_out_gaps(
    student: Student,
    teachers: Mapping[str, VelocityField],
    buckets: Mapping[str, Bucket],
    router: Router,
    params: LoopParams,
    grid: torch.Tensor,
    seed: int,
    execution: Execution,
) -> dict[str, float]:
    """Mean squared velocity gap to each route's teacher on its held-out rows, at queries of the student's own rollout;
    by capability.

    Noise and query indices are the same every time, so that two gaps of one run differ by the student alone.
    """
    gaps = {}
    for route in router.routes:
        bucket = buckets[route.capability]
        rows = _held_out(bucket, params, route.capability, params.held_out)
        shapes = {slot: bucket.shape_of(row) or student.backbone.latent_shape for slot, row in enumerate(rows)}
        total = 0.0
        for part in parts(range(len(rows)), shapes, execution.micro_batch):
            condition = moved(bucket.at([rows[slot] for slot in part]), execution.device)
            noise = moved(noise_for(seed, 0, part, shapes[part[0]], "held_out"), execution.device)
            index = torch.tensor(
                [
                    query_index(params.rollout_steps, params.query, numpy_generator(seed, 0, slot, "held_out_query"))
                    for slot in part
                ]
            )
            with precision(execution.device, execution.dtype, execution.attention):
                query = roll_out_to_query(student.field, noise, condition, grid, index)
                target = teachers[route.teacher](query.x_t, query.t, condition)
                total += float(velocity_gaps(student.field(query.x_t, query.t, condition), target).sum())
        gaps[route.capability] = total / len(rows)
    return gaps


@torch.no_grad()
def held_out_pictures(
    student: Student,
    buckets: Mapping[str, Bucket],
    params: LoopParams,
    grid: torch.Tensor,
    seed: int,
    execution: Execution,
    count: int,
) -> dict[str, torch.Tensor]:
    """By capability, up to `count` held-out examples as the student draws them: (rows, n, 3, H, W) in [0, 1]; an edit's
    first row holds the sources.

    Rows of another latent shape than the first are left out.
    """
    pictures = {}
    for capability, bucket in buckets.items():
        rows = _held_out(bucket, params, capability, count)
        shape = bucket.shape_of(rows[0]) or student.backbone.latent_shape
        rows = [row for row in rows if (bucket.shape_of(row) or student.backbone.latent_shape) == shape]
        condition = moved(bucket.at(rows), execution.device)
        noise = moved(noise_for(seed, 0, range(len(rows)), shape, "pictures"), execution.device)
        with precision(execution.device, execution.dtype, execution.attention):
            latents = sample(student.field, noise, condition, moved(grid, execution.device))
        shown = [latents] if condition.source is None else [condition.source, latents]
        # Picture by picture: a VAE in fp32 needs several GB for each of 1024 px.
        drawn = [torch.cat([student.backbone.decode(row[None]) for row in one.cpu()]) for one in shown]
        pictures[capability] = torch.stack(drawn)
    return pictures


def gradient_cosines(
    student: Student,
    teachers: Mapping[str, VelocityField],
    buckets: Mapping[str, Bucket],
    router: Router,
    params: LoopParams,
    grid: torch.Tensor,
    seed: int,
    index: int,
    execution: Execution,
) -> dict[tuple[str, str], float]:
    """The cosine between the gradients that each pair of routes would give the student as it is, each from a batch of
    its own.

    Costs a whole step's evaluations for every route. The student's own gradients are left as they were.
    """
    kept = [(parameter, parameter.grad) for parameter in student.parameters.values()]
    vectors = {}
    for route in router.routes:
        plan = plan_step(params, router, buckets, seed, index, route)
        _clear(parameter for parameter, _ in kept)
        accumulate(
            student,
            teachers[route.teacher],
            buckets[route.capability],
            plan,
            range(params.batch),
            params,
            grid,
            seed,
            execution,
        )
        vectors[route.capability] = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p, _ in kept]
        )
    for parameter, gradient in kept:
        parameter.grad = gradient
    names = list(vectors)
    pairs = [(a, b) for place, a in enumerate(names) for b in names[place + 1 :]]
    return {(a, b): float(nn.functional.cosine_similarity(vectors[a], vectors[b], dim=0)) for a, b in pairs}


def _clear(parameters: Iterator[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
