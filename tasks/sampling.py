"""From examples to images: what a field makes of the evaluation set, one image per (prompt, k), each from a seed of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.micro import score_images
from benchmarks.scorecard import ExampleScore
from data.errors import UserError
from data.microworld import World
from data.records import CAPABILITIES, Example
from model.backbones import Backbone
from model.field import Condition, Guided, VelocityField
from model.rollout import euler_grid, sample
from tasks.params import SamplingParams
from tasks.pictures import as_images, as_pictures, read_picture
from tasks.progress import Advance


@dataclass(frozen=True)
class EvaluationSet:
    """Held-out examples with the pictures that belong to them, all (H, W, 3) uint8: an edit's source by example id, every target."""

    examples: tuple[Example, ...]
    sources: dict[str, np.ndarray]
    targets: dict[str, np.ndarray]

    def only(self, capability: str) -> EvaluationSet:
        categories = CAPABILITIES[capability].categories
        return EvaluationSet(tuple(example for example in self.examples if example.category in categories), self.sources, self.targets)


def evaluation_set(examples: Sequence[Example], curated: Path) -> EvaluationSet:
    """The eval split of a curated folder."""
    chosen = tuple(example for example in examples if example.split == "eval")
    if not chosen:
        raise UserError(f"{curated}: no example of the eval split; nothing can be scored")
    return EvaluationSet(
        chosen,
        {example.id: read_picture(curated / example.source) for example in chosen if example.source},
        {example.id: read_picture(curated / example.target) for example in chosen if example.target},
    )


def image_seed(example: Example, k: int, seed: int) -> int:
    """The seed of one image: from benchmark, example, sample number and base seed alone, so that two models start from the same noise."""
    suite = CAPABILITIES[example.capability].benchmark
    return int.from_bytes(hashlib.sha256(f"{suite}|{example.id}|{k}|{seed}".encode()).digest()[:8], "big") >> 1


@torch.no_grad()
def score_field(
    field: VelocityField,
    backbone: Backbone,
    world: World,
    evaluation: EvaluationSet,
    params: SamplingParams,
    *,
    model: str,
    scale: float,
    folder: Path,
    advance: Advance,
) -> list[ExampleScore]:
    """Samples every (example, k) with guidance `scale`, writes the images below `folder`/images/`model` and scores them.

    The batch size changes nothing but speed.
    """
    grid = euler_grid(params.steps, float(backbone.scheduler["shift"]))
    empty_embeds, empty_pooled = backbone.encode_prompt([""])
    (folder / "images" / model).mkdir(parents=True, exist_ok=True)
    scores: list[ExampleScore] = []
    for edits in (False, True):
        jobs = [(example, k) for example in evaluation.examples if CAPABILITIES[example.capability].is_edit == edits for k in range(params.images_per_prompt)]
        for first in range(0, len(jobs), params.batch):
            batch = jobs[first : first + params.batch]
            embeds, pooled = backbone.encode_prompt([example.prompt for example, _ in batch])
            source = backbone.encode_image(as_images(np.stack([evaluation.sources[example.id] for example, _ in batch]))) if edits else None
            seeds = [image_seed(example, k, params.seed) for example, k in batch]
            noise = torch.stack([torch.randn(backbone.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
            latents = sample(Guided(field, scale), noise, Condition(embeds, pooled, empty_embeds[0], empty_pooled[0], source), grid)
            pictures = as_pictures(backbone.decode(latents))
            paths = [f"images/{model}/{example.id}-{k}.png" for example, k in batch]
            for picture, path in zip(pictures, paths, strict=True):
                Image.fromarray(picture).save(folder / path)
            scores += score_images(
                world, [example for example, _ in batch], pictures, model=model, paths=paths, seeds=seeds, k=[k for _, k in batch], sources=evaluation.sources
            )
            advance(len(batch))
    return scores
