"""From examples to scored images: what a field makes of the evaluation set, each image from its own seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.params import BenchmarkParams, JudgeParams
from benchmarks.scorers import scorer_of
from benchmarks.scores.scorecard import ExampleScore, read_scores
from benchmarks.scores.scorer import DrawnImage, Scorer
from benchmarks.scores.statistics import Bootstrap
from data.bounds import Positive, Share
from data.errors import UserError
from data.images import read_picture
from data.microworld import World
from data.progress import Advance
from data.randomness import seed_of
from data.records import CAPABILITIES, Example, read_examples
from model.backbones import Backbone
from model.drawing import PictureJob, draw
from model.networks.network import NetworkField
from model.networks.student import Sampled
from model.route import Route
from tasks.params.sections import BackboneParams, RoutingParams, SamplingParams


@dataclass(frozen=True)
class ScoringParams:
    """Keys of every stage that scores. `resamples` and `confidence` are of the bootstrap intervals."""

    world: World
    backbone: BackboneParams
    sampling: SamplingParams
    routing: RoutingParams
    benchmark: BenchmarkParams
    judge: JudgeParams
    seed: int
    resamples: Positive
    confidence: Share

    @property
    def bootstrap(self) -> Bootstrap:
        return {"seed": self.seed, "resamples": self.resamples, "confidence": self.confidence}


@dataclass(frozen=True)
class EvaluationSet:
    """Held-out examples, and by example id the pictures (H, W, 3) uint8 that are edited; `folder` holds the files."""

    examples: tuple[Example, ...]
    sources: dict[str, np.ndarray]
    folder: Path

    def only(self, capability: str) -> EvaluationSet:
        categories = CAPABILITIES[capability].categories
        return replace(self, examples=tuple(example for example in self.examples if example.category in categories))

    def source_file(self, example: Example) -> Path | None:
        return self.folder / example.source if example.source else None


def evaluation_set(examples: Sequence[Example], curated: Path, split: str) -> EvaluationSet:
    """A split of a curated folder. Raises UserError where it has no example."""
    chosen = tuple(example for example in examples if example.split == split)
    if not chosen:
        raise UserError(f"{curated}: no example of the {split} split (sampling.split); nothing can be scored")
    sources = {example.id: read_picture(curated / example.source) for example in chosen if example.source}
    return EvaluationSet(chosen, sources, curated)


def to_score(params: ScoringParams, curated: Path) -> tuple[Scorer, EvaluationSet]:
    """Who scores, and the examples of the split `sampling.split` that it judges."""
    scorer = scorer_of(params.benchmark, params.judge, params.world)
    judged = [example for example in read_examples(curated) if scorer.judges(example)]
    return scorer, evaluation_set(judged, curated, params.sampling.split)


def image_seed(example: Example, k: int, seed: int) -> int:
    """An image's seed: of benchmark, example, sample number and base seed alone, so two models share their noise."""
    suite = CAPABILITIES[example.capability].benchmark
    return seed_of(suite, example.id, k, seed)


@dataclass(frozen=True)
class Scoring:
    """What all models of a stage share: how their images are drawn, the folder that holds them, and who scores them."""

    backbone: Backbone
    sampling: SamplingParams
    scorer: Scorer
    folder: Path
    advance: Advance


def score_field(
    field: NetworkField, evaluation: EvaluationSet, scoring: Scoring, *, model: str, how: Sampled
) -> list[ExampleScore]:
    """Samples every (example, k) as `how` says, writes the images below `folder`/images/`model` and has them scored.
    The batch size changes nothing but speed."""
    drawn: list[DrawnImage] = []
    for batch in draw_field(field, evaluation, scoring, model=model, how=how):
        for example, path, seed, k in zip(batch.examples, batch.paths, batch.seeds, batch.k, strict=True):
            source = evaluation.source_file(example)
            drawn.append(DrawnImage(model, example, k, seed, path, scoring.folder / path, source))
        scoring.advance(len(batch.examples))
    return scoring.scorer.score(drawn)


def guided(name: str) -> str:
    """The name of a teacher's rows under guidance."""
    return f"{name}_guided"


def reference_scores(validated: Path, routes: Sequence[Route]) -> dict[str, list[ExampleScore]]:
    """Model -> its rows, as stage `validate` wrote them. Raises UserError where a teacher of a route has none."""
    rows: dict[str, list[ExampleScore]] = {}
    for row in read_scores(validated):
        rows.setdefault(row.model, []).append(row)
    missing = sorted({route.teacher for route in routes} - rows.keys())
    if missing:
        raise UserError(f"{validated}: no scores of {missing}; run the validate stage again")
    return rows


@dataclass(frozen=True)
class Drawn:
    """One batch of images: pictures (H, W, 3) uint8, their files relative to the folder, and what each was drawn
    from."""

    examples: list[Example]
    pictures: list[np.ndarray]
    paths: list[str]
    seeds: list[int]
    k: list[int]


def draw_field(
    field: NetworkField, evaluation: EvaluationSet, scoring: Scoring, *, model: str, how: Sampled
) -> Iterator[Drawn]:
    """Samples every (example, k) as `how` says and writes the images below `folder`/images/`model`; T2I in the usual
    square, edits in their sources' bucket. The batch size changes nothing but speed."""
    folder, params = scoring.folder, scoring.sampling
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
    what = field, scoring.backbone, jobs
    for rows, pictures in draw(*what, batch=params.batch, steps=how.steps, guidance=how.guidance):
        paths = [f"images/{model}/{samples[row][0].id}-{samples[row][1]}.png" for row in rows]
        for picture, path in zip(pictures, paths, strict=True):
            Image.fromarray(picture).save(folder / path)
        examples, numbers = [samples[row][0] for row in rows], [samples[row][1] for row in rows]
        yield Drawn(examples, pictures, paths, [jobs[row].seed for row in rows], numbers)
