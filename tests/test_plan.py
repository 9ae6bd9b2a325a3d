"""Property: the plan's numbers are the ones that a run would count, it says from what they follow, and it names every
weight that is missing.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data.errors import UserError, UserErrors
from data.files import write_json, write_text
from data.randomness import numpy_generator
from data.yaml_files import read_yaml
from model.rollout import QUERY_BIAS, query_indices
from tasks.checks import plan as planning
from tasks.checks.plan import (
    Size,
    expected_index,
    forward_operations,
    measured_rate,
    plan,
    print_plan,
    query_distribution,
    stage_states,
    step_cost,
)
from tasks.checks.preflight import other_teachers, preflight, teacher_faults
from tasks.environment import PROJECT
from tasks.running.repro import Ended
from tasks.stages.contract import STAGES
from tests.servers import free_ports

PRESETS = sorted(path.stem for path in (PROJECT / "presets").glob("*.yaml"))
FOREIGN = [name for name in PRESETS if not name.startswith("micro")]


@pytest.mark.parametrize(("steps", "expected"), [(8, 5.21), (16, 10.93), (20, 13.79), (28, 19.50)])
def test_the_expected_rollout_is_the_published_one(steps: int, expected: float) -> None:
    assert expected_index(steps, "low") == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("bias", sorted(QUERY_BIAS))
def test_the_distribution_is_that_of_the_draws(bias: str) -> None:
    generators = [numpy_generator(0, step, 0, "query") for step in range(3000)]
    drawn = np.array([query_indices(8, bias, 4, generator) for generator in generators])
    assert query_distribution(8, bias).sum() == pytest.approx(1.0)
    assert drawn[:, 0].mean() == pytest.approx(expected_index(8, bias), abs=0.15)
    assert drawn.max(axis=1).mean() == pytest.approx(expected_index(8, bias, 4), abs=0.1)
    assert expected_index(8, bias, 8) == expected_index(8, bias, 16) == 7


def test_evaluations_of_a_sample_by_method() -> None:
    params = SimpleNamespace(rollout_steps=16, query="low")
    kinds = {"danceopd": 12.93, "offpolicy": 2.0, "diffusionopd": 47.0, "flowopd_kl": 32.0, "joint": 1.0, "merge": 0.0}
    for method, expected in kinds.items():
        states = "off_policy" if method == "offpolicy" else "on_policy"
        assert step_cost(params, 1.0, method, states, 1)[0] == pytest.approx(expected, abs=0.005)
    assert step_cost(params, 2.0, "danceopd", "on_policy", 1)[0] == pytest.approx(13.93, abs=0.005)  # a guided teacher


def test_operations_of_z_image_are_near_the_counted_ones() -> None:
    size = Size(6_155_000_000, 1, 4096 + 128, 3840, 34)
    for edit in (False, True):
        formula = forward_operations(size, "zimage", 1000, edit)  # no figure for this resolution: by formula
        assert formula == pytest.approx(forward_operations(size, "zimage", 1024, edit), rel=0.2)


def test_the_measured_rate_is_of_the_same_network_or_none(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "student"
    assert measured_rate(tmp_path, "micro") is None
    write_json(folder / "student.json", {"backbone": "micro", "stage": "distill", "fingerprint": "f" * 64})
    write_text(folder / "steps.csv", "step,evaluations\n1,300\n2,500\n3,900\n")
    assert measured_rate(tmp_path, "micro") is None  # pulled from DVC: this machine knows no times of it
    lines = [json.dumps({"name": "seconds", "step": step, "value": 2.0}) for step in (1, 2)]
    write_text(tmp_path / "runs" / f"distill-{'f' * 12}" / "speed.jsonl", "\n".join(lines))
    assert measured_rate(tmp_path, "micro") == 200.0 and measured_rate(tmp_path, "zimage") is None


def status(monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any]) -> None:
    monkeypatch.setattr("tasks.running.repro.stream", lambda *_: Ended(0, ("WARNING: something", json.dumps(answer))))


def test_states_follow_dvc_and_pass_downstream(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    same = dict.fromkeys(STAGES, True)
    status(monkeypatch, {})
    states = stage_states(tmp_path, same)
    assert states["collect"] == states["score"] == "cached" and states["teachers"] == "frozen: not fetched"
    status(monkeypatch, {"encode": [{"changed deps": {"tasks/stages/encode.py": "modified"}}]})
    states = stage_states(tmp_path, same)
    assert states["curate"] == "cached" and states["encode"] == "runs: code" and states["score"] == "runs: after encode"
    status(monkeypatch, {})
    assert stage_states(tmp_path, {**same, "distill": False})["distill"] == "runs: params"
    monkeypatch.setattr("tasks.running.repro.stream", lambda *_: Ended(255, ("ERROR: not a repository",)))
    assert set(stage_states(tmp_path, same).values()) == {"unknown: dvc status failed here"}


def test_a_plan_of_the_default_and_of_a_published_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status(monkeypatch, {})
    monkeypatch.setattr("tasks.checks.preflight.in_hub_cache", lambda _: False)
    made = plan(PROJECT / "params.yaml", tmp_path)
    rows = {row["stage"]: row for row in made["stages"]}
    assert tuple(rows) == STAGES and made["weights"] == [] and made["parameters"] < 1e7
    document = read_yaml(PROJECT / "params.yaml")
    loop, routes = document["distill"], document["routing"]["routes"]
    assert (loop["rollout_steps"], loop["query"], loop["method"]) == (4, "early", "danceopd")
    # E[j] of Beta(1, 2) over four steps; guidance asks twice a sub-step, four sub-steps of T2I and two of edits.
    shares = {route["capability"]: route["weight"] for route in routes}
    reached = sum((1 - k / 4) ** 2 for k in (1, 2, 3))
    asked = (8 * shares["t2i"] + 4 * (shares["local_edit"] + shares["global_edit"])) / sum(shares.values())
    samples = loop["steps"] * loop["batch"]
    assert rows["distill"]["evaluations"] == pytest.approx(samples * (reached + asked + 1.0), abs=1)
    assert rows["validate"]["evaluations"] == (3 * 656 + 2 * 656) * 16  # three teachers, and each guided on its own
    published = plan(PROJECT / "presets" / "zimage_local_global.yaml", tmp_path)
    assert published["parameters"] == pytest.approx(6.155e9, rel=0.001)
    assert published["memory"]["base"] == pytest.approx(12.3, abs=0.1) and sum(published["memory"].values()) < 25
    assert [weights["state"] for weights in published["weights"]] == [
        "to fetch",
        "missing",
        "missing",
        "to fetch",
        "to fetch",
    ]
    assert published["weights"][-1]["key"] == "benchmark.classifier"
    offloaded = plan(PROJECT / "presets" / "sd35_realism.yaml", tmp_path)
    assert offloaded["waiting_memory"] == offloaded["memory"]["full-checkpoint teachers"] == offloaded["memory"]["base"]
    assert published["waiting_memory"] == 0.0
    print_plan(offloaded)
    assert f"{offloaded['waiting_memory']:.2f} GB on the host" in capsys.readouterr().out
    print_plan(published)
    shown = capsys.readouterr().out
    assert "from operations at 40% of 790 TF/s: one H100" in shown
    assert "set teachers.sources.global.uri to where they are" in shown
    with pytest.raises(UserError, match="unknown preset 'nobody'"):
        planning.cli(["--preset", "nobody"])


@pytest.mark.parametrize("name", FOREIGN)
def test_a_preset_without_its_weights_fails_before_anything_loads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that is not here is named in one answer, with the key that says where it is: own weights, public ones,
    GenEval's networks, the examples.
    """
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_ports(1)[0]}")  # nobody is there
    monkeypatch.setattr("tasks.checks.preflight.in_hub_cache", lambda _: False)
    monkeypatch.setenv("OPENAI_API_KEY", "a judge's")
    path = PROJECT / "presets" / f"{name}.yaml"
    with pytest.raises(UserErrors) as caught:
        preflight(path, tmp_path / "data" / "teachers")
    document = read_yaml(path)
    sources = document["teachers"]["sources"].items()
    uris = {f"teachers.sources.{teacher}.uri": source["uri"] for teacher, source in sources}
    public = {key for key, uri in uris.items() if uri.startswith("hf://")}
    public |= {"benchmark.detector", "benchmark.classifier"}
    for key in {*uris, *public, "collect.folder"}:
        (fault,) = [fault for fault in caught.value.faults if fault.startswith(f"{key} ")]
        words = ["the hub cannot be reached", "name the folder's path instead"] if key in public else ["put "]
        assert all(word in fault for word in words)
    assert len(caught.value.faults) == len(uris) + 3


def test_teachers_made_from_another_address_are_not_taken_for_these(tmp_path: Path) -> None:
    sources = {"base": {"uri": "hf://a/b"}, "local": {"uri": "weights/local"}}
    document = {"routing": {"routes": [{"teacher": "local"}]}, "teachers": {"teachers": {}, "sources": sources}}
    write_json(tmp_path / "base" / "teacher.json", {"source": "hf://a/b"})
    write_json(tmp_path / "local" / "teacher.json", {"name": "local"})  # one that was trained here
    (fault,) = other_teachers(document, tmp_path)
    assert "teachers.sources.local.uri is weights/local" in fault
    document["routing"]["routes"] = [{"teacher": "nobody"}]
    faults = teacher_faults(document, tmp_path / "data" / "teachers")
    assert any("no such teacher in teachers.sources" in fault for fault in faults)
