"""YAML is read as DVC reads it, strictly; a value that is changed changes its own line and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError, UserErrors
from data.yaml_files import read_yaml, set_values
from tasks.environment import PROJECT

FILES = [PROJECT / "params.yaml", *sorted((PROJECT / "presets").glob("*.yaml"))]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def written(text: str) -> Path:
        path = tmp_path / "file.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return written


SCALARS = "1e-3 1e5 1.5e+3 .5 5. -1 012 1_000 0o14 0x1F on no ~ null 'true' FALSE 1:30 .inf"


@pytest.mark.parametrize("scalar", SCALARS.split())
def test_scalars_are_read_as_dvc_reads_them(write: Any, scalar: str) -> None:
    """DVC hashes the parameters: what it recorded must be what ran."""
    from dvc.utils.serialize import load_yaml

    path = write(f"a: {scalar}\n")
    ours, theirs = read_yaml(path)["a"], load_yaml(str(path))["a"]
    assert (ours, type(ours)) == (theirs, type(theirs))


def test_yaml_1_2_holds_no_surprise(write: Any) -> None:
    text = "words: [no, on, yes, 1:30, 2024-01-01]\nnumbers: [012, 1_000, 0o14]\nanchor: &a {x: 1}\nalias: *a\n"
    words = ["no", "on", "yes", "1:30", "2024-01-01"]
    assert read_yaml(write(text)) == {"words": words, "numbers": [12, 1000, 12], "anchor": {"x": 1}, "alias": {"x": 1}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", "the key 'a' is given twice; keep one"),
        ("a: {b: 1, b: 1}\n", "the key 'b' is given twice; keep one"),
        ("a:\n\tb: 1\n", "line 2"),
        ("a: \tb: [\n", "cannot start any token"),
        ("a: *b\n", "undefined alias 'b'"),
        ("a: !!python/object:os.system {}\n", "could not determine a constructor"),
    ],
)
def test_what_is_not_plain_yaml_is_refused(write: Any, text: str, words: str) -> None:
    path = write(text)
    with pytest.raises(UserError, match=words) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"{path}: not valid YAML: ") and "\n" not in str(caught.value)


def changed_lines(before: str, after: str) -> list[str]:
    old, new = before.splitlines(), after.splitlines()
    assert len(old) == len(new)
    return [line for line, other in zip(new, old, strict=True) if line != other]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_one_value_is_one_line(write: Any, file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    path = write(text)
    set_values(path, {"distill.steps": 8})
    assert changed_lines(text, path.read_text(encoding="utf-8")) == ["  steps: 8"]
    set_values(path, {"distill.accept_changed": ["rows", "seed"]})
    assert len(changed_lines(text, path.read_text(encoding="utf-8"))) == 2


VALUES = [
    None,
    True,
    3,
    1e-5,
    "",
    "no",
    "true",
    "012",
    "1e-3",
    "null",
    "- a",
    "a # b",
    'two\n"lines": é',
    [],
    ["a"],
    {"a": 1},
    {"a": {"b": [None]}},
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_what_was_set_is_read_and_its_comment_stays(write: Any, value: Any) -> None:
    text = "# top\na:\n  b: 1 # why\n  c: {x: 1}\n\n# next\nd: [1, 2] # list\n"
    path = write(text)
    set_values(path, {"a.b": value})
    assert read_yaml(path) == {"a": {"b": value, "c": {"x": 1}}, "d": [1, 2]}
    kept = path.read_text(encoding="utf-8")
    assert (
        "# why" in kept
        and kept.startswith("# top\na:\n")
        and kept.endswith("  c: {x: 1}\n\n# next\nd: [1, 2] # list\n")
    )


def test_mappings_and_lists_keep_their_lines(write: Any) -> None:
    path = write("a:\n  b: 1 # first\n  c: 2\nl:\n  - {x: 1, y: 2} # item\n  - {x: 3, y: 4}\n")
    set_values(path, {"a": {"b": 5, "c": 2}, "l": [{"x": 1, "y": 7}]})
    assert path.read_text(encoding="utf-8") == "a:\n  b: 5 # first\n  c: 2\nl:\n  - {x: 1, y: 7} # item\n"


def test_keys_that_do_not_exist_leave_the_file_alone(write: Any) -> None:
    path = write("a: {b: 1}\n")
    with pytest.raises(UserErrors) as told:
        set_values(path, {"a.b": 2, "a.c": 1, "a.b.c": 1, "d": 1})
    assert told.value.faults == [f"{key}: no such key in file.yaml" for key in ("a.c", "a.b.c", "d")]
    assert path.read_text(encoding="utf-8") == "a: {b: 1}\n"
