"""params.yaml, read strictly: it holds every number of a run once, and a mistake is told before anything runs.

A stage's parameters are a frozen dataclass, filled from the section of the stage's name; defaults do not count, but a
key whose field has the metadata `OPTIONAL` may be left out. A field with the name and the type of a shared section
(`SHARED`) is filled from that top-level section, so that several stages read the same values.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

from data.bounds import OPTIONAL, OneOf, expected, holds
from data.errors import UserErrors
from data.yaml_files import read_yaml
from tasks.params.sections import SHARED

T = TypeVar("T")
PARAMS_FILE = "params.yaml"


# --- filling a dataclass ----------------------------------------------------------------------------------------------


def load_params(cls: type[T], section: str, path: str | Path = PARAMS_FILE) -> T:
    """A stage's parameters from `section` of the file, shared sections included.

    Raises UserErrors with all faults: unknown key (with the nearest name), missing key, wrong type, and what the
    dataclass's `faults()` returns. `float` takes whole numbers, `int` takes no booleans, numbers are finite.
    """
    faults: list[str] = []
    value = fill_section(cls, section, read_yaml(path), faults)
    _raise(path, faults)
    return typing.cast(T, value)


def check_sections(classes: Mapping[str, type], path: str | Path = PARAMS_FILE) -> None:
    """Checks the whole file: every section of `classes` and of `SHARED` is there and valid, and there is no other.

    Raises UserErrors with the faults of all sections.
    """
    document, known = read_yaml(path), {**SHARED, **classes}
    faults = [f"{name}: unknown section{_nearest(name, known)}" for name in document if name not in known]
    for name, cls in known.items():
        fill_section(cls, name, document, faults)
    _raise(path, faults)


def _raise(path: str | Path, faults: list[str]) -> None:
    distinct = list(dict.fromkeys(faults))
    if distinct:
        raise UserErrors(f"{path}: {len(distinct)} fault{'s' if len(distinct) > 1 else ''}", distinct)


def _names_of(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def shared_fields(cls: type) -> dict[str, type]:
    """The fields of a parameter class that are filled from shared sections: name -> dataclass."""
    hints = typing.get_type_hints(cls)
    return {name: SHARED[name] for name in _names_of(cls) if SHARED.get(name) is hints[name]}


def faults_of(params: Any) -> list[str]:
    """The faults of parameters that were made in code or from flags, in the words for a file's faults."""
    faults: list[str] = []
    _dataclass(type(params), dataclasses.asdict(params), "", faults)
    return [fault.removeprefix(".") for fault in faults]


def fill_section(cls: type, section: str, document: Mapping[str, Any], faults: list[str]) -> Any:
    """As `load_params`, from a document already read: adds to `faults` (dotted keys), and then returns None."""
    shared = {name: fill_section(shared_cls, name, document, faults) for name, shared_cls in shared_fields(cls).items()}
    names = [name for name in _names_of(cls) if name not in shared]
    if section not in document and names:
        faults.append(f"{section}: the section is missing; it needs the keys {', '.join(names)}")
        return None
    return _dataclass(cls, document.get(section, {}), section, faults, given=shared)


def _dataclass(cls: type, value: Any, key: str, faults: list[str], given: Mapping[str, Any] | None = None) -> Any:
    given = given or {}
    before = len(faults)
    names = [name for name in _names_of(cls) if name not in given]
    if not isinstance(value, dict):
        return _refuse(faults, key, value, f"expected a mapping with the keys {', '.join(names)}")
    for name, item in value.items():
        if name in given:
            _refuse(faults, f"{key}.{name}", item, f"this is the shared top-level section {name!r}; remove it here")
        elif name not in names:
            _refuse(faults, f"{key}.{name}", item, f"unknown key{_nearest(name, names)}")
    hints = typing.get_type_hints(cls, include_extras=True)
    optional = {of.name for of in dataclasses.fields(cls) if of.metadata == OPTIONAL}
    filled = dict(given)
    for name in names:
        if name in value:
            filled[name] = _convert(hints[name], value[name], f"{key}.{name}", faults)
        elif name not in optional:
            faults.append(f"{key}.{name}: missing; expected {_expected(hints[name])}")
    if len(faults) > before or any(section is None for section in given.values()):
        return None
    made = cls(**filled)
    if hasattr(made, "faults"):
        faults.extend(fault if fault.startswith(f"{key}.") else f"{key}.{fault}" for fault in made.faults())
    return made


def _refuse(faults: list[str], key: str, value: Any, text: str) -> None:
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    faults.append(f"{key} = {shown if len(shown) <= 80 else shown[:77] + '...'}: {text}")


def _convert(hint: Any, value: Any, key: str, faults: list[str]) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _dataclass(hint, value, key, faults)
    if origin is Annotated:
        made = _convert(arguments[0], value, key, faults)
        if made is None or all(holds(made, rule) for rule in hint.__metadata__):
            return made
        near = _nearest(made, _choices(hint)) if _choices(hint) else ""
        return _refuse(faults, key, value, f"expected {_rules(hint)}{near}")
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _convert(inner, value, key, faults)
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        fixed = origin is tuple and arguments[-1] is not Ellipsis
        if not fixed or len(value) == len(arguments):
            kinds = arguments if fixed else [arguments[0]] * len(value)
            pairs = enumerate(zip(kinds, value, strict=True))
            return origin(_convert(kind, item, f"{key}[{index}]", faults) for index, (kind, item) in pairs)
    elif origin is dict and isinstance(value, dict):
        known = _choices(arguments[0])
        for name, item in value.items():
            if not isinstance(name, str):
                faults.append(f"{key}: key {name!r}: expected text; put it in quotes")
            elif known and name not in known:
                _refuse(faults, f"{key}.{name}", item, f"unknown name{_nearest(name, known)}")
        return {name: _convert(arguments[1], item, f"{key}.{name}", faults) for name, item in value.items()}
    elif origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        near = _nearest(value, arguments) if isinstance(value, str) else ""
        return _refuse(faults, key, value, f"expected {_expected(hint)}{near}")
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
    elif hint is Any or (isinstance(hint, type) and type(value) is hint):
        return value
    return _refuse(faults, key, value, f"expected {_expected(hint)}")


# --- words ------------------------------------------------------------------------------------------------------------


def _expected(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _rules(hint) if _choices(hint) else f"{_expected(arguments[0])}, {_rules(hint)}"
    if origin in (Union, types.UnionType):
        return " or ".join("null" if argument is type(None) else _expected(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(str(argument) for argument in arguments)
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)} values ({', '.join(_expected(argument) for argument in arguments)})"
    if origin in (list, tuple):
        return f"a list, each item {_expected(arguments[0])}"
    if origin is dict:
        return f"a mapping from names to {_expected(arguments[1])}"
    if dataclasses.is_dataclass(hint):
        return f"a mapping with the keys {', '.join(_names_of(hint))}"
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
    return words.get(hint, str(hint))


def _rules(hint: Any) -> str:
    words = [rule for rule in hint.__metadata__ if isinstance(rule, str)]
    return words[0] if words else " and ".join(text for rule in hint.__metadata__ if (text := expected(rule)))


def _choices(hint: Any) -> Collection[str]:
    """The names of a `OneOf`; none for every other type."""
    return next((rule.names for rule in getattr(hint, "__metadata__", ()) if isinstance(rule, OneOf)), ())


def _nearest(name: Any, valid: Iterable[Any]) -> str:
    names = [str(item) for item in valid]
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"
