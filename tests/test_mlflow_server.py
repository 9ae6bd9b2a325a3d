"""The whole way of a candidate, through a real MLflow server that keeps database and artifacts to itself, as in
production.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from pathlib import Path

import candidates
import pytest

from data.errors import UserError
from tasks.registry import ledger, server, tracking, versions
from tasks.release import decisions, gate, submission
from tests.servers import MlflowServer

pytestmark = pytest.mark.slow


def test_candidate_champion_refusal_and_a_server_that_dies(
    mlflow_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, process = mlflow_server.url, mlflow_server.process
    name = f"danceopd-{uuid.uuid4().hex[:8]}"
    monkeypatch.setattr(versions, "MODEL", name)
    monkeypatch.setattr(server, "EXPERIMENT", name)
    for key, value in mlflow_server.environment.items():
        monkeypatch.setenv(key, value)
    project = candidates.new_project(tmp_path / "project")
    first = candidates.submitted(project, promote="auto")
    assert (first["status"], first["version"], first["tracking_uri"]) == ("champion", "1", uri)
    assert candidates.submitted(project, geneval=0.1, weights=2.0)["status"] == "refused"
    assert candidates.submitted(project, geneval=0.82, weights=3.0)["status"] == "candidate"
    decisions.promote(project, "2", "eve", "better")
    store = tracking.open_store(project)
    assert versions.aliases_of(store) == {"champion": "2", "previous": "1"}
    version = store.client.get_model_version(versions.MODEL, "2")
    assert store.client.get_run(version.run_id).info.artifact_uri.startswith(
        "mlflow-artifacts:"
    )  # the server keeps the files
    assert not (project / "mlflow" / "artifacts").exists() and not (project / "mlflow" / "mlflow.db").exists()
    entries = ledger.read(versions.ledger_place(store))
    assert [(entry.action, entry.from_version, entry.to_version) for entry in entries] == [
        ("promote", None, "1"),
        ("promote", "1", "2"),
    ]
    decisions.rollback(project, "eve", "artefacts")
    champion = versions.champion(project)
    assert champion is not None and champion["version"] == "1" and Path(champion["scores"]).is_file()
    run = store.client.get_run(champion["run_id"]).info
    assert champion["page"] == f"{uri}/#/experiments/{run.experiment_id}/runs/{run.run_id}/artifacts/report/report.html"

    os.killpg(process.pid, signal.SIGSTOP)  # alive, and answers nothing
    try:
        before = (project / gate.VERDICT_FILE).read_bytes()
        started = time.monotonic()
        with pytest.raises(UserError, match="no MLflow server answers"):
            candidates.judged(project)
        with pytest.raises(UserError, match="no MLflow server answers"):
            submission.submit_files(project, candidates.PARAMS, "review", "ann", "x")
        assert time.monotonic() - started < 30
        assert (project / gate.VERDICT_FILE).read_bytes() == before  # no verdict without the champion
    finally:
        os.killpg(process.pid, signal.SIGCONT)
    assert candidates.submitted(project, geneval=0.83, weights=4.0, promote="auto")["status"] == "champion"
