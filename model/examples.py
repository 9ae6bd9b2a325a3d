"""The encoded training examples of a capability, in the form that the loops draw from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from data.errors import UserError
from model.field import Condition

Rows = torch.Tensor | Sequence[torch.Tensor]  # one tensor where all rows share a shape, else a tensor a row


@dataclass(frozen=True)
class Bucket:
    """A capability's encoded training examples.

    Row i has the prompt prompts[i] of the tables embeds (P, L, D), or P tensors (L_p, D) where prompts differ in length, and pooled (P, D'). segments (P, S)
    counts the tokens of each prompt's parts, None where all prompts have L tokens. source and target hold latents (C, H, W) a row, shapes[i] is row i's.
    """

    prompts: torch.Tensor
    embeds: Rows
    pooled: torch.Tensor
    empty_embeds: torch.Tensor
    empty_pooled: torch.Tensor
    source: Rows | None
    target: Rows | None
    segments: torch.Tensor | None = None
    empty_segments: torch.Tensor | None = None
    shapes: tuple[tuple[int, int, int], ...] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def shape_of(self, row: int) -> tuple[int, int, int] | None:
        """The latents' shape (C, H, W) of one row; None where only the backbone knows it: T2I without pictures."""
        if self.shapes is not None:
            return self.shapes[row]
        for latents in (self.target, self.source):
            if latents is not None:
                return cast(tuple[int, int, int], tuple(latents[row].shape))
        return None

    def at(self, rows: Sequence[int]) -> Condition:
        """The condition of these rows, which must share one latent shape where they have a source."""
        picked = self.prompts[list(rows)]
        source = None if self.source is None else at_rows(self.source, rows)
        if self.segments is None:
            return Condition(cast(torch.Tensor, self.embeds)[picked], self.pooled[picked], self.empty_embeds, self.empty_pooled, source)
        segments = self.segments[picked]
        embeds = torch.nn.utils.rnn.pad_sequence([self.embeds[int(prompt)] for prompt in picked], batch_first=True)
        return Condition(embeds, self.pooled[picked], self.empty_embeds, self.empty_pooled, source, segments.sum(1), segments, self.empty_segments)

    def targets(self, rows: Sequence[int]) -> torch.Tensor:
        """The clean target latents (B, C, H, W) of rows that share a shape. Raises UserError where the data has none."""
        if self.target is None:
            raise UserError("states = 'off_policy' needs target images in the data, and this bucket has rows without; add them or query on-policy")
        return at_rows(self.target, rows)


def at_rows(latents: Rows, rows: Sequence[int]) -> torch.Tensor:
    """(B, C, H, W). Raises UserError when the rows differ in shape: a batch holds one shape."""
    if isinstance(latents, torch.Tensor):
        return latents[list(rows)]
    picked = [latents[row] for row in rows]
    shapes = {tuple(part.shape) for part in picked}
    if len(shapes) > 1:
        raise UserError(f"examples: rows of shapes {sorted(shapes)} in one batch; group rows by Bucket.shape_of")
    return torch.stack(picked)
