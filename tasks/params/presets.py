"""The presets: whole parameter files by name, kept in presets/NAME.yaml."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from data.errors import UserError
from data.files import write_text
from data.yaml_files import flatten, read_yaml
from tasks.environment import TEACHERS
from tasks.params.reading import PARAMS_FILE

PRESETS = Path("presets")


def preset_names(project: Path = Path()) -> list[str]:
    return sorted(file.stem for file in (project / PRESETS).glob("*.yaml"))


def preset_file(name: str | None, project: Path = Path()) -> Path:
    """The preset's file. Raises UserError for an unknown name."""
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
    text = "Put presets/NAME.yaml in force as params.yaml, after checking it."
    parser = argparse.ArgumentParser("python -m tasks preset", description=text)
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"one of: {', '.join(preset_names()) or 'none found'}")
    text = "the file to replace (default: %(default)s)"
    parser.add_argument("--params", type=Path, default=Path(PARAMS_FILE), metavar="FILE", help=text)
    parsed = parser.parse_args(arguments)
    source = preset_file(parsed.name)
    from tasks.checks import preflight  # here, as it imports the gate

    preflight.check_all(source)
    before = flatten(read_yaml(parsed.params)) if parsed.params.exists() else {}
    after = flatten(read_yaml(source))
    write_text(parsed.params, preset_text(parsed.name))
    changed = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    for key in changed:
        print(f"{key}: {before.get(key, '(none)')} -> {after.get(key, '(none)')}")
    number = f"{len(changed)} value{'s' if len(changed) != 1 else ''} changed"
    print(f"{parsed.params} is now {source}: {number}. The old file is in git: git diff {parsed.params}")
    document = read_yaml(parsed.params)
    faults = [*preflight.teacher_faults(document, TEACHERS), *preflight.folder_faults(document, Path.cwd())]
    for fault in faults:
        print(f"to do before it runs: {fault}")
    return 0
