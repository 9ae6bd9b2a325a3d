"""Scores of pictures that no parser of shapes can read: GenEval's networks for T2I. The stages that draw images, validate and score, share it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks.geneval_run import Evaluator, evaluator_identity, judge_pictures
from benchmarks.scorecard import ExampleScore
from data.errors import UserError
from data.records import CAPABILITIES, Example
from tasks.params import BenchmarkParams
from tasks.progress import Advance

STORE = Path("runs/detections")  # outside every out: DVC removes those before a stage runs


class Batch(Protocol):
    """Images as tasks.sampling draws them: their files, relative to the folder, and what each was drawn from."""

    @property
    def examples(self) -> list[Example]: ...
    @property
    def paths(self) -> list[str]: ...
    @property
    def seeds(self) -> list[int]: ...
    @property
    def k(self) -> list[int]: ...


def evaluator_of(benchmark: BenchmarkParams) -> Evaluator:
    return Evaluator(benchmark.detector, benchmark.classifier, benchmark.device)


def check_judgeable(examples: Sequence[Example], benchmark: BenchmarkParams) -> None:
    """Raises UserError, before anything is drawn, for edits (a judge scores those, see `python -m benchmarks gedit`) or networks that are not there."""
    edits = sorted({example.category for example in examples if CAPABILITIES[example.capability].is_edit})
    if edits:
        advice = "keep edits out of the eval split and score them with `python -m benchmarks gedit`"
        raise UserError(f"benchmark.detector = {benchmark.detector}: it sees objects and cannot judge edits ({', '.join(edits)}); {advice}")
    evaluator_identity(evaluator_of(benchmark), [example.record for example in examples])


def identity_of_scores(examples: Sequence[Example], benchmark: BenchmarkParams) -> dict[str, Any]:
    """What a scorecard of these examples names under "geneval": scorecards with other evaluators are not compared with it."""
    return {"evaluator": evaluator_identity(evaluator_of(benchmark), [example.record for example in examples])}


def score_drawn(batches: Iterable[Batch], benchmark: BenchmarkParams, *, model: str, folder: Path, advance: Advance) -> list[ExampleScore]:
    """Draws every batch, then asks GenEval's networks for all of its images, which spreads over workers; one ExampleScore an image.

    Images that these networks have seen before, in a run that was killed or whose student did not change, are not looked at again. Raises UserError as
    `check_judgeable`, or for a malformed record.
    """
    drawn = []
    for batch in batches:
        drawn += list(zip(batch.examples, batch.paths, batch.seeds, batch.k, strict=True))
        advance(len(batch.examples))
    check_judgeable([example for example, *_ in drawn], benchmark)
    pictures = [(path, example.record) for example, path, *_ in drawn]
    verdicts, _ = judge_pictures(
        folder, STORE, pictures, evaluator_of(benchmark), batch=benchmark.batch, workers=benchmark.workers, scheduler=benchmark.scheduler
    )
    return [
        ExampleScore(model, "geneval", example.category, example.id, k, seed, {"correct": float(one.correct)}, one.reasons, path)
        for (example, path, seed, k), one in zip(drawn, verdicts, strict=True)
    ]
