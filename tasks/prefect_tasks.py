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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from prefect import Task, task
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.concurrency.sync import concurrency
from prefect.events import emit_event
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from data.errors import Outage, UserError
from data.files import read_json
from tasks.environment import PROJECT
from tasks.running.repro import StageFailed, failure, pull, reproduce, stream
from tasks.running.workspace import Workspace, open_workspace, repository
from tasks.running.workspace import close as close_workspace
from tasks.running.workspace import push as push_workspace

SCORECARD = Path("reports/scorecard.json")
REPORT = Path("reports/score/report.html")
IMAGES = {
    "images": "t2i.png",
    "edits": "edits.png",
    "scorecard-bars": "scorecard.png",
}  # artifact's key -> file beside the report
LARGEST_IMAGE = 1_000_000  # bytes of a picture that the run's page carries itself
TEACHERS = "data/teachers"
ABSORBED = Path("checkpoints/absorbed")
DELAYS = [10.0, 30.0, 60.0, 120.0, 300.0]  # s before each new try
SLOT = "DANCEOPD_SLOT"  # the concurrency limit that stands for this worker's device: one run on it at a time
LEASE = 60.0  # s after which a dead run's slot is free again
HOUR = 3600.0
TIMEOUTS = {"distill": 168 * HOUR, "absorb": 72 * HOUR, "teachers": 336 * HOUR}  # s; of the other stages: STAGE_TIMEOUT
STAGE_TIMEOUT = 24 * HOUR
SHORT_TIMEOUT = HOUR  # what talks to servers
PROGRESS = re.compile(r"^(?P<what>[^:]+(?:: [^:]+)?): (?P<done>\d+)/(?P<total>\d+)(?:,|$)")  # data/progress.py's lines


def _when_transient(task: Any, run: Any, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), Outage)


retried = partial(
    task, cache_policy=NO_CACHE, retries=len(DELAYS), retry_delay_seconds=DELAYS, retry_condition_fn=_when_transient
)
asking = partial(retried, timeout_seconds=SHORT_TIMEOUT)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Our own refusals say all there is to say; where in Prefect's engine they passed is noise. Defects keep their
    traceback.
    """
    if record.exc_info and isinstance(record.exc_info[1], (StageFailed, UserError)):
        record.exc_info = None
    return True


for _name in ("prefect.task_runs", "prefect.flow_runs"):
    logging.getLogger(_name).addFilter(_without_traceback)


def _into_log() -> Callable[[str], None]:
    logger = get_run_logger()
    return lambda text: logger.info(text) if text.strip() else None


def _into_page(name: str) -> Callable[[str], None]:
    """Lines into the run's log, and the last count of a long loop into a progress bar on the run's page. A page that
    cannot be reached stops no training.
    """
    log = _into_log()
    made: dict[str, Any] = {}  # progress artifact -> its id

    def line(text: str) -> None:
        log(text)
        found = PROGRESS.match(text)
        if found is None or not int(found["total"]):
            return
        key, percent = (
            re.sub(r"[^a-z0-9]+", "-", found["what"].lower()).strip("-"),
            100 * int(found["done"]) / int(found["total"]),
        )
        try:
            if key in made:
                update_progress_artifact(made[key], percent)
            else:
                made[key] = create_progress_artifact(
                    percent, key=f"progress-{key}", description=f"{name}: {found['what']}"
                )
        except Exception as error:  # whatever the server's trouble is, the stage goes on
            log(f"progress is not shown: {type(error).__name__}")

    return line


# --- where the run works ----------------------------------------------------------------------------------------------


@asking
def checkout(revision: str | None, preset: str | None, overrides: Mapping[str, Any]) -> Workspace:
    """The folder of this run: a checkout of `revision` on a worker that has a repository, else this folder."""
    work = open_workspace(revision, preset, overrides, str(flow_run.get_name() or "local"), _into_log())
    if work.is_checkout:
        require_servers()
        create_markdown_artifact(
            f"branch `{work.branch}`, params in commit `{work.sha}`",
            key="revision",
            description="the code and params that run",
        )
    return work


def require_servers() -> None:
    """A checkout is removed after its run: what is registered has to lie on a server. Raises UserError when none is
    set.
    """
    if not os.environ.get("MLFLOW_TRACKING_URI", "").strip():
        raise UserError(
            "MLFLOW_TRACKING_URI is not set on this worker; runs of a repository's revisions are registered on an MLflow server"
        )


@contextlib.contextmanager
def slot() -> Iterator[None]:
    """Holds the concurrency limit that `DANCEOPD_SLOT` names on this worker, so that one run at a time has its device;
    nothing to hold where it is unset.

    Raises ConcurrencySlotAcquisitionError when the server does not know the limit: running beside another run would be
    worse than not running.
    """
    name = os.environ.get(SLOT, "").strip()
    if not name:
        yield
        return
    with concurrency(
        name, strict=True, lease_duration=LEASE, raise_on_lease_renewal_failure=False
    ):  # a server's restart stops no training
        yield


@asking
def push(work: Workspace) -> dict[str, str]:
    """Data and checkpoints to the DVC remote, dvc.lock and reports to the run's branch."""
    pushed = push_workspace(work, _into_log())
    if pushed:
        restore = f"`git fetch origin {pushed['branch']} && git checkout FETCH_HEAD && dvc pull`"
        _show_table("dvc-revision", "DVC revision", pushed, "where it lies", f"Every file of this run: {restore}")
    return pushed


