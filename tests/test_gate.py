"""The gate: every rule passes and fails where it should, no missing or infinite number ever passes, and a refusal names
all its reasons with numbers.
"""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import candidates
import numpy as np
import pytest
from candidates import PARAMS, metric, scorecard

from data.errors import UserError
from data.files import read_json, write_json
from data.yaml_files import read_yaml
from tasks.params.reading import faults_of
from tasks.release import gate
from tasks.release.provenance import git_state, md5_of, provenance

CLEAN = {
    "git.known": True,
    "git.sha": "a" * 40,
    "git.dirty": False,
    "git.changed": [],
    "params.sha256": "p",
    "dvc.curated.md5": "c.dir",
    "files": {
        path: {"now": "x", "recorded": "x"}
        for path in (gate.SCORECARD_FILE, gate.VALIDATE_FILE, gate.CHECKPOINT_FOLDER)
    },
}
STRICT = replace(PARAMS, allow_unversioned=False)


def judged(
    candidate: dict[str, Any],
    *,
    params: gate.Params = STRICT,
    champion: dict[str, Any] | None = None,
    origin: dict[str, Any] | None = None,
    comparison: dict[str, Any] | None = None,
) -> dict[str, Any]:
    reigning = {"version": "3", "scorecard": champion} if champion is not None else None
    return gate.judge(params, candidate, champion=reigning, provenance=origin or CLEAN, comparison=comparison).to_json()


def failing(verdict: dict[str, Any]) -> set[str]:
    return {rule["rule"] for rule in verdict["rules"] if not rule["passed"]}


def with_metric(path: str, **changes: Any) -> dict[str, Any]:
    card = scorecard()
    card["metrics"][path] |= changes
    return card


def without(*keys: str) -> dict[str, Any]:
    card = scorecard()
    inner = card
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return card


def test_a_good_candidate_passes_every_rule_with_or_without_a_champion() -> None:
    for champion in (None, scorecard()):
        verdict = judged(scorecard(), champion=champion)
        assert verdict["passed"] is True and failing(verdict) == set()
        kinds = {one["rule"].partition("/")[0] for one in verdict["rules"]}
        assert kinds == {"floor", "retention", "regression", "complete", "identity", "provenance"}


@pytest.mark.parametrize(
    ("path", "rule", "bound"),
    [
        ("geneval/overall", "floor/geneval/overall", 0.7),
        ("gedit/average", "floor/gedit/average", 7.0),
        ("retention/local_edit", "retention/local_edit", 0.9),
    ],
)
def test_a_floor_is_passed_when_equalled_and_failed_just_below(path: str, rule: str, bound: float) -> None:
    assert rule not in failing(judged(with_metric(path, mean=bound)))
    assert failing(judged(with_metric(path, mean=math.nextafter(bound, 0)))) == {rule}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "0.9", True, np.float32("nan")])
def test_what_is_not_a_finite_number_never_passes_and_is_never_written_as_nan(value: Any) -> None:
    for path, rule in (("geneval/overall", "floor/geneval/overall"), ("retention/t2i", "retention/t2i")):
        verdict = judged(with_metric(path, mean=value), champion=scorecard())
        assert {rule, "complete/metrics"} <= failing(verdict)
        text = json.dumps(verdict, allow_nan=False)  # raises on NaN and infinity
        assert next(one for one in json.loads(text)["rules"] if one["rule"] == rule)["value"] is None


def test_numpy_scalars_are_numbers_and_the_verdict_is_plain_json() -> None:
    card = with_metric("geneval/overall", mean=np.float32(0.8), stderr=np.float64(0.01), n=np.int64(320))
    verdict = judged(card, champion=scorecard())
    assert verdict["passed"] is True
    assert json.loads(json.dumps(verdict, allow_nan=False)) == verdict


@pytest.mark.parametrize("path", gate.expected_paths(PARAMS.capabilities))
def test_a_missing_metric_is_incomplete_and_named(path: str) -> None:
    verdict = judged(without("metrics", path))
    assert "complete/metrics" in failing(verdict)
    assert path in next(rule["reason"] for rule in verdict["rules"] if rule["rule"] == "complete/metrics")


