"""From an image file to RGB pixels or the reason why not; fingerprints that find near-identical pictures."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from data.errors import RowFault, UserError
from data.files import sha256_bytes

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # decoders that run no other program
CONVERTIBLE = ("1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr")  # at most 8 bits a channel: nothing is clipped
FINGERPRINT_GRID = 12  # cells a side
# Of a channel; black, white and the micro world's backgrounds are at least 3 away from each.
FINGERPRINT_THRESHOLDS = np.arange(12, 256, 16)


class ImageFault(RowFault):
    """Why an image file cannot be used."""


@dataclass(frozen=True)
class Picture:
    """What curation remembers of a decoded image: the pixels themselves are not kept in memory."""

    sha256: str  # of the PNG file's bytes
    width: int  # px
    height: int  # px
    fingerprint: bytes  # packed bits, see `fingerprint`
    weight: int  # number of bits set
    flat: bool  # one colour everywhere


def _flatten(image: Image.Image) -> Image.Image:
    """RGB; transparent pixels show white, not whatever lies hidden under them."""
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def _upright(opened: Image.Image, convert_modes: bool) -> Image.Image:
    opened.load()
    image = ImageOps.exif_transpose(opened)
    plain = image.mode == "RGB" and not image.has_transparency_data
    if not plain and image.mode not in (*CONVERTIBLE, "RGB"):
        raise ImageFault(
            "wrong mode", f"mode {image.mode} cannot be turned into RGB without loss; save it as 8-bit RGB"
        )
    if not plain and not convert_modes:
        alpha = " with transparency" if image.mode == "RGB" else ""
        raise ImageFault("wrong mode", f"mode {image.mode}{alpha}, RGB wanted (convert_modes: true converts it)")
    return _flatten(image)


def decode_image(path: Path, *, max_pixels: int, convert_modes: bool) -> Image.Image:
    """The upright RGB image of a file, decoded to its last byte: EXIF orientation is applied.

    The header is judged before any pixel is decoded, so that a decompression bomb costs nothing. Raises ImageFault with
    reason "unreadable image", "too many pixels", "animated image" or "wrong mode": 16-bit and floating-point modes,
    and without `convert_modes` all others than RGB.
    """
    try:
        if not path.is_file():
            raise ImageFault("unreadable image", "no such file")
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # of the bomb (judged below) and of odd metadata
            with Image.open(file, formats=FORMATS) as header:
                width, height = header.size
                if width * height > max_pixels:
                    wanted = f"at most {max_pixels} pixels are decoded (max_pixels)"
                    raise ImageFault("too many pixels", f"{width}x{height}, {wanted}")
                if (frames := getattr(header, "n_frames", 1)) > 1:
                    raise ImageFault("animated image", f"{frames} frames, one wanted")
                header.verify()  # checksums; leaves the image unusable
            file.seek(0)
            with Image.open(file, formats=FORMATS) as opened:
                return _upright(opened, convert_modes)
    except MemoryError:
        raise
    except ImageFault as fault:
        raise ImageFault(fault.reason, f"{path.name}: {fault.detail}") from None
    except Image.DecompressionBombError as error:
        raise ImageFault("too many pixels", f"{path.name}: {error}") from error
    except Exception as error:  # decoders raise nearly every kind for damaged files
        raise ImageFault("unreadable image", f"{path.name}: {str(error) or type(error).__name__}") from error


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG of (H, W, 3) uint8 without any metadata: equal pixels give equal bytes."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG")
    return buffer.getvalue()


def fingerprint(image: Image.Image) -> bytes:
    """Perceptual hash that sees colour: 12 x 12 cells x 3 channels x 16 bits.

    The mean of a cell is written as a thermometer (a bit for every threshold reached, 16 grey values apart), so the
    number of bits in which two fingerprints differ is the sum of the absolute differences of their cells' quantised
    means. A hash of gradients or of deviations from the mean would call a red and a yellow disc on white equal.
    """
    cells = image.resize((FINGERPRINT_GRID, FINGERPRINT_GRID), Image.Resampling.BOX)
    return np.packbits(np.asarray(cells, dtype=np.int16)[..., None] >= FINGERPRINT_THRESHOLDS).tobytes()


def distances(bits: bytes, others: np.ndarray) -> np.ndarray:
    """Differing bits between a fingerprint and (N, bytes) uint8 others: (N,) int64."""
    return np.bitwise_count(np.frombuffer(bits, np.uint8)[None] ^ others).sum(axis=1, dtype=np.int64)


def picture_of(image: Image.Image) -> tuple[Picture, bytes]:
    """The picture's summary and its PNG bytes, from an RGB image."""
    pixels = np.asarray(image)  # (H, W, 3) uint8
    content, bits = encode_png(pixels), fingerprint(image)
    weight = int(np.bitwise_count(np.frombuffer(bits, np.uint8)).sum())
    flat = bool((pixels == pixels[0, 0]).all())
    return Picture(sha256_bytes(content), image.width, image.height, bits, weight, flat), content


def read_picture(path: Path) -> np.ndarray:
    """(H, W, 3) uint8, upright: EXIF orientation is applied. Raises UserError where there is no readable image."""
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height in px as `read_picture` gives them, from the header alone. Raises UserError as it does."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # a quarter turn, mirrored or not
            return (image.height, image.width) if turned else image.size
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be read as an image ({error}); run the curate stage again")
