"""The presets: whole parameter files by name, kept in presets/NAME.yaml."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from data.errors import UserError
from data.files import write_text
from data.yaml_files import flatten, read_yaml
from tasks.params.reading import PARAMS_FILE

PRESETS = Path("presets")


def preset_names(project: Path = Path()) -> list[str]:
    return sorted(file.stem for file in (project / PRESETS).glob("*.yaml"))


def preset_file(name: str | None, project: Path = Path()) -> Path:
    """Raises UserError for a name that is none."""
    known = preset_names(project)
    if name in known:
        return project / PRESETS / f"{name}.yaml"
    given = "no preset named" if name is None else f"unknown preset {name!r}"
    raise UserError(f"{given}; choose of {', '.join(known) or f'(there are none in {PRESETS})'}")


def preset_text(name: str | None, project: Path = Path()) -> str:
    """The preset as params.yaml of `project` would hold it."""
    text = preset_file(name, project).read_text(encoding="utf-8")
    return text.replace("$schema=../", "$schema=", 1)  # the schema lies beside params.yaml


def cli(arguments: Sequence[str]) -> int:
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
    from tasks.checks.preflight import (  # here, as they import the gate
        TEACHERS,
        check_all,
        folder_faults,
        teacher_faults,
    )

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
    document = read_yaml(parsed.params)
    for fault in [*teacher_faults(document, TEACHERS), *folder_faults(document, Path.cwd())]:
        print(f"to do before it runs: {fault}")
    return 0
