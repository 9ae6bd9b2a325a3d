"""The deployment `distill/prod` runs the whole job on a real Prefect server and worker, and a run that cannot succeed
says why in its state.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tasks.environment import PROJECT, defaults
from tasks.stages.contract import STAGES
from tests.servers import free_ports
from tests.short_params import shorten

STARTUP = 240.0  # s, on a busy machine


@dataclass(frozen=True)
class Stack:
    """A server and a worker at work in a copy of the project."""

    project: Path
    api: str
    environment: dict[str, str]

    def prefect(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        return subprocess.run(
            command, cwd=self.project, env=self.environment, capture_output=True, text=True, timeout=540, check=False
        )

    def find(self, kind: str, **query: Any) -> list[dict[str, Any]]:
        request = urllib.request.Request(
            f"{self.api}/{kind}/filter", json.dumps(query).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return list(json.loads(answer.read()))

    def run_deployment(self) -> tuple[int, dict[str, Any]]:
        """(exit status of the command, the newest flow run)."""
        ended = self.prefect("deployment", "run", "distill/prod", "--watch", "--watch-timeout", "500")
        (newest,) = self.find("flow_runs", sort="EXPECTED_START_TIME_DESC", limit=1)
        return ended.returncode, newest


def copy_project(folder: Path) -> Path:
    """What git knows or would add, as a repository with one commit: the same as a fresh clone."""
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (PROJECT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, folder / name)
    for command in (
        ["init", "--quiet"],
        ["add", "--all"],
        ["-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "--quiet", "-m", "copy"],
    ):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + STARTUP
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text(encoding="utf-8")
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"{address} did not answer\n{log.read_text(encoding='utf-8')}")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("flow")
    project = copy_project(folder / "project")
    shorten(project / "params.yaml")
    (port,) = free_ports(1)
    api = f"http://127.0.0.1:{port}/api"
    others = (*defaults(), "PREFECT_", "MLFLOW_", "DANCEOPD_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    environment = {
        **clean,
        **defaults(project),
        "PREFECT_API_URL": api,
        "PREFECT_WORKER_HEARTBEAT_SECONDS": "5",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
    }
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, *arguments: str) -> tuple[subprocess.Popen[bytes], Path]:
        log = folder / f"{name}.log"
        with log.open("wb") as file:
            command = [sys.executable, "-m", "prefect", *arguments]
            process = subprocess.Popen(
                command, cwd=project, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        started.append(process)
        return process, log

    try:
        server, log = start("server", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--analytics-off")
        wait_for(f"{api}/health", server, log)
        made = Stack(project, api, environment)
        pool = made.prefect("work-pool", "create", "local", "--type", "process")
        assert pool.returncode == 0, pool.stdout + pool.stderr
        deployed = made.prefect("deploy", "--all")
        assert deployed.returncode == 0, deployed.stdout + deployed.stderr
        start("worker", "worker", "start", "--pool", "local", "--type", "process", "--install-policy", "never")
        yield made
    finally:
        for process in reversed(started):
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=20)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_deployment_runs_the_whole_job(stack: Stack) -> None:
    status, run = stack.run_deployment()
    logs = stack.find("logs", logs={"flow_run_id": {"any_": [run["id"]]}}, sort="TIMESTAMP_ASC", limit=200)
    assert (status, run["state_type"]) == (0, "COMPLETED"), "\n".join(log["message"] for log in logs)
    assert run["state_name"] in ("Completed", "Refused")  # two steps teach little: the gate may well refuse
    assert run["parameters"]["promote"] == "review"

    tasks = stack.find("task_runs", flow_runs={"id": {"any_": [run["id"]]}}, sort="EXPECTED_START_TIME_ASC")
    names = [task["name"].rsplit("-", 1)[0] for task in tasks]
    stages = [stage for stage in STAGES if stage != "teachers"]
    assert names == [
        "checkout",
        "preflight",
        "fetch_teachers",
        *stages,
        "push",
        "benchmark-geneval",
        "benchmark-gedit",
        "gate",
        "register",
        "close",
    ]
    assert {task["state_type"] for task in tasks} == {"COMPLETED"}

    artifacts = {
        artifact["key"]: artifact for artifact in stack.find("artifacts", flow_runs={"id": {"any_": [run["id"]]}})
    }
    assert {"scorecard-geneval", "scorecard-gedit", "scorecard-retention", "verdict", "report", "registration"} <= set(
        artifacts
    )
    scorecard = json.loads((stack.project / "reports" / "scorecard.json").read_text(encoding="utf-8"))
    shown = {row["metric"]: row["mean"] for row in json.loads(artifacts["scorecard-geneval"]["data"])}
    assert shown == {
        path: metric["mean"] for path, metric in scorecard["metrics"].items() if path.startswith("geneval/")
    }
    verdict = json.loads((stack.project / "reports" / "verdict.json").read_text(encoding="utf-8"))
    assert all(rule["rule"] in artifacts["verdict"]["data"] for rule in verdict["rules"])
    assert verdict["passed"] == (run["state_name"] == "Completed")
    assert any("distill:" in log["message"] for log in logs)  # the stage's own lines are on the run's page


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_mistake_in_params_fails_the_run_with_its_message(stack: Stack) -> None:
    params = stack.project / "params.yaml"
    right = params.read_text(encoding="utf-8")
    params.write_text(right.replace("distill:\n  seed:", "distill:\n  sede:"), encoding="utf-8")
    assert params.read_text(encoding="utf-8") != right
    try:
        status, run = stack.run_deployment()
    finally:
        params.write_text(right, encoding="utf-8")
    assert (status, run["state_type"]) == (1, "FAILED")
    assert "distill.sede = 0: unknown key; did you mean 'seed'?" in run["state"]["message"]
    tasks = stack.find("task_runs", flow_runs={"id": {"any_": [run["id"]]}}, sort="EXPECTED_START_TIME_ASC")
    assert [task["name"].rsplit("-", 1)[0] for task in tasks] == ["checkout", "preflight"]  # nothing expensive ran
