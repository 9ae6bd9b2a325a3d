"""The rooms' walls: imports run one way, heavy packages have one home each, and the environment is pinned to what is
imported.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.environment import PROJECT, defaults
from tests.imports import ROOMS, files_of, imported, modules, parsed

# A room may import the rooms named here, and itself.
ALLOWED = {
    "flows": {"tasks", "data"},
    "tasks": {"model", "benchmarks", "data"},
    "model": {"data"},
    "benchmarks": {"data"},
    "data": set(),
}
EXCEPTIONS = {"benchmarks/speed.py": {"model"}}  # it measures the trainer itself, and knows nothing of stages
HOMES = {
    "prefect": ("flows/", "tasks/prefect_tasks.py"),
    "mlflow": ("tasks/registry/", "tasks/release/submission.py"),
    "diffusers": ("model/backbones/", "benchmarks/"),
    "transformers": ("model/backbones/", "benchmarks/"),
    "great_expectations": ("data/curation/expectations.py",),
    "jinja2": ("data/pages.py",),
    "torch": ("model/", "benchmarks/", "tasks/"),
    "boto3": ("tasks/s3/",),
    "botocore": ("tasks/s3/",),
    "dvc": ("tasks/running/dvc_child.py",),  # a program of its own: a process holds the locks of DVC
    "pickle": (),
    "cloudpickle": (),
}
DISTRIBUTIONS = {
    "ruamel": "ruamel-yaml",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
}  # where the import's name is not the package's
NAME = re.compile(r"^([A-Za-z0-9_.-]+)")


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(file: str) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (PROJECT / file).read_text(encoding="utf-8").splitlines()]
    return {normal(NAME.match(line).group(1)): line for line in lines if line}  # type: ignore[union-attr]


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    files = [path for path in modules() if path.parts[0] == room]
    assert files
    crossed = [
        f"{path} imports {name}"
        for path in files
        for name in sorted(roots(path) & set(ROOMS))
        if name != room and name not in ALLOWED[room] | EXCEPTIONS.get(str(path), set())
    ]
    assert not crossed


@pytest.mark.parametrize("package", HOMES)
def test_heavy_packages_have_their_homes(package: str) -> None:
    strangers = [str(path) for path in modules() if package in roots(path) and not str(path).startswith(HOMES[package])]
    assert not strangers


def test_imports_of_our_own_name_files_that_exist() -> None:
    """`importlib` aside, a name of ours that no file answers to fails only when its line runs: find it here."""
    missing = [
        f"{path}: {name}"
        for path in modules()
        for name in imported(path)
        if name.split(".")[0] in ROOMS and "." in name and not _answers(name)
    ]
    assert not missing


def _answers(name: str) -> bool:
    head = Path(*name.split(".")[:2])
    return (PROJECT / head.with_suffix(".py")).is_file() or (PROJECT / head).is_dir() or bool(list(files_of(name)))


def test_importing_a_flow_loads_no_torch(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """A server or a scheduler imports flows: it has neither the memory nor the seconds for what the stages need."""
    flows = [
        ".".join(path.with_suffix("").parts)
        for path in modules()
        if path.parts[0] == "flows" and path.stem != "__init__"
    ]
    assert flows
    heavy = ["torch", "diffusers", "transformers", "mlflow", "great_expectations", "pandas"]
    ended = python("-c", f"import sys, {', '.join(flows)}; print([name for name in {heavy} if name in sys.modules])")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip().splitlines()[-1] == "[]"


def test_no_module_is_named_like_a_room() -> None:
    """Prefect puts the flow's own folder first on the import path: a flows/data.py would take the place of the room."""
    assert not [
        str(path)
        for path in modules()
        if len(path.parts) > 1 and any(part in ROOMS for part in (*path.parts[1:-1], path.stem))
    ]


def test_every_module_says_what_it_is_for() -> None:
    files = [
        *modules(),
        *(path.relative_to(PROJECT) for path in (PROJECT / "tests").glob("*.py") if path.stem != "__init__"),
    ]
    assert not [str(path) for path in files if not ast.get_docstring(parsed(path))]


def test_every_import_is_required_and_every_requirement_pinned() -> None:
    wanted, locked = requirements("requirements.in"), requirements("requirements.lock")
    files = [*modules(), *(path.relative_to(PROJECT) for path in (PROJECT / "tests").glob("*.py"))]
    known = {*sys.stdlib_module_names, *ROOMS, "tests", *(path.stem for path in (PROJECT / "tests").glob("*.py"))}
    foreign = {name: path for path in files for name in roots(path) if name not in known}
    assert not {
        name: str(path) for name, path in foreign.items() if normal(DISTRIBUTIONS.get(name, name)) not in wanted
    }
    assert not [line for line in locked.values() if not re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.!+-]+", line)]
    assert not set(wanted) - set(locked)


def test_what_is_installed_is_what_is_locked() -> None:
    installed = {
        normal(found.metadata["Name"]): found.version.split("+")[0] for found in importlib.metadata.distributions()
    }
    locked = {name: line.split("==")[1] for name, line in requirements("requirements.lock").items()}
    assert {name: version for name, version in locked.items() if installed.get(name) != version} == {}


def test_everything_stays_inside_and_silent() -> None:
    """Folders of the libraries lie in the project; each library that reports home has its off switch."""
    values = defaults(Path("/somewhere"))
    assert all(value.startswith("/somewhere/") for value in values.values() if value.startswith("/"))
    assert {"PREFECT_HOME", "HF_HOME", "MPLCONFIGDIR", "DVC_SITE_CACHE_DIR"} <= set(values)
    assert {"DO_NOT_TRACK", "PREFECT_SERVER_ANALYTICS_ENABLED", "MLFLOW_DISABLE_TELEMETRY", "DVC_NO_ANALYTICS"} <= set(
        values
    )
    assert {"ITERATIVE_DO_NOT_TRACK", "HF_HUB_DISABLE_TELEMETRY"} <= set(values)
    assert values["DO_NOT_TRACK"] == "true"  # MLflow takes no other word


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.environment import prepare

    monkeypatch.setenv("PREFECT_HOME", "/elsewhere")
    monkeypatch.delenv("HF_HOME", raising=False)
    prepare(Path("/somewhere"))
    import os

    assert os.environ["PREFECT_HOME"] == "/elsewhere"
    assert os.environ["HF_HOME"] == "/somewhere/.cache/huggingface"
