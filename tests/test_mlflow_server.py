"""The whole way of a candidate, through a real MLflow server that keeps database and artifacts to itself, as in production."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import candidates
import pytest

from data.errors import UserError
from tasks import gate, ledger, registry, tracking

pytestmark = pytest.mark.slow
START_SECONDS = 300  # 26 s on an idle machine


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """(address, process) of `mlflow server` on a free loopback port; its whole process group ends with the module."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--serve-artifacts"]
    stores = ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--artifacts-destination", str(folder / "artifacts")]
    environment = {**os.environ, **tracking.SWITCHES}
    environment.pop("MLFLOW_TRACKING_URI", None)
    with open(folder / "log", "wb") as log:
        command = [sys.executable, "-m", "mlflow", "server", *options, *stores]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except (OSError, urllib.error.URLError):
                if process.poll() is not None or time.monotonic() > until:
                    pytest.fail(f"mlflow server did not start: {(folder / 'log').read_text()[-2000:]}")
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}", process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def test_candidate_champion_refusal_and_a_server_that_dies(
    server: tuple[str, subprocess.Popen[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, process = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    project = candidates.new_project(tmp_path / "project")
    first = candidates.submitted(project, promote="auto")
    assert (first["status"], first["version"], first["tracking_uri"]) == ("champion", "1", uri)
    assert candidates.submitted(project, geneval=0.1, weights=2.0)["status"] == "refused"
    assert candidates.submitted(project, geneval=0.82, weights=3.0)["status"] == "candidate"
    registry.promote(project, "2", "eve", "better")
    store = tracking.open_store(project)
    assert registry._aliases(store) == {"champion": "2", "previous": "1"}
    version = store.client.get_model_version(registry.MODEL, "2")
    assert store.client.get_run(version.run_id).info.artifact_uri.startswith("mlflow-artifacts:")  # the server keeps the files
    assert not (project / "mlflow" / "artifacts").exists() and not (project / "mlflow" / "mlflow.db").exists()
    entries = ledger.read(registry.ledger_place(store))
    assert [(entry.action, entry.from_version, entry.to_version) for entry in entries] == [("promote", None, "1"), ("promote", "1", "2")]
    registry.rollback(project, "eve", "artefacts")
    champion = registry.champion(project)
    assert champion is not None and champion["version"] == "1" and Path(champion["scores"]).is_file()

    os.killpg(process.pid, signal.SIGSTOP)  # alive, and answers nothing
    try:
        before = (project / gate.VERDICT_FILE).read_bytes()
        started = time.monotonic()
        with pytest.raises(UserError, match="no MLflow server answers"):
            candidates.judged(project)
        with pytest.raises(UserError, match="no MLflow server answers"):
            registry.submit_files(project, candidates.PARAMS, "review", "ann", "x")
        assert time.monotonic() - started < 30
        assert (project / gate.VERDICT_FILE).read_bytes() == before  # no verdict without the champion
    finally:
        os.killpg(process.pid, signal.SIGCONT)
    assert candidates.submitted(project, geneval=0.83, weights=4.0, promote="auto")["status"] == "champion"
