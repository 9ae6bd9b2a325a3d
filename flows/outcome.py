"""How a run ended, for a person at a terminal: the scorecard beside the teachers, the verdict with every rule, and
where to look."""

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
Means = dict[str, float | None]  # metric path -> mean


def print_outcome(project: Path, *, verdict: dict[str, Any], registered: dict[str, Any], champion: Means) -> None:
    """Prints the reports of `project`. `champion`: the means of the champion before this run, if any."""
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    teachers = teacher_means(project / "reports" / "validate.json")
    others = {"champion before": champion, **teachers} if champion else teachers
    console.print(_scores(read_json(project / "reports" / "scorecard.json"), others))
    console.print(_rules(verdict))
    table = Table(title="registered", show_header=False)
    for key, value in registered.items():
        if not isinstance(value, (dict, list)):
            table.add_row(Text(str(key)), Text(str(value)))
    console.print(table)
    for label, path in PLACES.items():
        if (project / path).exists():
            print(f"{label:10} {project / path}")
    print("MLflow     make ui, then open http://127.0.0.1:5000")


def teacher_means(path: Path) -> dict[str, Means]:
    """Teacher -> its means, from reports/validate.json; without the teachers that were not scored."""
    teachers = read_json(path).get("teachers", {}) if path.exists() else {}
    metrics = {name: scored["metrics"] for name, scored in teachers.items() if scored.get("metrics")}
    return {name: {key: metric["mean"] for key, metric in values.items()} for name, values in metrics.items()}


def _scores(scorecard: dict[str, Any], others: dict[str, Means]) -> Table:
    metrics = scorecard["metrics"]
    table = Table(title=str(scorecard["model"]))
    table.add_column("metric")
    for column in ("student", "interval", "n", *others):
        table.add_column(column, justify="right")
    for path in sorted(
        metrics, key=lambda path: (path not in HEADLINES.values(), not path.startswith("retention/"), path)
    ):
        metric, name = metrics[path], Text(path, style="bold" if path in HEADLINES.values() else "")
        interval = f"{_number(metric['low'])} to {_number(metric['high'])}"
        beside = [_number(means.get(path)) for means in others.values()]
        table.add_row(name, _number(metric["mean"]), interval, str(metric["n"]), *beside)
    return table


def _rules(verdict: dict[str, Any]) -> Table:
    table = Table(title="the candidate passed the gate" if verdict["passed"] else "the candidate was refused")
    for column in ("rule", "", "value", "bound", "reason"):
        table.add_column(column)
    for rule in verdict["rules"]:
        mark = Text("passed", style="green") if rule["passed"] else Text("failed", style="bold red")
        name, reason = Text(str(rule["rule"])), Text(str(rule["reason"]))
        table.add_row(name, mark, _number(rule["value"]), _number(rule["bound"]), reason)
    return table


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)
