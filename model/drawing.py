"""The one sampler: prompts and sources in, pictures out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from data.aspect import bucket_of, fit
from model.backbones import Backbone, check_sizes


def as_images(pictures: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 255.0


def as_pictures(images: torch.Tensor) -> list[np.ndarray]:
    """(B, 3, H, W) in [0, 1] -> B pictures (H, W, 3) uint8."""
    return list((images.clamp(0, 1).permute(0, 2, 3, 1) * 255.0).round().to(torch.uint8).numpy())


def picture_bucket(backbone: Backbone, source: np.ndarray | None) -> tuple[int, int]:
    """Width and height in px that this backbone draws: the bucket of a source's aspect, the usual square without one.
    Raises UserError as check_sizes.
    """
    edge = backbone.latent_shape[1] * backbone.pixels_per_latent
    size = (edge, edge) if source is None else bucket_of(source.shape[1], source.shape[0], edge, backbone.size_multiple)
    check_sizes(backbone, [size])
    return size


def encode_sources(backbone: Backbone, sources: Sequence[np.ndarray], size: tuple[int, int]) -> torch.Tensor:
    """Latents (B, C, h, w) of pictures fitted to one size (width, height)."""
    return backbone.encode_image(as_images(np.stack([fit(source, size) for source in sources])))


def network_device(backbone: Backbone) -> torch.device:
    device: torch.device = next(backbone.network.parameters()).device
    return device
