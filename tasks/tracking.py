"""MLflow as a reading room: stages write plain files, this module publishes them afterwards. A dead server costs no training.

The store is `mlflow/mlflow.db` (SQLite) with `mlflow/artifacts` inside the project, or whatever `MLFLOW_TRACKING_URI` names. Nothing is reported home.

    with run(project, "distill", tags={...}) as tracked:
        log_params(tracked, params)                      # nested sections become dotted names
        log_steps(tracked, "distill", Path("steps.csv"))  # distill/loss/t2i, distill/gradient_norm, ...
        log_scorecard(tracked, scorecard)                # each metric path, under its own name
        log_files(tracked, {"report": Path("reports/score")})
"""

from __future__ import annotations

import fcntl
import http.client
import json
import logging
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from data.errors import UserError
from data.files import explain, sha256_bytes

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "danceopd"
FOLDER = "mlflow"  # inside the project
LONGEST_PARAM = 6000  # characters; MLflow cuts longer values without a word
LONGEST_TAG = 8000
BATCH = {"metrics": 1000, "params": 100, "tags": 100}  # MLflow's limits for one log_batch
STEP_COLUMNS = ("step", "route", "loss", "t", "gradient_norm", "seconds")
PROBE_SECONDS = 10.0
SWITCHES = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_MODEL_CATALOG_URI": "",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # the default (7, doubling) hangs for minutes on a dead server
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "GIT_PYTHON_REFRESH": "quiet",
}


@dataclass(frozen=True)
class Store:
    """An open tracking store and registry."""

    client: MlflowClient
    uri: str
    project: Path

    @property
    def is_local(self) -> bool:
        return self.uri == local_uri(self.project)


@dataclass(frozen=True)
class Run:
    """One MLflow run that is being written."""

    store: Store
    run_id: str
    experiment_id: str


def local_uri(project: Path) -> str:
    return f"sqlite:///{Path(project).resolve() / FOLDER / 'mlflow.db'}"


def tracking_uri(project: Path) -> str:
    """`MLFLOW_TRACKING_URI` if set, else the SQLite file inside the project."""
    return os.environ.get("MLFLOW_TRACKING_URI", "").strip() or local_uri(project)


def _probe(uri: str) -> None:
    """Raises UserError within seconds when no HTTP server answers at `uri`. Any answer counts, also a refusal."""
    parts = urllib.parse.urlsplit(uri)
    where = urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], "", "", ""))  # no credentials in messages
    remedy = "start the server, or unset MLFLOW_TRACKING_URI to use the store inside the project; no result is lost, run the same command again"
    try:
        with urllib.request.urlopen(f"{where}/health", timeout=PROBE_SECONDS):
            pass
    except urllib.error.HTTPError:
        return
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"MLFLOW_TRACKING_URI = {where}: no MLflow server answers ({getattr(error, 'reason', None) or error}); {remedy}") from error


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turns MLflow's exceptions, and the disk's, into UserError."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    try:
        yield
    except (MlflowException, RequestException) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = uri if uri.startswith("sqlite") else urllib.parse.urlsplit(uri)._replace(query="").geturl().rpartition("@")[2]
        raise UserError(f"MLflow ({where}): {first}") from error
    except OSError as error:
        raise explain(error, Path(error.filename or FOLDER)) from error


@contextmanager
def locked(project: Path) -> Iterator[None]:
    """Held by one process of this project at a time: for creating the database and for moving aliases. Freed by the kernel when its holder dies."""
    path = Path(project).resolve() / FOLDER / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115 - held over the yield below
    except OSError as error:
        raise explain(error, path) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def open_store(project: Path) -> Store:
    """Opens (and the first time creates) the store. Raises UserError within seconds when a server does not answer."""
    project = Path(project).resolve()
    uri = tracking_uri(project)
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
    if uri.startswith("http"):
        _probe(uri)
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with locked(project), explained(uri):  # two processes creating one SQLite database at once would trip over its migrations
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        store = Store(client, uri, project)
        if client.get_experiment_by_name(EXPERIMENT) is None:
            client.create_experiment(EXPERIMENT, artifact_location=(project / FOLDER / "artifacts").as_uri() if store.is_local else None)
    return store


