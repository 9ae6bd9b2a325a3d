"""Made-up candidates for the tests of gate, tracking and registry: a project folder with the files that the stages
would have left.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from data.files import digest, write_json
from data.records import CAPABILITIES
from tasks.registry import server, tracking
from tasks.release import gate, submission

PARAMS = gate.Params(
    capabilities=("t2i", "local_edit", "global_edit"),
    floors={"geneval/overall": 0.7, "gedit/average": 7.0},
    retention=0.9,
    compared=("geneval/overall", "gedit/average"),
    alpha=0.05,
    resamples=200,
    seed=0,
    min_prompts={"geneval": 300, "gedit": 300},
    allow_dirty=False,
    allow_unversioned=True,
    allow_benchmark_change=False,
)


def metric(mean: Any, stderr: Any = 0.01, n: Any = 320) -> dict[str, Any]:
    return {"mean": mean, "stderr": stderr, "low": mean - 2 * stderr, "high": mean + 2 * stderr, "n": n}


def scorecard(geneval: float = 0.8, gedit: float = 8.0, retention: float = 0.95) -> dict[str, Any]:
    """A complete scorecard of all three capabilities, the same value on every category."""
    means = {"geneval": geneval, "gedit": gedit, "retention": retention}
    metrics = {path: metric(means[path.partition("/")[0]]) for path in gate.expected_paths(PARAMS.capabilities)}
    return {
        "model": "student",
        "benchmarks": {"geneval": {"n": 320, "digest": "g" * 64}, "gedit": {"n": 336, "digest": "e" * 64}},
        "identities": {
            "base": "b" * 64,
            "teachers": {name: digest(name) for name in ("base", "local", "global")},
            "student": "s" * 64,
            "sampling": {"split": "eval", "steps": 16, "seed": 0},
        },
        "metrics": metrics,
    }


def write_candidate(project: Path, *, card: dict[str, Any] | None = None, weights: float = 1.0) -> None:
    """What a whole `dvc repro` leaves behind, as far as gate and registry read it."""
    from benchmarks.scores.scorecard import ExampleScore, write_scores

    card = card or scorecard()
    for folder in ("reports/score", "checkpoints/student", "checkpoints/absorbed"):
        shutil.rmtree(project / folder, ignore_errors=True)
        (project / folder).mkdir(parents=True)
    routes = [{"capability": "t2i", "teacher": "base", "weight": 1.0}]
    write_json(project / "params.yaml", {"distill": {"steps": 300, "routes": routes}, "seed": 0})
    write_json(project / "reports/scorecard.json", card)
    teachers = {name: {"metrics": scorecard(0.85, 8.5)["metrics"]} for name in ("base", "local", "global")}
    write_json(project / "reports/validate.json", {"teachers": teachers})
    for stage, route in (("student", "t2i"), ("absorbed", "guided")):
        rows = [f"{step},{route},{1 / (step + 1)},0.5,0.1" for step in range(5)]
        table = "\n".join(["step,route,loss,t,gradient_norm", *rows, ""])
        (project / f"checkpoints/{stage}/steps.csv").write_text(table)
    save_file({"weight": np.full(4, weights, np.float32)}, project / "checkpoints/absorbed/student.safetensors")
    write_json(project / "checkpoints/absorbed/checkpoint.json", {"trains": "all"})
    Image.fromarray(np.full((24, 24, 3), 128, np.uint8)).save(project / "reports/score/samples.png")
    scores = []
    for name, one in CAPABILITIES.items():
        for category in one.categories if name != "edit" else ():
            level = card["metrics"][f"{one.benchmark}/{category}"]["mean"]
            for index in range(10):
                value = float(index < round(10 * level)) if one.benchmark == "geneval" else level
                values = (
                    {"correct": value}
                    if one.benchmark == "geneval"
                    else {"O": value, "sc": value, "pq": value, "exact": 0.0}
                )
                scores.append(ExampleScore("student", one.benchmark, category, f"{category}-{index}", 0, index, values))
    write_scores(project / "reports/score", scores)


def new_project(folder: Path, database: Path | None = None) -> Path:
    """An empty project; `database` is a fresh MLflow database to copy, since making one takes seconds."""
    (folder / server.FOLDER).mkdir(parents=True)
    if database is not None:
        shutil.copyfile(database, folder / server.FOLDER / "mlflow.db")
    write_candidate(folder)
    return folder


def fresh_database(folder: Path) -> Path:
    """An MLflow database without experiments of ours, so that a copy of it carries no path."""
    from mlflow import MlflowClient

    for name, value in tracking.SWITCHES.items():
        os.environ.setdefault(name, value)
    MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}").search_experiments()
    return folder / "mlflow.db"


def submitted(
    project: Path,
    *,
    geneval: float = 0.8,
    gedit: float = 8.0,
    weights: float = 1.0,
    promote: submission.Promote = "review",
) -> dict[str, Any]:
    """Writes, judges and submits one candidate."""
    write_candidate(project, card=scorecard(geneval, gedit), weights=weights)
    judged(project)
    return submission.submit_files(project, PARAMS, promote, "ann", "nightly run")


def judged(project: Path, **changes: Any) -> dict[str, Any]:
    """Judges what lies in the project with PARAMS (or some of them changed)."""
    return gate.judge_files(project, replace(PARAMS, **changes))
