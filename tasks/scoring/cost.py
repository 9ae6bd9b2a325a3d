"""Quality against cost: teachers, the distilled student and the candidate, each drawn in few and in many steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.scores.scorecard import ExampleScore, expected_scores, summarise
from benchmarks.scores.statistics import Bootstrap
from data.bounds import Count, Positive
from data.records import HEADLINES, Example
from model.networks.network import NetworkField
from model.networks.student import Sampled
from tasks.scoring.sampling import EvaluationSet, Scoring, score_field


@dataclass(frozen=True)
class Curve:
    """Key `score.curve`: every model drawn in each of these numbers of `steps` on the first `examples` of a category;
    0: not at all."""

    steps: tuple[Positive, ...]
    examples: Count

    def faults(self) -> list[str]:
        return ["examples = 1: one has no standard error; choose 0 or two or more"] if self.examples == 1 else []

    def part_of(self, evaluation: EvaluationSet) -> EvaluationSet:
        """The same examples every time: the first of every category, by id."""
        chosen: dict[str, list[Example]] = {}
        for example in sorted(evaluation.examples, key=lambda example: example.id):
            chosen.setdefault(example.category, []).append(example)
        kept = {example.id for members in chosen.values() for example in members[: self.examples]}
        return replace(evaluation, examples=tuple(e for e in evaluation.examples if e.id in kept))


@dataclass(frozen=True)
class Contestant:
    """A line of the curve: by capability, the field that draws its examples; `guidance` is the scale of all of them.

    `known`: rows that were drawn already, by the number of steps.
    """

    name: str
    fields: Mapping[str, NetworkField]
    guidance: float
    known: Mapping[int, Sequence[ExampleScore]]


def quality_curves(
    contestants: Sequence[Contestant], curve: Curve, evaluation: EvaluationSet, scoring: Scoring, how: Bootstrap
) -> list[dict[str, Any]]:
    """A point for each contestant, number of steps and benchmark: {"model", "steps", "evaluations_per_image", "path",
    "mean", "low", "high", "n"}."""
    points: list[dict[str, Any]] = []
    part = curve.part_of(evaluation)
    for contestant in contestants if part.examples else ():
        for steps in curve.steps:
            rows = _rows(contestant, Sampled(steps, contestant.guidance), part, scoring)
            cost = {"steps": steps, "evaluations_per_image": Sampled(steps, contestant.guidance).evaluations}
            metrics = summarise(rows, expected=expected_scores(part.examples), **how)
            for path in HEADLINES.values():
                if metric := metrics.get(path):
                    numbers = {name: getattr(metric, name) for name in ("mean", "low", "high", "n")}
                    points.append({"model": contestant.name, **cost, "path": path, **numbers})
    return points


def _rows(contestant: Contestant, how: Sampled, part: EvaluationSet, scoring: Scoring) -> list[ExampleScore]:
    """Its first images of the part's examples, drawn unless they are known."""
    wanted = {example.id for example in part.examples}
    known = [row for row in contestant.known.get(how.steps, ()) if row.example_id in wanted and row.k == 0]
    if {row.example_id for row in known} == wanted:
        return [replace(row, model=contestant.name) for row in known]
    sampling, rows = replace(scoring.sampling, images_per_prompt=1), list[ExampleScore]()
    folder = f"curve/{contestant.name}-{how.steps}"
    for capability, field in contestant.fields.items():
        of = part.only(capability)
        rows += (
            score_field(field, of, replace(scoring, sampling=sampling), model=folder, how=how) if of.examples else []
        )
    return [replace(row, model=contestant.name) for row in rows]
