"""The chord field: many steps of a field in one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from data.bounds import Count, Positive
from model.fields.base import Condition, Sampler, VelocityField, shifted


@dataclass(frozen=True)
class Chord(VelocityField):
    """The field's mean velocity over the next of `steps` Euler steps: what a sampler of that many steps needs to know.

    At a state z of level t, t' the level after it on the grid of `steps` steps: z is followed over `substeps` Euler
    steps of the field to z' at t', and the answer is (z' - z) / (t' - t). `shift` is the grid's, and steps * substeps
    steps of the same shift are the path that is cut short. One sub-step is the field itself, exactly. The map is
    deterministic, so that a mean of such targets blurs nothing that the field does not. Progressive distillation (arXiv
    2202.00512) halves steps so, at noised data; here the states are the student's own.
    """

    field: VelocityField
    steps: Positive
    substeps: Positive
    shift: float = 1.0

    @property
    def members(self) -> tuple[VelocityField, ...]:
        return (self.field,)

    @property
    def evaluations(self) -> int:
        return self.field.evaluations * self.substeps

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        if self.substeps == 1:
            return self.field(x_t, t, condition)
        levels = self._levels(t)  # (substeps + 1, B)
        lengths = (levels[1:] - levels[:-1]).reshape(self.substeps, -1, 1, 1, 1)
        z, total = x_t, torch.zeros_like(x_t, dtype=torch.float32)
        for level, length in zip(levels[:-1], lengths, strict=True):
            velocity = self.field(z, level, condition).float()
            z, total = z + length * velocity, total + length * velocity
        return total / lengths.sum(0)

    def _levels(self, t: torch.Tensor) -> torch.Tensor:
        """From `t` (B,) to the grid's next level below it: (substeps + 1, B)."""
        u = t / (self.shift - (self.shift - 1.0) * t)  # the same before the shift
        after = (torch.ceil(u * self.steps - 1e-3) - 1.0).clamp(min=0.0) / self.steps
        parts = torch.linspace(0.0, 1.0, self.substeps + 1, device=t.device)[:, None]
        return shifted(u + (after - u) * parts, self.shift)


def chord(field: VelocityField, steps: Positive, substeps: Count = 0, *, sampler: Sampler) -> Chord:
    """`substeps` 0: as many as the steps that the field's model is drawn in."""
    return Chord(field, steps, substeps or max(1, round(sampler.steps / steps)), sampler.shift)
