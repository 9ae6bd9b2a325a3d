"""`python -m tasks COMMAND ...`: every stage by its name, the check of params.yaml, presets, and the reviewer's
commands.

A user's mistake is one clear message on stderr and exit status 2; an outage, worth another try, is one line and 75
(EX_TEMPFAIL of sysexits.h); Ctrl-C is one line and 130. Anything else is a defect and keeps its traceback.
"""

from __future__ import annotations

import argparse
import ast
import errno
import importlib
import inspect
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from data.errors import TRY_AGAIN, Outage, Terminated, UserError
from data.files import explain, write_json, write_text
from data.yaml_files import read_yaml
from tasks.environment import prepare
from tasks.params.presets import preset_file, preset_names, preset_text
from tasks.params.reading import PARAMS_FILE, load_params
from tasks.stages.contract import STAGES, load_stage

SUMMARIES = Path("runs/summaries")
OTHERS = {
    "check": "check params.yaml, the routes and the teachers they name",
    "preset": "put presets/NAME.yaml in force as params.yaml",
    "schema": "write params.schema.json, with which editors check and explain params.yaml",
}
TOOLS = {  # modules with a `cli(argv)` of their own
    "plan": "what params.yaml would run: stages, cache, evaluations, memory, time",
    "export": "write a student as diffusers pipeline, PEFT adapter, ComfyUI file or merged network",
    "sample": "draw images from a student",
    "sample-set": "sample a list of prompts with one model into a folder",
}
TOOL_ROOMS = {"plan": "checks", "export": "student", "sample": "student", "sample-set": "student"}
REGISTRY = {
    "registry": "list the registered versions, their aliases and the ledger",
    "promote": "make a reviewed version the champion",
    "reject": "refuse a candidate version",
    "rollback": "return to the previous champion",
    "approve": "note an approval on a version, as its page would",
    "review": "act on the approvals and refusals given on the versions' pages",
    "reconcile": "make aliases and reviews say what the ledger says",
}
SERVERS = {
    "secrets": ("credentials", "make the servers' passwords into a file"),
    "rescore": ("checks.rescore", "score one checkpoint again"),
    "publish": ("release.publish", "publish the champion to S3 and point at it"),
    "fetch": ("release.publish", "fetch what is published, every file verified"),
    "lineage": ("checks.lineage", "where a version comes from, verified; or which versions come from a digest"),
    "doctor": ("checks.doctor", "check this machine, the stores and the servers"),
}
TABLE_ROWS = 40
REFUSALS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.EISDIR,
    errno.ENOTDIR,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status.

    0 done, 2 a user's mistake, 75 an outage (try again), 130 interrupted, 143 terminated.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    prepare()
    try:
        return _dispatch(arguments)
    except Terminated as error:
        return _refuse(str(error), 143)
    except UserError as error:
        return _refuse(str(error), TRY_AGAIN if isinstance(error, Outage) else 2)
    except KeyboardInterrupt as error:
        return _refuse(
            str(error) or "interrupted; nothing half-written was left, the same command goes on from there", 130
        )
    except _Terminated:
        return _refuse("terminated; nothing half-written was left, the same command goes on from there", 143)
    except MemoryError:
        return _refuse(
            "not enough memory; lower the batch or the model's size in params.yaml, or close other programs", 2
        )
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        return _refuse(str(explain(error, Path(os.fsdecode(error.filename or ".")))), 2)
    except RuntimeError as error:
        if "allocate memory" not in str(error) and "out of memory" not in str(error):  # how torch says MemoryError
            raise
        return _refuse(
            f"not enough memory ({str(error).splitlines()[0]}); lower the batch or the model's size in params.yaml", 2
        )


def _dispatch(arguments: list[str]) -> int:
    command = arguments[0] if arguments else "--help"
    if command in STAGES:
        return _run_stage(command, arguments[1:])
    if command == "check":
        return _check(arguments[1:])
    if command == "preset":
        return _preset(arguments[1:])
    if command == "schema":
        return _schema(arguments[1:])
    if command in TOOLS:
        signal.signal(signal.SIGTERM, _terminate)
        return int(
            importlib.import_module(f"tasks.{TOOL_ROOMS[command]}.{command.replace('-', '_')}").cli(arguments[1:]) or 0
        )
    if command in REGISTRY:
        from tasks.release import decisions

        return int(decisions.cli(arguments) or 0)
    if command in SERVERS:
        module = importlib.import_module(f"tasks.{SERVERS[command][0]}")
        return int(module.cli(arguments if SERVERS[command][0] == "release.publish" else arguments[1:]))
    return _overview(command)


# --- commands ---------------------------------------------------------------------------------------------------------


