"""MLflow as a reading room: stages write plain files, this module publishes them afterwards. A dead server costs no
training.

The store is `mlflow/mlflow.db` (SQLite) with `mlflow/artifacts` inside the project, or whatever `MLFLOW_TRACKING_URI`
names. Nothing is reported home.

    with run(project, "distill", tags={...}) as tracked:
        log_params(tracked, params)                      # nested sections become dotted names
        log_steps(tracked, "distill", Path("steps.csv"))  # distill/loss/t2i, distill/gradient_norm, ...
        log_scorecard(tracked, scorecard)                # each metric path, under its own name
        log_files(tracked, {"report": Path("reports/score")})
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from data.errors import UserError
from data.files import sha256_bytes
from data.yaml_files import flatten
from tasks.environment import PROXIED
from tasks.registry import server
from tasks.registry.server import Store
from tasks.training.metrics import METRICS, speed_file

NamedValue = tuple[str, float, int]  # metric, value, step
LONGEST_PARAM = 6000  # characters; MLflow cuts longer values without a word
LONGEST_TAG = 8000
STEP_COLUMNS = ("step", "route", "loss", "t", "gradient_norm")
IDENTITY_TAG = "submission"  # what a run is about
SWITCHES = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_MODEL_CATALOG_URI": "",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # the default (7, doubling) hangs for minutes on a dead server
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    **PROXIED,
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it would print the address with its password
    "GIT_PYTHON_REFRESH": "quiet",
}


@dataclass(frozen=True)
class Run:
    """One MLflow run that is being written."""

    store: Store
    run_id: str
    experiment_id: str
    started: int  # ms since 1970, UTC: the time of every metric, so that what is sent twice is kept once


def open_store(project: Path) -> Store:
    """Opens (and the first time creates) the store. Raises Outage within seconds when a server does not answer."""
    project = Path(project).resolve()
    uri = server.tracking_uri(project)
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
    if uri.startswith("http"):
        server.probe(uri)
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with server.locked(project), server.explained(uri):  # two that create one SQLite database disturb each other
        store = Store(MlflowClient(tracking_uri=uri, registry_uri=uri), uri, project)
        if store.client.get_experiment_by_name(server.EXPERIMENT) is None:
            place = (project / server.FOLDER / "artifacts").as_uri() if store.is_local else None
            store.client.create_experiment(server.EXPERIMENT, artifact_location=place)
    return store


@contextmanager
def run(project: Path, name: str, tags: Mapping[str, str], identity: str | None = None) -> Iterator[Run]:
    """A run that ends FINISHED, FAILED or KILLED (Ctrl-C).

    MLflow's failures inside it become UserError, Outage where the server went away. `identity` names what the run is
    about: the same call after a failure goes on with the run that it left.
    """
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    store = open_store(project)
    with server.explained(store.uri):
        experiment = store.client.get_experiment_by_name(server.EXPERIMENT)
        assert experiment is not None  # open_store made it
        started = _interrupted(store, experiment.experiment_id, identity) if identity else None
        if started is None:
            first = {IDENTITY_TAG: identity} if identity else {}
            started = store.client.create_run(experiment.experiment_id, run_name=name, tags=first)
        else:
            store.client.update_run(started.info.run_id, status="RUNNING")
        tracked = Run(store, started.info.run_id, experiment.experiment_id, int(started.info.start_time))
        try:
            log_tags(tracked, tags)
            yield tracked
        except BaseException as error:
            try:
                store.client.set_terminated(tracked.run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
            except (MlflowException, RequestException) as other:  # the first failure is the one to tell
                reason = server.first_line(other)
                logging.getLogger(__name__).warning("run %s: its end is not recorded: %s", tracked.run_id, reason)
            raise
        store.client.set_terminated(tracked.run_id, "FINISHED")


def _interrupted(store: Store, experiment_id: str, identity: str) -> Any:
    """The newest run about the same thing that did not finish; None when there is none."""
    same = f"tags.`{IDENTITY_TAG}` = '{identity}'"
    runs = store.client.search_runs([experiment_id], same, order_by=["attributes.start_time DESC"])
    return next((run for run in runs if run.info.status != "FINISHED"), None)


def param_text(value: Any) -> str:
    """A text, or JSON; digest and length of what MLflow would cut (the whole is in the params.yaml artifact)."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= LONGEST_PARAM else f"sha256:{sha256_bytes(text.encode())} ({len(text)} characters)"


def log_params(tracked: Run, params: Mapping[str, Any]) -> None:
    """Logs nested params under dotted names."""
    from mlflow.entities import Param

    flat = [Param(name, param_text(value)) for name, value in flatten(params).items()]
    tracked.store.client.log_batch(tracked.run_id, params=flat)


