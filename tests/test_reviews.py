"""A review given on a version's page is followed once, by those who may, on what was judged; one that comes too late is
answered, not obeyed.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import candidates
import numpy as np
import pytest
from candidates import PARAMS, submitted
from safetensors.numpy import save_file

from data.errors import UserError, UserErrors
from data.files import sha256_file
from tasks.registry import ledger, server, tracking, versions
from tasks.release import decisions, submission


@pytest.fixture
def project(tmp_path: Path, mlflow_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MLFLOW_TRACKING_URI", "DANCEOPD_LEDGER", "DANCEOPD_REVIEWERS"):
        monkeypatch.delenv(name, raising=False)
    return candidates.new_project(tmp_path / "project", mlflow_database)


def click(project: Path, version: str, **tags: str) -> None:
    """What a person does on the version's page."""
    for key, value in tags.items():
        tracking.open_store(project).client.set_model_version_tag(versions.MODEL, version, f"review.{key}", value)


def tags_of(project: Path, version: str) -> dict[str, str]:
    return dict(tracking.open_store(project).client.get_model_version(versions.MODEL, version).tags)


def entries(project: Path) -> list[tuple[str, str, str]]:
    return [(one.action, one.actor, one.version) for one in ledger.read(project / "mlflow" / "ledger")]


def statuses(project: Path) -> list[tuple[str, str]]:
    return [(one["version"], one["status"]) for one in decisions.decide_reviews(project)]