def test_scores_of_a_judge_that_left_out_too_much_do_not_pass() -> None:
    def graded(coverage: Any, answered_by: str = "judge-2026-01-01") -> dict[str, Any]:
        card = scorecard()
        card["identities"]["gedit"] = {
            "judge": {"model": "judge", "answered_by": answered_by},
            "coverage": coverage,
            "statuses": {"ok": 336},
        }
        return card

    assert failing(judged(graded(0.99))) == set()
    for coverage in (0.989, math.nan, None, "1.0"):
        assert failing(judged(graded(coverage))) == {"complete/coverage/gedit"}
    # another judge than the champion's: not comparable, though the examples are the same
    assert failing(judged(graded(1.0), champion=graded(0.995))) == set()
    assert failing(judged(graded(1.0), champion=graded(1.0, "judge-2025"))) == {"identity/gedit"}


def test_too_few_prompts_fail_and_exactly_enough_pass() -> None:
    assert failing(judged(with_metric("geneval/overall", n=299))) == {"complete/n/geneval"}
    assert failing(judged(with_metric("gedit/average", n=300))) == set()
    assert "complete/metrics" in failing(judged(with_metric("gedit/style_change", n=0)))


def test_a_retention_that_was_measured_counts_also_when_nobody_asked_for_it() -> None:
    card = scorecard()
    card["metrics"]["retention/edit"] = metric(0.5)
    assert failing(judged(card)) == {"retention/edit"}


def test_only_the_capabilities_asked_for_must_be_there() -> None:
    card = scorecard()
    card["metrics"] = {path: one for path, one in card["metrics"].items() if "gedit" not in path and "edit" not in path}
    t2i = replace(STRICT, capabilities=("t2i",), floors={"geneval/overall": 0.7}, compared=("geneval/overall",))
    assert judged(card, params=t2i)["passed"] is True
    assert judged(card)["passed"] is False


def test_regression_is_a_fall_beyond_the_interval() -> None:
    champion = scorecard(geneval=0.85)
    # Two standard errors of 0.01: the 95 % interval of the difference is 1.96 * sqrt(2) * 0.01 = 0.0277 wide on each
    # side.
    assert failing(judged(scorecard(geneval=0.85 - 0.0277), champion=champion)) == set()
    assert failing(judged(scorecard(geneval=0.85 - 0.0278), champion=champion)) == {"regression/geneval/overall"}


def test_the_paired_comparison_is_preferred_to_the_intervals() -> None:
    paired = {"geneval/overall": {"difference": -0.01, "low": -0.015, "high": -0.005, "p": 0.001, "n": 320}}
    assert failing(judged(scorecard(0.79), champion=scorecard(0.80))) == set()
    assert failing(judged(scorecard(0.79), champion=scorecard(0.80), comparison=paired)) == {
        "regression/geneval/overall"
    }
    paired["geneval/overall"]["high"] = 0.0
    assert failing(judged(scorecard(0.79), champion=scorecard(0.80), comparison=paired)) == set()
    paired["geneval/overall"]["high"] = math.nan
    assert failing(judged(scorecard(0.79), champion=scorecard(0.80), comparison=paired)) == {
        "regression/geneval/overall"
    }


def test_a_missing_standard_error_is_no_proof_of_no_regression() -> None:
    assert "regression/geneval/overall" in failing(
        judged(with_metric("geneval/overall", stderr=math.nan), champion=scorecard())
    )


def test_losing_a_benchmark_that_the_champion_has_is_a_regression() -> None:
    card = scorecard()
    card["metrics"] = {path: one for path, one in card["metrics"].items() if "gedit" not in path}
    t2i = replace(STRICT, capabilities=("t2i",), floors={}, retention=0.5)
    assert "regression/gedit/average" in failing(judged(card, params=t2i, champion=scorecard()))


@pytest.mark.parametrize("name", ["geneval", "gedit", "sampling"])
def test_scores_from_another_benchmark_or_sampling_are_not_comparable(name: str) -> None:
    card = scorecard()
    if name == "sampling":
        card["identities"]["sampling"]["steps"] = 8
    else:
        card["benchmarks"][name]["digest"] = "another"
    assert failing(judged(card, champion=scorecard())) == {f"identity/{name}"}
    assert failing(judged(card)) == set()  # nobody to compare with
    assert judged(card, champion=scorecard(0.99), params=replace(STRICT, allow_benchmark_change=True))["passed"] is True
    if name == "sampling":  # settings in place of their digest: compared by content
        known = {"split": "eval", "seed": 0}
        settings = [{"steps": 8, **known}, {**known, "steps": 8}, {"steps": 4, **known}]
        cards = [{**scorecard(), "identities": {**scorecard()["identities"], "sampling": one}} for one in settings]
        assert failing(judged(cards[1], champion=cards[0])) == set()
        assert failing(judged(cards[2], champion=cards[0])) == {"identity/sampling"}
    unknown = copy.deepcopy(card)
    if name == "sampling":
        del unknown["identities"]["sampling"]
    else:
        del unknown["benchmarks"][name]["digest"]
    assert failing(judged(unknown)) == {f"identity/{name}", *(["identity/split"] if name == "sampling" else [])}