@task(cache_policy=NO_CACHE)
def close(work: Workspace) -> None:
    """Removes the checkout of a finished run."""
    close_workspace(work)


# --- stages -----------------------------------------------------------------------------------------------------------


def run_stage(name: str, project: Path) -> dict[str, Any]:
    """Reproduces one stage of dvc.yaml and streams its lines into the run's log. Raises StageFailed with the stage's
    own message.
    """
    return reproduce(name, project, _into_page(name))


def _stage(name: str) -> Task[[Workspace], dict[str, Any]]:
    @retried(
        name=name, description=f"dvc repro --single-item {name}", timeout_seconds=TIMEOUTS.get(name, STAGE_TIMEOUT)
    )
    def run(work: Workspace) -> dict[str, Any]:
        return run_stage(name, work.path)

    return run


collect, curate, validate, encode, distill, absorb, score = map(
    _stage, ("collect", "curate", "validate", "encode", "distill", "absorb", "score")
)


@task(cache_policy=NO_CACHE)
def preflight(work: Workspace) -> None:
    """Names every fault of params.yaml. In a child, because the stages' modules load torch."""
    ended = stream([sys.executable, "-m", "tasks", "check"], work.path, _into_log())
    if ended.status:
        raise failure("preflight", ended)


@retried
def fetch_teachers(work: Workspace) -> None:
    """Fetches the trained teachers that dvc.lock names, from the remote inside the repository, and checks that the
    routes' teachers are among them.
    """
    from tasks.checks.preflight import require_teachers

    pull(TEACHERS, work.path, _into_log())
    require_teachers(work.path / "params.yaml", work.path / TEACHERS)


# --- what the run's page shows ----------------------------------------------------------------------------------------


def _publish_benchmark(name: str, work: Workspace) -> int:
    scorecard = read_json(work.path / SCORECARD)
    rows = metric_rows(scorecard, name)
    if not scorecard["metrics"]:
        raise UserError(f"{SCORECARD}: no metric in it; run the score stage again")
    if not rows:  # a student of T2I alone has no edits to show, and the other way round
        get_run_logger().info(f"{name}: no example of it was held out")
        return 0
    create_table_artifact(
        table=rows, key=f"scorecard-{name}", description=f"{name}: mean with its interval; n counts prompts or samples"
    )
    return len(rows)


def _benchmark(name: str) -> Task[[Workspace], int]:
    @task(
        name=f"benchmark-{name}",
        cache_policy=NO_CACHE,
        description=f"Publishes the scorecard's part of {name} on the run's page",
    )
    def run(work: Workspace) -> int:
        return _publish_benchmark(name, work)

    return run


benchmark_geneval, benchmark_gedit = map(_benchmark, ("geneval", "gedit"))


def _show_images(folder: Path) -> None:
    """The stage's pictures, inside the page itself: a browser without MLflow's password sees them too."""
    for key, name in IMAGES.items():
        if (folder / name).is_file() and (folder / name).stat().st_size <= LARGEST_IMAGE:
            content = base64.b64encode((folder / name).read_bytes()).decode()
            create_image_artifact(f"data:image/png;base64,{content}", key=key, description=name)


def metric_rows(scorecard: dict[str, Any], prefix: str) -> list[dict[str, Any]]:
    """One row per metric path under `prefix/`: metric, mean, stderr, low, high, n."""
    return [
        {"metric": path, **metric} for path, metric in scorecard["metrics"].items() if path.startswith(f"{prefix}/")
    ]


