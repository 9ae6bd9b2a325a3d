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
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from data.errors import UserError
from data.files import explain, sha256_bytes
from tasks.environment import PROXIED
from tasks.registry.server import (
    EXPERIMENT,
    FOLDER,
    Store,
    _clean,
    _probe,
    explained,
    is_outage,
    locked,
    tracking_uri,
    without_credentials,
)
from tasks.training.metrics import METRICS, speed_file

if TYPE_CHECKING:
    from mlflow import MlflowClient


LONGEST_PARAM = 6000  # characters; MLflow cuts longer values without a word
LONGEST_TAG = 8000
BATCH = {"metrics": 1000, "params": 100, "tags": 100}  # MLflow's limits for one log_batch
STEP_COLUMNS = ("step", "route", "loss", "t", "gradient_norm")
SPOOL, OPERATIONS = "spool", "operations.jsonl"
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
    """Opens (and the first time creates) the store, and sends what the spool has kept. Raises UserError within seconds
    when a server does not answer.
    """
    project = Path(project).resolve()
    uri = tracking_uri(project)
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
    if uri.startswith("http"):
        _probe(uri)
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with (
        locked(project),
        explained(uri),
    ):  # two processes creating one SQLite database at once would trip over its migrations
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        store = Store(client, uri, project)
        if client.get_experiment_by_name(EXPERIMENT) is None:
            client.create_experiment(
                EXPERIMENT, artifact_location=(project / FOLDER / "artifacts").as_uri() if store.is_local else None
            )
        replay(store)
    return store


@contextmanager
def run(project: Path, name: str, tags: Mapping[str, str], identity: str | None = None) -> Iterator[Run]:
    """A run that ends FINISHED, FAILED or KILLED (Ctrl-C). MLflow's failures inside it become UserError.

    `identity` names what the run is about: the same call after a failure goes on with the run that it left. When the
    server stops answering, what is logged from then on is kept in `mlflow/spool` and sent when a store is next opened.
    """
    store = open_store(project)
    with explained(store.uri):
        experiment = store.client.get_experiment_by_name(EXPERIMENT)
        assert experiment is not None  # open_store made it
        found = _interrupted(store, experiment.experiment_id, identity)
        if found is None:
            first = {IDENTITY_TAG: identity} if identity else {}
            found = store.client.create_run(experiment.experiment_id, run_name=name, tags=first)
        else:
            store.client.update_run(found.info.run_id, status="RUNNING")
        tracked = Run(store, found.info.run_id, experiment.experiment_id, int(found.info.start_time))
        try:
            log_tags(tracked, tags)
            yield tracked
        except BaseException as error:
            _send(tracked, {"end": "FAILED" if isinstance(error, Exception) else "KILLED"}, spare=error)
            raise
        _send(tracked, {"end": "FINISHED"})


def _interrupted(store: Store, experiment_id: str, identity: str | None) -> Any:
    """The newest run about the same thing that did not finish; None when there is none."""
    if identity is None:
        return None
    same = store.client.search_runs(
        [experiment_id], f"tags.`{IDENTITY_TAG}` = '{identity}'", order_by=["attributes.start_time DESC"]
    )
    return next((one for one in same if one.info.status != "FINISHED"), None)


def _spool(store: Store) -> Path:
    """One for each server: a run's number means nothing to another."""
    return store.project / FOLDER / SPOOL / sha256_bytes(without_credentials(store.uri).encode())[:12]


def _send(tracked: Run, operation: Mapping[str, Any], spare: BaseException | None = None) -> None:
    """Carries out one operation, or keeps it when the server does not answer; once one is kept the later ones are too,
    so that their order holds.

    `spare`: an error on its way out, worth more than the failure to record it.
    """
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    folder = _spool(tracked.store) / tracked.run_id
    if not folder.exists():
        try:
            _apply(tracked.store.client, tracked.run_id, operation, tracked.started)
            return
        except (MlflowException, RequestException) as error:
            if not (tracked.store.uri.startswith("http") and is_outage(error)):
                if spare is None:
                    raise
                logging.getLogger(__name__).warning(
                    "run %s: %s could not be recorded: %s", tracked.run_id, dict(operation), _clean(error)
                )
                return
    _keep(folder, operation)


