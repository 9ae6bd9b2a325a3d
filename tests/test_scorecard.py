"""Defends: a scorecard is what its complete, unmixed rows say, in the promised format; anything less than a complete
set is refused, with what is missing.
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.gedit.rules import Sample, aggregate
from benchmarks.scores.scorecard import (
    ExampleScore,
    Scorecard,
    bounds,
    check_complete,
    compare,
    expected_scores,
    read_scorecard,
    read_scores,
    scorecard,
    summarise,
    write_scorecard,
    write_scores,
)
from benchmarks.scores.statistics import Metric, wilson
from data.errors import UserError, UserErrors
from data.randomness import numpy_generator
from data.records import GENEVAL_TAGS, GLOBAL_EDITS, LOCAL_EDITS, Example

HOW = {"seed": 0, "resamples": 300, "confidence": 0.95}
EDITS = LOCAL_EDITS + GLOBAL_EDITS


def rows_of(
    model: str, sizes: dict[str, int], seed: int = 0, level: float = 0.7, samples: int = 1
) -> list[ExampleScore]:
    rng = numpy_generator(seed, 0, 0, model)
    rows = []
    for category, size in sizes.items():
        for index in range(size):
            for k in range(samples):
                benchmark = "geneval" if category in GENEVAL_TAGS else "gedit"
                values = (
                    {"correct": float(rng.random() < level)}
                    if benchmark == "geneval"
                    else {"O": 10 * level * rng.random() ** 0.3, "exact": 1.0}
                )
                rows.append(
                    ExampleScore(
                        model,
                        benchmark,
                        category,
                        f"{category}-{index}",
                        k,
                        100 * index + k,
                        values,
                        ("a reason",),
                        f"{category}/{index}.png",
                    )
                )
    return rows


def expected_of(rows) -> dict[str, set[tuple[str, int]]]:
    expected: dict[str, set[tuple[str, int]]] = {}
    for row in rows:
        expected.setdefault(row.category, set()).add((row.example_id, row.k))
    return expected


SIZES = {"single_object": 10, "counting": 30, "position": 20, "subject-add": 10, "style_change": 25}
ROWS = rows_of("student", SIZES)
EXPECTED = expected_of(ROWS)


def primary(rows, category: str) -> np.ndarray:
    return np.array([row.values.get("correct", row.values.get("O")) for row in rows if row.category == category])


def test_paths_and_means_are_those_of_the_rows():
    metrics = summarise(ROWS, expected=EXPECTED, **HOW)
    assert list(metrics) == [
        "geneval/overall",
        "geneval/single_object",
        "geneval/counting",
        "geneval/position",
        "gedit/average",
        "gedit/subject-add",
        "gedit/style_change",
    ]
    means = {category: primary(ROWS, category).mean() for category in SIZES}
    for path in ("geneval/counting", "gedit/style_change"):
        assert (
            metrics[path].mean == pytest.approx(means[path.split("/")[1]])
            and metrics[path].n == SIZES[path.split("/")[1]]
        )
    assert metrics["geneval/overall"].mean == pytest.approx(
        np.mean([means[tag] for tag in ("single_object", "counting", "position")])
    )
    pooled = np.concatenate([primary(ROWS, tag) for tag in ("single_object", "counting", "position")]).mean()
    assert metrics["geneval/overall"].mean != pytest.approx(pooled)
    assert metrics["gedit/average"].mean == pytest.approx((means["subject-add"] + means["style_change"]) / 2)
    assert (metrics["geneval/overall"].n, metrics["gedit/average"].n) == (60, 35)
    low, high = wilson(int(primary(ROWS, "counting").sum()), 30, 0.95)
    assert (metrics["geneval/counting"].low, metrics["geneval/counting"].high) == (low, high)
    assert all(metric.low <= metric.mean <= metric.high and metric.stderr >= 0 for metric in metrics.values())


def test_the_average_agrees_with_gedit_s_own_aggregation():
    rows = [row for row in ROWS if row.benchmark == "gedit"]
    samples = [Sample(row.example_id, row.category, (row.values["O"],), (row.values["O"],)) for row in rows]
    total = aggregate(samples, ["subject-add", "style_change"])
    assert summarise(rows, expected=expected_of(rows), **HOW)["gedit/average"].mean == pytest.approx(
        total.average.overall
    )


def test_several_images_of_a_prompt_are_one_cluster():
    rows = rows_of("student", {"counting": 20}, samples=4)
    metric = summarise(rows, expected=expected_of(rows), **HOW)["geneval/counting"]
    means = primary(rows, "counting").reshape(20, 4).mean(1)
    assert metric.n == 20 and metric.mean == pytest.approx(means.mean())
    assert metric.stderr == pytest.approx(means.std(ddof=1) / math.sqrt(20))


def test_only_expected_categories_count():
    rows = [row for row in ROWS if row.benchmark == "geneval"]
    metrics = summarise(rows, expected=expected_of(rows), **HOW)
    assert {path.split("/")[0] for path in metrics} == {"geneval"}
    assert metrics["geneval/overall"] == summarise(ROWS, expected=EXPECTED, **HOW)["geneval/overall"]


def test_the_order_of_rows_does_not_matter():
    assert summarise(ROWS[::-1], expected=EXPECTED, **HOW) == summarise(ROWS, expected=EXPECTED, **HOW)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[1:], r"single_object: 1 of 10 images are missing: single_object-0 \(k=0\)"),
        ([row for row in ROWS if row.category != "position"], r"position: 20 of 20 images are missing: .* and 17 more"),
        ([*ROWS, ROWS[0]], "1 images are scored more than once: single_object-0"),
        ([*ROWS, replace(ROWS[0], example_id="foreign")], "1 images are not part of the set: foreign"),
        ([*ROWS[1:], replace(ROWS[0], model="teacher")], r"rows of 2 models are mixed: \['student', 'teacher'\]"),
        ([*ROWS, replace(ROWS[0], category="colors")], "colors: 1 rows of a category that is not part of the set"),
        ([replace(ROWS[0], values={"correct": math.nan}), *ROWS[1:]], "correct = nan"),
        ([replace(ROWS[0], values={"O": 5.0}), *ROWS[1:]], "correct = None"),
        ([*ROWS[:-1], replace(ROWS[-1], values={"O": 11.0})], "O = 11.0; a number from 0 to 10"),
        ([replace(ROWS[0], benchmark="gedit"), *ROWS[1:]], "belongs to 'geneval'"),
        ([*ROWS[:-1], replace(ROWS[-1], status="lost")], "status = 'lost'"),
        ([*ROWS[:-1], replace(ROWS[-1], status="refused")], "a failed judgement has none"),
        (
            [*ROWS[:-1], replace(ROWS[-1], status="refused", values={})],
            r"style_change: 1 of 25 images have no score \(\{'refused': 1\}\)",
        ),
        ([], "single_object: 10 of 10 images are missing"),
    ],
)
def test_incomplete_repeated_and_mixed_sets_are_refused(rows, message):
    with pytest.raises(UserErrors, match=message):
        summarise(rows, expected=EXPECTED, **HOW)


def test_every_fault_is_listed_at_once():
    with pytest.raises(UserErrors) as caught:
        check_complete(
            [*ROWS[1:], ROWS[20], replace(ROWS[3], model="teacher", example_id="foreign")],
            {**EXPECTED, "unheard-of": {("a", 0)}},
        )
    assert len(caught.value.faults) >= 5
    with pytest.raises(UserErrors, match="nothing is expected"):
        check_complete([], {})


def test_coverage_is_over_all_categories_and_the_missing_are_bounds():
    """One failed row of 99 is 1 % of its category and less of the set."""
    every = rows_of("student", {"subject-add": 99, "style_change": 60})
    rows = [replace(every[0], status="refused", values={}), *every[1:]]
    assert summarise(rows, expected=expected_of(every), **HOW)["gedit/subject-add"].n == 98
    low, high = bounds(rows)
    assert high - low == pytest.approx(10 / 99 / 2)
    mean = np.mean([primary(rows[1:], "subject-add").mean() * 98 / 99, primary(rows, "style_change").mean()])
    assert low == pytest.approx(mean) and bounds(every)[0] == bounds(every)[1]
    fewer = [replace(row, status="refused", values={}) for row in every[:2]] + every[2:]
    with pytest.raises(UserErrors) as caught:
        summarise(fewer, expected=expected_of(every), **HOW)
    low, high = bounds(fewer)
    where, whole = caught.value.faults
    assert where == "subject-add: 2 of 99 images have no score ({'refused': 2})"
    assert whole.startswith("gedit: 2 of 159 images have no score ({'refused': 2})") and "at least 99%" in whole
    assert f"{low:.4g} or {high:.4g}" in whole
    assert summarise(fewer, expected=expected_of(every), allow_partial=True, **HOW)["gedit/subject-add"].n == 97
    nothing = [replace(row, status="refused", values={}) for row in every[:99]] + every[99:]
    with pytest.raises(UserErrors, match="subject-add: 99 of 99 images have no score .* an average over nothing"):
        summarise(nothing, expected=expected_of(every), allow_partial=True, **HOW)


def test_a_rare_failed_judgement_is_left_out_and_not_a_zero():
    rows = [
        row if index else replace(row, status="api_error", values={})
        for index, row in enumerate(rows_of("student", {"subject-add": 120}))
    ]
    metric = summarise(rows, expected=expected_of(rows), **HOW)["gedit/subject-add"]
    assert metric.n == 119 and metric.mean == pytest.approx(np.mean([row.values["O"] for row in rows[1:]]))


# --- the card ---------------------------------------------------------------------------------------------------------


def card() -> Scorecard:
    teachers = {
        "t2i": rows_of("base", SIZES, 1, 0.8),
        "global_edit": [row for row in rows_of("global", SIZES, 2, 0.9) if row.category == "style_change"],
    }
    return scorecard("student", ROWS, teachers, EXPECTED, {"student": "abc", "teachers": {"t2i": "def"}}, **HOW)


def test_retention_is_over_the_teacher_s_own_categories():
    found, base = card().metrics["retention/t2i"], rows_of("base", SIZES, 1, 0.8)
    tags = ("single_object", "counting", "position")
    expected = np.mean([primary(ROWS, tag).mean() for tag in tags]) / np.mean(
        [primary(base, tag).mean() for tag in tags]
    )
    assert found.mean == pytest.approx(expected) and found.n == 60
    own = card().metrics["retention/global_edit"]
    assert own.n == 25 and own.low < own.mean < own.high


def test_a_teacher_s_incomplete_rows_are_refused_too():
    with pytest.raises(UserErrors, match="scores of base"):
        scorecard("student", ROWS, {"t2i": rows_of("base", SIZES)[1:]}, EXPECTED, {}, **HOW)
    with pytest.raises(UserError, match="retention/local_edit: no example"):
        rows = [row for row in ROWS if row.benchmark == "geneval"]
        scorecard("student", rows, {"local_edit": rows}, expected_of(rows), {}, **HOW)
    with pytest.raises(UserError, match="'t2v' is unknown"):
        scorecard("student", ROWS, {"t2v": ROWS}, EXPECTED, {}, **HOW)


def test_the_format_is_the_promised_one(tmp_path):
    write_scorecard(tmp_path / "scorecard.json", card())
    value = json.loads((tmp_path / "scorecard.json").read_text())
    assert list(value) == ["model", "benchmarks", "identities", "metrics", "cost"]
    assert all(
        list(metric) == ["mean", "stderr", "low", "high", "n"] and isinstance(metric["n"], int)
        for metric in value["metrics"].values()
    )
    assert value["benchmarks"]["geneval"]["n"] == 60 and value["benchmarks"]["gedit"]["n"] == 35
    assert read_scorecard(tmp_path / "scorecard.json") == card()


def test_the_set_s_digest_changes_with_the_set():
    smaller = [row for row in ROWS if row.example_id != "counting-3"]
    one, other = card(), scorecard("student", smaller, {}, expected_of(smaller), {}, **HOW)
    assert one.benchmarks["gedit"] == other.benchmarks["gedit"]
    assert one.benchmarks["geneval"]["digest"] != other.benchmarks["geneval"]["digest"]


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.pop("metrics"),
        lambda value: value["metrics"]["geneval/overall"].pop("n"),
        lambda value: value.update(metrics=[1]),
    ],
)
def test_a_broken_card_is_named(tmp_path, change):
    value = card().to_json()
    change(value)
    (tmp_path / "scorecard.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"scorecard\.json"):
        read_scorecard(tmp_path / "scorecard.json")
    with pytest.raises(UserError, match="not finite"):
        Scorecard.from_json(
            {
                **card().to_json(),
                "metrics": {"geneval/overall": {"mean": math.nan, "stderr": 0, "low": 0, "high": 1, "n": 3}},
            }
        )


def test_rows_survive_the_file(tmp_path):
    rows = [*ROWS, replace(ROWS[0], example_id="ünï", reasons=(), status="refused", values={}, seed=2**62)]
    write_scores(tmp_path, rows)
    assert read_scores(tmp_path) == rows
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]
    write_scores(tmp_path / "empty", [])
    assert read_scores(tmp_path / "empty") == []


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no such file; run the score stage"):
        read_scores(tmp_path)
    (tmp_path / "scores.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match="not a readable table"):
        read_scores(tmp_path)


# --- two models -------------------------------------------------------------------------------------------------------


def test_comparison_is_paired_and_antisymmetric():
    other = [
        replace(row, model="champion", values={name: value * 0.8 for name, value in row.values.items()})
        for row in ROWS
        if row.benchmark == "gedit"
    ]
    mine = [row for row in ROWS if row.benchmark == "gedit"]
    ahead, behind = (
        compare(mine, other, expected=expected_of(mine), **HOW),
        compare(other, mine, expected=expected_of(mine), **HOW),
    )
    metrics = summarise(mine, expected=expected_of(mine), **HOW)
    for path in metrics:
        assert (
            ahead[path].difference == pytest.approx(0.2 * metrics[path].mean) == pytest.approx(-behind[path].difference)
        )
        assert ahead[path].p == behind[path].p < 0.05 and ahead[path].low > 0 > behind[path].high
        assert ahead[path].discordant == ahead[path].n == metrics[path].n


def test_comparison_needs_the_same_seeds_and_the_same_set():
    other = [replace(row, model="champion") for row in ROWS]
    with pytest.raises(UserError, match="different seeds: counting-1"):
        compare(
            ROWS,
            [replace(row, seed=row.seed + (row.example_id == "counting-1")) for row in other],
            expected=EXPECTED,
            **HOW,
        )
    with pytest.raises(UserErrors, match="scores of champion"):
        compare(ROWS, other[1:], expected=EXPECTED, **HOW)
    same = compare(ROWS, other, expected=EXPECTED, **HOW)
    assert all((one.difference, one.p, one.discordant) == (0.0, 1.0, 0) for one in same.values())


def test_what_is_expected_follows_from_the_examples():
    examples = [
        Example("a", "eval", "t2i", "colors", "p"),
        Example("b", "eval", "t2i", "colors", "p"),
        Example("c", "eval", "local_edit", "subject-add", "p"),
    ]
    assert expected_scores(examples) == {"colors": {("a", 0), ("b", 0)}, "subject-add": {("c", 0)}}
    assert expected_scores(examples, {"geneval": 2, "gedit": 1})["colors"] == {("a", 0), ("a", 1), ("b", 0), ("b", 1)}


def test_a_metric_has_the_five_numbers():
    assert Metric(0.5, 0.1, 0.3, 0.7, 9) == Metric(mean=0.5, stderr=0.1, low=0.3, high=0.7, n=9)
    assert set(EDITS) | set(GENEVAL_TAGS) >= set(SIZES)
