"""Defends: the paper's numbers as data agree with themselves, and a scorecard never stands beside them without all that
differs.
"""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest

from benchmarks.compare import (
    cli,
    columns_of,
    compare_text,
    differences,
    load_paper,
    overall_of_counts,
    paper_rows,
    scorecard_row,
)
from benchmarks.gedit.rules import PAPER_CATEGORIES
from benchmarks.scores.scorecard import Scorecard, write_scorecard
from benchmarks.scores.statistics import Metric
from data.errors import UserErrors
from data.records import GENEVAL_TAGS, OFFICIAL_COUNTS

PAPER = load_paper()
SIZES = {
    **{f"geneval/{name}": n for name, n in PAPER["geneval"]["tasks"].items()},
    **{f"gedit/{name}": n for name, n in OFFICIAL_COUNTS.items()},
}


def card(model: str = "mine", images: int = 1, without: tuple[str, ...] = (), **gedit) -> Scorecard:
    metrics = {}
    for path, n in SIZES.items():
        if path not in without:
            value = 0.8 if path.startswith("geneval") else 5.0 if path.split("/")[1] in PAPER_CATEGORIES else 1.0
            metrics[path] = Metric(value, 0.06, value - 0.1, value + 0.1, n)
    metrics["gedit/average"] = Metric(3.2, 0.1, 3.0, 3.4, 606)
    about = {
        "geneval": {"n": 553, "images": 553 * images, "digest": "g"},
        "gedit": {"n": 606, "images": 606, "digest": "e"},
    }
    judge = {"model": "gpt", "answered_by": "gpt-1", "wording": {"name": "own"}}
    identities = {
        "geneval": {"evaluator": {"detector": "mask2former"}},
        "gedit": {
            "judge": judge,
            "language": "en",
            "subset": "full",
            "repeats": 3,
            "images": {"sampler": {"steps": 16, "guidance": 1.0}},
            **gedit,
        },
    }
    return Scorecard(model, about, identities, metrics)


def test_the_paper_s_overall_values_follow_from_its_counts() -> None:
    """Six rows, as printed to three decimals."""
    rows = [row for row in PAPER["rows"] if "correct" in row.get("geneval", {})]
    assert tuple(PAPER["geneval"]["tasks"]) == GENEVAL_TAGS and len(rows) == 6
    for row in rows:
        assert (
            round(overall_of_counts(row["geneval"]["correct"], list(PAPER["geneval"]["tasks"].values())), 3)
            == row["geneval"]["overall"]
        ), row["name"]
    printed = {
        "A: DanceOPD": [0.988, 0.939, 0.963, 0.894, 0.640, 0.670],
        "A: Edit source": [0.838, 0.828, 0.713, 0.840, 0.580, 0.470],
    }
    for name, shares in printed.items():
        values = next(row for row in paper_rows(PAPER) if row.name.endswith(name)).values
        assert [values[f"geneval/{tag}"].mean for tag in GENEVAL_TAGS] == pytest.approx(shares, abs=5.1e-4)


def test_the_paper_s_edit_averages_are_means_of_its_six_columns() -> None:
    assert list(PAPER["gedit"]["tasks"]) == list(PAPER_CATEGORIES) and sum(PAPER["gedit"]["tasks"].values()) == 317
    rows = [row["gedit"] for row in PAPER["rows"] if "scores" in row.get("gedit", {})]
    assert len(rows) == 5
    for row in rows:
        assert sum(row["scores"]) / 6 == pytest.approx(row["average"], abs=1e-3)


def test_the_noise_of_the_paper_s_rows_is_that_of_its_prompts() -> None:
    errors = {
        row.name.removeprefix("paper, "): row.values["geneval/overall"].stderr
        for row in paper_rows(PAPER)
        if "geneval/overall" in row.values
    }
    assert errors["A: DanceOPD"] == pytest.approx(0.0136, abs=2e-4) and errors["A: Edit source"] == pytest.approx(
        0.0183, abs=2e-4
    )
    assert errors["A: joint training"] is None


