"""The registry: only a candidate that passed becomes a version, exactly one version is champion, and the ledger says
who decided what, and why, whatever happens in between."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import candidates
import numpy as np
import pytest
from candidates import PARAMS, scorecard, submitted, write_candidate
from safetensors.numpy import save_file

from data.errors import UserError, UserErrors
from data.files import digest, read_json, sha256_file
from tasks.registry import ledger, server, tracking, versions
from tasks.release import card, decisions, submission


@pytest.fixture
def project(tmp_path: Path, mlflow_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return candidates.new_project(tmp_path / "project", mlflow_database)


@pytest.fixture(scope="module")
def seasoned(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Path) -> Path:
    """A project (read only) whose version 1 is champion, version 2 waits for review and whose third candidate was
    refused.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        project = candidates.new_project(tmp_path_factory.mktemp("seasoned") / "project", mlflow_database)
        submitted(project, promote="auto")
        submitted(project, geneval=0.82, weights=2.0)
        submitted(project, geneval=0.1, weights=3.0)
    return project


def aliases(project: Path) -> dict[str, str]:
    return versions.aliases_of(tracking.open_store(project))


def version_of(project: Path, number: str) -> Any:
    return tracking.open_store(project).client.get_model_version(versions.MODEL, number)


def entries(project: Path) -> list[ledger.Entry]:
    return ledger.read(project / "mlflow" / "ledger")


def test_a_passing_candidate_becomes_a_version_with_its_lineage(seasoned: Path) -> None:
    tags = version_of(seasoned, "2").tags
    assert tags["gate.status"] == "passed" and tags["gate.champion"] == "1" and tags["review.status"] == "pending"
    assert tags["teacher.local.sha256"] == digest("local") and tags["base.sha256"] == "b" * 64
    assert (
        len(tags["params.sha256"])
        == len(tags["gate.verdict.sha256"])
        == len(tags["weights.student.safetensors.sha256"])
        == 64
    )
    assert tags["git.known"] == "false" and tags["mlflow.run_id"] == version_of(seasoned, "2").run_id
    assert aliases(seasoned) == {"champion": "1", "candidate": "2"}


def test_the_run_holds_params_steps_scores_images_and_files_but_no_pickle(seasoned: Path) -> None:
    store = tracking.open_store(seasoned)
    run = store.client.get_run(version_of(seasoned, "2").run_id)
    assert run.info.status == "FINISHED" and run.data.params["distill.steps"] == "300"
    assert run.data.metrics["geneval/overall"] == pytest.approx(0.82)
    history = store.client.get_metric_history(run.info.run_id, "distill/loss/t2i")
    assert [(one.step, one.value) for one in history] == [(step, pytest.approx(1 / (step + 1))) for step in range(5)]
    top = {one.path for one in store.client.list_artifacts(run.info.run_id)}
    assert {"scorecard.json", "verdict.json", "validate.json", "params.yaml", "report", "scores", "steps"} <= top
    assert "report/samples.png" in {one.path for one in store.client.list_artifacts(run.info.run_id, "report")}
    suffixes = {
        path.suffix
        for path in (seasoned / "mlflow" / "artifacts").rglob("*")
        if path.is_file() and path.name != "MLmodel"
    }
    assert suffixes == {".safetensors", ".json", ".csv", ".yaml", ".png", ".parquet"}


def test_the_description_shows_a_reviewer_scores_rules_and_how_to_decide(seasoned: Path) -> None:
    text = version_of(seasoned, "2").description
    assert len(text) < card.LONGEST_DESCRIPTION
    assert "| geneval/overall | 0.820 [0.800, 0.840] | 0.800 [0.780, 0.820] | 0.850 [0.830, 0.870] |" in text
    assert "champion (v1)" in text and "--version 2" in text and "folder `report`" in text
    assert all(
        f"| {rule} |" in text
        for rule in ("floor/geneval/overall", "regression/gedit/average", "complete/metrics", "provenance/weights")
    )


