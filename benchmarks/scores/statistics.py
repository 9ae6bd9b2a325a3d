"""How sure a number is: standard errors, intervals, paired comparisons. The unit is the prompt; images of one prompt
are averaged first.

Groups map a category to one value a prompt, (n,) float. A macro average weighs categories equally, so every resampling
is stratified by category. Random numbers come from PCG64, addressed by seed and purpose: equal input gives equal
output. Methods: E. B. Wilson 1927 (binary proportions), B. Efron (percentile bootstrap, with T. Hesterberg's correction
for small n), Q. McNemar 1947 (exact form), S. Holm 1979, A. Owen 2007, E. Miller 2024, "Adding Error Bars to Evals"
(clusters, paired differences)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack

import numpy as np
from scipy.special import ndtr, stdtrit  # scipy.stats takes half a second more to import

from data.errors import UserError
from data.randomness import numpy_generator

Groups = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Metric:
    """A mean with its standard error and interval; n counts prompts or samples."""

    mean: float
    stderr: float
    low: float
    high: float
    n: int

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Metric:
        """Raises KeyError, TypeError or ValueError for a missing key or what is no number."""
        mean, stderr, low, high = (float(value[name]) for name in ("mean", "stderr", "low", "high"))
        return cls(mean, stderr, low, high, int(value["n"]))


@dataclass(frozen=True)
class Comparison:
    """Model a minus model b on the same n prompts, with interval and two-sided p; they differ on `discordant`."""

    difference: float
    low: float
    high: float
    p: float
    n: int
    discordant: int


class Bootstrap(TypedDict):
    """The settings of every interval: `seed` of the draws, their number, and the share that the interval covers."""

    seed: int
    resamples: int
    confidence: float  # between 0 and 1


def check_groups(groups: Groups) -> None:
    """Raises UserError for no category, or one with fewer than two prompts or with a value that is not finite."""
    if not groups:
        raise UserError("statistics: no category was given")
    for category, values in groups.items():
        if len(values) < 2:
            needs = "two or more are needed for a standard error"
            raise UserError(f"statistics: {category} has {len(values)} prompt(s); {needs}")
        broken = int((~np.isfinite(values)).sum())
        if broken:
            text = f"{category} holds {broken} values that are not finite"
            raise UserError(f"statistics: {text}; score those prompts again")


def wilson(successes: int, n: int, confidence: float) -> tuple[float, float]:
    """Wilson's score interval of a proportion, in [0, 1]. E.g. 80 of 80 at 0.95 begins at 0.954."""
    from scipy.stats import binomtest  # here: it takes half a second to import

    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def standard_error(groups: Groups) -> float:
    """Of the macro average of K categories: sqrt(sum of SE_k^2) / K with SE_k^2 = sum (y - mean)^2 / (n (n - 1))."""
    return math.sqrt(sum(float(values.var(ddof=1)) / len(values) for values in groups.values())) / len(groups)


def macro_mean(groups: Groups) -> float:
    return float(np.mean([values.mean() for values in groups.values()]))


def _count(groups: Groups) -> int:
    return sum(map(len, groups.values()))


def _macro_draws(groups: Groups, seed: int, resamples: int) -> np.ndarray:
    """Macro means (B,) or (B, M) over prompts drawn with replacement by category; a prompt's M columns stay paired."""
    means = []
    for category, values in groups.items():
        n = len(values)
        drawn = numpy_generator(seed, 0, 0, f"bootstrap/{category}").integers(n, size=(resamples, n), dtype=np.int32)
        means.append(values[drawn].mean(1))
    return np.asarray(np.mean(means, axis=0))


def _percentiles(draws: np.ndarray, confidence: float, smallest: int) -> tuple[float, float]:
    """The draws' interval, widened because percentile intervals are too narrow where a category has few prompts."""
    tail = float(ndtr(-math.sqrt(smallest / (smallest - 1)) * stdtrit(smallest - 1, 0.5 + confidence / 2)))
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    return float(low), float(high)


def _interval(groups: Groups, how: Bootstrap) -> tuple[float, float]:
    """The macro mean's, from a bootstrap stratified by category."""
    draws = _macro_draws(groups, how["seed"], how["resamples"])
    return _percentiles(draws, how["confidence"], min(map(len, groups.values())))


def category_metric(values: np.ndarray, *, category: str, binary: bool, **how: Unpack[Bootstrap]) -> Metric:
    """One category. `binary`: every value is one image's 0 or 1, and the interval is Wilson's instead of a bootstrap's.

    Raises UserError as `check_groups` does."""
    metric = macro_metric({category: values}, **how)
    if not binary:
        return metric
    low, high = wilson(round(float(values.sum())), len(values), how["confidence"])
    return replace(metric, low=low, high=high)


def macro_metric(groups: Groups, **how: Unpack[Bootstrap]) -> Metric:
    """The unweighted mean of the categories' means, with a bootstrap stratified by category.

    Raises UserError as `check_groups` does."""
    check_groups(groups)
    return Metric(macro_mean(groups), standard_error(groups), *_interval(groups, how), _count(groups))


