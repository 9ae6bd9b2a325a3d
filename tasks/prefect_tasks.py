"""The Prefect tasks: thin, one per stage and per benchmark. DVC is the cache across runs, so Prefect keeps none.

What a task returns is a small JSON value; files stay where the stages put them. A task is tried again only after what
passes by itself: another run on the same files, a store or server that does not answer. A stage that failed once fails
the same way again.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from prefect import Task, artifacts, task
from prefect.cache_policies import NO_CACHE
from prefect.concurrency.sync import concurrency
from prefect.events import emit_event
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from data.errors import Outage, UserError
from data.files import read_json
from tasks.checks.preflight import require_teachers
from tasks.environment import PROJECT, TEACHERS, prepare, setting
from tasks.registry.server import for_browsers
from tasks.running import workspace
from tasks.running.repro import Listener, StageFailed, pull, reproduce, require_success, stream
from tasks.running.workspace import Workspace
from tasks.s3 import objects, transfer

prepare()  # Prefect loads a deployment's file by its path, without the package `flows`

SCORECARD = Path("reports/scorecard.json")
REPORT = Path("reports/score/report.html")
IMAGES = {"images": "t2i.png", "edits": "edits.png", "scorecard-bars": "scorecard.png"}  # key -> file beside the report
LARGEST_IMAGE = 1_000_000  # bytes of a picture that the run's page carries itself
ABSORBED = Path("checkpoints/absorbed")
DELAYS = [10.0, 30.0, 60.0, 120.0, 300.0]  # s before each new try
SLOT = "DANCEOPD_SLOT"  # the concurrency limit that stands for this worker's device: one run on it at a time
LEASE = 60.0  # s after which a dead run's slot is free again
HOUR = 3600.0  # s
TIMEOUTS = {"distill": 168 * HOUR, "absorb": 72 * HOUR, "teachers": 336 * HOUR}  # of the other stages: STAGE_TIMEOUT
STAGE_TIMEOUT = 24 * HOUR
SHORT_TIMEOUT = HOUR  # of what talks to servers
PROGRESS = re.compile(r"^(?P<what>[^:]+(?:: [^:]+)?): (?P<done>\d+)/(?P<total>\d+)(?:,|$)")  # data/progress.py's lines


def _when_transient(task: Any, run: Any, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), Outage)


uncached = partial(task, cache_policy=NO_CACHE)
retried = partial(uncached, retries=len(DELAYS), retry_delay_seconds=DELAYS, retry_condition_fn=_when_transient)
asking = partial(retried, timeout_seconds=SHORT_TIMEOUT)


def _without_traceback(record: logging.LogRecord) -> bool:
    """A refusal's message says all; only defects keep their traceback."""
    if record.exc_info and isinstance(record.exc_info[1], (StageFailed, UserError)):
        record.exc_info = None
    return True


for _name in ("prefect.task_runs", "prefect.flow_runs"):
    logging.getLogger(_name).addFilter(_without_traceback)


def _into_log() -> Listener:
    logger = get_run_logger()
    return lambda text: logger.info(text) if text.strip() else None


def _into_page(name: str) -> Listener:
    """Lines into the run's log, and their counts into a progress bar on its page. A bar's failure stops nothing."""
    log = _into_log()
    bars: dict[str, Any] = {}  # key of a progress artifact -> its id

    def line(text: str) -> None:
        log(text)
        match = PROGRESS.match(text)
        if match is None or not int(match["total"]):
            return
        key = re.sub(r"[^a-z0-9]+", "-", match["what"].lower()).strip("-")
        percent = 100 * int(match["done"]) / int(match["total"])
        try:
            if key in bars:
                artifacts.update_progress_artifact(bars[key], percent)
            else:
                about = f"{name}: {match['what']}"
                bars[key] = artifacts.create_progress_artifact(percent, key=f"progress-{key}", description=about)
        except Exception as error:  # whatever the server's trouble is, the stage goes on
            log(f"progress is not shown: {type(error).__name__}")

    return line


# --- where the run works ----------------------------------------------------------------------------------------------


@asking
def checkout(revision: str | None, preset: str | None, overrides: Mapping[str, Any]) -> Workspace:
    """The folder of this run: a checkout of `revision` on a worker that has a repository, else this folder.

    Raises UserError for a checkout without an MLflow server: it is removed after its run, with a store inside it.
    """
    work = workspace.open_workspace(revision, preset, overrides, flow_run.get_name() or "local", _into_log())
    if work.is_checkout:
        if setting("MLFLOW_TRACKING_URI") is None:
            remedy = "runs of a repository's revisions are registered on an MLflow server"
            raise UserError(f"MLFLOW_TRACKING_URI is not set on this worker; {remedy}")
        text = f"branch `{work.branch}`, params in commit `{work.sha}`"
        artifacts.create_markdown_artifact(text, key="revision", description="the code and params that run")
    return work


