"""GenEval's networks as a scorer: they judge the images that a stage draws for T2I examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.geneval.confusion import confusions
from benchmarks.geneval.run import Evaluator, evaluator_identity, judge_pictures
from benchmarks.params import BenchmarkParams
from benchmarks.scores.scorecard import ExampleScore
from benchmarks.scores.scorer import DrawnImage, Scorer
from data.records import CAPABILITIES, Example

# Outside every out, as DVC removes those before a stage runs: images that the networks have seen before, in a run that
# was killed or whose student did not change, are not looked at again.
STORE = Path("runs/detections")


@dataclass(frozen=True)
class GenevalScorer(Scorer):
    params: BenchmarkParams

    @property
    def evaluator(self) -> Evaluator:
        return Evaluator(**asdict(self.params))

    def judges(self, example: Example) -> bool:
        return not CAPABILITIES[example.capability].is_edit

    def check(self, examples: Sequence[Example]) -> None:
        self.identity((), examples)

    def score(self, drawn: Sequence[DrawnImage]) -> list[ExampleScore]:
        pictures = [(str(image.file), image.example.record) for image in drawn]
        verdicts, _ = judge_pictures(Path(), STORE, pictures, self.evaluator)
        pairs = zip(drawn, verdicts, strict=True)
        return [image.score({"correct": float(verdict.correct)}, verdict.reasons) for image, verdict in pairs]

    def identity(self, scores: Sequence[ExampleScore], examples: Sequence[Example]) -> dict[str, Any]:
        return {"geneval": {"evaluator": evaluator_identity(self.evaluator, [example.record for example in examples])}}

    def confusions(self, scores: Sequence[ExampleScore], examples: Sequence[Example]) -> list[dict[str, Any]]:
        return confusions(scores, {example.id: example.record for example in examples})
