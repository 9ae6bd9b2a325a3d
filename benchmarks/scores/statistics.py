"""How sure a number is: standard errors, intervals, paired comparisons. The unit is the prompt; images of one prompt
are averaged first.

Groups map a category to one value a prompt, (n,) float. A macro average weighs categories equally, so every resampling
is stratified by category. Random numbers come from PCG64, addressed by seed and purpose: equal input gives equal
output. Methods: E. B. Wilson 1927 (binary proportions), B. Efron (percentile bootstrap, with T. Hesterberg's correction
for small n), Q. McNemar 1947 (exact form), S. Holm 1979, A. Owen 2007, E. Miller 2024, "Adding Error Bars to Evals"
(clusters, paired differences).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# cdf of the normal, quantile of Student's t: scipy.stats takes half a second more to import
from scipy.special import ndtr, stdtrit

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


@dataclass(frozen=True)
class Comparison:
    """Model a minus model b on the same prompts, with interval and two-sided p; `discordant` counts the prompts on
    which they differ.
    """

    difference: float
    low: float
    high: float
    p: float
    n: int
    discordant: int


def check_groups(groups: Groups) -> None:
    """Raises UserError for no category, or one with fewer than two prompts or with a value that is not finite."""
    if not groups:
        raise UserError("statistics: no category was given")
    for category, values in groups.items():
        if len(values) < 2:
            raise UserError(
                f"statistics: {category} has {len(values)} prompt(s); two or more are needed for a standard error"
            )
        if not np.isfinite(values).all():
            raise UserError(
                f"statistics: {category} holds {int((~np.isfinite(values)).sum())} values that are not finite; score those prompts again"
            )


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


def resampled_means(groups: Groups, *, seed: int, resamples: int) -> dict[str, np.ndarray]:
    """Per category, means (B, ...) over prompts drawn with replacement. Values (n,) or (n, M): the M columns of one
    prompt stay together (paired).
    """
    means = {}
    for category, values in groups.items():
        n = len(values)
        drawn = numpy_generator(seed, 0, 0, f"bootstrap/{category}").integers(n, size=(resamples, n), dtype=np.int32)
        means[category] = values[drawn].mean(1)
    return means


def _percentiles(draws: np.ndarray, confidence: float, smallest: int) -> tuple[float, float]:
    """The draws' interval, widened for the narrowness of percentile intervals when the smallest category has few
    prompts.
    """
    tail = float(ndtr(-math.sqrt(smallest / (smallest - 1)) * stdtrit(smallest - 1, 0.5 + confidence / 2)))
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    return float(low), float(high)


def category_metric(
    values: np.ndarray, *, category: str, binary: bool, seed: int, resamples: int, confidence: float
) -> Metric:
    """One category. `binary`: every value is one image's 0 or 1, and the interval is Wilson's; otherwise a bootstrap
    over prompts.

    Raises UserError as `check_groups` does.
    """
    check_groups({category: values})
    mean, error = float(values.mean()), standard_error({category: values})
    if binary:
        low, high = wilson(round(float(values.sum())), len(values), confidence)
    else:
        low, high = _percentiles(
            resampled_means({category: values}, seed=seed, resamples=resamples)[category], confidence, len(values)
        )
    return Metric(mean, error, low, high, len(values))


def macro_metric(groups: Groups, *, seed: int, resamples: int, confidence: float) -> Metric:
    """The unweighted mean of the categories' means, with a bootstrap stratified by category. Raises UserError as
    `check_groups` does.
    """
    check_groups(groups)
    draws = np.mean(list(resampled_means(groups, seed=seed, resamples=resamples).values()), axis=0)
    low, high = _percentiles(draws, confidence, min(map(len, groups.values())))
    return Metric(macro_mean(groups), standard_error(groups), low, high, sum(map(len, groups.values())))


def _check_pairs(a: Groups, b: Groups) -> None:
    check_groups(a)
    check_groups(b)
    sizes = {category: (len(a.get(category, ())), len(b.get(category, ()))) for category in {**a, **b}}
    unequal = {category: pair for category, pair in sizes.items() if pair[0] != pair[1]}
    if unequal:
        raise UserError(f"paired comparison: unequal numbers of prompts {unequal}; score both models on the same set")


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p that discordant pairs fall either way with equal chance."""
    n = only_a + only_b
    if n == 0:
        return 1.0
    from scipy.stats import binomtest  # here: it takes half a second to import

    return float(binomtest(only_a, n).pvalue)


