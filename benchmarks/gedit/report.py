"""The report of a judged folder: the shared page, with what is particular to a judge: who it was, what it left out, how
steady it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gedit.verdict import Judgements, column_scorecard, columns, drift, read_judgements, repeat_noise
from benchmarks.judge.wording import Wording
from benchmarks.scores.page import Report, write_report
from benchmarks.scores.scorecard import Scorecard, check_same_evaluator, read_scorecard


def notes_of(
    judgements: Judgements, column: str, *, allow_partial: bool, seed: int, resamples: int, confidence: float
) -> list[str]:
    """Sentences below the headline: the judge, what has no score and how far that could move the average, the other
    columns, the judge's noise and drift.
    """
    identity, table = judgements.identity, columns(judgements, allow_partial=allow_partial)
    found = table[column]
    notes = [
        f"Column {column}. Judge: {judgements.answered_by or identity['model']} ({identity['kind']}, {identity['provider']}), "
        f"wording {identity['wording']['name']}, "
        f"{judgements.repeats} judgement(s) an image, images {identity['resize']}."
    ]
    if not isinstance(found, str):
        means = found.average
        statuses = ", ".join(f"{count} {status}" for status, count in sorted(means.statuses.items()))
        notes.append(
            f"Scores: {statuses}; coverage {means.coverage:.1%}. "
            f"Had the images without a score earned 0 or 10, the average would be {means.low:.2f} or {means.high:.2f}."
        )
    others = [
        f"{name} {means.average.overall:.2f} (n={means.average.n})"
        for name, means in table.items()
        if name != column and not isinstance(means, str)
    ]
    if others:
        notes.append(f"Other columns of the same judgements: {', '.join(others)}.")
    stretched = sum(entry.stretched for entry, _ in judgements.samples)
    if stretched:
        notes.append(
            f"{stretched} edited images have another aspect than their source; they were judged as {identity['resize']} says."
        )
    noise, moved = repeat_noise(judgements), drift(judgements, seed=seed, resamples=resamples, confidence=confidence)
    if noise and noise["within"] is not None:
        spread = f"standard deviation {noise['within']:.2f} within an image, {noise['of_mean']:.3f} of the mean over {noise['samples']} images"
        notes.append(f"The judge's own noise: {spread}.")
    if moved and moved["difference"] is not None:
        word = "The judge has drifted" if moved["drifted"] else "No drift of the judge is visible"
        notes.append(
            f"{word}: anchors {moved['difference']:+.2f} [{moved['low']:+.2f}, {moved['high']:+.2f}] on {moved['n']} images since they were frozen."
        )
    return notes


def write_gedit_report(
    path: str | Path,
    folder: str | Path,
    wording: Wording,
    column: str,
    beside: Sequence[Path],
    *,
    allow_partial: bool,
    seed: int,
    resamples: int,
    confidence: float,
) -> None:
    """Writes the page for one column of a folder of judgements, beside the scorecards of other models.

    Raises UserErrors for a scorecard that was judged by another judge or on other rows: their figures may not share a
    table.
    """
    judgements = read_judgements(folder, wording)
    numbers: dict[str, Any] = {"seed": seed, "resamples": resamples, "confidence": confidence}
    card, rows = column_scorecard(judgements, column, allow_partial=allow_partial, **numbers)
    cards: dict[str, Scorecard] = {card.model: card}
    for file in beside:
        other = read_scorecard(file)
        name = other.model if other.model not in cards else f"{other.model} ({file.parent.name})"
        cards[name] = other
    check_same_evaluator(cards)
    entries = {entry.id: entry for entry, _ in judgements.samples}
    report = Report(
        cards=cards,
        scores=rows,
        folder=Path(folder),
        prompts={row.example_id: entries[row.example_id].instruction for row in rows},
        images={row.example_id: [("source", Path(folder) / entries[row.example_id].source)] for row in rows},
        title=f"GEdit-Bench: {card.model}",
        notes=notes_of(judgements, column, allow_partial=allow_partial, **numbers),
        files=["scores.parquet"],
    )
    write_report(path, report)
