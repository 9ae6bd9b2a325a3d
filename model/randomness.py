"""Torch draws by address: (seed, step, slot, purpose). See data/randomness.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from data.randomness import seed_of


def torch_generator(seed: int, step: int, slot: int, purpose: str) -> torch.Generator:
    """A fresh CPU generator, so that a draw depends on its address alone (neither device, batch size nor history)."""
    return torch.Generator().manual_seed(seed_of(seed, step, slot, purpose))


def noise_for(seed: int, step: int, slots: Sequence[int], shape: Sequence[int], purpose: str = "noise") -> torch.Tensor:
    """Standard normal noise, one independent draw a slot: (len(slots), *shape) float32."""
    return torch.stack(
        [torch.randn(tuple(shape), generator=torch_generator(seed, step, slot, purpose)) for slot in slots]
    )
