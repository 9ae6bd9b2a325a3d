"""Velocity fields and the one convention that everything above the backbones keeps.

t = 1 is noise and t = 0 the image: x_t = (1 - t) x_0 + t eps, v = dx/dt = eps - x_0, and an Euler step is x += (t_next
- t) v. This `t` is diffusers' `sigma`. A backbone whose network counts otherwise converts inside its own file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Prompts:
    """Encoded prompts: embeds (B, L, D) and pooled (B, P).

    Prompts of unequal length are padded to the longest. Then lengths (B,) counts a prompt's tokens without padding, and
    segments (B, S) those of its parts, which sum to lengths (an edit of Z-Image puts the images between the parts).
    Both are None where every token counts, as for SD3, whose padding is attended to.
    """

    embeds: torch.Tensor
    pooled: torch.Tensor
    lengths: torch.Tensor | None = None
    segments: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeds)


@dataclass(frozen=True)
class Condition:
    """What a field is conditioned on.

    embeds (B, L, D) and pooled (B, P) encode the prompts, empty_embeds (L, D) and empty_pooled (P) the empty prompt;
    source (B, C, H, W) holds the clean latents of the image to edit, None for T2I. lengths (B,), segments (B, S) and
    empty_segments (S,) are as in `Prompts`: None where no prompt is padded.
    """

    embeds: torch.Tensor
    pooled: torch.Tensor
    empty_embeds: torch.Tensor
    empty_pooled: torch.Tensor
    source: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    empty_segments: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeds)

    def dropped(self) -> Condition:
        """The unconditional one: the prompt is emptied, the source image of an edit stays."""
        count = len(self)
        embeds = self.empty_embeds.expand(count, *self.empty_embeds.shape)
        empty = replace(self, embeds=embeds, pooled=self.empty_pooled.expand_as(self.pooled))
        if self.lengths is None or self.empty_segments is None:
            return empty
        lengths = torch.full((count,), len(self.empty_embeds), dtype=self.lengths.dtype)
        return replace(empty, lengths=lengths, segments=self.empty_segments.expand(count, -1))

    def __getitem__(self, rows: slice | torch.Tensor) -> Condition:
        def picked(value: torch.Tensor) -> torch.Tensor:
            return value[rows.to(value.device)] if isinstance(rows, torch.Tensor) else value[rows]

        return self._changed(("embeds", "pooled", "source", "lengths", "segments"), picked)

    def to(self, device: torch.device | str) -> Condition:
        """The same on another device. Token counts stay on the CPU: lists of tokens are cut by them, which must not
        wait for the device."""
        names = ("embeds", "pooled", "empty_embeds", "empty_pooled", "source")
        return self._changed(names, lambda value: value.to(device, non_blocking=True))

    def _changed(self, names: Iterable[str], change: Callable[[torch.Tensor], torch.Tensor]) -> Condition:
        present: dict[str, Any] = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **{name: change(value) for name, value in present.items()})


def condition_of(prompts: Prompts, empty: Prompts, source: torch.Tensor | None = None) -> Condition:
    """A condition of encoded prompts; `empty` holds the empty prompt alone, encoded as the others were."""
    p, segments = prompts, None if empty.segments is None else empty.segments[0]
    return Condition(p.embeds, p.pooled, empty.embeds[0], empty.pooled[0], source, p.lengths, p.segments, segments)


def padded(embeds: Sequence[torch.Tensor]) -> torch.Tensor:
    """Batches (B_i, L_i, D) as one (sum B, max L, D), the rest zeros."""
    longest = max(batch.shape[1] for batch in embeds)
    return torch.cat([torch.nn.functional.pad(batch, (0, 0, 0, longest - batch.shape[1])) for batch in embeds])


def concatenate(conditions: Sequence[Condition]) -> Condition:
    """Conditions of one kind (all with or all without a source) as one batch."""

    def joined(name: str) -> Any:
        values = [getattr(condition, name) for condition in conditions]
        return None if values[0] is None else torch.cat(values)

    joint = {name: joined(name) for name in ("pooled", "source", "lengths", "segments")}
    return replace(conditions[0], embeds=padded([condition.embeds for condition in conditions]), **joint)


class VelocityField(Protocol):
    """Teacher, student, guided field: (x_t (B, C, H, W), t (B,) in [0, 1], condition of B) -> v (B, C, H, W), all
    float32."""

    @property
    def members(self) -> tuple[VelocityField, ...]:
        """The fields that this one asks; none for a network or a formula."""
        return ()

    @property
    def evaluations(self) -> int:
        """How many evaluations of a network one sample costs."""
        return sum(member.evaluations for member in self.members) or 1

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor: ...


@dataclass(frozen=True)
class Sampler:
    """How the model that a field asks is drawn: in so many Euler steps, on levels of this shift."""

    steps: int
    shift: float


def shifted(t: torch.Tensor, shift: float) -> torch.Tensor:
    """s t / (1 + (s - 1) t), as diffusers' FlowMatchEulerDiscreteScheduler shifts its levels; 1 changes nothing."""
    return shift * t / (1.0 + (shift - 1.0) * t)


def plain_fields(field: VelocityField) -> list[VelocityField]:
    """The networks and formulas at the bottom of a field."""
    return [plain for member in field.members for plain in plain_fields(member)] or [field]


def noised(x_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t = (1 - t) x_0 + t eps; x_0 and eps (B, C, H, W), t (B,)."""
    weight = t.reshape(-1, 1, 1, 1)
    return (1.0 - weight) * x_0 + weight * noise


def velocity_mse(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over all elements of the squared velocity gap; both (B, C, H, W), returns a scalar (DanceOPD, the
    distillation loss)."""
    return (prediction.float() - target.float()).square().mean()


def velocity_gaps(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The squared velocity gap of each sample, its mean over channels and pixels: (B, C, H, W) twice -> (B,) fp32.
    Their mean is `velocity_mse`."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)