def test_a_long_description_says_what_it_leaves_out() -> None:
    rules = [
        {"rule": f"floor/{'x' * 60}{index}", "passed": index > 3, "value": 0.5, "bound": 0.4, "reason": "r"}
        for index in range(80)
    ]
    others: dict[str, Any] = {title: {} for title in ("champion (none)", *(f"teacher {index}" for index in range(4)))}
    text = card.description(scorecard()["metrics"], {"passed": False, "rules": rules}, others, ["origin"])
    assert len(text) < card.LONGEST_DESCRIPTION and "more rules are in verdict.json" in text
    assert [f"x{index} | **FAIL**" in text for index in range(4)] == [True] * 4  # failures come first


def test_a_refused_candidate_is_kept_with_its_reasons_and_moves_nothing(seasoned: Path) -> None:
    client = tracking.open_store(seasoned).client
    assert {str(one.version) for one in client.search_model_versions("name='danceopd'")} == {"1", "2"}
    experiment = client.get_experiment_by_name(server.EXPERIMENT)
    refused = [
        run for run in client.search_runs([experiment.experiment_id]) if run.data.tags["gate.status"] == "refused"
    ]
    assert len(refused) == 1 and "registered.version" not in refused[0].data.tags
    for rule in ("floor/geneval/overall", "regression/geneval/overall"):
        assert rule in refused[0].data.tags["gate.reasons"] and rule in refused[0].data.tags["gate.verdict"]
    assert "Refused" in refused[0].data.tags["mlflow.note.content"]
    assert {"verdict.json", "report", "scores"} <= {one.path for one in client.list_artifacts(refused[0].info.run_id)}
    assert len(entries(seasoned)) == 1 and aliases(seasoned)["champion"] == "1"


def test_the_gate_gets_the_champions_own_files(seasoned: Path) -> None:
    champion = versions.champion(seasoned)
    assert champion is not None and champion["version"] == "1"
    assert champion["scorecard"]["metrics"]["geneval/overall"]["mean"] == 0.8
    assert sha256_file(champion["scores"]) == version_of(seasoned, "1").tags["scores.parquet.sha256"]


def test_the_champions_report_page_is_found_again(project: Path) -> None:
    write_candidate(project)
    (project / "reports/score/report.html").write_text("<!doctype html>the page")
    candidates.judged(project)
    submission.submit_files(project, PARAMS, "auto", "ann", "nightly run")
    champion = versions.champion(project)
    assert (
        champion is not None
        and champion["page"].startswith("file://")
        and champion["page"].endswith("/report/report.html")
    )
    assert Path(unquote(urlsplit(champion["page"]).path)).read_text() == "<!doctype html>the page"


def test_promotion_records_who_and_why_and_keeps_the_previous_for_rollback(project: Path) -> None:
    assert versions.champion(project) is None
    assert submitted(project, promote="auto")["status"] == "champion"
    assert submitted(project, geneval=0.82, weights=2.0)["status"] == "candidate"
    decisions.promote(project, "2", "eve", "better binding")
    assert aliases(project) == {"champion": "2", "previous": "1"}
    last = entries(project)[-1]
    assert (last.action, last.actor, last.reason, last.from_version, last.to_version) == (
        "promote",
        "eve",
        "better binding",
        "1",
        "2",
    )
    assert last.verdict == version_of(project, "2").tags["gate.verdict.sha256"]
    assert (
        version_of(project, "2").tags["review.by"] == "eve"
        and version_of(project, "2").tags["review.status"] == "approved"
    )
    with pytest.raises(UserError, match="champion already"):
        decisions.promote(project, "2", "eve", "again")
    decisions.rollback(project, "eve", "artefacts in production")
    assert aliases(project) == {"champion": "1"}
    assert [entry.action for entry in entries(project)] == ["promote", "promote", "rollback"]
    with pytest.raises(UserError, match="no previous champion"):
        decisions.rollback(project, "eve", "further")


def test_a_verdict_against_an_earlier_champion_is_stale(project: Path) -> None:
    submitted(project)
    submitted(project, weights=2.0)  # both judged while there was no champion
    decisions.promote(project, "1", "eve", "first")
    with pytest.raises(
        UserError, match=r"judged against champion none, but champion is version 1: the verdict is stale"
    ):
        decisions.promote(project, "2", "eve", "second")
    assert aliases(project)["champion"] == "1" and len(entries(project)) == 1


