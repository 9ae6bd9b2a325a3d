"""The tree is within the bounds of pyproject.toml's [tool.house], and scripts/house.py finds every kind of fault."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.environment import PROJECT

Run = Callable[..., subprocess.CompletedProcess[str]]
SETTINGS = """
[tool.house]
columns = 40
lines = 3
arguments = 2
files = 2
total = 12
[tool.house.exceptions]
lines = {EXCEPTION}
arguments = {}
"""
GOOD = {
    "tests/a.py": "x = 1\n" * 20,  # tests are not part of the total, and their folder may be full
    "tests/b.py": "",
    "tests/c.py": "",
    "tasks/stages/encode.py": "import tasks.paths\n",
    "tasks/paths.py": "if TYPE_CHECKING:\n    import tasks.stages.encode\n",
    "model/fields/base.py": "class Field:\n    def velocity(self, x, t):\n        y = x\n        return y\n",
}
BAD = {
    "a wide line": ({"tests/a.py": f"x = '{'wide' * 10}'"}, "tests/a.py:1 has 46"),
    "a long function": (
        {"model/fields/base.py": "class A:\n  def f():\n    1\n    2\n    3"},
        "model/fields/base.py:A.f has 4",
    ),
    "a long function inside another": (
        {"tests/a.py": "def f(): 1\ndef g():\n  def h():\n    1\n    2\n    3"},
        "tests/a.py:g.h has 4",
    ),
    "many arguments": ({"tests/a.py": "def f(a, b=1, *, c): ..."}, "tests/a.py:f has 3"),
    "a full folder": ({"tasks/__init__.py": "", "tasks/a.py": ""}, "tasks/paths.py is file 3 of 3"),
    "a circle": ({"tasks/paths.py": "from tasks.stages import encode"}, "tasks.stages.encode -> tasks.paths"),
    "a circle inside a function": (
        {"tasks/paths.py": "def f():\n  from tasks.stages.encode import x"},
        "tasks.stages.encode -> tasks.paths",
    ),
    "a circle past a type check": (
        {"tasks/paths.py": "if TYPE_CHECKING:\n  import os\nelse:\n  import tasks.stages.encode"},
        "tasks.stages.encode -> tasks.paths",
    ),
    "a stage in a stage": (
        {
            "tasks/paths.py": "import model.fields.base",
            "model/fields/base.py": "import tasks.steps.distill",
            "tasks/steps/distill.py": "",
        },
        "tasks.stages.encode -> tasks.paths -> model.fields.base -> tasks.steps.distill",
    ),
    "many lines": ({"data/records.py": "x = 1\n" * 6}, "13 in all"),
}


def made(folder: Path, files: dict[str, str], exception: str = "{}") -> Path:
    """A repository of two stages with these files."""
    settings = {
        "pyproject.toml": SETTINGS.replace("{EXCEPTION}", exception),
        "dvc.yaml": "stages: {encode: {}, distill: {}}\n",
    }
    for name, text in {**settings, **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    return folder


def measure(python: Run, root: Path) -> tuple[int, str]:
    ended = python(str(PROJECT / "scripts" / "house.py"), cwd=root)
    assert not ended.stderr
    return ended.returncode, ended.stdout


def test_the_house_is_in_order(python: Run) -> None:
    status, text = measure(python, PROJECT)
    assert status == 0, text


def test_what_keeps_the_bounds_passes(tmp_path: Path, python: Run) -> None:
    """Exactly at the bounds: length and arguments without `self`; an import for the type checker only is no circle."""
    status, text = measure(python, made(tmp_path, GOOD))
    assert status == 0, text


@pytest.mark.parametrize(("files", "fault"), BAD.values(), ids=BAD)
def test_each_fault_is_found_and_named(files: dict[str, str], fault: str, tmp_path: Path, python: Run) -> None:
    status, text = measure(python, made(tmp_path, GOOD | files))
    assert status == 1 and fault in text, text
    assert len([line for line in text.splitlines() if line[:1].isalpha() and not line.endswith(" 0")]) == 1, text


def test_exceptions_are_needed_and_have_a_reason(tmp_path: Path, python: Run) -> None:
    long = {"tests/a.py": "def f():\n  1\n  2\n  3"}
    assert measure(python, made(tmp_path, GOOD | long, '{"tests/a.py:f" = "a table"}'))[0] == 0
    status, text = measure(python, made(tmp_path, GOOD | long, '{"tests/a.py:f" = " "}'))
    assert status == 1 and "the exception tests/a.py:f has no reason" in text
    status, text = measure(python, made(tmp_path, GOOD, '{"tests/a.py:f" = "a table"}'))
    assert status == 1 and "the exception tests/a.py:f is not needed" in text


def test_what_git_ignores_is_not_measured(tmp_path: Path, python: Run) -> None:
    wide = {".gitignore": "/runs\n", "runs/a.py": "x" * 100}
    assert measure(python, made(tmp_path, GOOD | wide))[0] == 0