def sign_test(differences: np.ndarray) -> float:
    """Two-sided exact p that paired differences (n,) fall either way with equal chance; equal pairs say nothing. For 0
    and 1 it is McNemar's test.
    """
    return mcnemar(int((differences > 0).sum()), int((differences < 0).sum()))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p values adjusted for their number (S. Holm 1979), by name: below alpha means significant with the family-wise
    error at alpha or less.
    """
    adjusted: dict[str, float] = {}
    highest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: (p_values[name], name))):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def sign_flip(differences: Groups, *, seed: int, resamples: int) -> float:
    """Two-sided p that the macro mean of the paired differences is 0: prompts' signs are flipped at random, category by
    category.
    """
    observed = abs(macro_mean(differences))
    flipped = np.zeros(resamples)
    for category, values in differences.items():
        signs = numpy_generator(seed, 0, 0, f"sign-flip/{category}").integers(
            0, 2, size=(resamples, len(values)), dtype=np.int8
        ) * np.int8(2) - np.int8(1)
        flipped += signs @ values / len(values) / len(differences)
    return float((1 + (np.abs(flipped) >= observed - 1e-12).sum()) / (resamples + 1))


def compare_paired(a: Groups, b: Groups, *, binary: bool, seed: int, resamples: int, confidence: float) -> Comparison:
    """a minus b, row i of a category being the same prompt with the same noise in both; the interval is a stratified
    paired bootstrap's.

    p is McNemar's for one category of single binary images, and a stratified sign-flip permutation's otherwise. Raises
    UserError for unpaired groups.
    """
    _check_pairs(a, b)
    differences = {category: a[category] - b[category] for category in a}
    draws = np.mean(list(resampled_means(differences, seed=seed, resamples=resamples).values()), axis=0)
    low, high = _percentiles(draws, confidence, min(map(len, differences.values())))
    pooled = np.concatenate(list(differences.values()))
    if binary and len(differences) == 1:
        p = sign_test(pooled)
    else:
        p = sign_flip(differences, seed=seed, resamples=resamples)
    return Comparison(macro_mean(differences), low, high, p, len(pooled), int((pooled != 0).sum()))


def retention(student: Groups, teacher: Groups, *, seed: int, resamples: int, confidence: float) -> Metric:
    """Macro mean of the student over that of the teacher on the same prompts.

    The standard error is the delta method's; the interval a stratified paired bootstrap's, without the draws in which
    the teacher scores nothing (they have no ratio). Raises UserError for unpaired groups, or a teacher that scores 0.
    """
    _check_pairs(student, teacher)
    if macro_mean(teacher) <= 0.0:
        raise UserError(
            f"retention: the teacher scores 0 on {list(teacher)}, so nothing can be retained; check the teacher"
        )
    ratio = macro_mean(student) / macro_mean(teacher)
    error = standard_error(
        {category: student[category] - ratio * teacher[category] for category in student}
    ) / macro_mean(teacher)
    pairs = {category: np.stack([student[category], teacher[category]], axis=1) for category in student}
    means = np.mean(list(resampled_means(pairs, seed=seed, resamples=resamples).values()), axis=0)  # (B, 2)
    means = means[means[:, 1] > 0.0]
    low, high = _percentiles(means[:, 0] / means[:, 1], confidence, min(map(len, student.values())))
    return Metric(ratio, error, low, high, sum(map(len, student.values())))


def over_training_seeds(groups: Sequence[Groups], *, seed: int, resamples: int, confidence: float) -> Metric:
    """The macro mean over several trainings of one recipe, all scored on the same prompts: how well the recipe is
    known, not one of its models.

    A two-level bootstrap (A. Owen 2007, "The pigeonhole bootstrap"): trainings and prompts are drawn with replacement,
    prompts the same for all trainings. A draw's deviation has a part of the trainings, widened by sqrt(S / (S - 1))
    since S of them vary less than their population, and one of the prompts. With few trainings percentiles are too
    narrow, so the interval is Student's, with the degrees of freedom of the two parts together (Welch and
    Satterthwaite). It is somewhat conservative: what trainings and prompts do only together is counted in both parts. n
    counts prompts. Raises UserError for fewer than three trainings, or other prompts in one of them.
    """
    if len(groups) < 3:
        raise UserError(
            f"training seeds: {len(groups)} training(s); three or more are needed to tell how far trainings differ"
        )
    for other in groups[1:]:
        _check_pairs(groups[0], other)
    count = len(groups)
    columns = {
        category: np.stack([of_training[category] for of_training in groups], axis=1) for category in groups[0]
    }  # (n, S)
    grand = float(np.mean([values.mean() for values in columns.values()]))
    draws = np.mean(
        list(resampled_means(columns, seed=seed, resamples=resamples).values()), axis=0
    )  # (B, S): every training's macro mean of drawn prompts
    drawn = numpy_generator(seed, 0, 0, "bootstrap/trainings").integers(count, size=(resamples, count))
    prompts_part = draws.mean(1) - grand
    trainings_part = (np.take_along_axis(draws, drawn, axis=1).mean(1) - draws.mean(1)) * math.sqrt(count / (count - 1))
    variances = float(prompts_part.var()), float(trainings_part.var())
    total = sum(variances)
    smallest = min(len(values) for values in columns.values())
    freedom = total**2 / (variances[0] ** 2 / (smallest - 1) + variances[1] ** 2 / (count - 1)) if total > 0.0 else 1.0
    half = math.sqrt(total) * float(stdtrit(max(freedom, 1.0), 0.5 + confidence / 2))
    return Metric(grand, math.sqrt(total), grand - half, grand + half, sum(len(values) for values in columns.values()))
