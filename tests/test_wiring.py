"""The pipeline is written down once: dvc.yaml, params.yaml, presets and the flow say what the stages' functions say,
and DVC knows every file that runs.
"""

from __future__ import annotations

import ast
import dataclasses
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.yaml_files import read_yaml
from tasks.checks.preflight import check_all
from tasks.environment import PROJECT
from tasks.params.reading import shared_fields
from tasks.params.sections import SHARED
from tasks.running.workspace import RECORDS
from tasks.stages.contract import STAGES, load_stage
from tests.imports import closure

DVC = read_yaml(PROJECT / "dvc.yaml")
PRESETS = sorted((PROJECT / "presets").glob("*.yaml"))


def paths_of(entries: list[Any]) -> list[str]:
    """DVC writes an entry as a path or as {path: options}."""
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]


def options_of(entries: list[Any]) -> dict[str, dict[str, Any]]:
    return {path: options for entry in entries if isinstance(entry, dict) for path, options in entry.items()}


def flags_of(stage: str) -> dict[str, str]:
    """Flag -> path, of the stage's command line in dvc.yaml."""
    words = shlex.split(DVC["stages"][stage]["cmd"])
    assert words[:4] == ["python", "-m", "tasks", stage]
    flags, values = words[4::2], words[5::2]
    assert len(flags) == len(values) and all(flag.startswith("--") for flag in flags)
    return {flag.removeprefix("--").replace("-", "_"): value for flag, value in zip(flags, values, strict=True)}


def made_by(stage: str) -> list[str]:
    entry = DVC["stages"][stage]
    return [*paths_of(entry.get("outs", [])), *paths_of(entry.get("metrics", []))]


def is_code(path: str) -> bool:
    """Python, and the templates of pages: they decide what a stage writes."""
    return path.endswith((".py", ".j2", ".css"))


def test_stages_and_their_order() -> None:
    assert tuple(DVC["stages"]) == STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_flags_are_the_functions_paths(stage: str) -> None:
    assert tuple(flags_of(stage)) == load_stage(stage).paths


