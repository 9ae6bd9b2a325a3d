"""Defends: what `dvc metrics` and `dvc plots` show of a run is small enough to read and needs no network."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.scores.figures import scorecard_plot, training_curves
from benchmarks.scores.scorecard import Scorecard
from benchmarks.scores.statistics import Metric
from data.errors import UserError
from data.files import read_json
from tasks.environment import PROJECT
from tasks.stages.score import write_metrics

SCORES = ("geneval/overall", "geneval/colors", "gedit/average", "gedit/subject-add")
RETENTIONS = ("retention/t2i", "retention/local_edit", "retention/global_edit")


def card(name: str, mean: float = 0.987654321) -> Scorecard:
    """All but the base retain something of their teachers."""
    paths = SCORES if name == "base" else (*SCORES, *RETENTIONS)
    scales = {path: 10 if path.startswith("gedit") else 1 for path in paths}
    metrics = {path: Metric(mean * scale, 0.01, mean - 0.1, mean + 0.1, 320) for path, scale in scales.items()}
    return Scorecard(name, {}, {}, metrics)


def steps(path: Path, rows: int) -> Path:
    lines = [f"{step},t2i,{1 / step},{2 / step}" for step in range(1, rows + 1)]
    path.write_text("\n".join(["step,route,loss,gradient_norm", *lines]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository with the pipeline's description and the files that its last stage leaves for people."""
    for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
        subprocess.run(command, cwd=tmp_path, check=True)
    for name in ("dvc.yaml", ".dvc/config"):
        shutil.copy(PROJECT / name, tmp_path / name)
    write_metrics(tmp_path / "reports/metrics", card("student"), card("base", 0.5))
    (tmp_path / "reports/score").mkdir()
    training_curves({"distillation": steps(tmp_path / "steps.csv", 40)}, tmp_path / "reports/score/training.png")
    scorecard_plot({"student": card("student")}, tmp_path / "reports/score/scorecard.png")
    return tmp_path


def shown(project: Path, *words: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-m", "dvc", *words], cwd=project, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_metrics_fit_a_terminal_and_a_difference_is_seen(project: Path) -> None:
    lines = shown(project, "metrics", "show").strip().splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) == 6
    assert lines[0].split() == ["Path", "base", "high", "low", "mean", "n"]
    (t2i,) = [line.split() for line in lines if "retention_t2i" in line]
    assert t2i == ["reports/metrics/retention_t2i.json", "-", "1.0877", "0.8877", "0.9877", "320"]
    subprocess.run(["git", "add", "."], cwd=project, check=True)
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *author, "commit", "--quiet", "--message", "first"], cwd=project, check=True)
    write_metrics(project / "reports/metrics", card("student", 0.9), card("base", 0.5))
    (mean,) = [
        line for line in shown(project, "metrics", "diff").splitlines() if "geneval.json" in line and "mean" in line
    ]
    assert mean.split()[2:] == ["0.9877", "0.9", "-0.0877"]


def test_a_headline_figure_is_a_file_with_the_base_where_it_is_known(tmp_path: Path) -> None:
    headline = write_metrics(tmp_path / "metrics", card("student"), None)
    assert set(headline) == {"geneval/overall", "gedit/average", *RETENTIONS}
    assert read_json(tmp_path / "metrics/geneval.json") == {"mean": 0.9877, "low": 0.8877, "high": 1.0877, "n": 320}
    write_metrics(
        tmp_path / "metrics", Scorecard("student", {}, {}, {"gedit/average": Metric(1, 0.1, 0, 2, 4)}), card("base")
    )
    assert [path.name for path in (tmp_path / "metrics").iterdir()] == ["gedit.json"]  # nothing older stays
    assert read_json(tmp_path / "metrics/gedit.json")["base"] == 9.8765


def test_the_page_of_the_plots_needs_no_network(project: Path) -> None:
    shown(project, "plots", "show", "--out", "page")
    page = (project / "page/index.html").read_text(encoding="utf-8")
    images = re.findall(r'<img src="([^"]*)"', page)
    assert len(images) == 2 and all((project / "page" / image).is_file() for image in images)
    assert not re.search(r"https?://|<script", page)


def test_the_curves_show_every_training_and_an_empty_one_is_an_empty_panel(tmp_path: Path) -> None:
    heights = []
    for rows in (0, 40):
        trainings = {"distillation": steps(tmp_path / "a.csv", 40), "absorption": steps(tmp_path / "b.csv", rows)}
        training_curves(trainings, tmp_path / "curves.png")
        sheet = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"))
        heights.append(int((sheet == (0x00, 0x72, 0xB2)).all(-1).sum()))
    assert heights[1] > 1.5 * heights[0] > 500
    with pytest.raises(UserError, match=r"no .*c\.csv; run the stage that trains it again"):
        training_curves({"distillation": tmp_path / "c.csv"}, tmp_path / "curves.png")
