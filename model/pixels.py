"""Pictures as tensors and back."""

from __future__ import annotations

import numpy as np
import torch


def as_images(pictures: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 255.0


def as_pictures(images: torch.Tensor) -> list[np.ndarray]:
    """(B, 3, H, W) in [0, 1] -> B pictures (H, W, 3) uint8."""
    return list((images.clamp(0, 1).permute(0, 2, 3, 1) * 255.0).round().to(torch.uint8).numpy())