def log_tags(tracked: Run, tags: Mapping[str, str]) -> None:
    """Longer texts than a tag holds are cut at its limit with a visible mark; their whole is in an artifact."""
    from mlflow.entities import RunTag

    shown = {key: text if len(text) <= LONGEST_TAG else text[: LONGEST_TAG - 4] + " ..." for key, text in tags.items()}
    tracked.store.client.log_batch(tracked.run_id, tags=[RunTag(key, text) for key, text in shown.items()])


def step_metrics(stage: str, path: Path) -> list[NamedValue]:
    """A stage's steps.csv: STAGE/loss/ROUTE, STAGE/t, STAGE/gradient_norm.

    A loss that is not a number is kept as NaN. Raises UserError naming the file when it lacks a column or holds
    something else.
    """
    try:
        frame = pd.read_csv(path)
        missing = [column for column in STEP_COLUMNS if column not in frame.columns]
        if missing:
            raise UserError(f"{path}: columns {missing} are missing; expected {', '.join(STEP_COLUMNS)}")
        frame = frame.astype({"step": int, "route": str, "loss": float, "t": float, "gradient_norm": float})
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; run the {stage} stage first") from error
    except (ValueError, pd.errors.ParserError) as error:
        raise UserError(f"{path}: not a table of steps ({error}); run the {stage} stage again") from error
    metrics: list[NamedValue] = []
    for step, route, loss, t, norm in zip(*(frame[column].tolist() for column in STEP_COLUMNS), strict=True):
        values = {f"loss/{route}": loss, "t": t, "gradient_norm": norm}
        metrics += [(f"{stage}/{name}", value, step) for name, value in values.items()]
    return metrics


def named_metrics(stage: str, path: Path) -> list[NamedValue]:
    """A stage's metrics.jsonl or speed.jsonl: STAGE/loss/local_edit/t3, STAGE/held_out_gap, ...

    Empty where there is no such file. Raises UserError naming the line of one that is damaged.
    """
    if not path.exists():
        return []
    metrics = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            values = json.loads(line)
            metrics.append((f"{stage}/{values['name']}", float(values["value"]), int(values["step"])))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: not a metric ({error}); run the {stage} stage again") from error
    return metrics


def log_steps(tracked: Run, stage: str, path: Path) -> None:
    """Publishes a stage's steps.csv, its metrics and validation pictures and, where it ran here, its speed."""
    metrics = [*step_metrics(stage, path), *named_metrics(stage, path.with_name(METRICS))]
    speed = speed_file(tracked.store.project, path.parent)
    _log_metrics(tracked, metrics + (named_metrics(stage, speed) if speed else []))
    if path.with_name("validation").is_dir():
        log_files(tracked, {f"{stage}/validation": path.with_name("validation")})


def log_scorecard(tracked: Run, scorecard: Mapping[str, Any], model_id: str | None = None) -> None:
    """Each metric path's mean, of the logged model too; intervals are in the scorecard.json artifact."""
    means = {path: metric.get("mean") for path, metric in scorecard["metrics"].items()}
    _log_metrics(tracked, [(path, float(mean), 0) for path, mean in means.items() if mean is not None], model_id)


def _log_metrics(tracked: Run, metrics: Sequence[NamedValue], model_id: str | None = None) -> None:
    from mlflow.entities import Metric

    run = {"model_id": model_id, "run_id": tracked.run_id}
    values = [Metric(name, value, tracked.started, step, **run) for name, value, step in metrics]
    tracked.store.client.log_batch(tracked.run_id, metrics=values)


def log_files(tracked: Run, files: Mapping[str, Path]) -> None:
    """Artifact folder ("" is the top) -> a file, or a folder whose content is published.

    Raises UserError, before anything is sent, naming all that do not exist.
    """
    missing = [str(path) for path in files.values() if not path.exists()]
    if missing:
        raise UserError(f"cannot publish {', '.join(missing)}: no such file or folder; run the stage that makes it")
    client = tracked.store.client
    for target, path in files.items():
        (client.log_artifacts if path.is_dir() else client.log_artifact)(tracked.run_id, str(path), target or None)


def artifact(store: Store, run_id: str, name: str, folder: Path) -> Path:
    """A file that was kept with a run, brought into `folder`. Raises UserError when the run has none of that name.

    The list is asked first: when a download fails, MLflow's client does not tell whether file or server is missing.
    """
    top = Path(name).parent.as_posix()
    if name not in {item.path for item in store.client.list_artifacts(run_id, None if top == "." else top)}:
        raise UserError(f"MLflow run {run_id} has no {name}; submit the candidate again")
    return Path(store.client.download_artifacts(run_id, name, str(folder)))
