"""Picture sizes of about one area and many aspects: a picture keeps its aspect, and pictures of one size can share a
batch.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageOps

from data.errors import UserError

LONGEST = 2.0  # a bucket's longer edge over its shorter; what is longer still loses its ends
STEP_SHARE = 16  # edges differ by about this part of the square's


@lru_cache(maxsize=64)
def size_buckets(resolution: int, multiple: int) -> tuple[tuple[int, int], ...]:
    """Sizes (width, height) in px, each edge a multiple of `multiple`, of at most resolution^2 pixels and aspects from
    1:2 to 2:1; the square is among them.

    Raises UserError when the square itself is no multiple.
    """
    if resolution < multiple or resolution % multiple:
        raise UserError(
            f"resolution = {resolution}: expected a multiple of {multiple} px, as this backbone's latents and patches need"
        )
    step = max(multiple, resolution // STEP_SHARE // multiple * multiple)
    found = {(resolution, resolution)}
    for width in range(step, resolution, step):
        height = int(min(resolution * resolution // width, LONGEST * width)) // step * step
        if width <= height:
            found |= {(width, height), (height, width)}
    return tuple(sorted(found))


def bucket_of(width: int, height: int, resolution: int, multiple: int) -> tuple[int, int]:
    """The size (width, height) whose aspect is nearest (in ratio), the larger area where two are equally near."""
    aspect = float(np.log(width / height))
    return min(
        size_buckets(resolution, multiple),
        key=lambda size: (round(abs(float(np.log(size[0] / size[1])) - aspect), 9), -size[0] * size[1]),
    )


def fit(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 resized to cover `size` (width, height) and cut evenly to it: (height, width, 3). A picture of
    that size is returned as it is.
    """
    if (picture.shape[1], picture.shape[0]) == size:
        return picture
    return np.asarray(ImageOps.fit(Image.fromarray(picture), size, method=Image.Resampling.LANCZOS))
