"""MLflow with accounts, as in production: strangers change nothing, the right to promote is checked before anything is
decided, a server that goes away in the middle costs a repetition and no record, and no secret is kept anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import candidates
import pytest

from data.errors import Outage, UserError
from tasks.environment import PROJECT
from tasks.registry import ledger, server, tracking
from tasks.registry import versions as registry
from tasks.release import decisions, submission
from tasks.s3 import objects as store
from tests.servers import FaultyProxy, MlflowServer

pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path: Path, s3: str, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A model and an experiment of the test's own on the shared server; the ledger and what is published are on S3."""
    name = f"danceopd-{uuid.uuid4().hex[:8]}"
    monkeypatch.setattr(registry, "MODEL", name)
    monkeypatch.setattr(server, "EXPERIMENT", name)
    for key, value in {
        **mlflow_server.environment,
        "DANCEOPD_LEDGER": f"{s3}/ledger",
        "DANCEOPD_PUBLISH": f"{s3}/models",
    }.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    yield candidates.new_project(tmp_path / "project")


def state(project: Path) -> tuple[Any, ...]:
    """All that strangers might change: versions with their tags and texts, aliases, runs with their tags and status."""
    opened = tracking.open_store(project)
    known = opened.client.search_model_versions(f"name='{registry.MODEL}'")
    versions = [(one.version, sorted(one.tags.items()), one.description, one.source) for one in known]
    experiment = opened.client.get_experiment_by_name(server.EXPERIMENT)
    runs = [
        (one.info.run_id, one.info.status, sorted(one.data.tags.items()))
        for one in opened.client.search_runs([experiment.experiment_id])
    ]
    return versions, sorted(registry.aliases_of(opened).items()), runs, experiment.lifecycle_stage


