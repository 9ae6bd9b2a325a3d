"""Defends: the published standard errors and exact tests are reproduced, nominal 95 % intervals cover about 95 %, and
equal input gives equal output.
"""

import math

import numpy as np
import pytest
from scipy.stats import norm, t

from benchmarks.scores.statistics import (
    _percentiles,
    category_metric,
    compare_paired,
    holm,
    macro_mean,
    macro_metric,
    mcnemar,
    over_training_seeds,
    retention,
    sign_flip,
    sign_test,
    standard_error,
    wilson,
)
from data.errors import UserError
from data.randomness import numpy_generator

SIZES = (80, 99, 80, 94, 100, 100)
TOLERANCE = 0.03  # of coverage; the simulations' own standard error is near 0.01


def from_counts(counts) -> dict[str, np.ndarray]:
    return {
        str(index): np.r_[np.ones(count), np.zeros(size - count)]
        for index, (count, size) in enumerate(zip(counts, SIZES, strict=True))
    }


# correct images per tag of published GenEval rows, their macro average and its standard error
@pytest.mark.parametrize(
    ("counts", "average", "error"),
    [
        ((79, 93, 77, 84, 64, 67), 0.849, 0.0136),
        ((67, 82, 57, 79, 58, 47), 0.711, 0.0183),
        ((79, 92, 65, 81, 60, 57), 0.793, None),
        ((76, 93, 75, 89, 52, 70), 0.832, 0.0140),
    ],
)
def test_published_rows_give_the_published_average_and_error(counts, average, error):
    groups = from_counts(counts)
    metric = macro_metric(groups, seed=0, resamples=2000, confidence=0.95)
    assert metric.mean == pytest.approx(average, abs=5.1e-4)
    assert metric.n == 553
    if error is not None:
        assert metric.stderr == pytest.approx(error, abs=1.5e-4)
    assert metric.high - metric.low == pytest.approx(2 * 1.96 * metric.stderr, rel=0.1)


def test_the_standard_error_is_the_formula():
    groups = {"a": np.array([0.0, 1.0, 1.0]), "b": np.array([2.0, 4.0])}
    assert standard_error(groups) == pytest.approx(math.sqrt((2 / 3) / 6 + 2 / 2) / 2)
    assert macro_mean(groups) == pytest.approx((2 / 3 + 3) / 2)


@pytest.mark.parametrize("freedom", [1, 2, 3, 10])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_widening_of_a_small_category_follows_student_s_t(freedom, confidence):
    """T. Hesterberg's correction for n prompts: the tail of sqrt(n / (n - 1)) times the t quantile at n - 1 degrees of
    freedom.
    """
    draws = np.linspace(0.0, 1.0, 100_001)  # even, so that a quantile is its own probability
    tail = norm.cdf(-math.sqrt((freedom + 1) / freedom) * t.ppf(0.5 + confidence / 2, freedom))
    assert _percentiles(draws, confidence, freedom + 1) == pytest.approx((tail, 1.0 - tail), rel=1e-6)


def test_wilson_against_known_values():
    assert wilson(80, 80, 0.95) == (pytest.approx(0.9542, abs=1e-4), 1.0)
    assert wilson(0, 10, 0.95) == (0.0, pytest.approx(0.2775, abs=1e-4))
    assert wilson(50, 100, 0.95) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [(0, 0, 1.0), (1, 6, 0.125), (6, 1, 0.125), (0, 5, 0.0625), (5, 5, 1.0), (2, 8, 0.109375)],
)
def test_mcnemar_is_the_binomial_sum(only_a, only_b, p):
    assert mcnemar(only_a, only_b) == pytest.approx(p)


def test_sign_flips_approach_the_full_enumeration():
    groups = {"a": np.array([1.0, 2.0, -0.5, 3.0]), "b": np.array([0.5, -1.0, 2.5])}
    signs = np.array(np.meshgrid(*[[-1, 1]] * 7)).reshape(7, -1).T
    flipped = (signs[:, :4] @ groups["a"] / 4 + signs[:, 4:] @ groups["b"] / 3) / 2
    exact = np.mean(np.abs(flipped) >= abs(macro_mean(groups)) - 1e-12)
    assert sign_flip(groups, seed=0, resamples=20_000) == pytest.approx(exact, abs=0.01)