def verdict_markdown(verdict: dict[str, Any]) -> str:
    """The gate's verdict as a table, refused rules first."""
    rules = sorted(verdict["rules"], key=lambda rule: bool(rule["passed"]))
    head = [
        "# Passed" if verdict["passed"] else "# Refused",
        "",
        "| rule | passed | value | bound | reason |",
        "|---|---|---|---|---|",
    ]
    return "\n".join(
        head
        + [
            "| " + " | ".join(_cell(rule[key]) for key in ("rule", "passed", "value", "bound", "reason")) + " |"
            for rule in rules
        ]
    )


def _show_table(key: str, title: str, values: Mapping[str, Any], description: str, below: str = "") -> None:
    """Names and values as an artifact of the run's page, with a text below them."""
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in values.items())
    create_markdown_artifact(f"| {title} | |\n|---|---|\n{rows}\n\n{below}", key=key, description=description)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")


# --- the outside world: never a DVC stage -----------------------------------------------------------------------------


def _gate_params(work: Workspace) -> Any:
    """Section `gate`; where a checkout was run, what is registered comes from a clean, known revision whatever the
    params say.
    """
    from tasks.params.reading import load_params
    from tasks.release import gate as rules

    params = load_params(rules.Params, "gate", work.path / "params.yaml")
    return replace(params, allow_dirty=False, allow_unversioned=False) if work.is_checkout else params


@asking
def gate(work: Workspace) -> dict[str, Any]:
    """Judges the candidate; a refusal is a result, not a failure. Writes reports/verdict.json.

    Returns {"verdict": it, "champion": metric path -> mean of the champion it was compared with (empty if there is
    none)}.
    """
    from tasks.registry import versions as registry
    from tasks.release import gate as rules
    from tasks.release.review import write_review

    champion = registry.champion(work.path)  # before this candidate may take its place
    params = _gate_params(work)
    verdict = rules.judge_files(work.path, params)
    write_review(work.path, params, champion)
    rows = metric_rows(read_json(work.path / SCORECARD), "retention")
    if rows:
        create_table_artifact(
            table=rows, key="scorecard-retention", description="student / teacher on that teacher's own categories"
        )
    create_markdown_artifact(
        verdict_markdown(verdict), key="verdict", description="every rule of the gate with its numbers"
    )
    _show_images((work.path / REPORT).parent)
    if not work.is_checkout:  # a checkout's report is in MLflow
        create_link_artifact(
            (work.path / REPORT).as_uri(),
            link_text=str(REPORT),
            key="report",
            description="headline table, best and worst examples",
        )
    metrics = champion["scorecard"]["metrics"] if champion else {}
    return {"verdict": verdict, "champion": {path: metric["mean"] for path, metric in metrics.items()}}


@asking
def register(work: Workspace, promote: Literal["auto", "review"]) -> dict[str, Any]:
    """Records the run; a passing candidate becomes a version, and with promote="auto" the champion."""
    from tasks.release import submission

    reason = "promoted by the flow" if promote == "auto" else "submitted by the flow"
    result = dict(submission.submit_files(work.path, _gate_params(work), promote, actor(), reason))
    _show_table("registration", "registered", result, "the run and the version in MLflow")
    for key, (link, text) in mlflow_links(result).items():
        create_link_artifact(link, link_text=text, key=key, description=text)
    return result


