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
    """A stage as its module defines it: `function(params, *, path: Path, ...) -> summary`; `paths` are its keyword-only
    arguments, in order.
    """

    name: str
    function: Callable[..., dict[str, Any]]
    params: type
    paths: tuple[str, ...]


def load_stage(name: str) -> Stage:
    """Imports `tasks.stages.NAME`. Raises TypeError where the module does not keep the convention: a defect of ours,
    not of the user's.
    """
    module = importlib.import_module(f"tasks.stages.{name}")
    function, params = getattr(module, name), module.Params
    hints = get_type_hints(function)
    arguments = list(inspect.signature(function).parameters.values())
    paths = [argument for argument in arguments if argument.kind is argument.KEYWORD_ONLY]
    wrong = [
        argument.name
        for argument in paths
        if hints.get(argument.name) is not Path or argument.default is not argument.empty
    ]
    if wrong or [argument.name for argument in arguments if argument not in paths] != ["params"]:
        raise TypeError(
            f"tasks.stages.{name}.{name}: expected (params, *, path: Path, ...) without defaults, found {inspect.signature(function)}"
        )
    return Stage(name, function, params, tuple(argument.name for argument in paths))


def sections() -> dict[str, type]:
    """Every section of params.yaml that is not shared -> the dataclass that reads it."""
    from tasks.release import gate

    return {**{name: load_stage(name).params for name in STAGES}, "gate": gate.Params}