def test_strangers_change_nothing(
    project: Path, s3: str, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an account, with a wrong password, and with an account that may only read."""
    candidates.submitted(project, promote="auto")
    candidates.submitted(project, weights=2.0, geneval=0.82)
    before = state(project)
    run = registry.champion(project)["run_id"]  # type: ignore[index]
    experiment = tracking.open_store(project).client.get_experiment_by_name(server.EXPERIMENT).experiment_id
    model, reader = registry.MODEL, f"reader-{uuid.uuid4().hex[:6]}"
    password = mlflow_server.new_user(reader)
    name = {"name": model, "version": "2"}
    metric = {"key": "geneval/overall", "value": 1.0, "timestamp": 1, "step": 1}
    attempts: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "mlflow/registered-models/alias", {**name, "alias": "champion"}),
        ("DELETE", "mlflow/registered-models/alias", {"name": model, "alias": "champion"}),
        ("PATCH", "mlflow/model-versions/update", {**name, "description": "trust me"}),
        ("POST", "mlflow/model-versions/set-tag", {**name, "key": "review.status", "value": "approved"}),
        ("DELETE", "mlflow/model-versions/delete", name),
        ("POST", "mlflow/model-versions/create", {"name": model, "source": f"runs:/{run}/x"}),
        ("POST", "mlflow/registered-models/rename", {"name": model, "new_name": "mine"}),
        ("DELETE", "mlflow/registered-models/delete", {"name": model}),
        ("POST", "mlflow/runs/set-tag", {"run_id": run, "key": "gate.status", "value": "passed"}),
        ("POST", "mlflow/runs/log-batch", {"run_id": run, "metrics": [metric]}),
        ("POST", "mlflow/runs/update", {"run_id": run, "status": "FAILED"}),
        ("POST", "mlflow/runs/delete", {"run_id": run}),
        ("POST", "mlflow/runs/create", {"experiment_id": experiment}),
        ("POST", "mlflow/experiments/delete", {"experiment_id": experiment}),
        ("PUT", f"mlflow-artifacts/artifacts/{experiment}/{run}/artifacts/verdict.json", {"passed": True}),
        ("POST", "mlflow/users/update-admin", {"username": reader, "is_admin": True}),
    ]
    for method, path, body in attempts:
        for prefix in ("/api/2.0/", "/ajax-api/2.0/"):
            status, _ = mlflow_server.request(method, prefix + path, body)
            assert status in (401, 403, 404), (method, path, status)
    for path in ("..%2F..%2Fescaped", "a/..%2F..%2F..%2Fescaped", "%2Fescaped"):  # with every right
        status, _ = mlflow_server.request(
            "PUT", f"/api/2.0/mlflow-artifacts/artifacts/{path}", {}, (mlflow_server.admin, mlflow_server.password)
        )
        assert status >= 400 and not list(mlflow_server.folder.glob("escaped"))
    for who in ((mlflow_server.admin, "wrong"), ("nobody", "nothing-at-all")):
        assert mlflow_server.request("POST", "/api/2.0/" + attempts[0][1], attempts[0][2], who)[0] == 401
    for method, path, body in attempts:
        status, _ = mlflow_server.request(method, "/api/2.0/" + path, body, (reader, password))
        assert status >= 400, (method, path, status)
    assert state(project) == before and len(ledger.read(f"{s3}/ledger")) == 1
    with monkeypatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_USERNAME")
        patch.delenv("MLFLOW_TRACKING_PASSWORD")
        with pytest.raises(UserError, match="does not know"):
            decisions.promote(project, "2", "mallory", "mine")
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", reader)
        patch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        for decision in (decisions.promote, decisions.reject, decisions.approve):
            with pytest.raises(UserError, match="may not do this"):
                decision(project, "2", "reader", "I would like to")
    assert state(project) == before and len(ledger.read(f"{s3}/ledger")) == 1  # refused before the ledger's entry


@pytest.mark.parametrize("last", [-1, 2, 9, 18, 25])
def test_a_server_that_goes_away_in_the_middle(
    project: Path, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    """It stops answering after so many writes (-1: it is away from the start). What the stages made is in the project's
    files: with the server back the same command finishes the same run, and every figure and file is there once."""
    candidates.judged(project)
    with FaultyProxy(mlflow_server.url) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        left = [last]

        def fault(method: str, path: str) -> str | None:
            left[0] -= method != "GET"
            return "cut" if left[0] < 0 else None

        proxy.fault = fault
        with pytest.raises(Outage, match="run the same command again"):
            submission.submit_files(project, candidates.PARAMS, "review", "ann", "x")
        proxy.fault = lambda method, path: None
        done = submission.submit_files(project, candidates.PARAMS, "review", "ann", "x")
    assert (done["status"], done["version"]) == ("candidate", "1") and any(fault == "cut" for *_, fault in proxy.seen)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.url)
    opened = tracking.open_store(project)
    experiment = opened.client.get_experiment_by_name(server.EXPERIMENT).experiment_id
    (run,) = opened.client.search_runs([experiment])
    assert run.info.status == "FINISHED" and run.data.params["distill.steps"] == "300"
    for metric in ("distill/loss/t2i", "absorb/loss/guided"):
        assert [
            one.step
            for one in sorted(opened.client.get_metric_history(run.info.run_id, metric), key=lambda one: one.step)
        ] == list(range(5))
    assert len(registry.versions_of(opened)) == 1 and registry.aliases_of(opened) == {"candidate": "1"}
    listed = [opened.client.list_artifacts(run.info.run_id, top) for top in ("", "scores", "steps")]
    kept = {found.path for files in listed for found in files}
    wanted = {"scorecard.json", "verdict.json", "params.yaml", "report"}
    assert wanted | {"scores/scores.parquet", "steps/distill", "steps/absorb"} <= kept
    assert decisions.promote(project, "1", "eve", "go")["entry"]["to_version"] == "1"


def test_no_secret_is_kept_or_shown(
    project: Path,
    s3: str,
    mlflow_server: MlflowServer,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Not in the registry, in runs, in artifacts, in the ledger, in what is published, in the project, nor in what the
    commands print.
    """
    with_password = mlflow_server.url.replace("//", f"//{mlflow_server.admin}:{mlflow_server.password}@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", with_password)
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    done = candidates.submitted(project, promote="auto")
    assert done["tracking_uri"] == mlflow_server.url
    said = str(done) + "".join(capfd.readouterr())
    program = f"""
import sys
from tasks.__main__ import main
from tasks.registry import server, versions
versions.MODEL = server.EXPERIMENT = {registry.MODEL!r}
for name in ("registry", "doctor", "publish", "reconcile", "review"):
    main([name])
main(["lineage", "1"])
main(["promote", "--version", "1", "--reviewer", "eve", "--reason", "again"])
"""
    absent = {"MLFLOW_TRACKING_URI": with_password.replace(mlflow_server.url[-5:], "1")}  # a server that is not there
    for settings in ({}, absent):
        environment = {**os.environ, **settings, "PYTHONPATH": str(PROJECT)}
        command = [sys.executable, "-c", program]
        ended = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
        said += ended.stdout + ended.stderr
    assert "account admin" in said and "is published now" in said  # the commands did their work
    kept = b"".join(
        path.read_bytes() for folder in (project, mlflow_server.folder) for path in folder.rglob("*") if path.is_file()
    )
    kept += b"".join(store.read(one.uri)[0] for one in store.list_objects(s3))
    for secret in (mlflow_server.password, os.environ["AWS_SECRET_ACCESS_KEY"]):
        assert secret not in said and secret.encode() not in kept
