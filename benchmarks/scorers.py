"""Which scorers there are, and those that sections `benchmark` and `judge` of params.yaml choose.

Importing this module loads neither networks nor pandas."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.params import BenchmarkParams, JudgeParams
from data.microworld import World
from data.records import Example

if TYPE_CHECKING:
    from benchmarks.scores.scorecard import ExampleScore
    from benchmarks.scores.scorer import DrawnImage, Scorer


@dataclass(frozen=True)
class Entry:
    """What is known of a scorer before it is made."""

    make: Callable[[BenchmarkParams, JudgeParams, World], Scorer]
    named: bool = True  # chosen alone, where benchmark.detector is its name; otherwise where that names a network
    networks: tuple[str, ...] = ()  # keys of section `benchmark` that name networks which it loads
    asks: bool = False  # it asks the judge that section `judge` names


def _micro(benchmark: BenchmarkParams, judge: JudgeParams, world: World) -> Scorer:
    from benchmarks.micro import MicroScorer

    return MicroScorer(world)


def _geneval(benchmark: BenchmarkParams, judge: JudgeParams, world: World) -> Scorer:
    from benchmarks.geneval.scorer import GenevalScorer

    return GenevalScorer(benchmark)


def _gedit(benchmark: BenchmarkParams, judge: JudgeParams, world: World) -> Scorer:
    from benchmarks.gedit.scorer import GeditScorer

    return GeditScorer(benchmark, judge)


SCORERS = {
    "micro": Entry(_micro),
    "geneval": Entry(_geneval, named=False, networks=("detector", "classifier")),
    "gedit": Entry(_gedit, named=False, asks=True),
}


def entries(detector: str) -> list[Entry]:
    """Those that score where benchmark.detector is `detector`: the one of that name, or all that take a network."""
    entry = SCORERS.get(detector)
    return [entry] if entry and entry.named else [entry for entry in SCORERS.values() if not entry.named]


def scorer_of(benchmark: BenchmarkParams, judge: JudgeParams, world: World) -> Panel:
    """The scorer that a stage's params choose; `world` is the one whose pictures the micro scorer reads."""
    return Panel(tuple(entry.make(benchmark, judge, world) for entry in entries(benchmark.detector)))


@dataclass(frozen=True)
class Panel:
    """Scorers that share the examples, as a scorer: each scores those that it judges."""

    members: tuple[Scorer, ...]

    @property
    def edge(self) -> int | None:
        return next((scorer.edge for scorer in self.members if scorer.edge), None)

    def judges(self, example: Example) -> bool:
        return any(scorer.judges(example) for scorer in self.members)

    def _shares(self, examples: Sequence[Example]) -> list[tuple[Scorer, list[Example]]]:
        shares = [(scorer, [example for example in examples if scorer.judges(example)]) for scorer in self.members]
        return [(scorer, share) for scorer, share in shares if share]

    def check(self, examples: Sequence[Example]) -> None:
        for scorer, share in self._shares(examples):
            scorer.check(share)

    def score(self, drawn: Sequence[DrawnImage]) -> list[ExampleScore]:
        rows: dict[tuple[str, int], ExampleScore] = {}
        for scorer, share in self._shares([image.example for image in drawn]):
            ids = {example.id for example in share}
            rows |= {row.key: row for row in scorer.score([image for image in drawn if image.example.id in ids])}
        return [rows[image.example.id, image.k] for image in drawn]

    def identity(self, scores: Sequence[ExampleScore], examples: Sequence[Example]) -> dict[str, Any]:
        identity: dict[str, Any] = {}
        for scorer, share in self._shares(examples):
            identity |= scorer.identity(scores, share)
        return identity

    def notes(self, scores: Sequence[ExampleScore], identity: Mapping[str, Any]) -> list[str]:
        return [note for scorer in self.members for note in scorer.notes(scores, identity)]

    def controls(self, targets: Sequence[DrawnImage], seed: int) -> list[ExampleScore]:
        return [row for scorer in self.members for row in scorer.controls(targets, seed)]

    def confusions(self, scores: Sequence[ExampleScore], examples: Sequence[Example]) -> list[dict[str, Any]]:
        return [table for scorer in self.members for table in scorer.confusions(scores, examples)]