def test_equal_models_do_not_differ_and_a_shift_is_seen():
    rng = numpy_generator(0, 0, 0, "models")
    a = {name: rng.uniform(0, 10, 50) for name in "xyz"}
    same = compare_paired(a, a, binary=False, seed=0, resamples=999, confidence=0.95)
    assert (same.difference, same.low, same.high, same.p, same.discordant, same.n) == (0.0, 0.0, 0.0, 1.0, 0, 150)
    shifted = compare_paired(
        {name: values + 1.0 for name, values in a.items()}, a, binary=False, seed=0, resamples=999, confidence=0.95
    )
    assert (
        shifted.difference == pytest.approx(1.0)
        and shifted.low == pytest.approx(1.0)
        and shifted.p == pytest.approx(0.001)
    )
    back = compare_paired(
        a, {name: values + 1.0 for name, values in a.items()}, binary=False, seed=0, resamples=999, confidence=0.95
    )
    assert back.difference == pytest.approx(-1.0)


def test_pairing_is_worth_more_than_independence():
    rng = numpy_generator(0, 0, 0, "paired")
    base = {name: rng.uniform(0, 10, 60) for name in "xyz"}
    better = {name: values + rng.normal(0.3, 0.5, 60) for name, values in base.items()}
    paired = compare_paired(better, base, binary=False, seed=0, resamples=2000, confidence=0.95)
    alone = [macro_metric(groups, seed=0, resamples=2000, confidence=0.95) for groups in (base, better)]
    assert paired.low > 0 and alone[0].high > alone[1].low


def test_one_binary_category_uses_mcnemar():
    a, b = np.array([1.0] * 8 + [0.0] * 2), np.array([0.0] * 6 + [1.0] * 3 + [0.0])
    found = compare_paired({"x": a}, {"x": b}, binary=True, seed=0, resamples=500, confidence=0.95)
    assert found.p == pytest.approx(mcnemar(6, 1)) and found.discordant == 7 and found.difference == pytest.approx(0.5)


def test_retention_of_a_scaled_teacher_is_exact():
    rng = numpy_generator(0, 0, 0, "teacher")
    teacher = {name: rng.uniform(1, 10, 40) for name in "xy"}
    found = retention(
        {name: 0.9 * values for name, values in teacher.items()}, teacher, seed=0, resamples=500, confidence=0.95
    )
    assert found.mean == pytest.approx(0.9) and found.low == pytest.approx(0.9) and found.high == pytest.approx(0.9)
    assert found.stderr == pytest.approx(0.0, abs=1e-12) and found.n == 80


def test_retention_is_a_ratio_of_macro_means():
    student, teacher = (
        {"a": np.array([1.0, 1.0]), "b": np.array([0.0, 1.0, 1.0, 0.0])},
        {"a": np.array([1.0, 1.0]), "b": np.array([1.0, 1.0, 1.0, 1.0])},
    )
    assert retention(student, teacher, seed=0, resamples=500, confidence=0.95).mean == pytest.approx(0.75)


# --- coverage ---------------------------------------------------------------------------------------------------------


def covered(metric, truth: float) -> bool:
    return metric.low <= truth <= metric.high


def coverage(draw, metric_of, truth: float, simulations: int = 400) -> float:
    rng = numpy_generator(0, 0, 0, "coverage")
    return float(np.mean([covered(metric_of(draw(rng), index), truth) for index in range(simulations)]))


def test_wilson_covers_exactly_on_average():
    n, covers = 60, []
    counts = np.arange(n + 1)
    bounds = np.array([wilson(int(count), n, 0.95) for count in counts])
    for share in np.linspace(0.05, 0.95, 91):
        weights = np.array([math.comb(n, int(count)) for count in counts]) * share**counts * (1 - share) ** (n - counts)
        covers.append(weights[(bounds[:, 0] <= share) & (share <= bounds[:, 1])].sum())
    assert np.mean(covers) == pytest.approx(0.95, abs=0.01)


