"""A backbone binds a network family to the conventions of model/field.py. It knows nothing of losses, optimizers, routes or checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from model.field import Condition


class Backbone(Protocol):
    """One frozen base network with what belongs to it."""

    name: str
    network: Any  # the base, an nn.Module with diffusers' adapter methods
    latent_shape: tuple[int, int, int]  # (C, H, W)
    scheduler: dict[str, Any]  # type and shift, as the checkpoint says
    adapter_targets: tuple[str, ...]  # module names that a LoRA adapter covers

    def encode_prompt(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """embeds (B, L, D) and pooled (B, P)."""
        ...

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] -> latents (B, C, h, w)."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) -> (B, 3, H, W) in [0, 1]."""
        ...

    def velocity(self, network: nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        """The network's answer in our convention: (B, C, h, w) float32."""
        ...

    def save(self, folder: Path, network: nn.Module | None = None) -> None:
        """Writes the base with all that belongs to it (or `network` in its place) as a folder that `load` reads."""
        ...
