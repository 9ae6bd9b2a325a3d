"""What pairwise judging found, as a file: win rates by metric path, and one value a prompt, from which a gate can
decide with `benchmarks.scores.statistics`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pairwise.davidson import Strength
from benchmarks.scores.statistics import Groups, Metric
from data.errors import UserError
from data.files import read_json, write_json

WIN_RATE = "pairwise/win_rate"  # the macro average over the categories; "pairwise/CATEGORY" for each
EVEN = 0.5  # the win rate of two models of which neither is better


@dataclass(frozen=True)
class Standing:
    """The candidate against one other model.

    `values`: category -> example id -> the share that the candidate won of the prompt's contests, ties as half. `won`,
    `tied` and `lost` are shares of the judged contests. `p` is the two-sided sign test's over prompts that are no tie.
    `turned` is the share of verdicts that changed with the order (they count as ties), `lean` how far the judge leans
    to the place instead of the image: the share of answers for the first place minus that for the second. `bounds` is
    the win rate had the contests without a verdict been lost, or won."""

    metrics: dict[str, Metric]
    values: dict[str, dict[str, float]]
    won: float
    tied: float
    lost: float
    p: float
    turned: float
    lean: float
    coverage: float
    statuses: dict[str, int]
    bounds: tuple[float, float]

    def groups(self) -> tuple[Groups, Groups]:
        """(the candidate's values, those of an even contest), rows by example id: what `non_inferior` compares. A
        margin of .03 then says that the win rate is above .47."""
        ours = {
            name: np.array([value for _, value in sorted(prompts.items())]) for name, prompts in self.values.items()
        }
        return ours, {name: np.full(len(values), EVEN) for name, values in ours.items()}


@dataclass(frozen=True)
class Pairwise:
    """`identity` says who judged what; `against` has the candidate's standing by the other model's name, `strengths`
    every model's own."""

    candidate: str
    identity: dict[str, Any]
    against: dict[str, Standing]
    strengths: dict[str, Strength]

    def lines(self) -> list[str]:
        """What a reader is told, a sentence a line."""
        lines = []
        for other, found in self.against.items():
            whole, rest = found.metrics[WIN_RATE], [path for path in found.metrics if path != WIN_RATE]
            rate = f"win rate {whole.mean:.3f} [{whole.low:.3f}, {whole.high:.3f}] over {whole.n} prompts"
            shares = f"{found.won:.1%} won, {found.tied:.1%} tied, {found.lost:.1%} lost, sign test p = {found.p:.2g}"
            lines.append(f"{self.candidate} against {other}: {rate}; {shares}")
            for path in rest:
                metric = found.metrics[path]
                lines.append(f"  {path}: {metric.mean:.3f} [{metric.low:.3f}, {metric.high:.3f}] n={metric.n}")
            missing = (
                f"coverage {found.coverage:.1%}, between {found.bounds[0]:.3f} and {found.bounds[1]:.3f} with the rest"
            )
            judge = f"{found.turned:.1%} of the verdicts changed with the order, the judge leans {found.lean:+.3f}"
            lines.append(f"  {missing}; {judge} to the first place")
        for name, strength in sorted(self.strengths.items(), key=lambda item: -item[1].elo):
            lines.append(f"{name}: {strength.elo:+.0f} Elo [{strength.low:+.0f}, {strength.high:+.0f}]")
        return lines


def write_pairwise(path: Path, card: Pairwise) -> None:
    write_json(path, asdict(card))


def _standing(value: Mapping[str, Any]) -> Standing:
    metrics = {path: Metric.from_json(metric) for path, metric in value["metrics"].items()}
    low, high = value["bounds"]
    return Standing(**{**value, "metrics": metrics, "bounds": (float(low), float(high))})


def read_pairwise(path: Path) -> Pairwise:
    """Raises UserError, naming the file, when it is missing or not what `write_pairwise` writes."""
    value = read_json(path)
    try:
        against = {name: _standing(found) for name, found in value["against"].items()}
        strengths = {name: Strength(**strength) for name, strength in value["strengths"].items()}
        return Pairwise(value["candidate"], dict(value["identity"]), against, strengths)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        advice = "run `python -m benchmarks pairwise verdict` again"
        raise UserError(f"{path}: not a card of pairwise judgements ({error!r}); {advice}") from error
