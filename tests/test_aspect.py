"""Property: a picture lands in the size whose aspect is nearest its own, of about the wanted area, and loses only a
thin even margin.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.aspect import LONGEST, bucket_of, fit, size_buckets
from data.errors import UserError
from data.images import picture_size, read_picture


@pytest.mark.parametrize(("resolution", "multiple"), [(1024, 16), (512, 16), (768, 32), (24, 8), (16, 4)])
def test_sizes_fit_latents_and_area(resolution: int, multiple: int) -> None:
    sizes = size_buckets(resolution, multiple)
    assert (resolution, resolution) in sizes and len(set(sizes)) == len(sizes)
    for width, height in sizes:
        assert width % multiple == height % multiple == 0 and width * height <= resolution**2
        assert max(width, height) <= LONGEST * min(width, height) and (height, width) in sizes


def test_the_nearest_aspect_is_chosen_and_little_is_lost() -> None:
    for width, height in [
        (1024, 1024),
        (1920, 1080),
        (1080, 1920),
        (4000, 3000),
        (600, 800),
        (1333, 1000),
        (1500, 1000),
    ]:
        size = bucket_of(width, height, 1024, 16)
        kept = min(size[0] / size[1], width / height) / max(size[0] / size[1], width / height)
        assert kept > 0.92, (width, height, size)
        assert size[0] * size[1] > 0.85 * 1024**2
    assert bucket_of(3000, 500, 1024, 16)[0] == LONGEST * bucket_of(3000, 500, 1024, 16)[1]  # longer still: the ends go


def test_a_resolution_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="resolution = 1000: expected a multiple of 16"):
        size_buckets(1000, 16)


def test_a_cut_is_even_and_a_picture_of_that_size_stays() -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255
    assert (fit(wide, (8, 8)) == 255).all()
    assert fit(wide, (24, 8)) is wide


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_read_upright_and_their_size_is_known_from_the_header(orientation: int, tmp_path: Path) -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(pixels).save(path, exif=exif)
    upright = read_picture(path)
    assert picture_size(path) == (upright.shape[1], upright.shape[0]) == ((3, 2) if orientation < 5 else (2, 3))
    turned = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        6: np.rot90(pixels, -1),
        8: np.rot90(pixels),
    }
    if orientation in turned:
        np.testing.assert_array_equal(upright, turned[orientation])
