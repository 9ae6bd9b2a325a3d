"""What the project's modules import and which page templates they name, read from their text.

The tests of the walls and of the wiring use it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from jinja2 import Environment, meta

from tasks.environment import PROJECT

ROOMS = ("flows", "tasks", "model", "benchmarks", "data")
NAMED = re.compile(r"\w+(\.\w+)+:\w+")


def modules() -> list[Path]:
    """Every Python file of the rooms, relative to the project."""
    return sorted(path.relative_to(PROJECT) for room in ROOMS for path in (PROJECT / room).rglob("*.py"))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse((PROJECT / path).read_text(encoding="utf-8"))


@cache
def imported(path: Path) -> tuple[str, ...]:
    """Every dotted name that a file imports, at any depth: `from a.b import c` gives "a.b" and "a.b.c"."""
    names: list[str] = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import on line {node.lineno}"
            assert node.module is not None
            names += (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    return tuple(names)


@cache
def imported_by_name(path: Path) -> tuple[str, ...]:
    """What a file that calls `import_module` may import: names "MODULE:NAME" in it and in the files it imports."""
    if not any(
        isinstance(node, ast.Name | ast.alias) and "import_module" in ast.unparse(node)
        for node in ast.walk(parsed(path))
    ):
        return ()
    near = {path, *(file for name in imported(path) for file in files_of(name))}
    texts = [node.value for file in near for node in ast.walk(parsed(file)) if isinstance(node, ast.Constant)]
    return tuple(text.split(":")[0] for text in texts if isinstance(text, str) and NAMED.fullmatch(text))


def files_of(name: str) -> Iterator[Path]:
    """Our files that importing the dotted name runs; package files that hold no more than a docstring are left out."""
    parts = name.split(".")
    if parts[0] not in ROOMS:
        return
    for depth in range(1, len(parts) + 1):
        base = Path(*parts[:depth])
        package, module = base / "__init__.py", base.with_suffix(".py")
        if (PROJECT / package).is_file() and len(parsed(package).body) > 1:
            yield package
        elif (PROJECT / module).is_file():
            yield module


def templates_of(path: Path) -> set[Path]:
    """The page templates that a module names ("ROOM/NAME.html.j2"), and all that those name in turn."""
    texts = [
        node.value for node in ast.walk(parsed(path)) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    waiting = [
        Path(room, "templates", name) for text in texts if text.endswith(".j2") for room, name in [text.split("/")]
    ]
    found: set[Path] = set()
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            named = meta.find_referenced_templates(Environment().parse((PROJECT / current).read_text(encoding="utf-8")))
            places = [(current.with_name(str(name)), Path("data", "templates", str(name))) for name in named]
            waiting += [near if (PROJECT / near).is_file() else base for near, base in places]
    return found


CLIENTS = {
    Path("tasks/registry"),
    Path("tasks/s3"),
}  # of stores: loaded only for an address that names one, and what they bring is verified by its hash


def closure(path: Path) -> set[Path]:
    """The file, every file of ours that it imports, directly or through others, at any depth, and their page templates.

    Clients of stores are left out: their code changes no result.
    """
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            names = (*imported(current), *imported_by_name(current))
            waiting += [file for name in names for file in files_of(name) if not CLIENTS & {file, *file.parents}]
    return found.union(*map(templates_of, found))