@contextlib.contextmanager
def slot() -> Iterator[None]:
    """Holds the concurrency limit that `DANCEOPD_SLOT` names on this worker, so that one run at a time has its device;
    nothing to hold where it is unset.

    Raises ConcurrencySlotAcquisitionError when the server does not know the limit: running beside another run would be
    worse than not running.
    """
    name = setting(SLOT)
    if name is None:
        yield
        return
    # A server's restart, which a lease's renewal meets, stops no training.
    with concurrency(name, strict=True, lease_duration=LEASE, raise_on_lease_renewal_failure=False):
        yield


@asking
def push(work: Workspace) -> dict[str, str]:
    """Data and checkpoints to the DVC remote, dvc.lock and reports to the run's branch."""
    pushed = workspace.push(work, _into_log())
    if pushed:
        restore = f"`git fetch origin {pushed['branch']} && git checkout FETCH_HEAD && dvc pull`"
        _show_names("dvc-revision", "DVC revision", pushed, "where it lies", f"Every file of this run: {restore}")
    return pushed


@uncached
def close(work: Workspace) -> None:
    """Removes the checkout of a finished run."""
    workspace.close(work)


# --- stages -----------------------------------------------------------------------------------------------------------


def _stage(name: str) -> Task[[Workspace], dict[str, Any]]:
    """The task of a stage of dvc.yaml. Its lines go to the run's log; StageFailed carries the stage's own message."""
    about, limit = f"dvc repro --single-item {name}", TIMEOUTS.get(name, STAGE_TIMEOUT)

    @retried(name=name, description=about, timeout_seconds=limit)
    def run(work: Workspace) -> dict[str, Any]:
        return reproduce(name, work.path, _into_page(name))

    return run


collect, curate, validate = map(_stage, ("collect", "curate", "validate"))
encode, distill, absorb, score = map(_stage, ("encode", "distill", "absorb", "score"))


@uncached
def preflight(work: Workspace) -> None:
    """Names every fault of params.yaml. In a child, because the stages' modules load torch."""
    require_success("preflight", stream([sys.executable, "-m", "tasks", "check"], work.path, _into_log()))


@retried
def fetch_teachers(work: Workspace) -> None:
    """Fetches the trained teachers from the remote inside the repository; every routed one must be there."""
    pull(str(TEACHERS), work.path, _into_log())
    require_teachers(work.path / "params.yaml", work.path / TEACHERS)


# --- what the run's page shows ----------------------------------------------------------------------------------------


def _benchmark(name: str) -> Task[[Workspace], int]:
    about = f"Publishes the scorecard's part of {name} on the run's page"

    @uncached(name=f"benchmark-{name}", description=about)
    def run(work: Workspace) -> int:
        metrics = read_json(work.path / SCORECARD)["metrics"]
        if not metrics:
            raise UserError(f"{SCORECARD}: no metric in it; run the score stage again")
        rows = metric_rows(metrics, f"{name}/")
        if rows:
            _show_rows(f"scorecard-{name}", rows, f"{name}: mean with its interval; n counts prompts or samples")
        else:  # a student of T2I alone has no edits to show, and the other way round
            get_run_logger().info(f"{name}: no example of it was held out")
        return len(rows)

    return run


benchmark_geneval, benchmark_gedit = map(_benchmark, ("geneval", "gedit"))


def metric_rows(metrics: Mapping[str, Any], prefix: str = "") -> list[dict[str, Any]]:
    """A row for each metric path that starts with `prefix`: metric, mean, stderr, low, high, n."""
    return [{"metric": path, **metric} for path, metric in metrics.items() if path.startswith(prefix)]


def verdict_markdown(verdict: Mapping[str, Any]) -> str:
    """The gate's verdict as a table, refused rules first."""
    columns = ("rule", "passed", "value", "bound", "reason")
    rules = sorted(verdict["rules"], key=lambda rule: bool(rule["passed"]))
    rows = [f"| {' | '.join(_cell(rule[key]) for key in columns)} |" for rule in rules]
    title = "# Passed" if verdict["passed"] else "# Refused"
    return "\n".join([title, "", f"| {' | '.join(columns)} |", "|---|---|---|---|---|", *rows])