def test_a_scorecard_of_the_split_that_numbers_are_chosen_on_is_refused() -> None:
    for split in ("dev", None):
        card = scorecard()
        card["identities"]["sampling"]["split"] = split
        verdict = judged(card)
        assert failing(verdict) == {"identity/split"}
        (rule,) = (rule for rule in verdict["rules"] if rule["rule"] == "identity/split")
        assert (rule["value"], rule["bound"]) == (split, "eval") and "sampling.split: eval" in rule["reason"]


@pytest.mark.parametrize(
    ("change", "rule", "excuse"),
    [
        (
            {"git.known": False, "git.sha": None, "git.reason": "not a git repository"},
            "provenance/git",
            "allow_unversioned",
        ),
        ({"git.dirty": True, "git.changed": ["model/distill.py"]}, "provenance/git", "allow_dirty"),
        ({"params.sha256": None}, "provenance/params", None),
        ({"dvc.curated.md5": None}, "provenance/data", "allow_unversioned"),
        (
            {"files": {**CLEAN["files"], gate.SCORECARD_FILE: {"now": "y", "recorded": "x"}}},
            "provenance/scorecard",
            None,
        ),
        (
            {"files": {**CLEAN["files"], gate.CHECKPOINT_FOLDER: {"now": "y", "recorded": "x"}}},
            "provenance/weights",
            None,
        ),
        (
            {"files": {**CLEAN["files"], gate.CHECKPOINT_FOLDER: {"now": "y", "recorded": None}}},
            "provenance/weights",
            "allow_unversioned",
        ),
        (
            {"files": {**CLEAN["files"], gate.VALIDATE_FILE: {"now": None, "recorded": "x"}}},
            "provenance/validate",
            None,
        ),
    ],
)
def test_unknown_origin_fails_unless_it_is_allowed_by_name(
    change: dict[str, Any], rule: str, excuse: str | None
) -> None:
    origin = {**CLEAN, **change}
    assert failing(judged(scorecard(), origin=origin)) == {rule}
    everything = replace(STRICT, allow_dirty=True, allow_unversioned=True)
    assert failing(judged(scorecard(), origin=origin, params=everything)) == (set() if excuse else {rule})
    if excuse:
        assert failing(judged(scorecard(), origin=origin, params=replace(STRICT, **{excuse: True}))) == set()


@pytest.mark.parametrize("identity", ["base", "teachers", "student"])
def test_models_without_a_digest_fail(identity: str) -> None:
    empty = scorecard()
    empty["identities"][identity] = {} if identity == "teachers" else ""
    for card in (without("identities", identity), empty):
        assert failing(judged(card)) == {"provenance/models"}


def test_all_reasons_are_given_at_once_with_their_numbers() -> None:
    verdict = judged(scorecard(geneval=0.1, gedit=1.0, retention=0.1), champion=scorecard())
    assert failing(verdict) == {
        *(
            "floor/geneval/overall",
            "floor/gedit/average",
            "retention/t2i",
            "retention/local_edit",
            "retention/global_edit",
        ),
        *("regression/geneval/overall", "regression/gedit/average"),
    }
    for rule in verdict["rules"]:
        assert set(rule) == {"rule", "passed", "value", "bound", "reason"} and rule["reason"]
        if rule["rule"] in failing(verdict):
            assert rule["value"] is not None and rule["bound"] is not None


@pytest.mark.parametrize(
    "card",
    [{}, {"metrics": None}, {"metrics": {"geneval/overall": 0.9}}, {"metrics": [], "identities": "x", "benchmarks": 3}],
)
def test_a_malformed_scorecard_is_refused_not_a_crash(card: dict[str, Any]) -> None:
    assert judged(card, champion=scorecard())["passed"] is False
    assert gate.Verdict(()).passed is False


def test_params_faults_are_all_named() -> None:
    assert faults_of(PARAMS) == []
    floors = {"geneval/total": math.nan}
    bad = replace(
        PARAMS, capabilities=("t2l",), floors=floors, compared=("x",), alpha=1.0, min_prompts={"genval": 3}, resamples=0
    )
    text = "\n".join(faults_of(bad))
    for word in ("t2l", "geneval/total", "'x'", "alpha", "genval", "resamples", "finite"):
        assert word in text


# Provenance


