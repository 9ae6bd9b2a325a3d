"""What `python -m benchmarks geneval report` prints and writes: a model's table, its paired comparisons with others,
and its page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.geneval.confusion import confusions
from benchmarks.geneval.run import SCORECARD_FILE, VERDICT
from benchmarks.scores.scorecard import (
    SCORES_FILE,
    ExampleScore,
    Scorecard,
    check_same_evaluator,
    compare,
    over_trainings,
    read_scorecard,
    read_scores,
)
from benchmarks.scores.statistics import Comparison, holm
from data.errors import UserError
from data.files import write_text
from data.records import HEADLINES

PAGE_FILE, TABLE_FILE = "report.html", "report.txt"
PER_CATEGORY = 6  # best and worst images that the page shows of a task


def verdict_folder(folder: Path) -> Path:
    """The folder that holds the scorecard: the one given, or `verdict` in it. Raises UserError where neither does."""
    for candidate in (folder, folder / VERDICT):
        if (candidate / SCORECARD_FILE).exists():
            return candidate
    raise UserError(f"{folder}: no {SCORECARD_FILE} in it or in {VERDICT}/; run the verdict step first")


def _named(folders: Sequence[Path]) -> dict[str, tuple[Scorecard, list[ExampleScore]]]:
    """Name -> scorecard and rows; two models of one name are told apart by their folder."""
    found: dict[str, tuple[Scorecard, list[ExampleScore]]] = {}
    for folder in folders:
        card = read_scorecard(folder / SCORECARD_FILE)
        name = card.model if card.model not in found else f"{card.model} ({folder})"
        if name in found:
            raise UserError(f"{folder}: given twice; name every folder once")
        found[name] = card, read_scores(folder)
    return found


def adjusted(comparisons: Mapping[str, Comparison]) -> dict[str, float]:
    """p by metric path: the macro average is the declared question and keeps its own, the categories are adjusted
    together (Holm).
    """
    primary = {path: one.p for path, one in comparisons.items() if path in HEADLINES.values()}
    return {**primary, **holm({path: one.p for path, one in comparisons.items() if path not in primary})}


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
    folder: Path,
    against: Sequence[Path],
    trainings: Sequence[Path],
    *,
    images: Path | None,
    seed: int,
    resamples: int,
    confidence: float,
) -> str:
    """The text of the table and comparisons; also written beside the first scorecard, with the page where its images
    are given. `trainings` are other training seeds of the first model's recipe: with two or more of them the recipe
    gets intervals of its own.

    Raises UserErrors for mixed detectors or prompt sets, for unlike image sets, or for images of different seeds.
    """
    first = verdict_folder(folder)
    models = _named([first, *(verdict_folder(other) for other in against)])
    again = _named([first, *(verdict_folder(other) for other in trainings)])
    cards = {name: card for name, (card, _) in models.items()}
    check_same_evaluator({**cards, **{f"training {name}": card for name, (card, _) in again.items()}})
    (name, (card, scores)), *others = models.items()
    lines = [_table(cards)]
    expected: dict[str, set[tuple[str, int]]] = {}
    for row in scores:
        expected.setdefault(row.category, set()).add((row.example_id, row.k))
    for other, (_, rows) in others:
        comparisons = compare(scores, rows, expected=expected, seed=seed, resamples=resamples, confidence=confidence)
        lines += ["", f"{name} minus {other}, image by image (p of the tasks adjusted by Holm):"]
        lines.append(_comparison_table(comparisons))
    if trainings:
        lines += ["", f"over {len(again)} trainings, two-level bootstrap:"]
        metrics = over_trainings(
            [rows for _, rows in again.values()],
            expected=expected,
            seed=seed,
            resamples=resamples,
            confidence=confidence,
        )
        lines.append(_table({f"{len(again)} trainings": Scorecard(name, {}, {}, metrics)}))
    identity: Mapping[str, Any] = card.identities.get("geneval", {})
    lines += [
        "",
        f"set: {identity.get('set')}, images a prompt: {identity.get('images_per_prompt')}, prompts sha256 {str(identity.get('prompts'))[:12]}",
    ]
    text = "\n".join(lines)
    write_text(first / TABLE_FILE, text + "\n")
    if images is not None:
        _page(first, cards, scores, images)
    return text


def _page(folder: Path, cards: Mapping[str, Scorecard], scores: Sequence[ExampleScore], images: Path) -> None:
    from benchmarks.geneval.run import RESULTS_FILE, read_official_rows
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
        files=[str(folder / SCORES_FILE)],
    )
    write_report(folder / PAGE_FILE, report)
