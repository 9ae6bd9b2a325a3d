"""GEdit-Bench's arithmetic: from a judge's four numbers to a sample's score, a category's mean and the macro average,
for the micro judge and real judges alike.

SC = min of the two semantic scores, PQ = min of the two quality scores, O = sqrt(SC * PQ), all on 0 to 10; the average
weighs categories, not samples (stepfun-ai/Step1X-Edit, GEdit-Bench/calculate_statistics.py). A judge that failed gives
a status, never a number."""

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
FAULTY = "GEdit scores cannot be averaged:"
COLUMNS = tuple(f"{language}/{subset}" for language in LANGUAGES for subset in SUBSETS)


@dataclass(frozen=True)
class Sample:
    """What the judge said of one edited image: `semantic` = (editing success, no over-editing), `quality` =
    (naturalness, no artifacts), each score in [0, 10]; both empty unless the status is ok. `repeats` holds further
    judgements of the same image, as (semantic, quality) pairs: the sample is worth the mean over all of them."""

    example_id: str
    category: str
    semantic: tuple[float, ...] = ()
    quality: tuple[float, ...] = ()
    status: str = "ok"
    repeats: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...] = ()


@dataclass(frozen=True)
class Means:
    """Means over the ok samples, 0 to 10. `low` and `high` are the mean of O if every sample without a score had
    earned 0, or 10."""

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
        if not scores or not all(0.0 <= score <= HIGHEST for score in scores):
            needs = "one or more finite numbers from 0 to 10 are needed; a failed judgement has a status instead"
            raise UserError(f"{name} scores {list(scores)}: {needs}")
    sc, pq = float(min(semantic)), float(min(quality))
    return sc, pq, math.sqrt(sc * pq)


def sample_scores(sample: Sample) -> tuple[float, float, float]:
    """(SC, PQ, O) of an ok sample: means over its judgements, so O is the mean of the roots. Raises as `overall`."""
    judged = [overall(semantic, quality) for semantic, quality in ((sample.semantic, sample.quality), *sample.repeats)]
    sc, pq, o = (float(value) for value in np.mean(judged, axis=0))
    return sc, pq, o


def _fault(sample: Sample) -> str | None:
    if sample.status not in STATUSES:
        return f"status = {sample.status!r}; choose one of {list(STATUSES)}"
    if sample.status != "ok":
        scores = f"{list(sample.semantic)} {list(sample.quality)}"
        fault = f"status = {sample.status!r} but scores {scores}; a failed judgement has none"
        return fault if sample.semantic or sample.quality or sample.repeats else None
    try:
        sample_scores(sample)
    except UserError as error:
        return str(error)
    return None


def _faults(samples: Sequence[Sample], categories: Sequence[str]) -> list[str]:
    names = [f"{sample.category} {sample.example_id}" for sample in samples]
    faults = [f"{name}: {fault}" for name, sample in zip(names, samples) if (fault := _fault(sample))]
    faults += [f"{name}: {n} judgements of one sample; keep one" for name, n in Counter(names).items() if n > 1]
    strange = [name for name, sample in zip(names, samples) if sample.category not in categories]
    faults += [f"{name}: not one of the categories {list(categories)}" for name in strange]
    return faults if categories else [*faults, "no category to average over"]


def _coverage_fault(average: Means) -> str | None:
    if average.coverage >= MINIMUM_COVERAGE:
        return None
    failed = {status: count for status, count in average.statuses.items() if status != "ok"}
    total = sum(average.statuses.values())
    what = f"had the rest earned 0 or 10, the average would be {average.low:.2f} or {average.high:.2f}"
    advice = f"at least {MINIMUM_COVERAGE:.0%} are needed: judge the rest, or allow a partial result"
    return f"{average.n} of {total} samples have a score ({failed}); {advice}; {what}"


def _means(samples: Sequence[Sample]) -> Means:
    scores = np.array([sample_scores(sample) for sample in samples if sample.status == "ok"])
    total, missing = len(samples), len(samples) - len(scores)
    sc, pq, o = (float(value) for value in scores.mean(0))
    low, high = float(scores[:, 2].sum() / total), float((scores[:, 2].sum() + HIGHEST * missing) / total)
    return Means(sc, pq, o, low, high, len(scores), dict(Counter(sample.status for sample in samples)))


def aggregate(samples: Sequence[Sample], categories: Sequence[str], *, allow_partial: bool = False) -> Aggregate:
    """Means per category and their unweighted average.

    Raises UserErrors for malformed or repeated samples, for a category without any sample or any score, and, unless
    `allow_partial`, where fewer than MINIMUM_COVERAGE of all samples have one."""
    groups = {category: [sample for sample in samples if sample.category == category] for category in categories}
    faults = _faults(samples, categories)
    for category, members in groups.items():
        if not any(sample.status == "ok" for sample in members):
            nothing = "an average over nothing does not exist"
            faults.append(f"{category}: none of {len(members)} samples has a score; {nothing}")
    if faults:
        raise UserErrors(FAULTY, faults)
    means = {category: _means(members) for category, members in groups.items()}
    columns = [(mean.sc, mean.pq, mean.overall, mean.low, mean.high) for mean in means.values()]
    sc, pq, o, low, high = (float(value) for value in np.mean(columns, axis=0))
    statuses = Counter(sample.status for sample in samples)
    average = Means(sc, pq, o, low, high, statuses["ok"], dict(statuses))
    if (fault := _coverage_fault(average)) and not allow_partial:
        raise UserErrors(FAULTY, [fault])
    return Aggregate(means, average)
