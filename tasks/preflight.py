"""Faults that can be known before anything expensive runs: the whole of params.yaml, and the teachers that its routes name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.errors import UserError, UserErrors
from tasks.params import PARAMS_FILE, read_yaml
from tasks.stages import check_all

TEACHERS = Path("data/teachers")


def preflight(path: str | Path = PARAMS_FILE, teachers: Path = TEACHERS) -> None:
    """Raises UserErrors with every fault found: all sections and, once the teachers have been fetched, each teacher whose files are missing."""
    faults: list[str] = []
    try:
        check_all(path)
    except UserErrors as errors:
        faults += errors.faults
    faults += teacher_faults(read_yaml(path), teachers)
    if faults:
        raise UserErrors(f"{path}: {len(faults)} fault{'s' if len(faults) > 1 else ''} found before anything ran", faults)


def teacher_faults(document: dict[str, Any], teachers: Path) -> list[str]:
    """Teachers that `routing.routes` names and that section `teachers` does not make, or that have no files in the folder `teachers`, where it is there yet."""
    try:
        routed = [(index, route["teacher"]) for index, route in enumerate(document["routing"]["routes"])]
        made = list(document["teachers"]["teachers"])
    except (KeyError, TypeError):
        return []  # the sections' own checks name what is wrong with them
    faults = []
    for index, name in routed:
        if name not in made:
            faults.append(f"routing.routes[{index}].teacher = {name!r}: no such teacher in section teachers; choose of {', '.join(map(str, made))}")
        elif teachers.is_dir() and not any((teachers / name).rglob("*.safetensors")):
            faults.append(f"routing.routes[{index}].teacher = {name!r}: no weights in {teachers / name}; restore them with: dvc checkout --force {teachers}")
    return faults


def require_teachers(path: str | Path = PARAMS_FILE, teachers: Path = TEACHERS) -> None:
    """Raises UserError(s) unless `teachers` is there and holds every teacher that a route names."""
    if not teachers.is_dir():
        raise UserError(f"{teachers}: no such folder; fetch the trained teachers with: dvc pull {teachers}")
    faults = teacher_faults(read_yaml(path), teachers)
    if faults:
        raise UserErrors(f"{teachers}: not every routed teacher is there", faults)
