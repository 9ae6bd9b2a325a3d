"""From examples to images: what a field makes of the evaluation set, one image per (prompt, k), each from a seed of its
own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.micro import score_images
from benchmarks.scores.scorecard import ExampleScore
from data.errors import UserError
from data.images import read_picture
from data.microworld import MICRO, World
from data.progress import Advance
from data.records import CAPABILITIES, Example
from model.backbones import Backbone
from model.drawing import PictureJob, draw
from model.networks.network import NetworkField
from tasks.params.sections import BenchmarkParams, JudgeParams, SamplingParams
from tasks.scoring.real import score_drawn


@dataclass(frozen=True)
class EvaluationSet:
    """Held-out examples with the pictures that belong to them, all (H, W, 3) uint8: an edit's source by example id,
    every target. `folder` has the files.
    """

    examples: tuple[Example, ...]
    sources: dict[str, np.ndarray]
    targets: dict[str, np.ndarray]
    folder: Path

    def only(self, capability: str) -> EvaluationSet:
        categories = CAPABILITIES[capability].categories
        return replace(self, examples=tuple(example for example in self.examples if example.category in categories))


def evaluation_set(examples: Sequence[Example], curated: Path) -> EvaluationSet:
    """The eval split of a curated folder."""
    chosen = tuple(example for example in examples if example.split == "eval")
    if not chosen:
        raise UserError(f"{curated}: no example of the eval split; nothing can be scored")
    return EvaluationSet(
        chosen,
        {example.id: read_picture(curated / example.source) for example in chosen if example.source},
        {example.id: read_picture(curated / example.target) for example in chosen if example.target},
        curated,
    )


def image_seed(example: Example, k: int, seed: int) -> int:
    """The seed of one image: from benchmark, example, sample number and base seed alone, so that two models start from
    the same noise.
    """
    suite = CAPABILITIES[example.capability].benchmark
    return int.from_bytes(hashlib.sha256(f"{suite}|{example.id}|{k}|{seed}".encode()).digest()[:8], "big") >> 1


@torch.no_grad()
def score_field(
    field: NetworkField,
    backbone: Backbone,
    world: World,
    evaluation: EvaluationSet,
    params: SamplingParams,
    *,
    model: str,
    scale: float,
    folder: Path,
    advance: Advance,
    benchmark: BenchmarkParams,
    judge: JudgeParams,
) -> list[ExampleScore]:
    """Samples every (example, k) with guidance `scale`, writes the images below `folder`/images/`model` and scores
    them: pictures of the micro world by its parser and judge, others as `tasks.scoring.real` says.

    The batch size changes nothing but speed.
    """
    if benchmark.detector != MICRO:
        batches = draw_field(field, backbone, evaluation, params, model=model, scale=scale, folder=folder)
        return score_drawn(
            batches, benchmark, judge, model=model, folder=folder, curated=evaluation.folder, advance=advance
        )
    scores: list[ExampleScore] = []
    for drawn in draw_field(field, backbone, evaluation, params, model=model, scale=scale, folder=folder):
        scores += score_images(
            world,
            drawn.examples,
            drawn.pictures,
            model=model,
            paths=drawn.paths,
            seeds=drawn.seeds,
            k=drawn.k,
            sources=evaluation.sources,
        )
        advance(len(drawn.examples))
    return scores


@dataclass(frozen=True)
class Drawn:
    """One batch of images: pictures (H, W, 3) uint8, their files relative to the folder, and what each was drawn
    from.
    """

    examples: list[Example]
    pictures: list[np.ndarray]
    paths: list[str]
    seeds: list[int]
    k: list[int]


def draw_field(
    field: NetworkField,
    backbone: Backbone,
    evaluation: EvaluationSet,
    params: SamplingParams,
    *,
    model: str,
    scale: float,
    folder: Path,
) -> Iterator[Drawn]:
    """Samples every (example, k) with guidance `scale` and writes the images below `folder`/images/`model`; T2I in the
    usual square, edits in their sources' bucket. The batch size changes nothing but speed.
    """
    (folder / "images" / model).mkdir(parents=True, exist_ok=True)
    samples = [(example, k) for example in evaluation.examples for k in range(params.images_per_prompt)]
    jobs = [
        PictureJob(
            example.prompt,
            image_seed(example, k, params.seed),
            evaluation.sources[example.id] if CAPABILITIES[example.capability].is_edit else None,
        )
        for example, k in samples
    ]
    for rows, pictures in draw(field, backbone, jobs, batch=params.batch, steps=params.steps, guidance=scale):
        paths = [f"images/{model}/{samples[row][0].id}-{samples[row][1]}.png" for row in rows]
        for picture, path in zip(pictures, paths, strict=True):
            Image.fromarray(picture).save(folder / path)
        examples, numbers = [samples[row][0] for row in rows], [samples[row][1] for row in rows]
        yield Drawn(examples, pictures, paths, [jobs[row].seed for row in rows], numbers)