def _check_pairs(a: Groups, b: Groups) -> None:
    check_groups(a)
    check_groups(b)
    sizes = {category: (len(a.get(category, ())), len(b.get(category, ()))) for category in {**a, **b}}
    unequal = {category: pair for category, pair in sizes.items() if pair[0] != pair[1]}
    if unequal:
        raise UserError(f"paired comparison: unequal numbers of prompts {unequal}; score both models on the same set")


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p that discordant pairs fall either way with equal chance."""
    from scipy.stats import binomtest  # here: it takes half a second to import

    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def sign_test(differences: np.ndarray) -> float:
    """Two-sided exact p that paired differences (n,) fall either way with equal chance; McNemar's test for 0 and 1."""
    return mcnemar(int((differences > 0).sum()), int((differences < 0).sum()))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p values adjusted for their number (S. Holm 1979): those below alpha keep the family-wise error at alpha."""
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: (p_values[name], name))):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def sign_flip(differences: Groups, *, seed: int, resamples: int) -> float:
    """Two-sided p that the macro mean of the paired differences is 0, from random flips of the prompts' signs."""
    flipped = np.zeros(resamples)
    for category, values in differences.items():
        rng = numpy_generator(seed, 0, 0, f"sign-flip/{category}")
        signs = rng.integers(0, 2, size=(resamples, len(values)), dtype=np.int8) * np.int8(2) - np.int8(1)
        flipped += signs @ values / len(values) / len(differences)
    observed = abs(macro_mean(differences))
    return float((1 + (np.abs(flipped) >= observed - 1e-12).sum()) / (resamples + 1))


def compare_paired(a: Groups, b: Groups, *, binary: bool, **how: Unpack[Bootstrap]) -> Comparison:
    """a minus b with a stratified paired bootstrap's interval; row i of a category is one prompt and noise in both.

    p is McNemar's for one category of single binary images, and a stratified sign-flip permutation's otherwise. Raises
    UserError for unpaired groups."""
    _check_pairs(a, b)
    differences = {category: a[category] - b[category] for category in a}
    pooled = np.concatenate(list(differences.values()))
    single = binary and len(differences) == 1
    p = sign_test(pooled) if single else sign_flip(differences, seed=how["seed"], resamples=how["resamples"])
    interval = _interval(differences, how)
    return Comparison(macro_mean(differences), *interval, p, len(pooled), int((pooled != 0).sum()))


def retention(student: Groups, teacher: Groups, **how: Unpack[Bootstrap]) -> Metric:
    """Macro mean of the student over that of the teacher on the same prompts.

    The standard error is the delta method's; the interval a stratified paired bootstrap's, without the draws in which
    the teacher scores nothing (they have no ratio). Raises UserError for unpaired groups, or a teacher that scores 0.
    """
    _check_pairs(student, teacher)
    whole = macro_mean(teacher)
    if whole <= 0.0:
        nothing = "so nothing can be retained; check the teacher"
        raise UserError(f"retention: the teacher scores 0 on {list(teacher)}, {nothing}")
    ratio = macro_mean(student) / whole
    error = standard_error({category: student[category] - ratio * teacher[category] for category in student}) / whole
    pairs = {category: np.stack([student[category], teacher[category]], axis=1) for category in student}
    means = _macro_draws(pairs, how["seed"], how["resamples"])  # (B, 2)
    means = means[means[:, 1] > 0.0]
    interval = _percentiles(means[:, 0] / means[:, 1], how["confidence"], min(map(len, student.values())))
    return Metric(ratio, error, *interval, _count(student))


def over_training_seeds(groups: Sequence[Groups], **how: Unpack[Bootstrap]) -> Metric:
    """The macro mean over several trainings of one recipe, all scored on the same prompts: how well the recipe is
    known, not one of its models.

    A two-level bootstrap (A. Owen 2007, "The pigeonhole bootstrap"): trainings and prompts are drawn with replacement,
    prompts the same for all trainings. A draw's deviation has a part of the trainings, widened by sqrt(S / (S - 1))
    since S of them vary less than their population, and one of the prompts. With few trainings percentiles are too
    narrow, so the interval is Student's, with the degrees of freedom of the two parts together (Welch and
    Satterthwaite). It is somewhat conservative: what trainings and prompts do only together is counted in both parts. n
    counts prompts. Raises UserError for fewer than three trainings, or other prompts in one of them."""
    count, resamples = len(groups), how["resamples"]
    if count < 3:
        needs = "three or more are needed to tell how far trainings differ"
        raise UserError(f"training seeds: {count} training(s); {needs}")
    for other in groups[1:]:
        _check_pairs(groups[0], other)
    columns = {category: np.stack([training[category] for training in groups], axis=1) for category in groups[0]}
    grand = macro_mean(columns)
    draws = _macro_draws(columns, how["seed"], resamples)  # (B, S): every training's macro mean of drawn prompts
    drawn = numpy_generator(how["seed"], 0, 0, "bootstrap/trainings").integers(count, size=(resamples, count))
    of_prompts = draws.mean(1) - grand
    of_trainings = (np.take_along_axis(draws, drawn, axis=1).mean(1) - draws.mean(1)) * math.sqrt(count / (count - 1))
    variances = float(of_prompts.var()), float(of_trainings.var())
    total = sum(variances)
    smallest = min(map(len, columns.values()))
    freedom = total**2 / (variances[0] ** 2 / (smallest - 1) + variances[1] ** 2 / (count - 1)) if total > 0.0 else 1.0
    half = math.sqrt(total) * float(stdtrit(max(freedom, 1.0), 0.5 + how["confidence"] / 2))
    return Metric(grand, math.sqrt(total), grand - half, grand + half, _count(columns))
