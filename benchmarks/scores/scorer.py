"""Who judges images: a scorer draws nothing, and a stage that draws does not ask who judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.scores.scorecard import ExampleScore
from data.records import CAPABILITIES, Example


@dataclass(frozen=True)
class DrawnImage:
    """An image that a model has drawn for an example, as its k-th sample, from `seed`."""

    model: str
    example: Example
    k: int
    seed: int
    image: str  # its path relative to the results folder
    file: Path  # where it lies
    source: Path | None = None  # the picture that was edited

    def score(self, values: dict[str, float], reasons: Sequence[str] = (), status: str = "ok") -> ExampleScore:
        """The image's row."""
        example, benchmark = self.example, CAPABILITIES[self.example.capability].benchmark
        about = (self.model, benchmark, example.category, example.id, self.k, self.seed)
        return ExampleScore(*about, values, tuple(reasons), self.image, status)


class Scorer(Protocol):
    """Judges every image of the examples that are its own; a scorer that inherits from this class adds `score`."""

    @property
    def edge(self) -> int | None:
        """The only size of pictures in px that it reads; None: any."""
        return None

    def judges(self, example: Example) -> bool:
        """Whether the example is one of its own. Raises UserError for a record that it cannot read."""
        return True

    def check(self, examples: Sequence[Example]) -> None:
        """Raises UserError(s), before anything is drawn, for what it would miss when it scores these examples."""
        return

    def score(self, drawn: Sequence[DrawnImage]) -> list[ExampleScore]:
        """A row an image of one model, in order; an image that could not be judged has a row with its status."""
        ...

    def identity(self, scores: Sequence[ExampleScore], examples: Sequence[Example]) -> dict[str, Any]:
        """Benchmark -> who scored it and how: scorecards that differ here are not compared."""
        return {}

    def notes(self, scores: Sequence[ExampleScore], identity: Mapping[str, Any]) -> list[str]:
        """Sentences for the report, below the headline."""
        return []

    def controls(self, targets: Sequence[DrawnImage], seed: int) -> list[ExampleScore]:
        """Rows of the models in CONTROLS, the ends of the scale, from the examples' targets; none where it has none."""
        return []

    def confusions(self, scores: Sequence[ExampleScore], examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Tables for the report: {"title", "columns", "rows": {asked: {detected: places in `scores`}}}."""
        return []


CONTROLS = ("ground_truth", "shuffled")  # a target scored against its own example, and against another one's
