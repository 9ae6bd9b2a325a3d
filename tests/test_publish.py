"""Whoever reads what is published gets one whole version, the one last decided on, with every byte verified; or one
clear refusal.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import candidates
import numpy as np
import pytest
from candidates import submitted
from safetensors.numpy import load_file

from data.errors import Outage, UserError, UserErrors
from data.files import sha256_bytes
from tasks.registry import ledger, tracking, versions
from tasks.release import decisions, publish
from tasks.s3 import objects as store
from tests.servers import FaultyProxy, S3Server


@pytest.fixture
def project(tmp_path: Path, mlflow_database: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its ledger and what it publishes are on S3."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DANCEOPD_LEDGER", f"{s3}/ledger")
    monkeypatch.setenv("DANCEOPD_PUBLISH", f"{s3}/models")
    return candidates.new_project(tmp_path / "project", mlflow_database)


def weight(folder: Path) -> float:
    return float(load_file(folder / "student.safetensors")["weight"][0])


def test_promote_publish_roll_back(project: Path, s3: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no champion yet"):
        publish.publish(project)
    submitted(project, promote="auto")
    assert ledger.read(f"{s3}/ledger")[0].to_version == "1" and not (project / "mlflow" / "ledger").exists()
    first = publish.publish(project)
    assert first["changed"] and not publish.publish(project)["changed"]
    manifest = publish.fetch(f"{s3}/models", tmp_path / "served")
    assert manifest["version"] == "1" and weight(Path(manifest["folder"])) == 1.0
    assert (
        manifest["lineage"]["teacher.local.sha256"]
        and manifest["lineage"]["verdict.sha256"] == ledger.read(f"{s3}/ledger")[0].verdict
    )
    submitted(project, geneval=0.82, weights=2.0, promote="auto")
    assert publish.publish(project)["ledger"] == 2
    assert weight(Path(publish.fetch(f"{s3}/models", tmp_path / "served")["folder"])) == 2.0
    decisions.rollback(project, "eve", "colours drift")
    back = publish.publish(project)
    assert (back["ledger"], back["prefix"], back["manifest"]) == (3, first["prefix"], first["manifest"])
    assert weight(Path(publish.fetch(f"{s3}/models", tmp_path / "served")["folder"])) == 1.0


def test_nothing_is_readable_until_all_of_it_is(
    project: Path, s3: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store fails for good at each request in turn; the next try finishes, and no reader ever sees a part."""
    submitted(project, promote="auto")
    publish.publish(project)
    submitted(project, geneval=0.82, weights=2.0, promote="auto")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    broken = 0
    with FaultyProxy(s3_server.url) as proxy:
        for last in range(100):
            seen = iter(range(1000))
            proxy.fault = lambda method, path, seen=seen, last=last: (
                "503" if method == "PUT" and next(seen) >= last else None
            )  # type: ignore[misc]
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
            try:
                publish.publish(project)
                break
            except Outage:
                broken += 1
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server.url)
            manifest = publish.fetch(f"{s3}/models", tmp_path / str(last))
            assert manifest["version"] == "1" and weight(Path(manifest["folder"])) == 1.0
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server.url)
    assert broken >= 2 and publish.fetch(f"{s3}/models", tmp_path / "whole")["version"] == "2"