def test_the_macro_bootstrap_of_binary_scores_covers():
    shares = (0.95, 0.9, 0.6, 0.8, 0.5, 0.7)
    found = coverage(
        lambda rng: {str(index): (rng.random(50) < share).astype(float) for index, share in enumerate(shares)},
        lambda groups, index: macro_metric(groups, seed=index, resamples=400, confidence=0.95),
        float(np.mean(shares)),
    )
    assert found == pytest.approx(0.95, abs=TOLERANCE)


def test_the_bootstrap_over_prompts_with_several_images_covers():
    def draw(rng: np.random.Generator) -> np.ndarray:
        return rng.binomial(4, rng.beta(1.5, 1.0, 40)) / 4  # images of one prompt are correlated

    found = coverage(
        draw,
        lambda values, index: category_metric(
            values, category="x", binary=False, seed=index, resamples=400, confidence=0.95
        ),
        0.6,
    )
    assert found == pytest.approx(0.95, abs=TOLERANCE)


def test_the_retention_interval_covers():
    def draw(rng: np.random.Generator) -> tuple[dict, dict]:
        teacher = {name: 10 * rng.beta(4, 1, 50) for name in "xyz"}
        return {
            name: values * (0.8 + 0.3 * rng.random(50)) for name, values in teacher.items()
        }, teacher  # ratio of means 0.95

    found = coverage(draw, lambda pair, index: retention(*pair, seed=index, resamples=400, confidence=0.95), 0.95)
    assert found == pytest.approx(0.95, abs=TOLERANCE)


def test_the_delta_method_agrees_with_the_spread():
    rng = numpy_generator(0, 0, 0, "delta")
    found = []
    for index in range(300):
        teacher = {name: 10 * rng.beta(4, 1, 40) for name in "xy"}
        student = {name: np.clip(values - rng.exponential(1.0, 40), 0, 10) for name, values in teacher.items()}
        found.append(retention(student, teacher, seed=index, resamples=20, confidence=0.95))
    assert np.std([metric.mean for metric in found]) == pytest.approx(
        np.mean([metric.stderr for metric in found]), rel=0.12
    )


def test_the_sign_flip_p_is_uniform_under_no_difference():
    rng = numpy_generator(0, 0, 0, "null")
    p = [sign_flip({name: rng.normal(0, 1, 30) for name in "xy"}, seed=index, resamples=200) for index in range(400)]
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=TOLERANCE)
    assert np.mean(np.array(p) <= 0.5) == pytest.approx(0.5, abs=0.08)


# --- several comparisons, several trainings ---------------------------------------------------------------------------


def test_the_sign_test_counts_directions():
    assert sign_test(np.array([1.0, 0.5, 2.0, 0.1, 3.0, -0.2, 0.0])) == pytest.approx(mcnemar(5, 1))
    a, b = np.array([1.0] * 8 + [0.0] * 2), np.array([0.0] * 6 + [1.0] * 3 + [0.0])
    assert sign_test(a - b) == mcnemar(6, 1) and sign_test(np.zeros(4)) == 1.0


def test_holm_against_a_worked_example():
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == {
        "a": pytest.approx(0.03),
        "b": pytest.approx(0.06),
        "c": pytest.approx(0.06),
        "d": pytest.approx(0.02),
    }
    assert list(found) == ["a", "b", "c", "d"] and holm({"a": 0.8, "b": 0.9}) == {"a": 1.0, "b": 1.0} and holm({}) == {}


def test_holm_keeps_the_family_wise_error():
    """Fourteen true nulls, as many as the paper has columns."""
    p = numpy_generator(0, 0, 0, "holm").random((4000, 14))
    wrong = np.mean([min(holm(dict(enumerate(map(float, row)))).values()) <= 0.05 for row in p])
    assert wrong == pytest.approx(0.05, abs=0.012) and np.mean(p.min(1) <= 0.05) > 0.4


def trainings(
    rng: np.random.Generator, count: int, spread: float, sizes: dict[str, int]
) -> list[dict[str, np.ndarray]]:
    """Scores of `count` trainings on the same prompts around a true macro mean of 5; `spread` is the deviation between
    trainings.
    """
    prompts = {name: rng.normal(5, 2, n) for name, n in sizes.items()}
    return [
        {name: values + shift + rng.normal(0, 1, len(values)) for name, values in prompts.items()}
        for shift in rng.normal(0, spread, count)
    ]


