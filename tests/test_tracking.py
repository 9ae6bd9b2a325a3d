"""Tracking publishes what the stages wrote, under names, without cutting anything in silence; a dead server is one
clear message within seconds.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import candidates
import pytest
import requests
from mlflow.exceptions import MlflowException, RestException

from data.errors import Outage, UserError
from data.files import write_json
from data.yaml_files import flatten
from tasks.registry import server, tracking, versions


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Path) -> Path:
    return candidates.new_project(tmp_path_factory.mktemp("tracking") / "project", mlflow_database)


@pytest.fixture(autouse=True)
def own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_nested_params_get_dotted_names_and_lists_become_json() -> None:
    params = {
        "distill": {"steps": 300, "beta": [5, 2], "routes": [{"capability": "t2i"}], "extra": {}},
        "name": "micro",
        "on": True,
        "none": None,
    }
    assert {name: tracking.param_text(value) for name, value in flatten(params).items()} == {
        "distill.steps": "300",
        "distill.beta": "[5, 2]",
        "distill.routes": '[{"capability": "t2i"}]',
        "distill.extra": "{}",
        "name": "micro",
        "on": "true",
        "none": "null",
    }
    assert flatten({}) == {}


def test_a_param_too_long_for_mlflow_is_replaced_by_its_digest_not_cut() -> None:
    assert tracking.param_text("x" * 6000) == "x" * 6000
    long, other = tracking.param_text("x" * 6001), tracking.param_text("x" * 6000 + "y")
    assert long != other and long.startswith("sha256:") and "6001" in long


def test_steps_become_metrics_named_by_stage_and_route(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    path.write_text("step,route,loss,t,gradient_norm\n0,t2i,0.5,0.9,1.5\n1,local_edit,nan,0.4,2.5\n")
    metrics = tracking.step_metrics("distill", path)
    assert metrics[:3] == [("distill/loss/t2i", 0.5, 0), ("distill/t", 0.9, 0), ("distill/gradient_norm", 1.5, 0)]
    name, loss, step = metrics[3]
    assert (name, step) == ("distill/loss/local_edit", 1) and loss != loss  # a diverged step stays visible


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step,loss\n0,1\n", "columns"),
        ("", "not a table"),
        ("step,route,loss,t,gradient_norm\n0,a,b,c,d\n", "not a table"),
    ],
)
def test_a_damaged_steps_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "steps.csv").write_text(text)
    with pytest.raises(UserError, match=rf"steps\.csv: .*{message}"):
        tracking.step_metrics("distill", tmp_path / "steps.csv")
    with pytest.raises(UserError, match="no such file"):
        tracking.step_metrics("distill", tmp_path / "none.csv")


def test_a_run_holds_more_than_one_batch_and_stays_inside_the_project(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    rows = "\n".join(f"{step},t2i,{step / 1000},0.5,1.0" for step in range(700))
    (tmp_path / "steps.csv").write_text("step,route,loss,t,gradient_norm\n" + rows + "\n")
    write_json(tmp_path / "student.json", {"stage": "distill", "fingerprint": "f" * 64})
    (project / f"runs/distill-{'f' * 12}").mkdir(parents=True)
    (project / f"runs/distill-{'f' * 12}/speed.jsonl").write_text('{"name": "seconds", "step": 1, "value": 0.25}\n')
    with tracking.run(project, "steps", {"kind": "test"}) as tracked:
        tracking.log_params(tracked, {f"key{index}": index for index in range(150)})
        tracking.log_steps(tracked, "distill", tmp_path / "steps.csv")
        tracking.log_scorecard(tracked, candidates.scorecard())
        tracking.log_files(tracked, {"": tmp_path / "steps.csv"})
    client = tracked.store.client
    found = client.get_run(tracked.run_id)
    assert found.info.status == "FINISHED" and len(found.data.params) == 150
    history = client.get_metric_history(tracked.run_id, "distill/loss/t2i")
    assert sorted(one.step for one in history) == list(range(700)) and found.data.metrics[
        "distill/loss/t2i"
    ] == pytest.approx(0.699)
    assert found.data.metrics["gedit/style_change"] == 8.0
    assert found.data.metrics["distill/seconds"] == 0.25  # from beside the run's states, where DVC does not look
    assert found.info.artifact_uri.startswith((project / "mlflow" / "artifacts").as_uri())
    assert list(elsewhere.iterdir()) == []  # nothing is written where the command happened to be started


def test_a_run_that_fails_is_marked_and_its_error_passes_through(project: Path) -> None:
    with pytest.raises(ZeroDivisionError), tracking.run(project, "failing", {}) as failed:
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), tracking.run(project, "stopped", {}) as stopped:
        raise KeyboardInterrupt
    status = [one.store.client.get_run(one.run_id).info.status for one in (failed, stopped)]
    assert status == ["FAILED", "KILLED"]
    with pytest.raises(UserError, match="no such file or folder"), tracking.run(project, "missing", {}) as tracked:
        tracking.log_files(tracked, {"report": project / "reports" / "nothing"})


def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_a_dead_server_is_one_clear_message_within_seconds(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = closed_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://somebody:secret@127.0.0.1:{port}")
    started = time.monotonic()
    with pytest.raises(Outage, match=rf"127\.0\.0\.1:{port}: no MLflow server answers") as error:
        versions.champion(project)
    assert (
        time.monotonic() - started < 5
        and "secret" not in str(error.value)
        and "unset MLFLOW_TRACKING_URI" in str(error.value)
    )


def test_a_server_that_accepts_and_never_answers_does_not_hang(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PROBE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(Outage, match="no MLflow server answers"):
            tracking.open_store(project)
        assert time.monotonic() - started < 10


def answered(status: int) -> Exception:
    """What requests raises for an artifact."""
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(response=response)


def around(error: Exception) -> Exception:
    """As MLflow's client wraps what requests raised: the type is left in the context alone."""
    try:
        try:
            raise error
        except Exception as inner:
            raise MlflowException(f"API request failed with exception {inner}")  # noqa: B904
    except MlflowException as outer:
        return outer


