"""Pictures as files, as arrays (H, W, 3) uint8, and as the images (B, 3, H, W) in [0, 1] that backbones take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from data.errors import UserError

ORIENTATION = 0x0112  # EXIF tag


def read_picture(path: Path) -> np.ndarray:
    """(H, W, 3) uint8, upright: EXIF orientation is applied. Raises UserError for a file that is missing or no image."""
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error}); run the curate stage again") from error


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height in px as `read_picture` gives them, from the header alone. Raises UserError as it does."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)  # a quarter turn, mirrored or not
            return (image.height, image.width) if turned else image.size
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error}); run the curate stage again") from error


def as_images(pictures: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 255.0


def as_pictures(images: torch.Tensor) -> list[np.ndarray]:
    """(B, 3, H, W) in [0, 1] -> B pictures (H, W, 3) uint8."""
    return list((images.clamp(0, 1).permute(0, 2, 3, 1) * 255.0).round().to(torch.uint8).numpy())