@pytest.mark.parametrize("stage", STAGES)
def test_paths_are_deps_outs_and_metrics(stage: str) -> None:
    deps = [path for path in DVC["stages"][stage].get("deps", []) if not is_code(path)]
    assert sorted(flags_of(stage).values()) == sorted([*deps, *made_by(stage)])


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_read_was_made_before(stage: str) -> None:
    earlier = [path for name in STAGES[: STAGES.index(stage)] for path in made_by(name)]
    assert not [path for path in DVC["stages"][stage].get("deps", []) if not is_code(path) and path not in earlier]


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_the_sections_that_are_read(stage: str) -> None:
    params = load_stage(stage).params
    shared = shared_fields(params)
    own = [field.name for field in dataclasses.fields(params) if field.name not in shared]
    assert DVC["stages"][stage].get("params", []) == [
        *([stage] if own else []),
        *(name for name in SHARED if name in shared),
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_code_deps_are_what_the_stage_imports(stage: str) -> None:
    """The message holds the exact lines to add to dvc.yaml and to remove from it."""
    needed = {str(path) for path in closure(Path("tasks/stages") / f"{stage}.py")}
    listed = [path for path in DVC["stages"][stage].get("deps", []) if is_code(path)]
    missing, stale = sorted(needed - set(listed)), sorted(set(listed) - needed)
    text = "\n".join(
        [
            f"dvc.yaml, stage {stage}:",
            *(f"  add    - {path}" for path in missing),
            *(f"  remove - {path}" for path in stale),
        ]
    )
    assert not missing and not stale, text
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("stage", STAGES)
def test_stages_do_not_import_the_outside_world(stage: str) -> None:
    """A stage that loaded Prefect, MLflow or DVC would wait seconds for them, and DVC would lock itself out."""
    forbidden = (
        "tasks/prefect_tasks.py",
        "tasks/__main__.py",
        "tasks/release/",
        "tasks/registry/",
        "tasks/running/",
        "tasks/stages/contract.py",
    )
    assert not [path for path in closure(Path("tasks/stages") / f"{stage}.py") if str(path).startswith(forbidden)]


def test_importing_the_stages_loads_no_client(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """What the imports really load: clients wait for an address that names their store. (boto3 and PEFT come with
    diffusers.)
    """
    heavy = ["prefect", "mlflow", "dvc", "great_expectations"]
    stages = ", ".join(f"tasks.stages.{name}" for name in STAGES)
    ended = python("-c", f"import sys, {stages}; print([name for name in {heavy} if name in sys.modules])")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip().splitlines()[-1] == "[]"


def test_only_the_teachers_are_frozen_and_bundled() -> None:
    frozen = [name for name, entry in DVC["stages"].items() if entry.get("frozen")]
    bundled = [
        path
        for entry in DVC["stages"].values()
        for path, options in options_of(entry.get("outs", [])).items()
        if options.get("remote") == "bundled"
    ]
    assert frozen == ["teachers"] and bundled == ["data/teachers"]


def test_reports_are_files_for_git_and_only_the_headline_is_a_metric() -> None:
    """`dvc metrics show` prints every value of a metric file: the scorecard's hundreds are for programs, not for it."""
    entries = DVC["stages"].values()
    metrics = [path for entry in entries for path in paths_of(entry.get("metrics", []))]
    made = [one for entry in entries for kind in ("outs", "metrics") for one in entry.get(kind, [])]
    in_git = {path for path, options in options_of(made).items() if options.get("cache") is False}
    assert metrics == ["reports/metrics"]
    assert in_git == {"reports/validate.json", "reports/scorecard.json", "reports/metrics"} == {*RECORDS} - {"dvc.lock"}


def test_plots_show_images_that_stages_make() -> None:
    """An image stands on DVC's page as it is; data points would be drawn by scripts from the internet."""
    outs = {path for name in STAGES for path in made_by(name)}
    assert DVC["plots"] and all(Path(plot).suffix == ".png" and str(Path(plot).parent) in outs for plot in DVC["plots"])


def test_the_flow_runs_the_stages_in_their_order() -> None:
    """A straight list of calls; the frozen stage is fetched, not run."""
    tree = ast.parse((PROJECT / "flows" / "distill.py").read_text(encoding="utf-8"))
    (flow,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "distill"]
    called = [
        node.func for node in ast.walk(flow) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    names = [
        func.attr
        for func in sorted(called, key=lambda func: func.lineno)
        if isinstance(func.value, ast.Name) and func.value.id == "run"
    ]
    assert [name for name in names if name in STAGES] == [stage for stage in STAGES if stage != "teachers"]
    assert names[:4] == ["checkout", "preflight", "fetch_teachers", "slot"]
    assert names[-6:] == [
        "push",
        "benchmark_geneval",
        "benchmark_gedit",
        "gate",
        "register",
        "close",
    ]  # nothing is registered before its data is pushed
    assert not [node for node in ast.walk(flow) if isinstance(node, (ast.For, ast.While, ast.If, ast.Try))]


def test_the_deployment_is_the_flow() -> None:
    deployments = read_yaml(PROJECT / "prefect.yaml")["deployments"]
    named = {(Path(one["entrypoint"].split(":")[0]).stem, one["name"]): one for one in deployments}
    assert set(named) == {
        *((flow, "prod") for flow in ("distill", "score", "promote", "rollback", "watch")),
        ("distill", "prod-gpu"),
    }
    prod = named["distill", "prod"]
    assert prod["entrypoint"] == "flows/distill.py:distill"
    assert prod["parameters"] == {
        "preset": None,
        "overrides": None,
        "promote": "review",
        "revision": None,
    }  # a person decides
    assert prod["concurrency_limit"]["limit"] == 1  # one folder, one run
    assert {name: one["work_pool"] for name, one in named.items()} == {
        name: {"name": "local", "work_queue_name": "gpu" if name == ("distill", "prod-gpu") else "cpu"}
        for name in named
    }
    assert len(named["watch", "prod"]["schedules"]) == 2


def test_params_file_is_valid() -> None:
    check_all(PROJECT / "params.yaml")


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_are_valid(path: Path) -> None:
    check_all(path)


def test_outs_are_kept_out_of_git_and_reports_are_not() -> None:
    """DVC adds a .gitignore of its own beside every out that git would see."""
    text = (PROJECT / ".gitignore").read_text(encoding="utf-8")
    ignored = [line.strip("/\n") for line in text.splitlines() if line.startswith("/")]
    outs = {path for name in STAGES for path in made_by(name)} - {*RECORDS}
    assert not [path for path in outs if not any(path == line or path.startswith(f"{line}/") for line in ignored)]
    assert not {*RECORDS} & set(ignored)