def test_of_two_publishers_the_later_decision_stays(project: Path, s3: str) -> None:
    uri = f"{s3}/pointer/latest.json"
    pointer = {"format": 1, "version": "1", "prefix": "versions/1-a", "manifest": "0" * 64}
    refused: list[int] = []

    def move(number: int) -> None:
        try:
            publish._move(uri, {**pointer, "ledger": number})
        except UserError:
            refused.append(number)

    threads = [threading.Thread(target=move, args=(number,)) for number in (3, 1, 4, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads(store.read(uri)[0])["ledger"] == 4 and 4 not in refused
    assert publish._move(uri, {**pointer, "ledger": 4}) is False
    with pytest.raises(UserError, match="a later decision than entry 3"):
        publish._move(uri, {**pointer, "ledger": 3})


def change(uri: str, edit: Any) -> None:
    content, etag = store.read(uri)
    store.replace(uri, edit(content), etag)


def test_what_was_changed_after_publishing_is_refused(project: Path, s3: str, tmp_path: Path) -> None:
    submitted(project, promote="auto")
    done = publish.publish(project)
    where = f"{s3}/models/{done['prefix']}"
    change(f"{where}/student.safetensors", lambda content: content[:-1] + b"x")
    with pytest.raises(UserError, match="not the one that was asked for"):
        publish.fetch(f"{s3}/models", tmp_path / "a")
    assert not list((tmp_path / "a").rglob("student.safetensors"))

    def manifest(path: str) -> None:
        """A manifest naming `path`, with a pointer that fits it: somebody who may write to the bucket."""
        content = json.dumps({"version": "1", "files": [{"path": path, "sha256": "0" * 64, "size": 1}]}).encode()
        change(f"{where}/manifest.json", lambda _: content)
        change(
            f"{s3}/models/latest.json",
            lambda old: json.dumps({**json.loads(old), "manifest": sha256_bytes(content)}).encode(),
        )

    change(f"{where}/manifest.json", lambda content: content.replace(b'"1"', b'"7"'))
    with pytest.raises(UserError, match="changed after it was published"):
        publish.fetch(f"{s3}/models", tmp_path / "b")
    for path, words in (
        ("../../escape.json", "not a name"),
        ("student.pkl", "files are loaded"),
        ("/etc/x.json", "not a name"),
    ):
        manifest(path)
        with pytest.raises(UserError, match=words):
            publish.fetch(f"{s3}/models", tmp_path / "b" / "c")
    change(f"{s3}/models/latest.json", lambda old: old.replace(b"versions/1", b"versions/../1"))
    with pytest.raises(UserError, match="not a pointer"):
        publish.fetch(f"{s3}/models", tmp_path / "b")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix in (".pkl",)] and not list(
        tmp_path.glob("escape*")
    )
    with pytest.raises(UserError, match="another manifest"):
        publish.publish(project)


def test_a_champion_whose_files_were_exchanged_is_not_published(project: Path, s3: str) -> None:
    """Also when the tags were changed along with them: the ledger holds what was decided on."""
    from safetensors.numpy import save_file

    from data.files import sha256_file

    submitted(project, promote="auto")
    weights = next((project / "mlflow" / "artifacts").rglob("student.safetensors"))
    save_file({"weight": np.zeros(4, np.float32)}, weights)
    with pytest.raises(UserErrors, match="not the ones that were judged"):
        publish.publish(project)
    tracking.open_store(project).client.set_model_version_tag(
        versions.MODEL, "1", "weights.student.safetensors.sha256", sha256_file(weights)
    )
    with pytest.raises(UserError, match="not those of ledger entry 000001"):
        publish.publish(project)
    assert store.list_objects(f"{s3}/models") == []


def test_a_review_waits_while_the_store_is_down(
    project: Path, s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An approval is not void because the ledger could not be written."""
    submitted(project)
    decisions.approve(project, "1", "eve", "grids look right")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with FaultyProxy(s3_server.url, lambda method, path: "503" if method == "PUT" else None) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        assert [one["status"] for one in decisions.decide_reviews(project)] == ["failed"]
        proxy.fault = lambda method, path: None
        assert [one["status"] for one in decisions.decide_reviews(project)] == ["promoted"]
    assert [(one.actor, one.to_version) for one in ledger.read(f"{s3}/ledger")] == [("eve", "1")]


def test_a_ledger_that_does_not_answer_is_worth_another_try(
    project: Path, s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version is registered; the same submission promotes it."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with FaultyProxy(s3_server.url, lambda method, path: "503" if method == "PUT" else None) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        with pytest.raises(Outage, match="version 1 is registered as candidate, but was not promoted"):
            submitted(project, promote="auto")
        proxy.fault = lambda method, path: None
        done = submitted(project, promote="auto")
    assert (done["status"], done["version"]) == ("champion", "1") and len(ledger.read(f"{s3}/ledger")) == 1


def test_two_machines_share_one_ledger(project: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose ledger is another one is told so, instead of starting a history of its own."""
    submitted(project, promote="auto")
    with monkeypatch.context() as patch:
        patch.setenv("DANCEOPD_LEDGER", f"{s3}/other")
        with pytest.raises(UserError, match="another ledger is meant"):
            versions.champion(project)
        patch.setenv("DANCEOPD_LEDGER", "/somewhere")
        with pytest.raises(UserError, match="not an S3 address"):
            versions.champion(project)
    assert versions.champion(project)["version"] == "1"  # type: ignore[index]
