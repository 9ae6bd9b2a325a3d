"""YAML files: read strictly as YAML 1.2 by the library that DVC uses, and single values of them changed."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode

from data.errors import UserError, UserErrors
from data.files import explain, write_text


class _Strict(SafeConstructor):
    """A key may stand once; a date is text, as YAML 1.2 knows none."""

    def check_mapping_key(self, node: MappingNode, key_node: ScalarNode, mapping: Any, key: Any, value: Any) -> bool:
        if key in mapping:
            raise ConstructorError(None, None, f"the key {key!r} is given twice; keep one", key_node.start_mark)
        return True


_Strict.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The file's sections. Raises UserError when it is missing, unreadable, not YAML, or no mapping."""
    reader = YAML(typ="safe", pure=True)  # the compiled reader takes tabs
    reader.Constructor = _Strict
    value = _load(reader, _text(path), path)
    if not isinstance(value, dict):
        content = "nothing" if value is None else repr(value)[:80]
        raise UserError(f"{path}: expected sections (name: ...), found {content}")
    return value


def set_values(path: str | Path, values: Mapping[str, Any]) -> None:
    """Writes JSON values by dotted key into the file; every other line and all comments stay as they are.

    Raises UserErrors with all keys that do not exist.
    """
    editor = YAML()
    editor.width, editor.preserve_quotes = 1 << 20, True
    editor.indent(mapping=2, sequence=4, offset=2)
    null = "tag:yaml.org,2002:null"
    editor.representer.add_representer(type(None), lambda dumper, _: dumper.represent_scalar(null, "null"))
    document, faults = _load(editor, _text(path), path), []
    for key, value in values.items():
        *sections, last = key.split(".")
        place = document
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if isinstance(place, dict) and last in place:
            place[last] = _merged(place[last], value)
        else:
            faults.append(f"{key}: no such key in {Path(path).name}")
    if faults:
        raise UserErrors(f"{path}: not every key exists", faults)
    stream = io.StringIO()
    editor.dump(document, stream)
    write_text(path, stream.getvalue())


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists stay whole, an empty section stays as {}."""
    if not isinstance(value, dict) or (key and not value):
        return {key: value}
    inner = (flatten(part, f"{key}.{name}" if key else str(name)) for name, part in value.items())
    return {name: item for part in inner for name, item in part.items()}


def _merged(old: Any, value: Any) -> Any:
    """`value` in the lines of `old`, as far as they match."""
    if isinstance(old, dict) and isinstance(value, dict) and old and value:
        for name in [name for name in old if name not in value]:
            del old[name]
        for name, item in value.items():
            old[name] = _merged(old.get(name), item)
        return old
    if isinstance(old, list) and isinstance(value, list) and old and value:
        del old[len(value) :]
        for index, item in enumerate(old):
            old[index] = _merged(item, value[index])
        old.extend(_merged(None, item) for item in value[len(old) :])
        return old
    return YAML().load(json.dumps(value)) if isinstance(value, (dict, list)) else value  # on one line, like JSON


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        remedy = "run from the project's folder, or name another with --params"
        raise UserError(f"{path}: no such file; {remedy}") from error
    except OSError as error:
        raise explain(error, Path(path)) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error


def _load(yaml: YAML, text: str, path: str | Path) -> Any:
    try:
        return yaml.load(text)
    except YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