@contextmanager
def run(project: Path, name: str, tags: Mapping[str, str]) -> Iterator[Run]:
    """A run that ends FINISHED, FAILED or KILLED (Ctrl-C), never RUNNING. MLflow's failures inside it become UserError."""
    store = open_store(project)
    with explained(store.uri):
        experiment = store.client.get_experiment_by_name(EXPERIMENT)
        assert experiment is not None  # open_store made it
        tracked = Run(store, store.client.create_run(experiment.experiment_id, run_name=name).info.run_id, experiment.experiment_id)
        try:
            log_tags(tracked, tags)
            yield tracked
        except BaseException as error:
            _end(tracked, "FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        store.client.set_terminated(tracked.run_id, "FINISHED")


def _end(tracked: Run, status: str) -> None:
    """Best effort: the reason for failing is worth more than the failure to record it."""
    from mlflow.exceptions import MlflowException

    try:
        tracked.store.client.set_terminated(tracked.run_id, status)
    except MlflowException as error:
        logging.getLogger(__name__).warning("run %s could not be marked %s: %s", tracked.run_id, status, error)


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested sections as dotted names; lists as JSON. An empty section stays visible as {}."""
    if isinstance(value, Mapping) and (value or not prefix):
        return {name: text for key, inner in value.items() for name, text in flatten(inner, f"{prefix}.{key}" if prefix else str(key)).items()}
    return {prefix: value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)}


def param_text(value: str) -> str:
    """The value itself, or, where MLflow would cut it, its digest and length (the whole of it is in the params.yaml artifact)."""
    return value if len(value) <= LONGEST_PARAM else f"sha256:{sha256_bytes(value.encode())} ({len(value)} characters)"


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def log_params(tracked: Run, params: Mapping[str, Any]) -> None:
    """Logs nested params under dotted names."""
    from mlflow.entities import Param

    items = [Param(name, param_text(text)) for name, text in flatten(params).items()]
    for chunk in _chunks(items, BATCH["params"]):
        tracked.store.client.log_batch(tracked.run_id, params=chunk)


def log_tags(tracked: Run, tags: Mapping[str, str]) -> None:
    """Longer texts than a tag holds are cut at its limit with a visible mark; their whole is in an artifact."""
    from mlflow.entities import RunTag

    items = [RunTag(key, value if len(value) <= LONGEST_TAG else value[: LONGEST_TAG - 4] + " ...") for key, value in tags.items()]
    for chunk in _chunks(items, BATCH["tags"]):
        tracked.store.client.log_batch(tracked.run_id, tags=chunk)


def step_metrics(stage: str, path: Path) -> list[tuple[str, float, int]]:
    """A stage's steps.csv as (name, value, step): STAGE/loss/ROUTE, STAGE/t, STAGE/gradient_norm, STAGE/seconds.

    A loss that is not a number is kept as NaN. Raises UserError naming the file when it lacks a column or holds something else.
    """
    try:
        frame = pd.read_csv(path)
        missing = [column for column in STEP_COLUMNS if column not in frame.columns]
        if missing:
            raise UserError(f"{path}: columns {missing} are missing; expected {', '.join(STEP_COLUMNS)}")
        frame = frame.astype({"step": int, "route": str, "loss": float, "t": float, "gradient_norm": float, "seconds": float})
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; run the {stage} stage first") from error
    except (ValueError, pd.errors.ParserError) as error:
        raise UserError(f"{path}: not a table of steps ({error}); run the {stage} stage again") from error
    found: list[tuple[str, float, int]] = []
    for row in frame.itertuples(index=False):
        found.append((f"{stage}/loss/{row.route}", float(row.loss), int(row.step)))  # type: ignore[arg-type]
        found += [(f"{stage}/{name}", float(getattr(row, name)), int(row.step)) for name in ("t", "gradient_norm", "seconds")]  # type: ignore[arg-type]
    return found


def named_metrics(stage: str, path: Path) -> list[tuple[str, float, int]]:
    """A stage's metrics.jsonl as (name, value, step): STAGE/loss/local_edit/t3, STAGE/gradient_cosine/t2i/local_edit, STAGE/held_out_gap, ...

    Empty where there is no such file. Raises UserError naming the line of one that is damaged.
    """
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            values = json.loads(line)
            found.append((f"{stage}/{values['name']}", float(values["value"]), int(values["step"])))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: not a metric ({error}); run the {stage} stage again") from error
    return found


def log_steps(tracked: Run, stage: str, path: Path) -> None:
    """Publishes a stage's steps.csv, and the metrics and validation pictures beside it, a thousand metrics a request."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    everything = [*step_metrics(stage, path), *named_metrics(stage, path.with_name("metrics.jsonl"))]
    metrics = [Metric(name, value, now, step) for name, value, step in everything]
    for chunk in _chunks(metrics, BATCH["metrics"]):
        tracked.store.client.log_batch(tracked.run_id, metrics=chunk)
    pictures = path.with_name("validation")
    if pictures.is_dir():
        tracked.store.client.log_artifacts(tracked.run_id, str(pictures), f"{stage}/validation")


def log_scorecard(tracked: Run, scorecard: Mapping[str, Any], model_id: str | None = None) -> None:
    """Each metric path's mean under its own name (of the logged model too, if given). Intervals are in the scorecard.json artifact."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    means = {path: metric.get("mean") for path, metric in scorecard["metrics"].items()}
    metrics = [Metric(path, float(mean), now, 0, model_id=model_id, run_id=tracked.run_id) for path, mean in means.items() if mean is not None]
    for chunk in _chunks(metrics, BATCH["metrics"]):
        tracked.store.client.log_batch(tracked.run_id, metrics=chunk)


def log_files(tracked: Run, files: Mapping[str, Path]) -> None:
    """Artifact folder ("" is the top) -> a file, or a folder whose content is published. What does not exist is a UserError, named before anything is sent."""
    missing = [str(path) for path in files.values() if not path.exists()]
    if missing:
        raise UserError(f"cannot publish {', '.join(missing)}: no such file or folder; run the stage that makes it")
    for target, path in files.items():
        if path.is_dir():
            tracked.store.client.log_artifacts(tracked.run_id, str(path), target or None)
        else:
            tracked.store.client.log_artifact(tracked.run_id, str(path), target or None)
