"""The presets: whole parameter files by name, kept in presets/NAME.yaml."""

from __future__ import annotations

from pathlib import Path

from data.errors import UserError

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
