"""Property: a state is taken up only by the run that it belongs to, or by consent; what is looked at while training has
names and changes nothing.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from annotated_types import Ge
from PIL import Image

from data.errors import UserErrors
from data.files import read_json, write_json
from data.records import EDITS, read_examples
from data.yaml_files import read_yaml
from model.checkpoint import read_tensors, save_state
from model.compute.settings import ExecutionParams
from model.examples import load_held_out
from model.fields import FIELDS
from model.fields.base import Condition, VelocityField
from model.networks.teachers import BASE, read_records
from tasks.__main__ import main
from tasks.params.reading import load_params
from tasks.registry.tracking import named_metrics
from tasks.stages import distill as distilling
from tasks.training.metrics import read_metrics
from tasks.training.states import Watch, differing, facts_of
from tests.tiny import EACH, EXECUTION, Tiny, build, loop_params, write_params

SMALL = {
    "batch": 4,
    "rollout_steps": 4,
    "optimizer": "adamw",
    "trainable": "adapter",
    "start": "base",
    "decay_from": 1.0,
    "warmup": 0,
}
WATCH = Watch(2, 0, 0, 0, 0, 0, "", ())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def stage(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Runs the stage with changed parameters, in a folder of its own, on one thread."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(out: str, encoded: Path = tiny.encoded, **changes: Any) -> int:
        params = write_params(tmp_path / "params.yaml", **{**SMALL, **changes})
        return main(
            [
                "distill",
                "--encoded",
                str(encoded),
                "--teachers",
                str(tiny.teachers),
                "--out",
                out,
                "--params",
                str(params),
            ]
        )

    yield run
    torch.set_num_threads(threads)


def absorbing(tiny: Tiny, out: str, routes: list[dict[str, Any]], **changes: Any) -> list[str]:
    """The command that absorbs fields into "student", with params.yaml's section taken from that of distill."""
    document = read_yaml(Path("params.yaml"))
    of_distill = ("start", "trainable", "rank", "alpha", "states", "routes_taken", "method", "query_states")
    section = {key: value for key, value in document["distill"].items() if key not in of_distill}
    write_json(Path("params.yaml"), {**document, "absorb": {**section, "routes": routes, "phases": [], **changes}})
    inputs = ["--encoded", str(tiny.encoded), "--teachers", str(tiny.teachers), "--student", "student"]
    return ["absorb", *inputs, "--params", "params.yaml", "--out", out]


def adapter(out: str) -> bytes:
    return (Path(out) / "adapter_model.safetensors").read_bytes()


def test_facts_hold_what_decides_the_result_and_nothing_else() -> None:
    execution, loop = ExecutionParams(**EXECUTION), loop_params()
    facts = facts_of(loop, WATCH, execution, teachers={"base": "a"})
    same = (
        facts_of(loop, replace(WATCH, save_every=7, keep_every=14, cosine_every=3), execution, teachers={"base": "a"}),
        facts_of(
            loop,
            WATCH,
            replace(execution, processes=2, micro_batch=3, attention="math", merge_rollout="never"),
            teachers={"base": "a"},
        ),
        facts_of(loop, replace(WATCH, validate_every=5, held_out=3), execution, teachers={"base": "a"}),
    )
    assert all(other == facts for other in same)
    assert differing(
        facts, facts_of(replace(loop, clip=2.0), WATCH, replace(execution, precision="bf16"), teachers={"base": "b"})
    ) == {"clip": "1.0 -> 2.0", "precision": "fp32 -> bf16", "teachers.base": "a -> b"}
    assert (
        facts_of(loop, replace(WATCH, validate_every=5, patience=1), execution, teachers={"base": "a"}) != facts
    )  # it may end the run


