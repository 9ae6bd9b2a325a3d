"""`python -m tasks COMMAND ...`: stages, checks, presets, review; data/commands.py says how they end."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from data import commands
from data.files import write_json
from data.yaml_files import flatten
from tasks.environment import prepare
from tasks.params.reading import PARAMS_FILE, load_params
from tasks.stages.contract import STAGES, load_stage

SUMMARIES = Path("runs/summaries")
# Name -> (module of tasks/ with `cli(arguments)`, purpose). Imported only to run the command: torch costs seconds.
COMMANDS = {
    "check": ("checks.preflight", "check params.yaml, the routes and the teachers they name"),
    "preset": ("params.presets", "put presets/NAME.yaml in force as params.yaml"),
    "schema": ("params.schema", "write params.schema.json, with which editors check and explain params.yaml"),
    "plan": ("checks.plan", "what params.yaml would run: stages, cache, evaluations, memory, time"),
    "export": ("student.export", "write a student as diffusers pipeline, PEFT adapter, ComfyUI file or merged network"),
    "sample": ("student.sample", "draw images from a student"),
    "sample-set": ("student.sample_set", "sample a list of prompts with one model into a folder"),
    "registry": ("release.decisions", "list the registered versions, their aliases and the ledger"),
    "promote": ("release.decisions", "make a reviewed version the champion"),
    "reject": ("release.decisions", "refuse a candidate version"),
    "rollback": ("release.decisions", "return to the previous champion"),
    "approve": ("release.decisions", "note an approval on a version, as its page would"),
    "review": ("release.decisions", "act on the approvals and refusals given on the versions' pages"),
    "reconcile": ("release.decisions", "make aliases and reviews say what the ledger says"),
    "secrets": ("credentials", "make the servers' passwords into a file"),
    "rescore": ("checks.rescore", "score one checkpoint again"),
    "publish": ("release.publish", "publish the champion to S3 and point at it"),
    "fetch": ("release.publish", "fetch what is published, every file verified"),
    "lineage": ("checks.lineage", "where a version comes from, verified; or which versions come from a digest"),
    "doctor": ("checks.doctor", "check this machine, the stores and the servers"),
}
SEVERAL = ("release.decisions", "release.publish")  # modules of several commands: their `cli` takes the name first
TABLE_ROWS = 40


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status, as data.commands.run does."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    prepare()
    return commands.run(lambda: _dispatch(arguments))


def _dispatch(arguments: list[str]) -> int:
    name, *others = arguments or ["--help"]
    if name in STAGES:
        return _run_stage(name, others)
    if name in COMMANDS:
        module = COMMANDS[name][0]
        return int(importlib.import_module(f"tasks.{module}").cli(arguments if module in SEVERAL else others) or 0)
    stages = {stage: _first_line(stage) for stage in STAGES}
    groups = {"stages, in order": stages, "other commands": {name: text for name, (_, text) in COMMANDS.items()}}
    return commands.overview("python -m tasks COMMAND", name, groups)


def _run_stage(name: str, arguments: list[str]) -> int:
    stage = load_stage(name)
    text = inspect.getdoc(stage.function) or inspect.getdoc(sys.modules[stage.function.__module__]) or ""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"python -m tasks {name}", description=text, formatter_class=layout)
    for path in stage.paths:
        parser.add_argument(f"--{path.replace('_', '-')}", dest=path, type=Path, required=True, metavar="PATH")
    text = "the parameters' file (default: %(default)s)"
    parser.add_argument("--params", type=Path, default=Path(PARAMS_FILE), metavar="FILE", help=text)
    parsed = parser.parse_args(arguments)
    params: Any = load_params(stage.params, name, parsed.params)
    summary = plain(stage.function(params, **{path: getattr(parsed, path) for path in stage.paths}))
    write_json(SUMMARIES / f"{name}.json", summary)
    print_table(name, summary)
    return 0


def _first_line(name: str) -> str:
    """From the module's text: importing eight stages to list them would take half a minute."""
    path = Path(__file__).with_name("stages") / f"{name}.py"
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    sentence = " ".join(text.split("\n\n")[0].split()).partition(": ")[2].partition(". ")[0]
    return shorten(sentence.rstrip("."), 106, placeholder=" ...")


# --- what is shown and kept -------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A JSON value: paths as text, array scalars as numbers, numbers that are not finite as null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    return plain(value.item()) if hasattr(value, "item") else str(value)


def print_table(title: str, summary: dict[str, Any]) -> None:
    """A table in a terminal, plain lines in a log; the first `TABLE_ROWS` values of a long summary."""
    flat = list(flatten(summary).items())
    rows = [(key, f"{value:.4g}" if isinstance(value, float) else str(value)) for key, value in flat[:TABLE_ROWS]]
    rows = [(key, text if len(text) <= 100 else text[:97] + "...") for key, text in rows]
    if len(flat) > TABLE_ROWS:
        rows.append(("...", f"{len(flat) - TABLE_ROWS} more in {SUMMARIES / title}.json"))
    if not sys.stdout.isatty():
        print("\n".join(f"{title}: {key} = {text}" for key, text in rows), flush=True)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, show_header=False)
    for key, text in rows:
        table.add_row(Text(key), Text(text))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