def _keep(folder: Path, operation: Mapping[str, Any]) -> None:
    try:
        (folder / "files").mkdir(parents=True, exist_ok=True)
        kept = dict(operation)
        if "file" in kept:  # what is published may be replaced before the server is back
            copy = folder / "files" / uuid.uuid4().hex[:12] / Path(kept["file"]).name
            if Path(kept["file"]).is_dir():
                shutil.copytree(kept["file"], copy)
            else:
                copy.parent.mkdir()
                shutil.copyfile(kept["file"], copy)
            kept["file"] = copy.relative_to(folder).as_posix()
        with open(folder / OPERATIONS, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(kept) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
    except OSError as error:
        raise explain(error, folder) from error


def _apply(client: MlflowClient, run_id: str, operation: Mapping[str, Any], started: int) -> None:
    """Carries out one operation; repeating it changes nothing.

    operation: {"metrics": [[name, value, step], ...], "model": number of a logged model}, {"params" or "tags": {...}},
    {"file", "to"} or {"end"}.
    """
    from mlflow.entities import Metric, Param, RunTag

    if "end" in operation:
        client.set_terminated(run_id, operation["end"])
    elif "file" in operation and Path(operation["file"]).is_dir():
        client.log_artifacts(run_id, operation["file"], operation["to"] or None)
    elif "file" in operation:
        client.log_artifact(run_id, operation["file"], operation["to"] or None)
    else:
        model = operation.get("model")
        metrics = [
            Metric(name, value, started, step, model_id=model, run_id=run_id)
            for name, value, step in operation.get("metrics", ())
        ]
        params = [Param(name, value) for name, value in operation.get("params", {}).items()]
        client.log_batch(
            run_id, metrics, params, [RunTag(name, value) for name, value in operation.get("tags", {}).items()]
        )


def replay(store: Store) -> list[str]:
    """Sends what is kept in the spool, run by run in the order it was logged; returns the runs that are whole now.

    Raises Outage when the server goes away again: what is kept stays kept, and nothing is logged twice. What the server
    refuses for good (the run was deleted) is set aside as `RUN.refused`.
    """
    from mlflow.exceptions import MlflowException

    done = []
    for folder in sorted(_spool(store).glob("*/")):
        operations = folder / OPERATIONS
        if not operations.is_file() or folder.suffix == ".refused":
            continue
        lines = operations.read_text(encoding="utf-8").split("\n")[:-1]  # a line that was cut off was never promised
        with explained(store.uri):
            try:
                started = int(store.client.get_run(folder.name).info.start_time)
                for line in lines:
                    operation = json.loads(line)
                    if "file" in operation:
                        operation["file"] = str(folder / operation["file"])
                    _apply(store.client, folder.name, operation, started)
            except MlflowException as error:
                if is_outage(error):
                    raise
                logging.getLogger(__name__).warning(
                    "run %s refuses what was kept for it (%s): set aside in %s.refused",
                    folder.name,
                    _clean(error),
                    folder,
                )
                folder.rename(folder.with_name(f"{folder.name}.refused"))
                continue
        shutil.rmtree(folder)
        done.append(folder.name)
    return done


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested sections as dotted names; lists as JSON. An empty section stays visible as {}."""
    if isinstance(value, Mapping) and (value or not prefix):
        return {
            name: text
            for key, inner in value.items()
            for name, text in flatten(inner, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)}


def param_text(value: str) -> str:
    """The value itself, or, where MLflow would cut it, its digest and length (the whole of it is in the params.yaml
    artifact).
    """
    return value if len(value) <= LONGEST_PARAM else f"sha256:{sha256_bytes(value.encode())} ({len(value)} characters)"


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def log_params(tracked: Run, params: Mapping[str, Any]) -> None:
    """Logs nested params under dotted names."""
    items = [(name, param_text(text)) for name, text in flatten(params).items()]
    for chunk in _chunks(items, BATCH["params"]):
        _send(tracked, {"params": dict(chunk)})


def log_tags(tracked: Run, tags: Mapping[str, str]) -> None:
    """Longer texts than a tag holds are cut at its limit with a visible mark; their whole is in an artifact."""
    items = [
        (key, value if len(value) <= LONGEST_TAG else value[: LONGEST_TAG - 4] + " ...") for key, value in tags.items()
    ]
    for chunk in _chunks(items, BATCH["tags"]):
        _send(tracked, {"tags": dict(chunk)})


def step_metrics(stage: str, path: Path) -> list[tuple[str, float, int]]:
    """A stage's steps.csv as (name, value, step): STAGE/loss/ROUTE, STAGE/t, STAGE/gradient_norm.

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
    found: list[tuple[str, float, int]] = []
    for row in frame.itertuples(index=False):
        found.append((f"{stage}/loss/{row.route}", float(row.loss), int(row.step)))  # type: ignore[arg-type]
        for name in ("t", "gradient_norm"):
            found.append((f"{stage}/{name}", float(getattr(row, name)), int(row.step)))  # type: ignore[arg-type]
    return found


def named_metrics(stage: str, path: Path) -> list[tuple[str, float, int]]:
    """A stage's metrics.jsonl or speed.jsonl as (name, value, step): STAGE/loss/local_edit/t3, STAGE/held_out_gap, ...

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
    """Publishes a stage's steps.csv, the metrics and validation pictures beside it, and, where it ran here, its speed.

    A request takes a thousand metrics.
    """
    metrics = [*step_metrics(stage, path), *named_metrics(stage, path.with_name(METRICS))]
    speed = speed_file(tracked.store.project, path.parent)
    metrics += named_metrics(stage, speed) if speed else []
    for chunk in _chunks(metrics, BATCH["metrics"]):
        _send(tracked, {"metrics": [list(one) for one in chunk]})
    if path.with_name("validation").is_dir():
        log_files(tracked, {f"{stage}/validation": path.with_name("validation")})


def log_scorecard(tracked: Run, scorecard: Mapping[str, Any], model_id: str | None = None) -> None:
    """Each metric path's mean under its own name (of the logged model too, if given). Intervals are in the
    scorecard.json artifact.
    """
    means = {path: metric.get("mean") for path, metric in scorecard["metrics"].items()}
    for chunk in _chunks(
        [[path, float(mean), 0] for path, mean in means.items() if mean is not None], BATCH["metrics"]
    ):
        _send(tracked, {"metrics": list(chunk), **({"model": model_id} if model_id else {})})


def log_files(tracked: Run, files: Mapping[str, Path]) -> None:
    """Artifact folder ("" is the top) -> a file, or a folder whose content is published. What does not exist is a
    UserError, named before anything is sent.
    """
    missing = [str(path) for path in files.values() if not path.exists()]
    if missing:
        raise UserError(f"cannot publish {', '.join(missing)}: no such file or folder; run the stage that makes it")
    for target, path in files.items():
        _send(tracked, {"file": str(path), "to": target})
