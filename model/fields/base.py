"""Velocity fields and the one convention that everything above the backbones keeps.

t = 1 is noise and t = 0 the image: x_t = (1 - t) x_0 + t eps, v = dx/dt = eps - x_0, and an Euler step is x += (t_next
- t) v. This `t` is diffusers' `sigma`. A backbone whose network counts otherwise converts inside its own file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Prompts:
    """Encoded prompts: embeds (B, L, D) and pooled (B, P).

    Prompts of unequal length are padded to the longest. Then lengths (B,) counts each one's own tokens, and segments
    (B, S) the tokens of its parts, which sum to lengths (an edit of Z-Image puts the images between the parts). Both
    are None where every token counts, as for SD3, whose padding is attended to.
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
        pooled = self.empty_pooled.expand_as(self.pooled)
        if self.lengths is None or self.empty_segments is None:
            return replace(self, embeds=embeds, pooled=pooled)
        lengths = torch.full((count,), len(self.empty_embeds), dtype=self.lengths.dtype)
        return replace(
            self, embeds=embeds, pooled=pooled, lengths=lengths, segments=self.empty_segments.expand(count, -1)
        )

    def __getitem__(self, rows: slice | torch.Tensor) -> Condition:
        def of(value: torch.Tensor) -> torch.Tensor:
            return value[rows.to(value.device)] if isinstance(rows, torch.Tensor) else value[rows]

        names = ("embeds", "pooled", "source", "lengths", "segments")
        picked: dict[str, Any] = {
            name: None if getattr(self, name) is None else of(getattr(self, name)) for name in names
        }
        return replace(self, **picked)

    def to(self, device: torch.device | str) -> Condition:
        """The same on another device. Token counts stay on the CPU: lists of tokens are cut by them, which must not
        wait for the device.
        """
        names = ("embeds", "pooled", "empty_embeds", "empty_pooled", "source")
        moved: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name).to(device, non_blocking=True)
            for name in names
        }
        return replace(self, **moved)


def condition_of(prompts: Prompts, empty: Prompts, source: torch.Tensor | None = None) -> Condition:
    """A condition of encoded prompts; `empty` holds the empty prompt alone, encoded as the others were."""
    segments = None if empty.segments is None else empty.segments[0]
    return Condition(
        prompts.embeds,
        prompts.pooled,
        empty.embeds[0],
        empty.pooled[0],
        source,
        prompts.lengths,
        prompts.segments,
        segments,
    )


def padded(embeds: Sequence[torch.Tensor]) -> torch.Tensor:
    """Batches (B_i, L_i, D) as one (sum B, max L, D), the rest zeros."""
    longest = max(part.shape[1] for part in embeds)
    if all(part.shape[1] == longest for part in embeds):
        return torch.cat(list(embeds))
    return torch.cat([torch.nn.functional.pad(part, (0, 0, 0, longest - part.shape[1])) for part in embeds])


def concatenate(conditions: Sequence[Condition]) -> Condition:
    """Conditions of one kind (all with or all without a source) as one batch."""
    first = conditions[0]

    def joined(name: str) -> torch.Tensor | None:
        parts = [getattr(condition, name) for condition in conditions]
        return None if parts[0] is None else torch.cat(parts)

    others: dict[str, Any] = {name: joined(name) for name in ("source", "lengths", "segments")}
    return replace(
        first, embeds=padded([c.embeds for c in conditions]), pooled=torch.cat([c.pooled for c in conditions]), **others
    )


class VelocityField(Protocol):
    """Teacher, student, guided field: (x_t (B, C, H, W), t (B,) in [0, 1], condition of B) -> v (B, C, H, W), all
    float32.
    """

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor: ...


def velocity_mse(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over all elements of the squared velocity gap; both (B, C, H, W), returns a scalar (DanceOPD, the
    distillation loss).
    """
    return (prediction.float() - target.float()).square().mean()


def velocity_gaps(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The squared velocity gap of each sample, its mean over channels and pixels: (B, C, H, W) twice -> (B,) fp32.
    Their mean is `velocity_mse`.
    """
    return (prediction.float() - target.float()).square().flatten(1).mean(1)