def test_a_rejected_version_is_never_promoted_and_the_champion_is_not_rejected(project: Path) -> None:
    submitted(project, promote="auto")
    submitted(project, weights=2.0)
    decisions.reject(project, "2", "eve", "ugly hands")
    assert aliases(project) == {"champion": "1"} and version_of(project, "2").tags["review.status"] == "rejected"
    with pytest.raises(UserError, match=r"rejected by eve \(ugly hands\)"):
        decisions.promote(project, "2", "eve", "after all")
    with pytest.raises(UserError, match="rejected already"):
        decisions.reject(project, "2", "eve", "still")
    with pytest.raises(UserError, match="roll back"):
        decisions.reject(project, "1", "eve", "no")


@pytest.mark.parametrize("fault", ["changed", "missing", "added"])
def test_weights_that_are_not_the_ones_judged_are_refused(project: Path, fault: str) -> None:
    submitted(project)
    weights = next((project / "mlflow" / "artifacts").rglob("student.safetensors"))
    if fault == "changed":
        save_file({"weight": np.zeros(4, np.float32)}, weights)
    elif fault == "missing":
        weights.unlink()
    else:
        shutil.copyfile(weights, weights.with_name("other.safetensors"))
    name = "other" if fault == "added" else "student"
    with pytest.raises(UserErrors, match=rf"not the ones that were judged(.|\n)*{name}\.safetensors"):
        decisions.promote(project, "1", "eve", "go")
    assert aliases(project) == {"candidate": "1"} and entries(project) == []


def test_a_verdict_exchanged_in_the_store_is_refused(project: Path) -> None:
    submitted(project)
    path = next((project / "mlflow" / "artifacts").rglob("verdict.json"))
    path.write_text(path.read_text().replace('"value": "none"', '"value": "1"'))
    with pytest.raises(UserError, match="not the passing verdict"):
        decisions.promote(project, "1", "eve", "go")


def test_a_version_without_a_passing_gate_is_refused(project: Path) -> None:
    submitted(project)
    tracking.open_store(project).client.set_model_version_tag(versions.MODEL, "1", "gate.status", "refused")
    with pytest.raises(UserError, match="did not pass the gate"):
        decisions.promote(project, "1", "eve", "go")
    with pytest.raises(UserError, match=r"no version 7; versions: 1"):
        decisions.promote(project, "7", "eve", "go")


def test_what_was_judged_is_what_is_submitted(project: Path) -> None:
    candidates.judged(project)
    write_candidate(project, weights=9.0)
    with pytest.raises(UserErrors, match="other weights"):
        submission.submit_files(project, PARAMS, "review", "ann", "x")
    write_candidate(project, card=scorecard(0.9))
    with pytest.raises(UserErrors, match="another scorecard"):
        submission.submit_files(project, PARAMS, "review", "ann", "x")
    assert not (project / "mlflow" / "artifacts").exists()  # nothing was sent


def test_all_faults_of_a_submission_are_named_at_once(project: Path) -> None:
    candidates.judged(project)
    (project / "reports/validate.json").unlink()
    (project / "checkpoints/student/steps.csv").unlink()
    (project / "checkpoints/absorbed/optimizer.pt").write_bytes(b"pickle")
    weights = project / "checkpoints/absorbed/student.safetensors"
    weights.write_bytes(weights.read_bytes()[:20])
    with pytest.raises(UserErrors) as error:
        submission.submit_files(project, PARAMS, "review", "ann", "x")
    for word in ("validate.json", "steps.csv", "optimizer.pt", "student.safetensors: not readable"):
        assert any(word in fault for fault in error.value.faults)
    with pytest.raises(UserError, match="'auto' or 'review'"):
        submission.submit_files(project, PARAMS, "yes", "ann", "x")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a reason"):
        submission.submit_files(project, PARAMS, "review", "ann", " ")


