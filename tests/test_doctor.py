"""The doctor names what would break a run, in one line each with what to do, and fails only for what would."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import candidates
import pytest

from tasks.checks import doctor
from tasks.registry import ledger
from tasks.s3 import objects as store
from tests.servers import FaultyProxy, S3Server


@pytest.fixture
def project(tmp_path: Path, mlflow_database: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose ledger, published versions and DVC remote are on S3."""
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_API_AUTH_STRING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DANCEOPD_LEDGER", f"{s3}/ledger")
    monkeypatch.setenv("DANCEOPD_PUBLISH", f"{s3}/models")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    project = candidates.new_project(tmp_path / "project", mlflow_database)
    (project / ".dvc/cache").mkdir(parents=True)
    (project / ".dvc/config").write_text(f"['remote \"s3\"']\n    url = {s3}/dvc\n")
    monkeypatch.chdir(project)
    return project


def findings(project: Path) -> dict[str, tuple[str, str]]:
    return {finding.what: (finding.status, finding.text) for finding in doctor.examine(project)}


def test_what_is_well_is_said_in_one_line_each(project: Path, s3: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.cli([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "nothing failed" and all(line.startswith(("ok ", "warning ")) for line in lines[:-1])
    told = findings(project)
    assert told["ledger"] == ("ok", f"{s3}/ledger: reads, writes, conditional writes")
    for what in ("published", "dvc s3", "clock, bucket danceopd", "rights", "python"):
        assert told[what][0] == "ok", what
    assert "inside the project" in told["mlflow"][1] and "PREFECT_API_URL is not set" in told["prefect"][1]
    assert told["code"][0] == told["teachers"][0] == "warning"
    assert store.list_objects(s3) == []  # no probe is left


def test_a_laptop_without_servers_or_credentials_is_healthy(
    project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after `make demo` on a fresh machine: the DVC remote on S3 is told, and is no failure."""
    for name in [*os.environ]:
        if name.startswith("AWS_") or name in ("DANCEOPD_LEDGER", "DANCEOPD_PUBLISH"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # no cloud machine's own credentials
    assert doctor.cli([]) == 0
    status, text = findings(project)["dvc s3"]
    assert status == "ok" and "not looked at, no S3 store is configured here" in text
    assert "FAILED" not in capsys.readouterr().out
    monkeypatch.setenv("DANCEOPD_LEDGER", "s3://danceopd/ledger")  # from here on the store is meant to be used
    status, text = findings(project)["dvc s3"]
    assert status == "FAILED" and "set AWS_ACCESS_KEY_ID" in text


H100 = "NVIDIA H100 80GB HBM3, 81559 MiB, 550.54.15"


@pytest.mark.parametrize(
    ("script", "torch", "status", "text"),
    [
        (None, "2.9.0+cpu", "ok", "no GPU: the CPU is used"),
        (f"echo '{H100}'", "2.9.0", "ok", "NVIDIA H100 80GB HBM3, 81559 MiB; driver 550.54.15"),
        (f"echo '{H100}'", "2.9.0+cpu", "warning", "not used: torch is built for the CPU alone"),
        ("echo 'NVIDIA-SMI has failed' >&2; exit 9", "2.9.0", "warning", "lists none (NVIDIA-SMI has failed)"),
    ],
)
def test_gpus_are_told_in_one_line(
    script: str | None, torch: str, status: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda _: torch)
    (finding,) = doctor._gpus(tmp_path)
    assert (finding.status, finding.what) == (status, "gpu") and text in finding.text


def forgets_conditions(monkeypatch: pytest.MonkeyPatch, s3: str) -> None:
    put = store._put
    monkeypatch.setattr(store, "_put", lambda uri, content, **condition: put(uri, content))


def with_a_wrong_key(monkeypatch: pytest.MonkeyPatch, s3: str) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")


def with_no_bucket(monkeypatch: pytest.MonkeyPatch, s3: str) -> None:
    monkeypatch.setenv("DANCEOPD_PUBLISH", "s3://no-such-bucket/models")


def with_another_clock(monkeypatch: pytest.MonkeyPatch, s3: str) -> None:
    theirs = store.server_time
    monkeypatch.setattr(store, "server_time", lambda uri: theirs(uri) + timedelta(minutes=5))


def with_a_full_disk(monkeypatch: pytest.MonkeyPatch, s3: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**29))


def without_rights(monkeypatch: pytest.MonkeyPatch, s3: str) -> None:
    def refuse(**options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)


def with_a_tampered_ledger(monkeypatch: pytest.MonkeyPatch, s3: str) -> None:
    decision: dict[str, Any] = {"time": "t", "action": "promote", "actor": "ann", "reason": "r"}
    decision |= {"version": "1", "to_version": "1"}
    ledger.append(f"{s3}/ledger", [], **decision, **dict.fromkeys(("from_version", "previous", "verdict", "weights")))
    content, etag = store.read(f"{s3}/ledger/000001.json")
    store.replace(f"{s3}/ledger/000001.json", content.replace(b"ann", b"bob"), etag)


def with_a_dead_mlflow(monkeypatch: pytest.MonkeyPatch, s3: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:hidden@127.0.0.1:1")


def with_a_dead_prefect(monkeypatch: pytest.MonkeyPatch, s3: str) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")


Harm = Callable[[pytest.MonkeyPatch, str], None]
CASES: list[tuple[Harm, str, str]] = [
    (forgets_conditions, "ledger", "does not keep to If-None-Match and If-Match"),
    (with_a_wrong_key, "published", "or are wrong"),
    (with_no_bucket, "published", "create it, or correct the address"),
    (with_another_clock, "clock, bucket danceopd", "s apart"),
    (with_a_full_disk, "space, project", "0.5 GiB free"),
    (without_rights, "rights", "cannot write to"),
    (with_a_tampered_ledger, "ledger", "tampered"),
    (with_a_dead_mlflow, "mlflow", "no MLflow server answers"),
    (with_a_dead_prefect, "prefect", "no server answers"),
]


@pytest.mark.parametrize(("harm", "what", "words"), CASES, ids=[case[0].__name__ for case in CASES])
def test_what_would_break_a_run_is_named(
    project: Path,
    s3: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    harm: Harm,
    what: str,
    words: str,
) -> None:
    harm(monkeypatch, s3)
    assert doctor.cli([]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    (line,) = [line for line in failed if line.split(maxsplit=1)[1].startswith(what) and words in line]
    assert "hidden" not in line


def test_a_store_that_keeps_its_objects_for_good_suits_the_ledger(
    project: Path, s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An append-only ledger needs no right to remove, so its lack is no fault."""

    def refuse(uri: str) -> None:
        raise store.UserError(f"{uri}: these credentials may not do this here")

    monkeypatch.setattr(store, "delete", refuse)
    status, text = findings(project)["ledger"]
    assert status == "ok" and "suits an append-only ledger" in text


def test_a_prefect_server_is_asked_with_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answers as of 3.8, from a stand-in: the real one takes half a minute to start."""
    answers = {
        "/api/admin/version": b'"3.8.8"',
        "/api/work_pools/filter": b'[{"name": "local", "status": "NOT_READY"}]',
    }

    def get(url: str, authorization: str | None = None, body: Any = None) -> tuple[int, bytes, str]:
        path = url.removeprefix("http://127.0.0.1:4200")
        return (200, answers[path], "") if authorization == "Basic YWRtaW46cGFzcw==" else (401, b"", "")

    monkeypatch.setattr(doctor, "_get", get)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    monkeypatch.delenv("PREFECT_API_AUTH_STRING", raising=False)
    (refused,) = doctor._prefect(Path())
    assert refused.status == "FAILED" and "set PREFECT_API_AUTH_STRING" in refused.text
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "admin:pass")
    version, pools = doctor._prefect(Path())
    assert version.status == "ok" and "server 3.8.8" in version.text
    assert pools.status == "warning" and "local NOT_READY; no worker is ready" in pools.text


def test_a_slow_store_is_waited_for(project: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultyProxy(s3_server.url, lambda method, path: "slow") as proxy:
        proxy.delay = 0.1
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        assert findings(project)["published"][0] == "ok"
