"""The text of a version: its description with figures and teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data.records import HEADLINES
from tasks.release import gate

LONGEST_DESCRIPTION = 5000  # PostgreSQL's column; SQLite would take more
Metrics = Mapping[str, Any]  # metric path -> {"mean", "low", "high", ...}


def description(
    metrics: Metrics,
    verdict: Mapping[str, Any],
    others: Mapping[str, Metrics],
    lineage: Sequence[str],
    version: str | None = None,
) -> str:
    """Markdown that a reviewer can decide from, under 5000 characters: how to decide, scores with intervals, the
    verdict's rules, where the grids are.

    metrics: the candidate's. others: column title -> metrics, of the champion and the teachers. lineage: a line about
    the code, then those about data, teachers, files. version: None while its number is unknown. Rows and rules that do
    not fit are counted, never dropped in silence.
    """
    rules, passed = sorted(verdict["rules"], key=lambda rule: rule["passed"]), gate.has_passed(verdict)
    command = f"`python -m tasks promote --version {version or 'N'} --reviewer NAME --reason TEXT`"
    here = "Decide here: set the tags `review.by`, `review.reason` and then `review.status` = `approved` or `rejected`."
    registered = f"{here} Or promote with {command}; refuse: the same with `reject`; undo: `python -m tasks rollback`."
    pictures = ["", *(line for line in lineage if line.startswith("!["))]  # below the tables: figures decide
    kept = f"{sum(rule['passed'] for rule in rules)} of {len(rules)} rules"
    text = [
        f"**Gate: {'passed' if passed else 'refused'}**, {kept}. {lineage[0]}",
        "",
        registered if passed else "Refused: kept as a run, registered as no version.",
        "Sample grids and the report page: the source run's artifacts, folder `report`.",
        *(line for line in lineage[1:] if line and line not in pictures),
        "",
    ]
    known = [path for path in gate.PATHS if path in metrics]
    paths = sorted([*known, *sorted(metrics.keys() - set(known))], key=lambda path: not _decides(path))
    table = [_row("metric", "candidate", *others), "|---" * (2 + len(others)) + "|"]
    table += [_row(path, *(_number(column.get(path)) for column in (metrics, *others.values()))) for path in paths]
    outcomes = ["", "| rule | outcome | value | bound |", "|---|---|---|---|"]
    for rule in rules:
        shown = (_short(rule["value"]), _short(rule["bound"]))
        outcomes.append(_row(rule["rule"], "pass" if rule["passed"] else "**FAIL**", *shown))
    for block, rest in ((table, "metrics are in scorecard.json"), (outcomes, "rules are in verdict.json")):
        for index, line in enumerate(block):
            if len("\n".join([*text, line, *pictures])) > LONGEST_DESCRIPTION - 200:
                text += ["", f"({len(block) - index} more {rest})", ""]
                break
            text.append(line)
    return "\n".join([*text, *pictures])[: LONGEST_DESCRIPTION - 1]


def _decides(path: str) -> bool:
    return path.startswith("retention/") or path in HEADLINES.values()


def _row(*cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else ("-" if value is None else str(value))[:12]


def _number(metric: Mapping[str, Any] | None) -> str:
    mean, low, high = (gate.finite((metric or {}).get(key)) for key in ("mean", "low", "high"))
    if mean is None:
        return "-"
    return f"{mean:.3f}" if low is None or high is None else f"{mean:.3f} [{low:.3f}, {high:.3f}]"