def test_an_approval_on_the_page_is_followed_once_it_is_whole(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted(project)
    assert statuses(project) == []
    click(project, "1", status="approved")
    assert statuses(project) == [("1", "incomplete")] and entries(project) == []
    assert "review.by and review.reason" in tags_of(project, "1")["review.answer"]
    click(project, "1", by="eve", reason="grids look right")
    monkeypatch.setenv("DANCEOPD_REVIEWERS", "ada, bob")
    assert statuses(project) == [("1", "refused")] and entries(project) == []
    assert "'eve' may not decide here; DANCEOPD_REVIEWERS names ada, bob" in tags_of(project, "1")["review.answer"]
    monkeypatch.setenv("DANCEOPD_REVIEWERS", "ada, eve")
    click(project, "1", status="approved")
    assert statuses(project) == [("1", "promoted")] and entries(project) == [("promote", "eve", "1")]
    assert statuses(project) == []  # once
    (entry,) = ledger.read(project / "mlflow" / "ledger")
    assert entry.reason == "grids look right" and entry.account == server.account()


def test_a_review_after_the_champion_has_changed_is_void_for_good(project: Path) -> None:
    submitted(project)
    submitted(project, weights=2.0)
    submitted(project, weights=3.0)
    click(project, "3", by="bob", reason="worse", status="rejected")
    decisions.approve(project, "1", "eve", "first")
    decisions.approve(project, "2", "ann", "also good")
    assert statuses(project) == [("1", "promoted"), ("2", "stale"), ("3", "rejected")]
    assert (
        "champion is version 1: the verdict is stale" in tags_of(project, "2")["review.answer"]
        and tags_of(project, "2")["review.status"] == "stale"
    )
    assert entries(project) == [("promote", "eve", "1"), ("reject", "bob", "3")]
    assert statuses(project) == []
    with pytest.raises(UserError, match="verdict is stale"):
        decisions.approve(project, "2", "ann", "again")
    with pytest.raises(UserError, match="decided on already"):
        decisions.approve(project, "3", "ann", "after all")
    submitted(project, geneval=0.82, weights=4.0)
    decisions.promote(project, "4", "eve", "better")
    decisions.rollback(project, "eve", "colours drift")  # version 1 again, which version 3 was not compared with
    assert statuses(project) == [] and entries(project)[-1] == ("rollback", "eve", "1")


def test_the_same_weights_are_no_new_version(project: Path) -> None:
    first = submitted(project, promote="auto")
    again = submitted(project, promote="auto")  # judged against itself: another verdict
    assert (first["status"], first["version"]) == ("champion", "1")
    assert (
        (again["status"], again["version"]) == ("identical", "1")
        and "nothing new" in again["reasons"][0]
        and again["run_id"] != first["run_id"]
    )
    store = tracking.open_store(project)
    assert len(versions.versions_of(store)) == 1 and len(entries(project)) == 1
    assert store.client.get_run(again["run_id"]).data.tags["registered.identical"] == "1"


@pytest.mark.parametrize("step", ["log_steps", "_log_model", "update_version", "set_alias"])
def test_a_submission_that_broke_off_is_finished_by_the_same_command(
    project: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """One run, one logged model, one version, whichever step it broke off at, and however often it is repeated."""
    candidates.judged(project)

    def breaks(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if step in ("update_version", "set_alias"):
            from mlflow import MlflowClient

            patch.setattr(
                MlflowClient,
                {"update_version": "update_model_version", "set_alias": "set_registered_model_alias"}[step],
                breaks,
            )
        else:
            patch.setattr(submission if step.startswith("_") else tracking, step, breaks)
        with pytest.raises(KeyboardInterrupt):
            submission.submit_files(project, PARAMS, "review", "ann", "x")
    for _ in range(2):
        done = submission.submit_files(project, PARAMS, "review", "ann", "x")
        assert (done["status"], done["version"]) == ("candidate", "1")
    store = tracking.open_store(project)
    experiment = store.client.get_experiment_by_name(server.EXPERIMENT).experiment_id
    (run,) = store.client.search_runs([experiment])
    assert (
        run.info.status == "FINISHED"
        and len(versions.versions_of(store)) == 1
        and versions.aliases_of(store) == {"candidate": "1"}
    )
    assert len(store.client.get_metric_history(run.info.run_id, "distill/loss/t2i")) == 5  # nothing is there twice
    assert decisions.promote(project, "1", "eve", "go")["entry"]["to_version"] == "1"


def test_a_scorecard_that_was_tampered_with_is_refused(project: Path) -> None:
    submitted(project)
    (card,) = (project / "mlflow" / "artifacts").rglob("scorecard.json")
    card.write_text(card.read_text().replace("0.8", "0.9"))
    with pytest.raises(UserError, match=r"scorecard\.json .* not the one that was judged"):
        decisions.promote(project, "1", "eve", "go")
    assert entries(project) == []


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


@pytest.mark.parametrize("name", ["student.pkl", "model.pt", "extra.safetensors", "student.safetensors"])
def test_a_pickle_is_refused_unopened(project: Path, tmp_path: Path, name: str) -> None:
    """Whatever it is called, on the way in and in the store."""
    opened, poison = tmp_path / "opened", pickle.dumps(Harmful(tmp_path / "opened"))
    candidates.judged(project)
    target = project / "checkpoints/absorbed" / name
    before = target.read_bytes() if target.exists() else None
    target.write_bytes(poison)
    with pytest.raises(UserErrors, match=name):
        submission.submit_files(project, PARAMS, "review", "ann", "x")
    target.write_bytes(before) if before else target.unlink()
    submission.submit_files(project, PARAMS, "review", "ann", "x")
    folder = next((project / "mlflow" / "artifacts").rglob("student.safetensors")).parent
    (folder / name).write_bytes(poison)
    with pytest.raises(UserErrors, match=rf"{name}: (not among the files registered|SHA-256 is)"):
        decisions.promote(project, "1", "eve", "go")
    assert entries(project) == [] and not opened.exists()


def test_tags_that_were_moved_along_with_the_files_do_not_help(project: Path) -> None:
    """Somebody who may edit tags and artifacts, but who cannot make the verdict name other weights."""
    submitted(project)
    weights = next((project / "mlflow" / "artifacts").rglob("student.safetensors"))
    save_file({"weight": np.zeros(4, np.float32)}, weights)
    tracking.open_store(project).client.set_model_version_tag(
        versions.MODEL, "1", "weights.student.safetensors.sha256", sha256_file(weights)
    )
    with pytest.raises(UserError, match="the verdict names others"):
        decisions.promote(project, "1", "eve", "go")
