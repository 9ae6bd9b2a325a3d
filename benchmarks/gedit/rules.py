"""GEdit-Bench's arithmetic: from a judge's four numbers to a sample's score, a category's mean and the macro average.
The micro judge and the real share it.

SC = min of the two semantic scores, PQ = min of the two quality scores, O = sqrt(SC * PQ), all on 0 to 10; the average
weighs categories, not samples (stepfun-ai/Step1X-Edit, GEdit-Bench/calculate_statistics.py). A judge that failed gives
a status, never a number.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.scores.scorecard import HIGHEST, MINIMUM_COVERAGE, STATUSES
from data.errors import UserError, UserErrors
from data.records import GEDIT_CATEGORIES

PAPER_CATEGORIES = GEDIT_CATEGORIES[:6]
LANGUAGES = ("en", "cn")
SUBSETS = ("full", "intersection", "paper")  # all rows; those flagged Intersection_exist; the paper's six categories


@dataclass(frozen=True)
class Sample:
    """What the judge said of one edited image: `semantic` = (editing success, no over-editing), `quality` =
    (naturalness, no artifacts).

    Each score lies in [0, 10]; both are empty unless the status is ok. `repeats` holds further judgements of the same
    image, as (semantic, quality) pairs: the sample is worth the mean over all of them.
    """

    example_id: str
    category: str
    semantic: tuple[float, ...] = ()
    quality: tuple[float, ...] = ()
    status: str = "ok"
    repeats: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...] = ()


@dataclass(frozen=True)
class Means:
    """Means over the ok samples, 0 to 10. `low` and `high` bound the mean of O if every sample without a score had
    earned 0, or 10.
    """

    sc: float
    pq: float
    overall: float
    low: float
    high: float
    n: int  # samples with a score
    statuses: dict[str, int]

    @property
    def coverage(self) -> float:
        """Share of all samples that have a score."""
        return self.n / sum(self.statuses.values())


@dataclass(frozen=True)
class Aggregate:
    categories: dict[str, Means]
    average: Means  # unweighted mean over the categories


def overall(semantic: Sequence[float], quality: Sequence[float]) -> tuple[float, float, float]:
    """(SC, PQ, O) of one sample, each in [0, 10]. Raises UserError for a missing, non-finite or out-of-range score."""
    for name, scores in (("semantic", semantic), ("quality", quality)):
        if not scores or not all(math.isfinite(score) and 0.0 <= score <= HIGHEST for score in scores):
            raise UserError(
                f"{name} scores {list(scores)}: one or more finite numbers from 0 to 10 are needed; a failed judgement has a status instead"
            )
    sc, pq = float(min(semantic)), float(min(quality))
    return sc, pq, math.sqrt(sc * pq)


def sample_scores(sample: Sample) -> tuple[float, float, float]:
    """(SC, PQ, O) of an ok sample: means over its judgements, so O is the mean of the roots. Raises UserError as
    `overall` does.
    """
    judged = [overall(semantic, quality) for semantic, quality in ((sample.semantic, sample.quality), *sample.repeats)]
    sc, pq, o = (float(value) for value in np.mean(judged, axis=0))
    return sc, pq, o


def _faults(samples: Sequence[Sample]) -> list[str]:
    faults = []
    for sample in samples:
        where = f"{sample.category} {sample.example_id}"
        if sample.status not in STATUSES:
            faults.append(f"{where}: status = {sample.status!r}; choose one of {list(STATUSES)}")
        elif sample.status != "ok" and (sample.semantic or sample.quality or sample.repeats):
            faults.append(
                f"{where}: status = {sample.status!r} but scores {list(sample.semantic)} {list(sample.quality)}; a failed judgement has none"
            )
        elif sample.status == "ok":
            try:
                sample_scores(sample)
            except UserError as error:
                faults.append(f"{where}: {error}")
    counts = Counter((sample.category, sample.example_id) for sample in samples)
    faults += [
        f"{category} {name}: {count} judgements of one sample; keep one"
        for (category, name), count in counts.items()
        if count > 1
    ]
    return faults


def _means(samples: Sequence[Sample]) -> Means:
    scores = np.array([sample_scores(sample) for sample in samples if sample.status == "ok"])
    total, missing = len(samples), len(samples) - len(scores)
    sc, pq, o = (float(value) for value in scores.mean(0))
    low, high = float(scores[:, 2].sum() / total), float((scores[:, 2].sum() + HIGHEST * missing) / total)
    return Means(sc, pq, o, low, high, len(scores), dict(Counter(sample.status for sample in samples)))


def aggregate(samples: Sequence[Sample], categories: Sequence[str], *, allow_partial: bool = False) -> Aggregate:
    """Means per category and their unweighted average.

    Raises UserErrors for malformed or repeated samples, for a category without any score, and, unless `allow_partial`,
    where fewer than MINIMUM_COVERAGE of a category's samples have one.
    """
    faults = _faults(samples)
    groups = {category: [sample for sample in samples if sample.category == category] for category in categories}
    faults += [
        f"{sample.category} {sample.example_id}: not one of the categories {list(categories)}"
        for sample in samples
        if sample.category not in groups
    ]
    for category, members in groups.items():
        scored = sum(sample.status == "ok" for sample in members)
        if not scored:
            faults.append(
                f"{category}: none of {len(members)} samples has a score; an average over nothing does not exist"
            )
        elif scored < MINIMUM_COVERAGE * len(members) and not allow_partial:
            others = dict(Counter(sample.status for sample in members if sample.status != "ok"))
            bound = f"at least {MINIMUM_COVERAGE:.0%} are needed: judge the rest, or allow a partial result"
            faults.append(f"{category}: {scored} of {len(members)} samples have a score ({others}); {bound}")
    if not categories:
        faults.append("no category to average over")
    if faults:
        raise UserErrors("GEdit scores cannot be averaged:", faults)
    means = {category: _means(members) for category, members in groups.items()}
    columns = [(mean.sc, mean.pq, mean.overall, mean.low, mean.high) for mean in means.values()]
    sc, pq, o, low, high = (float(value) for value in np.mean(columns, axis=0))
    statuses = Counter(sample.status for sample in samples)
    return Aggregate(means, Means(sc, pq, o, low, high, statuses["ok"], dict(statuses)))