def test_a_state_of_other_facts_is_refused_unless_they_are_accepted(
    stage: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert stage("first", steps=2) == 0
    (state,) = Path("runs").glob("distill-*")
    capsys.readouterr()
    assert stage("second", steps=4, resume_from=str(state), learning_rate=2e-3) == 2
    error = capsys.readouterr().err
    assert (
        "learning_rate: 0.001 -> 0.002" in error
        and "steps: 2 -> 4" in error
        and "accept_changed" in error
        and not Path("second").exists()
    )
    assert stage("second", steps=4, resume_from=str(state), learning_rate=2e-3, accept_changed=["steps"]) == 2
    assert "steps" not in capsys.readouterr().err.split("facts:")[1].split(".")[0]
    assert stage("second", steps=4, resume_from=str(state), accept_changed=["steps"]) == 0
    assert "goes on at step 2 of 4" in capsys.readouterr().out
    origin = read_json(Path("second/student.json"))["origin"]
    assert origin["state"] == str(state / "step-00000002") and origin["changed"] == ["steps"]
    assert stage("straight", steps=4) == 0  # at a constant rate, two steps and two more are four
    assert adapter("straight") == adapter("second")
    printed = capsys.readouterr().out
    assert "starts anew" in printed and "differs in" in printed  # a run that leaves states aside says so
    assert stage("third", steps=4, resume_from="runs/nothing") == 2
    assert "no state there" in capsys.readouterr().err


def test_instruments_are_written_under_names_and_change_no_weight(stage: Callable[..., int], tmp_path: Path) -> None:
    assert stage("plain", steps=4) == 0
    for folder in Path("runs").glob("*"):
        folder.rename(tmp_path / f"done-{folder.name}")
    assert stage("watched", steps=4, held_out=2, validate_every=2, cosine_every=4, save_every=1, keep_every=3) == 0
    assert adapter("plain") == adapter("watched")
    lines = read_metrics(Path("watched/metrics.jsonl"))
    names = {line["name"] for line in lines}
    with open("watched/steps.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert row["evaluations"] == row["floor"] and {f"gradient_norm/{row['route']}", "learning_rate"} <= names
        binned = [
            line["value"]
            for line in lines
            if line["step"] == int(row["step"]) and line["name"].startswith(f"loss/{row['route']}/t")
        ]
        assert binned and min(binned) * (1 - 1e-6) <= float(row["loss"]) <= max(binned) * (1 + 1e-6)
    assert {
        "held_out_gap",
        "held_out_gap/t2i",
        "gradient_cosine/t2i/local_edit",
        "gradient_cosine/local_edit/global_edit",
    } <= names
    assert {line["step"] for line in lines if line["name"] == "held_out_gap"} == {2, 4}
    assert sum(line["value"] for line in lines if line["name"].startswith("query/t_")) == pytest.approx(1.0)
    assert sorted(path.name for path in Path("watched/validation").iterdir()) == sorted(
        f"{capability}-{step:08d}.png" for capability in ("t2i", "local_edit", "global_edit") for step in (2, 4)
    )
    with (
        Image.open("watched/validation/local_edit-00000004.png") as edits,
        Image.open("watched/validation/t2i-00000004.png") as t2i,
    ):
        assert edits.height == 2 * t2i.height and edits.width == t2i.width  # the sources above
    assert ("distill/held_out_gap", 4) in {
        (name, step) for name, _, step in named_metrics("distill", Path("watched/metrics.jsonl"))
    }
    assert sorted(path.name for path in Path("runs").glob("distill-*/step-*")) == ["step-00000003", "step-00000004"]


def test_a_validation_looks_at_dev_rows_of_every_category(tiny: Tiny) -> None:
    category_of = {}
    for capability in ("local_edit", "global_edit"):
        known = [e for e in read_examples(tiny.curated) if (e.split, e.capability) == ("dev", capability)]
        (latents,) = (
            value
            for name, value in read_tensors(tiny.encoded / "dev" / f"{capability}.safetensors").items()
            if name.startswith("source.")
        )
        category_of |= {row.numpy().tobytes(): e.category for row, e in zip(latents, known, strict=True)}
    base = read_records(tiny.teachers)[BASE].sha256
    for count in (6, 10):
        bucket = load_held_out(tiny.encoded, ["edit"], base, count)["edit"]
        assert bucket.source is not None and bucket.target is None and len(bucket) == count
        found = Counter(category_of[row.numpy().tobytes()] for row in bucket.source)
        assert set(found) == set(EDITS) and max(found.values()) - min(found.values()) <= 1
    assert len(load_held_out(tiny.encoded, ["t2i"], base, 100)["t2i"]) == EACH  # as many as there are


def test_a_validation_without_dev_rows_is_refused_before_training(
    stage: Callable[..., int], tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny.encoded, "encoded")
    facts = read_json(Path("encoded/encoded.json"))
    facts["examples"]["dev"] |= {"local_edit": 0, "global_edit": 0}
    write_json(Path("encoded/encoded.json"), facts)
    assert stage("out", Path("encoded"), held_out=2, validate_every=2) == 2
    error = capsys.readouterr().err
    assert all(f"route {name}: no example of it in the dev split" in error for name in ("local_edit", "global_edit"))
    assert "route t2i" not in error and "validate_every: 0" in error and not Path("runs").exists()


def test_a_gap_that_does_not_fall_ends_the_run_early(
    stage: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert stage("out", steps=30, held_out=2, validate_every=1, patience=2, learning_rate=1e-12) == 0
    rows = (Path("out") / "steps.csv").read_text().splitlines()
    assert 3 <= len(rows) - 1 < 30 and "ended" in capsys.readouterr().out
    assert read_json(Path("out/student.json"))["trained_steps"] == len(rows) - 1
    before = adapter("out")
    assert stage("out", steps=30, held_out=2, validate_every=1, patience=2, learning_rate=1e-12) == 0  # and stays ended
    assert (Path("out") / "steps.csv").read_text().splitlines() == rows and adapter("out") == before


def test_absorbing_takes_the_same_loop_and_goes_on_after_a_stop(
    stage: Callable[..., int], tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stage("student", steps=2) == 0
    routes = [
        {"capability": "t2i", "teacher": "student", "weight": 1.0, "field": {"guidance": 2.0}},
        {"capability": "local_edit", "teacher": "local", "weight": 1.0},
    ]
    command = absorbing(tiny, "straight", routes, steps=3, save_every=1)
    assert main(command) == 0
    (state,) = Path("runs").glob("absorb-*")
    shutil.rmtree(state / "step-00000003")
    capsys.readouterr()
    assert main([*command[:-1], "resumed"]) == 0
    assert "goes on at step 2 of 3" in capsys.readouterr().out
    assert adapter("straight") == adapter("resumed") != adapter("student")
    with open("straight/steps.csv", newline="") as file:
        for row in csv.DictReader(file):
            assert row["evaluations"] == row["floor"] and int(row["evaluations"]) >= 4 * (
                3 if row["route"] == "t2i" else 2
            )


@dataclass(frozen=True)
class Scaled(VelocityField):
    """A made-up field over a field."""

    field: VelocityField
    factor: Annotated[float, Ge(0)]

    @property
    def members(self) -> tuple[VelocityField, ...]:
        return (self.field,)

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        return self.factor * self.field(x_t, t, condition)


def test_a_made_up_field_costs_one_entry(
    stage: Callable[..., int], tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(FIELDS, "scaled", Scaled)
    assert stage("student", steps=2) == 0

    def absorb(out: str, *fields: dict[str, float]) -> int:

        capabilities = ("t2i", "local_edit", "global_edit")
        named = [
            {"capability": capability, "teacher": "student", "weight": 1.0, "field": field}
            for capability, field in zip(capabilities, fields)
        ]
        return main(absorbing(tiny, out, named, steps=1))

    def first_step(out: str) -> dict[str, str]:
        with open(f"{out}/steps.csv", newline="") as file:
            return next(csv.DictReader(file))

    for out, factor in (("same", 1.0), ("half", 0.5), ("none", 0.0)):
        assert absorb(out, {"scaled": factor}) == 0
    losses = {out: float(first_step(out)["loss"]) for out in ("same", "half", "none")}
    assert losses["same"] == 0.0  # the frozen student itself
    assert losses["half"] > 0 and losses["none"] == pytest.approx(4.0 * losses["half"], rel=1e-5)
    assert absorb("both", {"guidance": 2.0, "scaled": 0.5}) == 0
    step = first_step("both")
    assert step["evaluations"] == step["floor"]
    assert (
        int(step["evaluations"]) == int(first_step("half")["evaluations"]) + 4
    )  # guidance asks twice, in a batch of 4
    capsys.readouterr()
    assert absorb("wrong", {"scalde": 1.0}, {"scaled": -1.0}, {"guidance": 0.5}) == 2
    error = capsys.readouterr().err
    assert "absorb.routes[0].field.scalde = 1.0: unknown name; did you mean 'scaled'?" in error
    assert "absorb.routes[1].field.scaled = -1.0: expected 0 or more" in error
    assert "absorb.routes[2].field.guidance = 0.5: expected 1 or more" in error


def test_a_metrics_file_cut_short_is_read_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = json.dumps({"name": "loss/t2i/t0", "step": 1, "value": 0.5})
    path.write_text(f"{line}\n{line[:9]}")
    assert read_metrics(path) == [json.loads(line)] and read_metrics(tmp_path / "none") == []


def test_every_so_many_states_are_kept_for_good(tmp_path: Path) -> None:
    for step in range(1, 9):
        save_state(tmp_path, step, {"a": torch.zeros(1)}, {"fingerprint": "f"}, keep_every=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in (3, 6, 7, 8)]


def test_faults_of_what_is_watched_are_named() -> None:
    assert WATCH.conflicts() == []
    assert any("held_out" in fault for fault in replace(WATCH, validate_every=5).conflicts())
    assert replace(WATCH, validate_every=5, held_out=2).conflicts() == []
    assert any("validate_every" in fault for fault in replace(WATCH, patience=1).conflicts())
    assert any("keep_every" in fault for fault in replace(WATCH, keep_every=3).conflicts())
    assert any("resume_from" in fault for fault in replace(WATCH, accept_changed=("steps",)).conflicts())


def test_faults_of_the_loops_numbers_are_named_together(tmp_path: Path) -> None:
    wrong = {"steps": 0, "query": "lo", "states": "of_policy", "routes_taken": "sfot", "ema": 1.0, "learning_rate": 0.0}
    with pytest.raises(UserErrors) as told:
        load_params(distilling.Params, "distill", write_params(tmp_path / "params.yaml", **wrong))
    assert sorted(told.value.faults) == [
        "distill.ema = 1.0: expected 0 or more and less than 1",
        "distill.learning_rate = 0.0: expected more than 0",
        "distill.query = 'lo': expected one of low, mid, high, uniform, early; did you mean 'low'?",
        "distill.routes_taken = 'sfot': expected one of hard, mixed, soft; did you mean 'soft'?",
        "distill.states = 'of_policy': expected one of on_policy, off_policy; did you mean 'off_policy'?",
        "distill.steps = 0: expected 1 or more",
    ]
