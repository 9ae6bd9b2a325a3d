"""How a run ended, for a person at a terminal: the scorecard beside the teachers, the verdict with every rule, and
where to look.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data.files import read_json
from data.records import HEADLINES

LOG_WIDTH = 150  # columns where no terminal says otherwise
PLACES = {
    "report": "reports/score/report.html",
    "images": "reports/score",
    "scorecard": "reports/scorecard.json",
    "verdict": "reports/verdict.json",
}


def failure_line(error: object, message: str | None) -> str:
    """One clear message for a flow that did not complete."""
    return (
        str(error)
        if isinstance(error, BaseException) and str(error)
        else message or "the flow failed; its log is above"
    )


def print_outcome(
    project: Path,
    *,
    verdict: dict[str, Any],
    registered: dict[str, Any],
    champion: dict[str, float | None],
    console: Console | None = None,
) -> None:
    """Reads the reports of `project`; prints tables and paths. `champion`: metric path -> mean of the champion before
    this run, empty if there was none.
    """
    console = console or Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    teachers = teacher_means(project / "reports" / "validate.json")
    console.print(
        _scores(
            read_json(project / "reports" / "scorecard.json"),
            {"champion before": champion, **teachers} if champion else teachers,
        )
    )
    console.print(_rules(verdict))
    table = Table(title="registered", show_header=False)
    for key, value in registered.items():
        if not isinstance(value, (dict, list)):
            table.add_row(Text(str(key)), Text(str(value)))
    console.print(table)
    for label, path in PLACES.items():
        if (project / path).exists():
            console.print(f"{label:10} {project / path}", markup=False, highlight=False, soft_wrap=True)
    console.print("MLflow     make ui, then open http://127.0.0.1:5000", markup=False, highlight=False)


def teacher_means(path: Path) -> dict[str, dict[str, float | None]]:
    """Teacher -> metric path -> mean, from reports/validate.json."""
    teachers = read_json(path).get("teachers", {}) if path.exists() else {}
    return {
        name: {key: metric["mean"] for key, metric in scored["metrics"].items()}
        for name, scored in teachers.items()
        if scored.get("metrics")
    }


def _scores(scorecard: dict[str, Any], others: dict[str, dict[str, float | None]]) -> Table:
    metrics = scorecard["metrics"]
    table = Table(title=str(scorecard["model"]))
    table.add_column("metric")
    for column in ("student", "interval", "n", *others):
        table.add_column(column, justify="right")
    headlines = HEADLINES.values()
    for path in sorted(metrics, key=lambda path: (path not in headlines, not path.startswith("retention/"), path)):
        metric = metrics[path]
        interval = f"{_number(metric['low'])} to {_number(metric['high'])}"
        beside = [_number(means.get(path)) for means in others.values()]
        table.add_row(
            Text(path, style="bold" if path in headlines else ""),
            _number(metric["mean"]),
            interval,
            str(metric["n"]),
            *beside,
        )
    return table


def _rules(verdict: dict[str, Any]) -> Table:
    table = Table(title="the candidate passed the gate" if verdict["passed"] else "the candidate was refused")
    for column in ("rule", "", "value", "bound", "reason"):
        table.add_column(column)
    for rule in verdict["rules"]:
        mark = Text("passed", style="green") if rule["passed"] else Text("failed", style="bold red")
        table.add_row(
            Text(str(rule["rule"])), mark, _number(rule["value"]), _number(rule["bound"]), Text(str(rule["reason"]))
        )
    return table


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)
