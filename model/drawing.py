"""The one sampler: prompts, seeds and sources in, pictures out. The pictures of a batch have one kind and one size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from data.aspect import bucket_of, fit
from model.backbones import Backbone, check_sizes
from model.fields.base import condition_of
from model.fields.guided import Guided
from model.networks.network import NetworkField
from model.pixels import as_images, as_pictures
from model.rollout import euler_grid, sample

Size = tuple[int, int]  # width and height in px


@dataclass(frozen=True)
class PictureJob:
    """A picture to draw. `seed` is its noise's; `source`, (H, W, 3) uint8, is what an edit reads, None for T2I."""

    prompt: str
    seed: int
    source: np.ndarray | None = None


@dataclass(frozen=True)
class Batch:
    """Rows of a list of jobs that are drawn together."""

    edits: bool
    size: Size
    rows: tuple[int, ...]


def size_of(picture: np.ndarray) -> Size:
    return picture.shape[1], picture.shape[0]


def picture_bucket(backbone: Backbone, source: Size | None, resolution: int = 0) -> Size:
    """The size that is drawn: the bucket of a source's aspect, a square without one. `resolution` is the square's edge
    in px, 0 the backbone's usual one. Raises UserError as check_sizes."""
    edge = resolution or backbone.latent_shape[1] * backbone.pixels_per_latent
    size = (edge, edge) if source is None else bucket_of(*source, edge, backbone.size_multiple)
    check_sizes(backbone, [size])
    return size


def latent_shape(backbone: Backbone, size: Size) -> tuple[int, int, int]:
    """(C, h, w) of a picture's latents."""
    return backbone.latent_shape[0], size[1] // backbone.pixels_per_latent, size[0] // backbone.pixels_per_latent


def encode_sources(backbone: Backbone, sources: Sequence[np.ndarray], size: Size) -> torch.Tensor:
    """Latents (B, C, h, w) of pictures fitted to one size."""
    return backbone.encode_image(as_images(np.stack([fit(source, size) for source in sources])))


def deal(backbone: Backbone, sources: Sequence[Size | None], batch: int, resolution: int = 0) -> list[Batch]:
    """The rows of `sources` (each job's source's size, None for T2I) in batches of at most `batch`, T2I first.

    The batches follow from the whole list: in its last bits a picture may depend on the others of its batch. Raises
    UserError for a size that the network has no positions for.
    """
    groups: dict[tuple[bool, Size], list[int]] = {}
    for row, source in enumerate(sources):
        groups.setdefault((source is not None, picture_bucket(backbone, source, resolution)), []).append(row)
    return [
        Batch(edits, size, tuple(rows[first : first + batch]))
        for (edits, size), rows in sorted(groups.items(), key=lambda group: group[0][0])
        for first in range(0, len(rows), batch)
    ]


@torch.no_grad()
def draw(
    field: NetworkField,
    backbone: Backbone,
    jobs: Sequence[PictureJob],
    *,
    batch: int,
    steps: int,
    guidance: float,
    resolution: int = 0,
) -> Iterator[tuple[tuple[int, ...], list[np.ndarray]]]:
    """Yields (rows of `jobs`, their pictures (H, W, 3) uint8), batch by batch as `deal` makes them.

    A picture's noise depends on its seed alone; `guidance` 1 is unguided. Raises UserError as `deal`.
    """
    grid, device = euler_grid(steps, float(backbone.scheduler["shift"])), field.device
    sizes = [None if job.source is None else size_of(job.source) for job in jobs]
    for edits, group in groupby(deal(backbone, sizes, batch, resolution), key=lambda dealt: dealt.edits):
        empty = backbone.encode_prompts([""], edits)
        for dealt in group:
            members, shape = [jobs[row] for row in dealt.rows], latent_shape(backbone, dealt.size)
            noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(j.seed)) for j in members])
            pictures = [job.source for job in members if job.source is not None]
            source = encode_sources(backbone, pictures, dealt.size) if edits else None
            prompts = backbone.encode_prompts([job.prompt for job in members], edits)
            condition = condition_of(prompts, empty, source).to(device)
            latents = sample(Guided(field, guidance), noise.to(device), condition, grid)
            yield dealt.rows, as_pictures(backbone.decode(latents))