@pytest.mark.parametrize(
    ("error", "outage", "words"),
    [
        (RestException({"error_code": "INTERNAL_ERROR", "message": "x"}), True, "again"),
        (RestException({"error_code": "TEMPORARILY_UNAVAILABLE", "message": "x"}), True, "again"),
        (around(requests.ConnectionError("refused")), True, "again"),
        (around(requests.exceptions.RetryError("x")), True, "again"),
        (answered(502), True, "again"),
        (requests.Timeout("x"), True, "again"),
        (RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": "Connection lost"}), False, "lost"),
        (RestException({"error_code": "PERMISSION_DENIED", "message": "x"}), False, "may not do this"),
        (answered(403), False, "may not do this"),
        (RestException({"error_code": "UNAUTHENTICATED", "message": "x"}), False, "does not know"),
        (answered(401), False, "does not know"),
        (answered(404), False, "MLflow"),
    ],
)
def test_an_outage_is_told_by_types_and_status_not_by_words(error: Exception, outage: bool, words: str) -> None:
    with pytest.raises(UserError, match=words) as told, server.explained("http://127.0.0.1:5000"):
        raise error
    assert isinstance(told.value, Outage) is outage


def test_a_file_that_a_run_has_not_is_no_outage(project: Path) -> None:
    with tracking.run(project, "bare", {}) as tracked, pytest.raises(UserError, match=r"has no scores/none\.parquet"):
        tracking.artifact(tracked.store, tracked.run_id, "scores/none.parquet", project)


def test_the_lock_lets_one_in_at_a_time(project: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with server.locked(project):
            order.append("second")

    with server.locked(project):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_importing_tracking_registry_and_gate_does_not_load_mlflow() -> None:
    """The command line and the flow import them at every start; MLflow costs seconds."""
    code = "import sys, tasks.registry.tracking, tasks.registry.versions, tasks.release.gate, tasks.release.decisions"
    code += "; sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0
