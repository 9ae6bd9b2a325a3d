"""What is promoted can be checked out again, what is scored again are the registered weights, and drift is a mean
outside its registered interval.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import candidates
import pytest

from data.errors import Outage, UserError, UserErrors
from tasks import prefect_tasks
from tasks.checks import rescore
from tasks.registry import files, tracking, versions
from tasks.registry import versions as registry
from tasks.running.repro import StageFailed


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Path) -> Iterator[Path]:
    """A project whose first version is champion."""
    project = candidates.new_project(tmp_path_factory.mktemp("versions") / "project", mlflow_database)
    candidates.submitted(project, promote="auto")
    yield project


def test_versions_are_found_by_number_and_alias(registered: Path) -> None:
    found = versions.require(registered, f"models:/{registry.MODEL}@champion")
    assert found == versions.find(registered, "1") == versions.find(registered, f"models:/{registry.MODEL}/1")
    assert found.weights == files.weight_hashes(registered / "checkpoints" / "absorbed")
    assert (
        versions.find(registered, "7") is None and versions.find(registered, f"models:/{registry.MODEL}@nobody") is None
    )
    with pytest.raises(UserError, match="has no version 7"):
        versions.require(registered, "7")
    assert not versions.is_reference("s3://bucket/folder") and not versions.is_reference("models:/other@champion")


def test_only_the_registered_weights_are_scored(registered: Path) -> None:
    found, checkpoint = versions.require(registered, "1"), registered / "checkpoints" / "absorbed"
    versions.require_weights(found, checkpoint)
    content = (checkpoint / "student.safetensors").read_bytes()
    (checkpoint / "student.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        with pytest.raises(UserErrors, match="student.safetensors: SHA-256 is"):
            versions.require_weights(found, checkpoint)
    finally:
        (checkpoint / "student.safetensors").write_bytes(content)


def test_the_registered_scorecard_is_the_judged_one(registered: Path, tmp_path: Path) -> None:
    found = versions.require(registered, "1")
    card = rescore.registered_scorecard(registered, found, tmp_path / "one")
    assert card == candidates.scorecard()
    store = tracking.open_store(registered)
    (tmp_path / "scorecard.json").write_text("{}", encoding="utf-8")
    store.client.log_artifact(found.run_id, str(tmp_path / "scorecard.json"))
    with pytest.raises(UserError, match="is not the file that was judged"):
        rescore.registered_scorecard(registered, found, tmp_path / "two")


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"git.known": "false"}, "unknown code"),
        ({"git.known": "true", "git.dirty": "true"}, "changed files"),
        ({"git.known": "true"}, "changed files"),
    ],
)
def test_changed_or_unknown_code_is_not_promoted(tags: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        versions.require_clean(versions.Version("3", "run", {"git.sha": "a" * 40, **tags}))
    clean = {"git.known": "true", "git.dirty": "false"}
    with pytest.raises(UserError, match="unknown code"):
        versions.require_clean(versions.Version("3", "run", clean))
    versions.require_clean(versions.Version("3", "run", {"git.sha": "a" * 40, **clean}))


def test_drift_is_a_mean_outside_its_interval() -> None:
    before = {
        "metrics": {name: {"mean": 0.5, "low": 0.4, "high": 0.6} for name in ("same", "edge", "low", "gone", "nan")}
    }
    now: dict[str, Any] = {
        "same": {"mean": 0.5},
        "edge": {"mean": 0.6},
        "low": {"mean": 0.399},
        "nan": {"mean": float("nan")},
    }
    rows = rescore.drifted(before, {"metrics": now})
    assert [(row["metric"], row["now"]) for row in rows] == [("low", 0.399), ("gone", None), ("nan", None)]


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (Outage("whatever its words"), True),
        (UserError("s3://b/k: the store answers 503; run the same command again when it has recovered"), False),
        (StageFailed("distill: loss is not a number"), False),
        (UserError("overrides: not every key exists"), False),
        (ValueError("a defect"), False),
    ],
)
def test_only_what_passes_by_itself_is_tried_again(error: Exception, again: bool) -> None:
    class Ended:
        def result(self, raise_on_failure: bool) -> Exception:
            return error

    assert prefect_tasks._when_transient(None, None, Ended()) is again


def test_links_lead_to_the_pages_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DANCEOPD_MLFLOW_URL", raising=False)
    told = {"tracking_uri": "http://ada:hunter2@mlflow:5000", "run_id": "r1", "version": "3", "model": "danceopd"}
    assert prefect_tasks.mlflow_links(told)["mlflow-version"][0] == "http://mlflow:5000/#/models/danceopd/versions/3"
    monkeypatch.setenv("DANCEOPD_MLFLOW_URL", "https://mlflow.example.org/")
    assert prefect_tasks.mlflow_links(told)["mlflow-run"][0] == "https://mlflow.example.org/#/runs/r1"
    assert prefect_tasks.mlflow_links({**told, "tracking_uri": "sqlite:///mlflow.db"})  # the browser's address decides
    monkeypatch.delenv("DANCEOPD_MLFLOW_URL")
    assert prefect_tasks.mlflow_links({**told, "tracking_uri": "sqlite:///mlflow.db"}) == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("distill: 10/300, 2/s, 1:20 left", ("distill", "10", "300")),
        ("score: images: 72/108, 13/s", ("score: images", "72", "108")),
        ("distill: 2/2", ("distill", "2", "2")),
        ("distill: loss, last tenth = 0.1", None),
        ("collect: 12 of 20", None),
    ],
)
def test_counts_are_told_from_other_lines(text: str, found: tuple[str, str, str] | None) -> None:
    match = prefect_tasks.PROGRESS.match(text)
    assert (match and match.group("what", "done", "total")) == found
