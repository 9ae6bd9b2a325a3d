"""The report of a judged folder: the shared page, with what is particular to a judge: who it was, what it left out, how
steady it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gedit.verdict import Judgements, column_scorecard, columns, drift, repeat_noise
from benchmarks.scores.page import Report, write_report
from benchmarks.scores.scorecard import Scorecard, check_same_evaluator, read_scorecard


def notes_of(judgements: Judgements, column: str, *, allow_partial: bool, **bootstrap: Any) -> list[str]:
    """Sentences below the headline: the judge, what has no score and how far that could move the average, the other
    columns, the judge's noise and drift."""
    identity, table = judgements.identity, columns(judgements, allow_partial=allow_partial)
    judge = f"{judgements.answered_by or identity['model']} ({identity['kind']}, {identity['provider']})"
    how = f"{judgements.about['repeats']} judgement(s) an image, images {identity['resize']}"
    notes = [f"Column {column}. Judge: {judge}, wording {identity['wording']['name']}, {how}."]
    aggregate = table.pop(column)
    if not isinstance(aggregate, str):
        means = aggregate.average
        statuses = ", ".join(f"{count} {status}" for status, count in sorted(means.statuses.items()))
        bounds = f"the average would be {means.low:.2f} or {means.high:.2f}"
        scores = f"Scores: {statuses}; coverage {means.coverage:.1%}."
        notes.append(f"{scores} Had the images without a score earned 0 or 10, {bounds}.")
    averages = {name: other.average for name, other in table.items() if not isinstance(other, str)}
    if averages:
        others = ", ".join(f"{name} {means.overall:.2f} (n={means.n})" for name, means in averages.items())
        notes.append(f"Other columns of the same judgements: {others}.")
    stretched = sum(entry.stretched for entry, _ in judgements.samples)
    if stretched:
        judged = f"they were judged as {identity['resize']} says"
        notes.append(f"{stretched} edited images have another aspect than their source; {judged}.")
    noise, change = repeat_noise(judgements), drift(judgements, **bootstrap)
    if noise and noise["within"] is not None:
        of_mean = f"{noise['of_mean']:.3f} of the mean over {noise['samples']} images"
        notes.append(f"The judge's own noise: standard deviation {noise['within']:.2f} within an image, {of_mean}.")
    if change and change["difference"] is not None:
        verdict = "The judge has drifted" if change["drifted"] else "No drift of the judge is visible"
        interval = f"{change['difference']:+.2f} [{change['low']:+.2f}, {change['high']:+.2f}]"
        notes.append(f"{verdict}: anchors {interval} on {change['n']} images since they were frozen.")
    return notes


def write_gedit_report(
    path: Path, judgements: Judgements, column: str, beside: Sequence[Path], *, allow_partial: bool, **bootstrap: Any
) -> None:
    """Writes the page for one column of the judgements, beside the scorecards of other models. `bootstrap`: see
    `summarise`. Raises UserErrors for a scorecard by another judge or on other rows: they may not share a table."""
    card, rows = column_scorecard(judgements, column, allow_partial=allow_partial, **bootstrap)
    cards: dict[str, Scorecard] = {card.model: card}
    for file in beside:
        other = read_scorecard(file)
        cards[other.model if other.model not in cards else f"{other.model} ({file.parent.name})"] = other
    check_same_evaluator(cards)
    entries = {entry.id: entry for entry, _ in judgements.samples}
    folder, ids = judgements.folder, [row.example_id for row in rows]
    report = Report(
        cards=cards,
        scores=rows,
        folder=folder,
        prompts={name: entries[name].instruction for name in ids},
        images={name: [("source", folder / entries[name].source)] for name in ids},
        title=f"GEdit-Bench: {card.model}",
        notes=notes_of(judgements, column, allow_partial=allow_partial, **bootstrap),
        files=["scores.parquet"],
    )
    write_report(path, report)