@pytest.mark.parametrize(("count", "spread"), [(3, 0.0), (3, 0.4), (5, 0.4)])
def test_the_interval_over_trainings_covers(count, spread):
    found = coverage(
        lambda rng: trainings(rng, count, spread, {"a": 40, "b": 60}),
        lambda groups, index: over_training_seeds(groups, seed=index, resamples=300, confidence=0.95),
        5.0,
        simulations=300,
    )
    assert 0.92 <= found <= 0.995  # conservative by design, most of all where trainings do not differ


def test_trainings_that_differ_widen_the_interval_and_equal_ones_do_not():
    rng = numpy_generator(0, 0, 0, "trainings")
    sizes = {"a": 40, "b": 60}
    alike, unlike = trainings(rng, 3, 0.0, sizes), trainings(rng, 3, 2.0, sizes)
    how = {"seed": 0, "resamples": 1000, "confidence": 0.95}
    one = macro_metric(alike[0], **how)
    same = over_training_seeds([alike[0]] * 3, **how)
    assert (same.mean, same.n) == (pytest.approx(one.mean), 100) and same.stderr == pytest.approx(one.stderr, rel=0.1)
    assert same.high - same.low == pytest.approx(one.high - one.low, rel=0.1)
    wide = over_training_seeds(unlike, **how)
    assert wide.stderr > 3 * one.stderr and wide.high - wide.mean > 3 * wide.stderr  # two degrees of freedom
    assert over_training_seeds(unlike, **how) == wide and over_training_seeds(unlike, **{**how, "seed": 1}) != wide
    with pytest.raises(UserError, match=r"2 training\(s\); three or more"):
        over_training_seeds(unlike[:2], **how)
    with pytest.raises(UserError, match="unequal numbers of prompts"):
        over_training_seeds([*unlike[:2], {"a": np.zeros(40), "b": np.zeros(59)}], **how)


def test_nominal_intervals_cover_within_two_percent():
    """The macro average of six tasks, four correlated images a prompt: 1,500 simulated benchmarks."""
    rng, names, truth = numpy_generator(0, 0, 0, "two percent"), "abcdef", 0.6
    images = rng.binomial(4, rng.beta(1.5, 1.0, (1500, len(names), 40))) / 4
    hits = [
        covered(
            macro_metric(
                {name: values[place] for place, name in enumerate(names)}, seed=index, resamples=200, confidence=0.95
            ),
            truth,
        )
        for index, values in enumerate(images)
    ]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.02)


# --- determinism and bad input ----------------------------------------------------------------------------------------


def test_the_seed_decides_and_the_order_of_categories_does_not():
    rng = numpy_generator(0, 0, 0, "order")
    groups = {name: rng.uniform(0, 1, 30) for name in "abc"}
    first = macro_metric(groups, seed=1, resamples=300, confidence=0.95)
    assert macro_metric(groups, seed=1, resamples=300, confidence=0.95) == first
    turned = macro_metric(dict(reversed(groups.items())), seed=1, resamples=300, confidence=0.95)
    assert (turned.low, turned.high) == (pytest.approx(first.low), pytest.approx(first.high))
    other = macro_metric(groups, seed=2, resamples=300, confidence=0.95)
    assert other.mean == first.mean and other.low != first.low


def test_too_little_is_refused():
    with pytest.raises(UserError, match="x has 1 prompt"):
        category_metric(np.array([1.0]), category="x", binary=True, seed=0, resamples=10, confidence=0.95)
    with pytest.raises(UserError, match="no category"):
        macro_metric({}, seed=0, resamples=10, confidence=0.95)
    with pytest.raises(UserError, match="not finite"):
        macro_metric({"x": np.array([1.0, np.nan])}, seed=0, resamples=10, confidence=0.95)
    with pytest.raises(UserError, match=r"unequal numbers of prompts .*'x': \(2, 3\)"):
        compare_paired({"x": np.zeros(2)}, {"x": np.zeros(3)}, binary=False, seed=0, resamples=10, confidence=0.95)
    with pytest.raises(UserError, match="teacher scores 0"):
        retention({"x": np.ones(3)}, {"x": np.zeros(3)}, seed=0, resamples=10, confidence=0.95)