def test_a_crash_between_ledger_and_alias_is_repaired_from_the_ledger(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(project, promote="auto")
    submitted(project, geneval=0.82, weights=2.0)
    follow = versions.follow
    calls: list[int] = []

    def dies_after_the_entry(store: server.Store) -> list[str]:
        calls.append(1)
        if len(calls) == 2:  # the first call comes before the decision
            raise KeyboardInterrupt
        return follow(store)

    monkeypatch.setattr(versions, "follow", dies_after_the_entry)
    with pytest.raises(KeyboardInterrupt):
        decisions.promote(project, "2", "eve", "better")
    monkeypatch.undo()
    assert aliases(project) == {"champion": "1", "candidate": "2"} and entries(project)[-1].to_version == "2"
    champion = versions.champion(project)
    assert champion is not None and champion["version"] == "2"  # the ledger is the truth already
    assert versions.reconcile(project) != []
    assert (
        aliases(project) == {"champion": "2", "previous": "1"} and version_of(project, "2").tags["review.by"] == "eve"
    )
    assert versions.reconcile(project) == []


def test_an_alias_moved_by_hand_is_put_back(project: Path) -> None:
    submitted(project, promote="auto")
    submitted(project, geneval=0.82, weights=2.0)
    tracking.open_store(project).client.set_registered_model_alias(versions.MODEL, "champion", "2")
    assert any("champion -> version 1" in line for line in versions.reconcile(project))
    assert aliases(project)["champion"] == "1"


@pytest.mark.parametrize("fault", ["edited", "middle removed", "end removed", "rewritten"])
def test_a_ledger_that_was_tampered_with_is_refused(project: Path, fault: str) -> None:
    submitted(project, promote="auto")
    submitted(project, geneval=0.82, weights=2.0, promote="auto")
    folder = project / "mlflow" / "ledger"
    first, second = folder / "000001.json", folder / "000002.json"
    if fault == "edited":
        first.write_text(first.read_text().replace('"ann"', '"bob"'))
    elif fault == "middle removed":
        first.unlink()
    elif fault == "end removed":
        second.unlink()
    else:  # consistent in itself, but not the history that the registry followed
        content = {**read_json(second), "actor": "bob"}
        content["hash"] = digest({key: value for key, value in content.items() if key != "hash"})
        second.write_text(json.dumps(content))
    for call in (
        lambda: versions.champion(project),
        lambda: decisions.rollback(project, "eve", "x"),
        lambda: versions.reconcile(project),
    ):
        with pytest.raises(UserError, match="tampered"):
            call()


def test_the_commands_decide_and_list(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    submitted(project)
    assert decisions.cli(["promote", "--version", "1", "--reviewer", "eve", "--reason", "fine"]) == 0
    assert "alias champion -> version 1" in capsys.readouterr().out
    submitted(project, weights=2.0)
    decisions.cli(["reject", "--version", "2", "--reviewer", "eve", "--reason", "worse"])
    decisions.cli(["registry"])
    shown = capsys.readouterr().out
    assert "version 1  [champion]" in shown and "review rejected by eve (worse)" in shown and "000002" in shown
    with pytest.raises(UserError, match="no previous champion"):
        decisions.cli(["rollback", "--reviewer", "eve", "--reason", "x"])


def test_each_ledger_number_is_given_once(tmp_path: Path) -> None:
    """Eight writers that saw the same ledger: one entry, seven refusals, five times over."""
    decision = {"time": "t", "action": "promote", "reason": "r", "version": "1", "to_version": "1"}
    decision |= dict.fromkeys(("from_version", "previous", "verdict", "weights"))
    for number in range(1, 6):
        seen = ledger.read(tmp_path)
        taken: list[str] = []

        def write(actor: str, seen: list[ledger.Entry] = seen, taken: list[str] = taken) -> None:
            try:
                ledger.append(tmp_path, seen, actor=actor, **decision)
            except ledger.Taken:
                taken.append(actor)

        threads = [threading.Thread(target=write, args=(f"writer {index}",)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(taken) == 7 and len(ledger.read(tmp_path)) == number
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{number:06d}.json" for number in range(1, 6)
    ]  # no temporary file is left


def test_another_store_has_a_ledger_of_its_own(tmp_path: Path) -> None:
    own = server.Store(None, server.local_uri(tmp_path), tmp_path.resolve())  # type: ignore[arg-type]
    other = server.Store(None, "http://127.0.0.1:5000", tmp_path.resolve())  # type: ignore[arg-type]
    assert versions.ledger_place(own) == tmp_path.resolve() / "mlflow" / "ledger"
    assert versions.ledger_place(other).parent == versions.ledger_place(own)
