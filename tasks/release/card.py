"""The text of a version: its description with figures and teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data.records import HEADLINES
from tasks.release import gate

LONGEST_DESCRIPTION = 5000  # PostgreSQL's column; SQLite would take more


def _number(metric: Mapping[str, Any] | None) -> str:
    mean = gate.finite((metric or {}).get("mean"))
    if mean is None:
        return "-"
    low, high = gate.finite((metric or {}).get("low")), gate.finite((metric or {}).get("high"))
    return f"{mean:.3f}" if low is None or high is None else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def teacher_metrics(validated: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Teacher -> metric path -> metric, from reports/validate.json (`teachers: {NAME: {"metrics": {...}}}`)."""
    teachers = validated.get("teachers")
    found = (
        {name: one.get("metrics") for name, one in teachers.items() if isinstance(one, Mapping)}
        if isinstance(teachers, Mapping)
        else {}
    )
    return {name: metrics for name, metrics in found.items() if isinstance(metrics, Mapping)}


def _cell(text: Any) -> str:
    return str(text).replace("|", "/").replace("\n", " ")


def description(
    scorecard: Mapping[str, Any],
    verdict: Mapping[str, Any],
    compared: tuple[str, Mapping[str, Any]] | None,
    teachers: Mapping[str, Mapping[str, Any]],
    origin: str,
    version: str | None,
    lineage: Sequence[str] = (),
) -> str:
    """Markdown that a reviewer can decide from, under 5000 characters: how to decide, scores with intervals, the
    verdict's rules, where the grids are.

    compared: (version, metrics) of the champion. teachers: name -> metrics. version: None while its number is unknown.
    lineage: lines about data, teachers and files. Rows and rules that do not fit are counted, never dropped in silence.
    """
    kept = sum(rule["passed"] for rule in verdict["rules"])
    command = f"`python -m tasks promote --version {version or 'N'} --reviewer NAME --reason TEXT`"
    here = "Decide here: set the tags `review.by`, `review.reason` and then `review.status` = `approved` or `rejected`."
    registered = f"{here} Or promote with {command}; refuse: the same with `reject`; undo: `python -m tasks rollback`."
    pictures = ["", *(line for line in lineage if line.startswith("!["))]  # below the tables: figures decide
    head = [
        f"**Gate: {'passed' if gate.has_passed(verdict) else 'refused'}**, {kept} of {len(verdict['rules'])} rules. {origin}",
        "",
        registered if gate.has_passed(verdict) else "Refused: kept as a run, registered as no version.",
        "Sample grids and the report page: the source run's artifacts, folder `report`.",
        *(line for line in lineage if line and line not in pictures),
        "",
    ]
    metrics = scorecard["metrics"]
    order = [path for path in gate.PATHS if path in metrics] + sorted(
        path for path in metrics if path not in gate.PATHS
    )
    order.sort(
        key=lambda path: not path.startswith("retention/") and path not in HEADLINES.values()
    )  # what decides comes first
    titles = ["metric", "candidate", f"champion (v{compared[0]})" if compared else "champion (none)", *teachers]
    table = ["| " + " | ".join(map(_cell, titles)) + " |", "|---" * len(titles) + "|"]
    for path in order:
        others = [compared[1] if compared else {}, *teachers.values()]
        table.append(
            "| " + " | ".join([path, _number(metrics[path]), *(_number(other.get(path)) for other in others)]) + " |"
        )
    rules = ["", "| rule | outcome | value | bound |", "|---|---|---|---|"]
    for rule in sorted(verdict["rules"], key=lambda rule: rule["passed"]):
        shown = [
            f"{value:.4g}" if isinstance(value, float) else _cell("-" if value is None else value)[:12]
            for value in (rule["value"], rule["bound"])
        ]
        rules.append(f"| {rule['rule']} | {'pass' if rule['passed'] else '**FAIL**'} | {shown[0]} | {shown[1]} |")
    text = head
    for block, name in ((table, "metrics are in scorecard.json"), (rules, "rules are in verdict.json")):
        for index, line in enumerate(block):
            if len("\n".join([*text, line, *pictures])) > LONGEST_DESCRIPTION - 200:
                text = [*text, "", f"({len(block) - index} more {name})", ""]
                break
            text = [*text, line]
    return "\n".join([*text, *pictures])[: LONGEST_DESCRIPTION - 1]