def test_a_scorecard_of_eleven_categories_is_averaged_over_the_paper_s_six() -> None:
    row = scorecard_row("mine", card(), PAPER)
    assert row.values["gedit/average"].mean == pytest.approx(5.0) and row.values[
        "gedit/average"
    ].stderr == pytest.approx(0.06 / math.sqrt(6))
    assert row.values["geneval/overall"].mean == pytest.approx(0.8)
    assert "gedit/average" not in scorecard_row("mine", card(without=("gedit/subject-add",)), PAPER).values
    assert set(row.values) <= set(columns_of(PAPER))


def test_everything_that_differs_is_said() -> None:
    text = "\n".join(differences(card(images=4, language="cn", subset="intersection", coverage=0.98), PAPER))
    for part in (
        "images per prompt: 4, the paper 1",
        "detector: mask2former, the paper's not stated",
        "GEdit categories: 11, the paper 6",
        "own average is 3.200",
        "language: cn, the paper en",
        "rows: intersection, the paper's not stated",
        "judge: gpt-1 (wording own, 3 judgement(s) an image), the paper's not stated",
        "coverage: 98.0%",
        "sampling: 16 steps, guidance 1.0; the paper 28 steps",
    ):
        assert part in text
    assert "images per prompt" not in "\n".join(differences(card(), PAPER)) and "prompts" not in "\n".join(
        differences(card(), PAPER)
    )


def test_a_set_of_another_size_does_not_pass_for_the_benchmark() -> None:
    small = card()
    metrics = {
        path: Metric(metric.mean, metric.stderr, metric.low, metric.high, 56) for path, metric in small.metrics.items()
    }
    about = {"geneval": {"n": 336, "images": 336}, "gedit": {"n": 336, "images": 336}}
    text = "\n".join(differences(Scorecard("micro", about, {}, metrics), PAPER))
    for part in (
        "GenEval prompts: 336 (56/56/56/56/56/56 a task), the paper 553 (80/99/80/94/100/100)",
        "samples in those categories: 336, the paper 317",
    ):
        assert part in text
    assert "judge: not stated" in text and "detector: not stated" in text and "sampling: not stated" in text


def test_images_made_elsewhere_name_no_sampling() -> None:
    """Their scorecard has `images: null`."""
    made = Scorecard("x", {"geneval": {"n": 553, "images": 553}}, {"geneval": {"images": None}}, card().metrics)
    assert differences(made, PAPER)[-1].startswith("sampling: not stated; the paper 28 steps")


def test_different_judges_do_not_share_a_table(tmp_path: Path) -> None:
    write_scorecard(tmp_path / "a.json", card())
    write_scorecard(tmp_path / "b.json", card("other", judge={"model": "gpt", "answered_by": "gpt-2"}))
    with pytest.raises(UserErrors, match="gedit: 2 different values of judge"):
        compare_text([tmp_path / "a.json", tmp_path / "b.json"], "text")


@pytest.mark.parametrize("style", ["text", "markdown", "csv"])
def test_every_form_holds_every_row_and_every_difference(tmp_path: Path, style: str, capsys) -> None:
    write_scorecard(tmp_path / "a.json", card(images=4))
    assert cli([str(tmp_path / "a.json"), "--format", style]) == 0
    text = capsys.readouterr().out
    assert text == compare_text([tmp_path / "a.json"], style)
    for row in PAPER["rows"]:
        assert f"paper, {row['name']}" in text
    assert "5.35" in text.replace("5.347", "5.35") and "images per prompt: 4, the paper 1" in text
    if style == "csv":
        lines = list(
            csv.reader(
                io.StringIO("".join(line for line in text.splitlines(keepends=True) if not line.startswith("#")))
            )
        )
        assert len(lines) == 1 + len(PAPER["rows"]) + 1 and {len(line) for line in lines} == {1 + 2 * 14}
        assert float(lines[-1][1]) == pytest.approx(5.0)
    cli([str(tmp_path / "a.json"), "--format", style, "--out", str(tmp_path / "table")])
    assert (tmp_path / "table").read_text(encoding="utf-8") == text


def test_the_same_model_twice_stays_two_rows(tmp_path: Path) -> None:
    for name in "ab":
        write_scorecard(tmp_path / f"{name}.json", card())
    text = compare_text([tmp_path / "a.json", tmp_path / "b.json"], "markdown")
    assert "| mine |" in text and f"| mine ({tmp_path / 'b.json'}) |" in text
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["model"] == "mine"
