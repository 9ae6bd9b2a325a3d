"""The stages' names and order, and how a stage is read from its module: the function is the definition."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

STAGES = ("collect", "teachers", "curate", "validate", "encode", "distill", "absorb", "score")


@dataclass(frozen=True)
class Stage:
    """A stage as its module defines it: `function(params, *, path: Path, ...) -> summary`; `paths` names the paths."""

    name: str
    function: Callable[..., dict[str, Any]]
    params: type
    paths: tuple[str, ...]


def load_stage(name: str) -> Stage:
    """Imports `tasks.stages.NAME`. Raises TypeError where the module breaks the convention, which is a defect."""
    module = importlib.import_module(f"tasks.stages.{name}")
    function, params = getattr(module, name), module.Params
    hints = get_type_hints(function)
    signature = inspect.signature(function)
    arguments = list(signature.parameters.values())
    paths = [argument for argument in arguments if argument.kind is argument.KEYWORD_ONLY]
    good = all(hints.get(path.name) is Path and path.default is path.empty for path in paths)
    if not good or [argument.name for argument in arguments if argument not in paths] != ["params"]:
        convention = "expected (params, *, path: Path, ...) without defaults"
        raise TypeError(f"tasks.stages.{name}.{name}: {convention}, got {signature}")
    return Stage(name, function, params, tuple(path.name for path in paths))


def sections() -> dict[str, type]:
    """Every section of params.yaml that is not shared -> the dataclass that reads it."""
    from tasks.release import gate

    return {**{name: load_stage(name).params for name in STAGES}, "gate": gate.Params}
