"""The Prefect tasks: thin, one per stage and per benchmark. DVC is the cache across runs, so Prefect keeps none.

What a task returns is a small JSON value; files stay where the stages put them.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from prefect import Task, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from data.errors import UserError
from data.files import read_json
from tasks.environment import PROJECT
from tasks.repro import Busy, StageFailed, failure, is_chatter, pull, reproduce, stream

SCORECARD = Path("reports/scorecard.json")
REPORT = Path("reports/score/report.html")
TEACHERS = "data/teachers"
BUSY_DELAYS = [10.0, 30.0, 60.0]  # s


def _when_busy(task: Any, run: Any, state: Any) -> bool:
    """Only a lock is worth waiting for: a stage that failed once fails the same way again."""
    return isinstance(state.result(raise_on_failure=False), Busy)


retried_when_busy = partial(task, cache_policy=NO_CACHE, retries=len(BUSY_DELAYS), retry_delay_seconds=BUSY_DELAYS, retry_condition_fn=_when_busy)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Our own refusals say all there is to say; where in Prefect's engine they passed is noise. Defects keep their traceback."""
    if record.exc_info and isinstance(record.exc_info[1], (StageFailed, Busy, UserError)):
        record.exc_info = None
    return True


for _name in ("prefect.task_runs", "prefect.flow_runs"):
    logging.getLogger(_name).addFilter(_without_traceback)


def _into_log() -> Callable[[str], None]:
    logger = get_run_logger()
    return lambda text: None if is_chatter(text) else logger.info(text)


def run_stage(name: str) -> dict[str, Any]:
    """Reproduces one stage of dvc.yaml and streams its lines into the run's log. Raises StageFailed with the stage's own message."""
    return reproduce(name, PROJECT, _into_log())


def _stage(name: str) -> Task[[], dict[str, Any]]:
    @retried_when_busy(name=name, description=f"dvc repro --single-item {name}")
    def run() -> dict[str, Any]:
        return run_stage(name)

    return run


collect, curate, validate, encode, distill, absorb, score = map(_stage, ("collect", "curate", "validate", "encode", "distill", "absorb", "score"))


@task(cache_policy=NO_CACHE)
def preflight(preset: str | None) -> None:
    """Puts the preset in force, if one is given, and names every fault of params.yaml. In a child, because the stages' modules load torch."""
    for arguments in ([["preset", preset]] if preset else []) + [["check"]]:
        ended = stream([sys.executable, "-m", "tasks", *arguments], PROJECT, _into_log())
        if ended.status:
            raise failure("preflight", ended)


@retried_when_busy
def fetch_teachers() -> None:
    """Fetches the trained teachers that dvc.lock names, from the remote inside the repository, and checks that the routes' teachers are among them."""
    from tasks.preflight import require_teachers

    pull(TEACHERS, PROJECT, _into_log())
    require_teachers(PROJECT / "params.yaml", PROJECT / TEACHERS)


# --- what the run's page shows ----------------------------------------------------------------------------------------------


def _publish_benchmark(name: str) -> int:
    rows = metric_rows(read_json(PROJECT / SCORECARD), name)
    if not rows:
        raise UserError(f"{SCORECARD}: no metric of {name}; run the score stage again")
    create_table_artifact(table=rows, key=f"scorecard-{name}", description=f"{name}: mean with its interval; n counts prompts or samples")
    return len(rows)


def _benchmark(name: str) -> Task[[], int]:
    @task(name=f"benchmark-{name}", cache_policy=NO_CACHE, description=f"Publishes the scorecard's part of {name} on the run's page")
    def run() -> int:
        return _publish_benchmark(name)

    return run


benchmark_geneval, benchmark_gedit = map(_benchmark, ("geneval", "gedit"))


def metric_rows(scorecard: dict[str, Any], prefix: str) -> list[dict[str, Any]]:
    """One row per metric path under `prefix/`: metric, mean, stderr, low, high, n."""
    return [{"metric": path, **metric} for path, metric in scorecard["metrics"].items() if path.startswith(f"{prefix}/")]


def verdict_markdown(verdict: dict[str, Any]) -> str:
    """The gate's verdict as a table, refused rules first."""
    rules = sorted(verdict["rules"], key=lambda rule: bool(rule["passed"]))
    head = ["# Passed" if verdict["passed"] else "# Refused", "", "| rule | passed | value | bound | reason |", "|---|---|---|---|---|"]
    return "\n".join(head + ["| " + " | ".join(_cell(rule[key]) for key in ("rule", "passed", "value", "bound", "reason")) + " |" for rule in rules])


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")


# --- the outside world: never a DVC stage -----------------------------------------------------------------------------------


@task(cache_policy=NO_CACHE)
def gate() -> dict[str, Any]:
    """Judges the candidate; a refusal is a result, not a failure. Writes reports/verdict.json.

    Returns {"verdict": it, "champion": metric path -> mean of the champion it was compared with (empty if there is none)}.
    """
    from tasks import gate as rules
    from tasks import registry
    from tasks.params import load_params
    from tasks.review import write_review

    champion = registry.champion(PROJECT)  # before this candidate may take its place
    params = load_params(rules.Params, "gate", PROJECT / "params.yaml")
    verdict = rules.judge_files(PROJECT, params)
    write_review(PROJECT, params, champion)
    rows = metric_rows(read_json(PROJECT / SCORECARD), "retention")
    if rows:
        create_table_artifact(table=rows, key="scorecard-retention", description="student / teacher on that teacher's own categories")
    create_markdown_artifact(verdict_markdown(verdict), key="verdict", description="every rule of the gate with its numbers")
    create_link_artifact((PROJECT / REPORT).as_uri(), link_text=str(REPORT), key="report", description="headline table, best and worst examples")
    metrics = champion["scorecard"]["metrics"] if champion else {}
    return {"verdict": verdict, "champion": {path: metric["mean"] for path, metric in metrics.items()}}


@task(cache_policy=NO_CACHE)
def register(promote: Literal["auto", "review"]) -> dict[str, Any]:
    """Records the run; a passing candidate becomes a version, and with promote="auto" the champion."""
    from tasks import gate as rules
    from tasks import registry
    from tasks.params import load_params

    params = load_params(rules.Params, "gate", PROJECT / "params.yaml")
    result = dict(registry.submit_files(PROJECT, params, promote, actor(), "promoted by the flow" if promote == "auto" else "submitted by the flow"))
    rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in result.items())
    create_markdown_artifact(f"| registered | |\n|---|---|\n{rows}", key="registration", description="the run and the version in MLflow")
    return result


def actor() -> str:
    """Who runs this: the system's account, as far as it is known."""
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