def git(project: Path, *arguments: str) -> None:
    subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(project), *arguments],
        check=True,
        capture_output=True,
    )


def test_git_state_knows_a_clean_a_changed_and_a_foreign_folder(tmp_path: Path) -> None:
    project = tmp_path / "outer" / "project"
    candidates.new_project(project)
    assert git_state(project)["git.known"] is False
    git(tmp_path / "outer", "init", "-q")
    (tmp_path / "outer" / "readme").write_text("x")
    git(tmp_path / "outer", "add", "readme")
    git(tmp_path / "outer", "commit", "-qm", "outer")
    assert git_state(project)["git.known"] is False  # somebody's repository around it says nothing about the project
    git(tmp_path / "outer", "add", "project/params.yaml", "project/reports/scorecard.json")
    git(tmp_path / "outer", "commit", "-qm", "project")
    state = git_state(project)
    assert state["git.known"] is True and len(state["git.sha"]) == 40 and state["git.dirty"] is False
    write_json(project / "reports" / "scorecard.json", {})  # generated by the run
    (tmp_path / "outer" / "readme").write_text("y")  # outside the project
    assert git_state(project)["git.dirty"] is False
    (project / "params.yaml").write_text("seed: 1\n")
    assert git_state(project)["git.changed"] == ["params.yaml"]


def test_a_folders_hash_is_dvcs_own_and_a_changed_weight_is_noticed(tmp_path: Path) -> None:
    project = candidates.new_project(tmp_path / "project")
    (project / ".dvc").mkdir()
    (project / ".dvc" / "config").write_text(
        "[core]\n    no_scm = true\n    analytics = false\n    check_update = false\n"
    )
    subprocess.run(
        [sys.executable, "-m", "dvc", "add", "-q", gate.CHECKPOINT_FOLDER], cwd=project, check=True, capture_output=True
    )
    out = read_yaml(project / f"{gate.CHECKPOINT_FOLDER}.dvc")["outs"][0]
    assert md5_of(project / gate.CHECKPOINT_FOLDER) == out["md5"]
    lock = {
        "schema": "2.0",
        "stages": {"absorb": {"cmd": "x", "outs": [{"path": gate.CHECKPOINT_FOLDER, "md5": out["md5"]}]}},
    }
    write_json(project / "dvc.lock", lock)
    assert provenance(project)["files"][gate.CHECKPOINT_FOLDER] == {"now": out["md5"], "recorded": out["md5"]}
    candidates.write_candidate(project, weights=2.0)
    files = provenance(project)["files"][gate.CHECKPOINT_FOLDER]
    assert files["now"] != files["recorded"] == out["md5"]
    lock["stages"]["score"] = {"cmd": "y", "deps": [{"path": gate.CHECKPOINT_FOLDER, "md5": files["now"]}]}
    write_json(project / "dvc.lock", lock)
    assert provenance(project)["files"][gate.CHECKPOINT_FOLDER]["recorded"] not in (
        files["now"],
        out["md5"],
    )  # the stages disagree
    (project / "dvc.lock").write_text("stages: [")
    with pytest.raises(UserError, match=r"dvc\.lock"):
        provenance(project)


def test_judging_writes_the_verdict_it_returns_and_a_missing_scorecard_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.registry.versions.champion", lambda project: None)
    project = candidates.new_project(tmp_path / "project")
    verdict = gate.judge_files(project, PARAMS)
    assert verdict["passed"] is True and read_json(project / gate.VERDICT_FILE) == verdict
    (project / gate.SCORECARD_FILE).unlink()
    with pytest.raises(UserError, match=r"scorecard\.json: no such file"):
        gate.judge_files(project, PARAMS)


def test_the_same_examples_are_compared_in_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fall of 0.5 points on every edit is certain in pairs, while standard errors of 0.4 would hide it."""
    champion = candidates.new_project(tmp_path / "champion")
    project = candidates.new_project(tmp_path / "project")
    worse = scorecard(gedit=7.5)
    for card in (worse, reigning := scorecard()):
        card["metrics"]["gedit/average"]["stderr"] = 0.4
    candidates.write_candidate(project, card=worse)
    known = {"version": "1", "scorecard": reigning, "scores": champion / gate.SCORES_FILE}
    monkeypatch.setattr("tasks.registry.versions.champion", lambda folder: known)
    assert failing(gate.judge_files(project, PARAMS)) == {"regression/gedit/average"}
    monkeypatch.setattr("tasks.registry.versions.champion", lambda folder: {**known, "scores": None})
    assert failing(gate.judge_files(project, PARAMS)) == set()
