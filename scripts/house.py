"""Measures the sizes and shapes that keep the code readable, against the bounds in pyproject.toml's [tool.house].

`python scripts/house.py` prints a table and every fault; exit status 1 where there is one.
"""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import networkx
from ruamel.yaml import YAML

Function = ast.FunctionDef | ast.AsyncFunctionDef
Trees = dict[Path, ast.Module]

ROOMS = ("flows", "tasks", "model", "benchmarks", "data")
NAMES = {
    "columns": "lines over {} columns",
    "lines": "functions over {} lines",
    "arguments": "functions over {} arguments",
    "files": "files past {} in a folder",
    "circles": "import circles",
    "stages": "stages that import stages",
    "total": "lines of Python outside tests past {:,}",
}


def python_files(root: Path) -> list[Path]:
    """The Python files that git tracks or would track, relative to `root`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(path for path in map(Path, set(listed)) if (root / path).is_file())


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Every function with its dotted name, those inside classes and functions too."""
    for node in ast.iter_child_nodes(tree):
        named = isinstance(node, Function | ast.ClassDef)
        name = f"{prefix}{node.name}" if isinstance(node, Function | ast.ClassDef) else prefix
        if isinstance(node, Function):
            yield name, node
        yield from functions(node, f"{name}." if named else prefix)


def lines_of(function: Function) -> int:
    """From `def` to the last line; decorators are not counted."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def arguments_of(function: Function) -> int:
    """Named arguments without `self` and `cls`."""
    taken = function.args
    return sum(arg.arg not in ("self", "cls") for arg in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs))


def large_functions(trees: Trees, size: Callable[[Function], int], bound: int, allowed: dict[str, str]) -> list[str]:
    """Functions over the bound that are no exceptions, and exceptions that no function over the bound needs."""
    sizes = {f"{path}:{name}": size(node) for path, tree in trees.items() for name, node in functions(tree)}
    large = {name: count for name, count in sizes.items() if count > bound}
    faults = [f"{name} has {count}" for name, count in large.items() if name not in allowed]
    faults += [f"the exception {name} is not needed" for name in allowed if name not in large]
    return faults + [f"the exception {name} has no reason" for name, reason in allowed.items() if not reason.strip()]


def imported(node: ast.AST) -> Iterator[str]:
    """Every dotted name that is imported, at any depth; what only a type checker reads is left out."""
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        children: Iterable[ast.AST] = node.orelse
    else:
        children = ast.iter_child_nodes(node)
    for child in children:
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        else:
            yield from imported(child)


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def import_graph(trees: Trees) -> networkx.DiGraph:
    """Module -> module that it imports. `from a import b` imports a.b where that is a module, and a where it is not."""
    modules = {module_name(path): tree for path, tree in trees.items()}
    graph = networkx.DiGraph()
    for module, tree in modules.items():
        graph.add_node(module)
        for name in imported(tree):
            target = name if name in modules else name.rpartition(".")[0]
            if target in modules:
                graph.add_edge(module, target)
    return graph


def circles(graph: networkx.DiGraph) -> list[str]:
    """The shortest circle in each set of modules that import one another, and modules that import themselves."""
    knots = [graph.subgraph(knot) for knot in networkx.strongly_connected_components(graph)]
    rings = [min(networkx.simple_cycles(knot), key=lambda ring: (len(ring), ring)) for knot in knots if knot.size()]
    return sorted(" -> ".join((*ring, ring[0])) for ring in rings)


def stages_in_stages(graph: networkx.DiGraph, stages: set[str]) -> list[str]:
    """Stages that import another stage, directly or through other modules: the way from the first to the second."""
    nodes = {node for node in graph if node.startswith("tasks.") and node.rpartition(".")[2] in stages}
    pairs = itertools.permutations(sorted(nodes), 2)
    return [" -> ".join(networkx.shortest_path(graph, *pair)) for pair in pairs if networkx.has_path(graph, *pair)]


def crowded(files: list[Path], bound: int) -> list[str]:
    """The files of each folder past the bound; tests/ is flat on purpose."""
    folders = defaultdict(list)
    for path in files:
        folders[path.parent].append(path)
    return [
        f"{path} is file {number} of {len(members)}"
        for folder, members in folders.items()
        if folder != Path("tests")
        for number, path in enumerate(members[bound:], bound + 1)
    ]


def measure(root: Path, house: dict[str, Any]) -> dict[str, list[str]]:
    """Check -> its faults. Raises KeyError where [tool.house] lacks a bound."""
    texts = {path: (root / path).read_text(encoding="utf-8") for path in python_files(root)}
    trees = {path: ast.parse(text, str(path)) for path, text in texts.items()}
    graph = import_graph({path: tree for path, tree in trees.items() if path.parts[0] in ROOMS})
    stages = set(YAML(typ="safe", pure=True).load(root / "dvc.yaml")["stages"])
    lines = [(f"{path}:{row}", line) for path, text in texts.items() for row, line in enumerate(text.splitlines(), 1)]
    outside = sum(not place.startswith("tests/") for place, _ in lines)
    return {
        "columns": [f"{place} has {len(line)}" for place, line in lines if len(line) > house["columns"]],
        "lines": large_functions(trees, lines_of, house["lines"], house["exceptions"]["lines"]),
        "arguments": large_functions(trees, arguments_of, house["arguments"], house["exceptions"]["arguments"]),
        "files": crowded(list(texts), house["files"]),
        "circles": circles(graph),
        "stages": stages_in_stages(graph, stages),
        "total": [f"{outside:,} in all"] * max(0, outside - house["total"]),
    }


def main() -> int:
    root = Path.cwd()
    house = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["house"]
    measured = measure(root, house)
    for check, faults in measured.items():
        print(f"{NAMES[check].format(house.get(check)):44}{len(faults):>6,}", *sorted(set(faults)), sep="\n  ")
    return int(any(measured.values()))


if __name__ == "__main__":
    sys.exit(main())