def mlflow_links(registered: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Artifact key -> (address, text) of the version's and the run's page, where MLflow is a server."""
    from tasks.registry.server import for_browsers

    address = for_browsers(str(registered["tracking_uri"]))
    if address is None:
        return {}
    links = {"mlflow-run": (f"{address}/#/runs/{registered['run_id']}", f"MLflow run {registered['run_id']}")}
    if registered.get("version"):
        version = registered["version"]
        links["mlflow-version"] = (
            f"{address}/#/models/{registered['model']}/versions/{version}",
            f"{registered['model']} version {version}",
        )
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
    """{"model", "version", "sha", "address"}: a registered version with its number and commit, or a checkpoint by
    address (s3:// or a folder).
    """
    from tasks.registry import versions

    if not versions.is_reference(model):
        return {"model": model, "version": None, "sha": None, "address": model}
    found = versions.require(PROJECT, model)
    return {"model": model, "version": found.number, "sha": found.sha, "address": None}


@asking
def find_champion() -> dict[str, Any] | None:
    """As `find_model` for the champion; None before the first promotion."""
    from tasks.registry import versions
    from tasks.registry import versions as registry

    found = versions.find(PROJECT, f"models:/{registry.MODEL}@{registry.CHAMPION}")
    return (
        None
        if found is None
        else {"model": registry.CHAMPION, "version": found.number, "sha": found.sha, "address": None}
    )


@asking
def checkout_of(found: Mapping[str, Any], revision: str | None) -> Workspace:
    """The folder with the examples, params and code to score a model with: those of its own revision unless another is
    asked for.
    """
    return open_workspace(
        revision or found["sha"] if repository() else None,
        None,
        {},
        f"score-{flow_run.get_name() or 'local'}",
        _into_log(),
    )


@retried(timeout_seconds=STAGE_TIMEOUT)
def rescore(work: Workspace, found: Mapping[str, Any]) -> dict[str, Any]:
    """Scores the model's weights, after comparing them with the registered hashes. Returns {"model", "version",
    "metrics"}.
    """
    from tasks.registry import versions

    folder = work.path / "runs" / "rescore"
    if found["address"] is None:
        checkpoint = work.path / ABSORBED
        versions.require_weights(versions.require(PROJECT, str(found["version"])), checkpoint)
    elif str(found["address"]).startswith("s3://"):
        from tasks.s3 import transfer

        checkpoint = folder / "checkpoint"
        transfer.download_folder(str(found["address"]), checkpoint)
    else:
        checkpoint = Path(str(found["address"])).resolve()
    command = [
        sys.executable,
        "-m",
        "tasks",
        "rescore",
        "--checkpoint",
        str(checkpoint),
        "--out",
        str(folder / "scores"),
    ]
    ended = stream(command, work.path, _into_page("rescore"))
    if ended.status:
        raise failure("rescore", ended)
    metrics = read_json(folder / "scores" / "scorecard.json")["metrics"]
    create_table_artifact(
        table=[{"metric": path, **metric} for path, metric in metrics.items()],
        key="rescored",
        description=f"{found['model']}, scored again",
    )
    return {"model": found["model"], "version": found["version"], "metrics": metrics}


@asking
def report_drift(found: Mapping[str, Any], scored: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The metrics that left their registered interval, on the run's page and as the event `danceopd.champion.drifted`;
    empty when none did.
    """
    from tempfile import TemporaryDirectory

    from tasks.checks import rescore as checks_rescore
    from tasks.registry import versions
    from tasks.registry import versions as registry

    version = versions.require(PROJECT, str(found["version"]))
    with TemporaryDirectory() as temporary:
        before = checks_rescore.registered_scorecard(PROJECT, version, Path(temporary))
    rows = checks_rescore.drifted(before, scored)
    if rows:
        create_table_artifact(
            table=rows,
            key="drift",
            description=f"version {version.number}: means outside the interval they were registered with",
        )
        resource = {"prefect.resource.id": f"danceopd.model.{registry.MODEL}", "version": version.number}
        emit_event("danceopd.champion.drifted", resource=resource, payload={"metrics": [row["metric"] for row in rows]})
    return rows


@asking
def require_clean(version: str) -> None:
    """Refuses a version that was made from changed or unknown code."""
    from tasks.registry import versions

    versions.require_clean(versions.require(PROJECT, version))


def _decided(result: Mapping[str, Any]) -> dict[str, Any]:
    entry, changed = result["entry"], [str(line) for line in result["changed"]]
    told = "\n".join(f"- {line}" for line in changed)
    _show_table("decision", "ledger", entry, "the ledger's entry and what followed it", told)
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
    """Reviews that were made in MLflow's pages become promotions and rejections. Returns one {"version", "status",
    "message"} for each.
    """
    from tasks.release import decisions

    decided = decisions.decide_reviews(PROJECT)
    if decided:
        create_table_artifact(
            table=decided, key="reviews", description="reviews carried out, and those that could not be"
        )
    return decided


@asking
def publish() -> dict[str, Any]:
    """What the ledger says is in service is published, and `latest` points to it; empty where DANCEOPD_PUBLISH is
    unset. Repeating it sends what is missing.
    """
    from tasks.release import publish as publishing

    if publishing.destination() is None:
        return {}
    published = publishing.publish(PROJECT)
    _show_table("published", "published", published, "the champion in the S3 store")
    return published