def _show_rows(key: str, rows: list[dict[str, Any]], description: str) -> None:
    artifacts.create_table_artifact(table=rows, key=key, description=description)


def _show_names(key: str, title: str, values: Mapping[str, Any], description: str, below: str = "") -> None:
    """Names and values as an artifact of the run's page, with a text below them."""
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in values.items())
    text = f"| {title} | |\n|---|---|\n{rows}\n\n{below}"
    artifacts.create_markdown_artifact(text, key=key, description=description)


def _show_images(folder: Path) -> None:
    """The stage's pictures, inside the page itself: a browser without MLflow's password sees them too."""
    for key, name in IMAGES.items():
        if (folder / name).is_file() and (folder / name).stat().st_size <= LARGEST_IMAGE:
            content = base64.b64encode((folder / name).read_bytes()).decode()
            artifacts.create_image_artifact(f"data:image/png;base64,{content}", key=key, description=name)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")


# --- the outside world: never a DVC stage -----------------------------------------------------------------------------


def _gate_params(work: Workspace) -> Any:
    """Section `gate`; what a checkout registers comes from a clean, known revision, whatever it says."""
    from tasks.params.reading import load_params
    from tasks.release import gate as rules

    params = load_params(rules.Params, "gate", work.path / "params.yaml")
    return replace(params, allow_dirty=False, allow_unversioned=False) if work.is_checkout else params


@asking
def gate(work: Workspace) -> dict[str, Any]:
    """Judges the candidate; a refusal is a result, not a failure. Writes reports/verdict.json.

    Returns {"verdict", "champion": metric path -> mean of the champion it was compared with (empty if there is none)}.
    """
    from tasks.registry import versions
    from tasks.release import gate as rules
    from tasks.release.review import write_review

    champion = versions.champion(work.path)  # before this candidate may take its place
    params = _gate_params(work)
    verdict = rules.judge_files(work.path, params)
    write_review(work.path, params, champion)
    rows = metric_rows(read_json(work.path / SCORECARD)["metrics"], "retention/")
    if rows:
        _show_rows("scorecard-retention", rows, "student / teacher on that teacher's own categories")
    about = "every rule of the gate with its numbers"
    artifacts.create_markdown_artifact(verdict_markdown(verdict), key="verdict", description=about)
    report = work.path / REPORT
    _show_images(report.parent)
    if not work.is_checkout:  # a checkout's report is in MLflow
        about = "headline table, best and worst examples"
        artifacts.create_link_artifact(report.as_uri(), link_text=str(REPORT), key="report", description=about)
    metrics = champion["scorecard"]["metrics"] if champion else {}
    return {"verdict": verdict, "champion": {path: metric["mean"] for path, metric in metrics.items()}}


@asking
def register(work: Workspace, promote: Literal["auto", "review"]) -> dict[str, Any]:
    """Records the run; a passing candidate becomes a version, and with promote="auto" the champion."""
    from tasks.release import submission

    reason = "promoted by the flow" if promote == "auto" else "submitted by the flow"
    result = dict(submission.submit_files(work.path, _gate_params(work), promote, actor(), reason))
    _show_names("registration", "registered", result, "the run and the version in MLflow")
    for key, (link, text) in mlflow_links(result).items():
        artifacts.create_link_artifact(link, link_text=text, key=key, description=text)
    return result