def _run_stage(name: str, arguments: list[str]) -> int:
    stage = load_stage(name)
    text = inspect.getdoc(stage.function) or inspect.getdoc(sys.modules[stage.function.__module__]) or ""
    parser = argparse.ArgumentParser(
        f"python -m tasks {name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for path in stage.paths:
        parser.add_argument(f"--{path.replace('_', '-')}", dest=path, type=Path, required=True, metavar="PATH")
    parser.add_argument(
        "--params",
        type=Path,
        default=Path(PARAMS_FILE),
        metavar="FILE",
        help="the parameters' file (default: %(default)s)",
    )
    parsed = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _terminate)
    params: Any = load_params(stage.params, name, parsed.params)
    summary = plain(stage.function(params, **{path: getattr(parsed, path) for path in stage.paths}))
    write_json(SUMMARIES / f"{name}.json", summary)
    print_table(name, summary)
    return 0


def _check(arguments: list[str]) -> int:
    from tasks.checks.preflight import preflight

    parser = argparse.ArgumentParser(
        "python -m tasks check",
        description="Check every section of params.yaml, the routes and the teachers they name.",
    )
    parser.add_argument("--params", type=Path, default=Path(PARAMS_FILE), metavar="FILE")
    path = parser.parse_args(arguments).params
    preflight(path)
    print(f"{path}: no fault found")
    return 0


def _preset(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m tasks preset", description="Put presets/NAME.yaml in force as params.yaml, after checking it."
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"one of: {', '.join(preset_names()) or 'none found'}")
    parser.add_argument(
        "--params",
        type=Path,
        default=Path(PARAMS_FILE),
        metavar="FILE",
        help="the file to replace (default: %(default)s)",
    )
    parsed = parser.parse_args(arguments)
    source = preset_file(parsed.name)
    from tasks.checks.preflight import check_all

    check_all(source)
    before = flatten(read_yaml(parsed.params)) if parsed.params.exists() else {}
    after = flatten(read_yaml(source))
    write_text(parsed.params, preset_text(parsed.name))
    changed = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    for key in changed:
        print(f"{key}: {before.get(key, '(none)')} -> {after.get(key, '(none)')}")
    print(
        f"{parsed.params} is now {source}: {len(changed)} value{'s' if len(changed) != 1 else ''} changed. The old file is in git: git diff {parsed.params}"
    )
    from tasks.checks.preflight import TEACHERS, folder_faults, teacher_faults

    document = read_yaml(parsed.params)
    for fault in [*teacher_faults(document, TEACHERS), *folder_faults(document, Path.cwd())]:
        print(f"to do before it runs: {fault}")
    return 0


def _schema(arguments: list[str]) -> int:
    from tasks.params.schema import FILE, schema

    parser = argparse.ArgumentParser(
        "python -m tasks schema", description="Write the JSON Schema of params.yaml, for editors."
    )
    parser.add_argument("--out", type=Path, default=FILE, metavar="FILE", help="(default: %(default)s)")
    path = parser.parse_args(arguments).out
    write_json(path, schema())
    print(f"{path}: written; an editor with a YAML language server reads it for params.yaml and the presets")
    return 0


def _overview(command: str) -> int:
    servers = {name: text for name, (_, text) in SERVERS.items()}
    lines = ["usage: python -m tasks COMMAND [--help]", "", "stages, in order:"]
    lines += [f"  {name:10}{_first_line(name)}" for name in STAGES]
    lines += [
        "",
        "other commands:",
        *(f"  {name:12}{text}" for name, text in {**OTHERS, **TOOLS, **REGISTRY, **servers}.items()),
    ]
    if command in ("-h", "--help", "help"):
        print("\n".join(lines))
        return 0
    from difflib import get_close_matches

    near = get_close_matches(command, [*STAGES, *OTHERS, *TOOLS, *REGISTRY, *SERVERS], n=1)
    raise UserError(f"unknown command {command!r}{f'; did you mean {near[0]!r}?' if near else ''}\n" + "\n".join(lines))


def _first_line(name: str) -> str:
    """From the module's text: importing eight stages to list them would take half a minute."""
    path = Path(__file__).with_name("stages") / f"{name}.py"
    if not path.exists():
        return ""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]


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


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists stay whole."""
    if not isinstance(value, dict):
        return {key: value}
    return {
        inner: item
        for name, part in value.items()
        for inner, item in flatten(part, f"{key}.{name}" if key else str(name)).items()
    }


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


# --- endings ----------------------------------------------------------------------------------------------------------


class _Terminated(BaseException):
    pass


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated  # so that temporary files are removed on the way out


def _refuse(message: str, status: int) -> int:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
