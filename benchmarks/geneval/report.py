"""What `python -m benchmarks geneval report` prints and writes: a model's table, its paired comparisons with others,
and its page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.geneval.confusion import confusions
from benchmarks.geneval.run import RESULTS_FILE, SCORECARD_FILE, VERDICT, read_official_rows
from benchmarks.scores import scorecard
from benchmarks.scores.scorecard import ExampleScore, Scorecard
from benchmarks.scores.statistics import Comparison, holm
from data.errors import UserError
from data.files import write_text
from data.records import HEADLINES

PAGE_FILE, TABLE_FILE = "report.html", "report.txt"
PER_CATEGORY = 6  # best and worst images that the page shows of a task


def verdict_folder(folder: Path) -> Path:
    """The folder that holds the scorecard: this folder, or `verdict` in it. Raises UserError where neither does."""
    for place in (folder, folder / VERDICT):
        if (place / SCORECARD_FILE).exists():
            return place
    raise UserError(f"{folder}: no {SCORECARD_FILE} in it or in {VERDICT}/; run the verdict step first")


def _read(folders: Sequence[Path]) -> dict[str, tuple[Scorecard, list[ExampleScore]]]:
    """Name -> scorecard and rows; two models of one name are told apart by their folder."""
    models: dict[str, tuple[Scorecard, list[ExampleScore]]] = {}
    for folder in map(verdict_folder, folders):
        card = scorecard.read_scorecard(folder / SCORECARD_FILE)
        name = card.model if card.model not in models else f"{card.model} ({folder})"
        if name in models:
            raise UserError(f"{folder}: given twice; name every folder once")
        models[name] = card, scorecard.read_scores(folder)
    return models


def adjusted(comparisons: Mapping[str, Comparison]) -> dict[str, float]:
    """p by metric path: the macro average is the declared question and keeps its p, the categories are adjusted
    together (Holm)."""
    p = {path: comparison.p for path, comparison in comparisons.items()}
    return {**p, **holm({path: value for path, value in p.items() if path not in HEADLINES.values()})}


def _table(cards: Mapping[str, Scorecard]) -> str:
    """Metrics down, models across."""
    cells = {
        name: {path: f"{cell.mean:.4f} [{cell.low:.3f}, {cell.high:.3f}]" for path, cell in card.metrics.items()}
        for name, card in cards.items()
    }
    return pd.DataFrame(cells).fillna("-").to_string()


def _comparison_table(comparisons: Mapping[str, Comparison]) -> str:
    p_values = adjusted(comparisons)
    cells = {
        path: {
            "difference": f"{value.difference:+.4f}",
            "interval": f"[{value.low:+.4f}, {value.high:+.4f}]",
            "p": f"{p_values[path]:.4f}",
            "prompts that differ": f"{value.discordant} of {value.n}",
        }
        for path, value in comparisons.items()
    }
    return pd.DataFrame(cells).T.to_string()


def report(
    folder: Path, against: Sequence[Path], trainings: Sequence[Path], *, images: Path | None, **intervals: Any
) -> str:
    """The text of the table and comparisons; also written beside the first scorecard, with the page where its images
    are given. `trainings` are other training seeds of the first model's recipe: with two or more of them the recipe
    gets its own intervals. `intervals`: seed, resamples and confidence, as `compare` takes them.

    Raises UserErrors for mixed detectors or prompt sets, for unlike image sets, or for images of different seeds."""
    models, recipe = _read([folder, *against]), _read([folder, *trainings])
    cards = {name: card for name, (card, _) in models.items()}
    scorecard.check_same_evaluator({**cards, **{f"training {name}": card for name, (card, _) in recipe.items()}})
    (name, (card, scores)), *others = models.items()
    expected: dict[str, set[tuple[str, int]]] = {}
    for row in scores:
        expected.setdefault(row.category, set()).add((row.example_id, row.k))
    lines = [_table(cards)]
    for other, (_, rows) in others:
        comparisons = scorecard.compare(scores, rows, expected=expected, **intervals)
        lines += ["", f"{name} minus {other}, image by image (p of the tasks adjusted by Holm):"]
        lines.append(_comparison_table(comparisons))
    if trainings:
        metrics = scorecard.over_trainings([rows for _, rows in recipe.values()], expected=expected, **intervals)
        lines += ["", f"over {len(recipe)} trainings, two-level bootstrap:"]
        lines.append(_table({f"{len(recipe)} trainings": Scorecard(name, {}, {}, metrics)}))
    identity: Mapping[str, Any] = card.identities.get("geneval", {})
    digest = str(identity.get("prompts"))[:12]
    samples = identity.get("images_per_prompt")
    lines += ["", f"set: {identity.get('set')}, images a prompt: {samples}, prompts sha256 {digest}"]
    text = "\n".join(lines)
    first = verdict_folder(folder)
    write_text(first / TABLE_FILE, text + "\n")
    if images is not None:
        _page(first, cards, scores, images)
    return text


def _page(folder: Path, cards: Mapping[str, Scorecard], scores: Sequence[ExampleScore], images: Path) -> None:
    from benchmarks.scores.page import Report, write_report

    rows = {row["filename"]: row for row in read_official_rows(folder / RESULTS_FILE)}
    records = {score.example_id: json.loads(rows[score.image]["metadata"]) for score in scores}
    report = Report(
        cards=cards,
        scores=scores,
        folder=images,
        prompts={score.example_id: rows[score.image]["prompt"] for score in scores},
        confusions=confusions(scores, records),
        per_category=PER_CATEGORY,
        files=[str(folder / scorecard.SCORES_FILE)],
    )
    write_report(folder / PAGE_FILE, report)
