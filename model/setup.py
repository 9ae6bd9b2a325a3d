"""What a training holds fixed, and the batches in which it computes the slots of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from model.backbones import Backbone
from model.compute.execution import WHOLE_BATCH, Execution, moved, precision, rollout_ready
from model.examples import Bucket
from model.families import FAMILIES
from model.fields import composed
from model.fields.base import Condition, Sampler, VelocityField
from model.networks.student import Student
from model.randomness import noise_for
from model.rollout import euler_grid
from model.route import Route, Router, router
from model.step import LoopParams, Plan

T = TypeVar("T")


@dataclass(frozen=True)
class Setup:
    """Who learns from whom, on what, and how it is computed.

    `teachers`: field by name. `buckets`: examples by capability; `held_out`: those of the dev split that a validation
    looks at. `grid` (N + 1,), on the host: the noise levels of the student's rollout.
    """

    student: Student
    teachers: Mapping[str, VelocityField]
    buckets: Mapping[str, Bucket]
    router: Router
    params: LoopParams
    grid: torch.Tensor
    seed: int
    execution: Execution = WHOLE_BATCH
    held_out: Mapping[str, Bucket] = field(default_factory=dict)

    def moved(self, value: T) -> T:
        return moved(value, self.execution.device)

    def precision(self) -> AbstractContextManager[None]:
        """Within it student and teachers compute; equal weights then give equal answers."""
        return precision(self.execution.device, self.execution.dtype, self.execution.attention)

    @contextmanager
    def rolling_out(self) -> Iterator[None]:
        """Within it the student answers without a gradient, as fast as `execution` allows."""
        ready = rollout_ready(self.student.network, self.student.adapter, self.execution)
        with torch.no_grad(), ready, self.precision():
            yield

    def shape_of(self, capability: str, row: int) -> tuple[int, ...]:
        """The latents' shape (C, H, W) of an example."""
        return self.buckets[capability].shape_of(row) or self.student.backbone.latent_shape

    def batches(
        self, plan: Plan, slots: Sequence[int], size: int, order: Callable[[int], int] | None = None
    ) -> Iterator[Batch]:
        """The slots in batches of at most `size`, all of one capability and latent shape; within these sorted by
        `order` where there is more than one batch."""
        named = {slot: plan.routes[slot].capability for slot in slots}
        kinds = {slot: (name, self.shape_of(name, plan.rows[slot])) for slot, name in named.items()}
        for kind in dict.fromkeys(kinds.values()):
            group = [slot for slot in slots if kinds[slot] == kind]
            if order is not None and len(group) > size:
                group.sort(key=order)
            for first in range(0, len(group), size):
                yield Batch(self, plan, group[first : first + size])


def setup_of(
    student: Student,
    teachers: Mapping[str, VelocityField],
    buckets: Mapping[str, Bucket],
    router: Router,
    params: LoopParams,
    seed: int,
    held_out: Mapping[str, Bucket],
) -> Setup:
    """On the noise levels that the student's backbone is sampled at, computed on the CPU in whole batches."""
    grid = euler_grid(params.rollout_steps, float(student.backbone.scheduler["shift"]))
    return Setup(student, teachers, buckets, router, params, grid, seed, held_out=held_out)


def teacher_sampler(backbone: Backbone) -> Sampler:
    """How the family's pretrained networks are drawn."""
    return Sampler(FAMILIES[backbone.name].steps, float(backbone.scheduler["shift"]))


def with_fields(
    routes: Sequence[Route], known: Mapping[str, VelocityField], samplers: Mapping[str, Sampler]
) -> tuple[Router, dict[str, VelocityField]]:
    """A router whose teachers are the routes' fields, and these by name: each teacher under its layers.

    `samplers`: how each of `known` is drawn. Raises UserErrors with all faults at once.
    """
    named = router(routes, list(known)).routes
    fields = {r.asked: composed(known[r.teacher], r.field, known, samplers[r.teacher]) for r in named}
    return Router(tuple(replace(route, teacher=route.asked, field={}) for route in named)), fields


@dataclass(frozen=True)
class Batch:
    """Slots of a plan, n of them, of one capability and one latent shape, so that they are computed together."""

    setup: Setup
    plan: Plan
    slots: list[int]

    @property
    def capability(self) -> str:
        return self.plan.routes[self.slots[0]].capability

    @property
    def bucket(self) -> Bucket:
        return self.setup.buckets[self.capability]

    @property
    def rows(self) -> list[int]:
        return [self.plan.rows[slot] for slot in self.slots]

    @property
    def index(self) -> torch.Tensor:
        """(n,) on the host: the (first) query indices."""
        return torch.tensor([self.plan.query[slot][0] for slot in self.slots])

    def condition(self) -> Condition:
        return self.setup.moved(self.bucket.at(self.rows))

    def noise(self, purpose: str = "noise") -> torch.Tensor:
        """(n, C, H, W), independent of the batch that a slot is in."""
        shape = self.setup.shape_of(self.capability, self.rows[0])
        return self.setup.moved(noise_for(self.setup.seed, self.plan.index, self.slots, shape, purpose))

    def targets(self) -> torch.Tensor:
        """The clean target latents (n, C, H, W). Raises UserError where the data has none."""
        return self.setup.moved(self.bucket.targets(self.rows))

    def levels(self, index: torch.Tensor) -> torch.Tensor:
        """(n,): the noise levels at these indices of the grid."""
        return self.setup.moved(self.setup.grid[index])

    def at(self, t: float) -> torch.Tensor:
        """(n,), all `t`."""
        return torch.full((len(self.slots),), t, device=self.setup.execution.device)


# (setup, the field to learn from, plan, slots of one route and this process) -> losses, (B,) by slot or (B, K) by slot
# and state, 0 for other slots, whose mean is the step's loss; and samples by name. Adds the gradient of the step's mean
# loss, as far as the slots go, to the student's.
Accumulate = Callable[[Setup, VelocityField, Plan, Sequence[int]], tuple[torch.Tensor, dict[str, torch.Tensor]]]