def mlflow_links(registered: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Artifact key -> (address, text) of the version's and the run's page, where MLflow is a server."""
    address = for_browsers(str(registered["tracking_uri"]))
    if address is None:
        return {}
    run, model, version = registered["run_id"], registered["model"], registered.get("version")
    links = {"mlflow-run": (f"{address}/#/runs/{run}", f"MLflow run {run}")}
    if version:
        links["mlflow-version"] = (f"{address}/#/models/{model}/versions/{version}", f"{model} version {version}")
    return links


def actor() -> str:
    """Who runs this: the system's account, as far as it is known."""
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


# --- versions: scored again, promoted, rolled back --------------------------------------------------------------------


@asking
def find_model(model: str) -> dict[str, Any]:
    """{"model", "version", "sha", "address"} of a registered version, or of a checkpoint by address."""
    from tasks.registry import versions

    if not versions.is_reference(model):
        return {"model": model, "version": None, "sha": None, "address": model}
    version = versions.require(PROJECT, model)
    return {"model": model, "version": version.number, "sha": version.sha, "address": None}


@asking
def find_champion() -> dict[str, Any] | None:
    """As `find_model` for the champion; None before the first promotion."""
    from tasks.registry import versions

    version = versions.find(PROJECT, f"models:/{versions.MODEL}@{versions.CHAMPION}")
    if version is None:
        return None
    return {"model": versions.CHAMPION, "version": version.number, "sha": version.sha, "address": None}


@asking
def checkout_of(judged: Mapping[str, Any], revision: str | None) -> Workspace:
    """The folder to score a model in (as `find_model` returns it): of its revision unless another is named."""
    revision = (revision or judged["sha"]) if workspace.repository() else None
    name = f"score-{flow_run.get_name() or 'local'}"
    return workspace.open_workspace(revision, None, {}, name, _into_log())


@retried(timeout_seconds=STAGE_TIMEOUT)
def rescore(work: Workspace, judged: Mapping[str, Any]) -> dict[str, Any]:
    """Scores a model whose weights are as registered. Returns {"model", "version", "metrics"}."""
    from tasks.registry import versions

    folder, address = work.path / "runs" / "rescore", judged["address"]
    if address is None:
        checkpoint = work.path / ABSORBED
        versions.require_weights(versions.require(PROJECT, str(judged["version"])), checkpoint)
    elif objects.is_s3(address):
        checkpoint = folder / "checkpoint"
        transfer.download_folder(address, checkpoint)
    else:
        checkpoint = Path(address).resolve()
    paths = ["--checkpoint", str(checkpoint), "--out", str(folder / "scores")]
    command = [sys.executable, "-m", "tasks", "rescore", *paths]
    require_success("rescore", stream(command, work.path, _into_page("rescore")))
    metrics = read_json(folder / "scores" / "scorecard.json")["metrics"]
    _show_rows("rescored", metric_rows(metrics), f"{judged['model']}, scored again")
    return {"model": judged["model"], "version": judged["version"], "metrics": metrics}


@asking
def report_drift(champion: Mapping[str, Any], scored: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Metrics that left their registered interval, on the run's page and as `danceopd.champion.drifted`."""
    from tasks.checks import rescore
    from tasks.registry import versions

    version = versions.require(PROJECT, str(champion["version"]))
    with TemporaryDirectory() as temporary:
        before = rescore.registered_scorecard(PROJECT, version, Path(temporary))
    rows = rescore.drifted(before, scored)
    if rows:
        _show_rows("drift", rows, f"version {version.number}: means outside the interval they were registered with")
        resource = {"prefect.resource.id": f"danceopd.model.{versions.MODEL}", "version": version.number}
        emit_event("danceopd.champion.drifted", resource=resource, payload={"metrics": [row["metric"] for row in rows]})
    return rows


@asking
def require_clean(version: str) -> None:
    """Refuses a version that was made from changed or unknown code."""
    from tasks.registry import versions

    versions.require_clean(versions.require(PROJECT, version))


def _decided(result: Mapping[str, Any]) -> dict[str, Any]:
    entry, changed = result["entry"], [str(line) for line in result["changed"]]
    below = "\n".join(f"- {line}" for line in changed)
    _show_names("decision", "ledger", entry, "the ledger's entry and what followed it", below)
    return {"entry": entry, "changed": changed}


@asking
def promote(version: str, reviewer: str, reason: str) -> dict[str, Any]:
    """The reviewed version becomes the champion. Returns {"entry" (the ledger's), "changed"}."""
    from tasks.release import decisions

    return _decided(decisions.promote(PROJECT, version, reviewer, reason))


@asking
def rollback(reviewer: str, reason: str) -> dict[str, Any]:
    """Back to the previous champion. Returns as `promote`."""
    from tasks.release import decisions

    return _decided(decisions.rollback(PROJECT, reviewer, reason))


@asking
def carry_out_reviews() -> list[dict[str, Any]]:
    """Carries out the reviews of MLflow's pages. Returns a {"version", "status", "message"} for each."""
    from tasks.release import decisions

    decided = decisions.decide_reviews(PROJECT)
    if decided:
        _show_rows("reviews", decided, "reviews carried out, and those that could not be")
    return decided


@asking
def publish() -> dict[str, Any]:
    """Publishes what the ledger says is in service; empty where DANCEOPD_PUBLISH is unset. Can be repeated."""
    from tasks.release import publish as publishing

    if publishing.destination() is None:
        return {}
    published = publishing.publish(PROJECT)
    _show_names("published", "published", published, "the champion in the S3 store")
    return published
