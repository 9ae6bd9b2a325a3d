"""Picture sizes of nearly equal area and several aspects: a picture keeps its aspect, and a batch holds one size."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageOps

from data.errors import UserError

LONGEST = 2.0  # the longer edge of a size over its shorter one; a longer picture loses its ends
STEP_SHARE = 16  # edges differ by about this part of the square's


@lru_cache(maxsize=64)
def size_buckets(resolution: int, multiple: int) -> tuple[tuple[int, int], ...]:
    """Sizes (width, height) in px, each edge a multiple of `multiple`, at most resolution^2 pixels, aspects 1:2 to 2:1.

    The square is among them. Raises UserError when its edge is no multiple.
    """
    if resolution < multiple or resolution % multiple:
        remedy = f"expected a multiple of {multiple} px, as this backbone's latents and patches need"
        raise UserError(f"resolution = {resolution}: {remedy}")
    step = max(multiple, resolution // STEP_SHARE // multiple * multiple)
    sizes = {(resolution, resolution)}
    for width in range(step, resolution, step):
        height = int(min(resolution * resolution // width, LONGEST * width)) // step * step
        if width <= height:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def bucket_of(width: int, height: int, resolution: int, multiple: int) -> tuple[int, int]:
    """The size (width, height) with the nearest aspect (in ratio), the larger area where two are equally near."""
    aspect = float(np.log(width / height))

    def distance(size: tuple[int, int]) -> tuple[float, int]:
        return round(abs(float(np.log(size[0] / size[1])) - aspect), 9), -size[0] * size[1]

    return min(size_buckets(resolution, multiple), key=distance)


def fit(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 resized to cover `size` (width, height) and cut evenly to it: (height, width, 3)."""
    if (picture.shape[1], picture.shape[0]) == size:
        return picture
    return np.asarray(ImageOps.fit(Image.fromarray(picture), size, method=Image.Resampling.LANCZOS))
