"""Property: every baseline computes the loss and the gradient that its formula says, on toys where both are known, and
runs in the one loop.
"""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from data.files import write_json
from model.checkpoint import Ema
from model.compute.optimizer import build_optimizer
from model.distill import distill
from model.examples import Bucket, load_buckets
from model.fields.base import velocity_gaps
from model.methods import METHODS, method_faults
from model.methods.base import Backward, Method, by_batch
from model.methods.flowopd import ETA, grouped, transition
from model.networks.student import load_student, merged_weights, plain_weights, start_student
from model.networks.teachers import BASE, load_base, load_teachers, read_records
from model.randomness import noise_for
from model.rollout import euler_grid
from model.route import Route, Router, router
from model.setup import Batch, Setup
from model.step import Plan
from tasks.__main__ import main
from tasks.environment import PROJECT
from tasks.params.reading import load_params, read_yaml
from tasks.stages import distill as stage
from tests.tiny import Tiny, build, loop_params, write_params

SHAPE = (2, 3, 3)
STEPS, SHIFT = 4, 3.0
GRID = euler_grid(STEPS, SHIFT)
AIM = 0.7  # what the toy's teacher says everywhere


class Constant(nn.Module):
    """A student that says theta everywhere, so that every gap is theta - AIM."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))


def toy(theta: float = 0.2) -> Any:
    network = Constant(theta)
    backbone = SimpleNamespace(latent_shape=SHAPE)

    def field(x: torch.Tensor, t: torch.Tensor, condition: Any) -> torch.Tensor:
        return network.theta * torch.ones_like(x)

    return SimpleNamespace(
        network=network, adapter=None, backbone=backbone, field=field, parameters={"theta": network.theta}
    )


def teacher(x: torch.Tensor, t: torch.Tensor, condition: Any) -> torch.Tensor:
    return torch.full_like(x, AIM)


def bucket(rows: int = 5) -> Bucket:
    pooled, clean = torch.zeros(rows, 1), noise_for(9, 0, range(rows), SHAPE, "clean")
    return Bucket(torch.arange(rows), torch.zeros(rows, 1, 1), pooled, torch.zeros(1, 1), torch.zeros(1), None, clean)


PLAN = Plan(3, Route("t2i", "teacher", 1.0), (0, 1, 2, 3), (0, 1, 2, 3))


def setup(student: Any, field: Any, examples: Bucket) -> Setup:
    params = loop_params(rollout_steps=STEPS)
    return Setup(student, {"teacher": field}, {"t2i": examples}, Router((PLAN.route,)), params, GRID, 7)


def step(method: str, student: Any, query_states: int = 1, field: Any = teacher) -> tuple[torch.Tensor, float]:
    """Losses by slot and the gradient of theta."""
    compute = METHODS[method].compute
    assert compute is not None
    losses, _ = compute(query_states)(setup(student, field, bucket()), field, PLAN, range(4))
    return losses, float(student.network.theta.grad)


def test_diffusionopd_weights_every_state_by_its_own_squared_step() -> None:
    student = toy()
    losses, gradient = step("diffusionopd", student)
    weight = float((GRID[1:] - GRID[:-1]).square().sum())
    gap = 0.2 - AIM
    torch.testing.assert_close(losses, torch.full((4,), 0.5 * weight * gap**2))
    assert gradient == pytest.approx(weight * gap, rel=1e-5)
    squares = (euler_grid(16, 3.0)[1:] - euler_grid(16, 3.0)[:-1]).square()
    assert float(squares.max() / squares.min()) == pytest.approx(58.8, abs=0.1)  # what a uniform weight would ignore


def test_diffusionopd_compares_where_the_student_goes() -> None:
    """A teacher that tells the state: the losses are those of the states of the student's own Euler path."""
    student = toy()
    losses, _ = step("diffusionopd", student, field=lambda x, t, condition: x)
    noise = noise_for(7, PLAN.index, range(4), SHAPE)
    expected = torch.zeros(4)
    for k in range(STEPS):
        x_k = noise + (GRID[k] - 1.0) * 0.2  # theta for all the way down from t = 1
        expected += 0.5 * (GRID[k + 1] - GRID[k]) ** 2 * (0.2 - x_k).square().mean((1, 2, 3))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)


def test_several_query_states_are_the_mean_of_their_losses() -> None:
    several, single = toy(), toy()
    losses, gradient = step("danceopd", several, 4)
    alone, slope = step("danceopd", single, 1)
    torch.testing.assert_close(losses, alone)  # the gap is the same everywhere
    assert gradient == pytest.approx(slope, rel=1e-5)
    spread, _ = step("danceopd", toy(), 16, field=lambda x, t, condition: t.reshape(-1, 1, 1, 1) * torch.ones_like(x))
    levels = [float((0.2 - level) ** 2) for level in GRID[:-1]]
    assert (
        all(min(levels) <= float(loss) <= max(levels) for loss in spread)
        and len({round(float(loss), 6) for loss in spread}) > 1
    )


def test_joint_training_asks_no_teacher() -> None:
    def forbidden(*_: Any) -> torch.Tensor:
        raise AssertionError("no teacher in joint training")

    losses, gradient = step("joint", toy(), field=forbidden)
    aim = noise_for(7, PLAN.index, range(4), SHAPE) - noise_for(9, 0, range(5), SHAPE, "clean")[[0, 1, 2, 3]]
    torch.testing.assert_close(losses, (0.2 - aim).square().mean((1, 2, 3)))
    assert gradient == pytest.approx(float(2.0 * (0.2 - aim).mean()), rel=1e-4)


@pytest.mark.parametrize("t", [0.9, 0.5, 0.1])
def test_the_stochastic_step_keeps_the_marginals(t: float) -> None:
    """Data at 0: x_t has deviation t, and so must x_{t + dt} have t + dt, to second order in dt."""
    errors = []
    for dt in (-0.02, -0.01):
        mean, deviation = transition(
            torch.tensor(t, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64), t, t + dt, 0.99
        )
        errors.append(abs(float(mean) ** 2 + deviation**2 - (t + dt) ** 2))
    assert deviation == pytest.approx(ETA * (t / (1 - t)) ** 0.5 * 0.01**0.5)
    assert errors[1] < 0.3 * errors[0] and errors[0] < 0.02


def test_flowopd_weighs_the_score_by_the_kl_at_every_state() -> None:
    student, gap = toy(), 0.2 - AIM
    losses, gradient = step("flowopd", student)
    kls, expected = [], 0.0
    for k in range(STEPS):
        now, after = float(GRID[k]), float(GRID[k + 1])
        _, deviation = transition(torch.zeros(1), torch.zeros(1), now, after, float(GRID[1]))
        gain = float(
            transition(torch.zeros(1), torch.ones(1), now, after, float(GRID[1]))[0]
        )  # of the mean by the velocity
        kls.append((gain * gap) ** 2 / (2 * deviation**2))
        drawn = noise_for(7, PLAN.index, range(4), SHAPE, f"transition/{k}")
        expected += kls[-1] * gain * float(drawn.mean()) / deviation / STEPS
    torch.testing.assert_close(losses, torch.full((4,), sum(kls) / STEPS), rtol=1e-4, atol=1e-6)
    assert gradient == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_flowopd_takes_one_prompt_a_group() -> None:
    seen: list[torch.Tensor] = []

    def listening(x: torch.Tensor, t: torch.Tensor, condition: Any) -> torch.Tensor:
        seen.append(condition.embeds.flatten())
        return torch.zeros_like(x)

    examples = bucket()
    examples.embeds.copy_(torch.arange(5.0).reshape(5, 1, 1))  # type: ignore[union-attr]
    _, samples = grouped(setup(toy(), listening, examples), listening, PLAN, range(4))
    assert samples["rows"].tolist() == [0, 0, 0, 0]
    assert seen and all(torch.equal(rows, torch.zeros(4)) for rows in seen)


def test_choices_that_do_not_fit_are_named() -> None:
    good = [("danceopd", "on_policy", 4, "base"), ("danceopd", "off_policy", 1, "base")]
    good += [("offpolicy", "off_policy", 1, "base"), ("merge", "on_policy", 1, "merged")]
    assert [fault for method, states, k, start in good for fault in method_faults(method, states, k, start, 16)] == []
    bad = [("offpolicy", "on_policy", 1, "base"), ("joint", "off_policy", 1, "base"), ("merge", "on_policy", 1, "base")]
    bad += [("diffusionopd", "on_policy", 4, "base")]
    assert [len(method_faults(method, states, k, start, 16)) for method, states, k, start in bad] == [1] * len(bad)
    assert "groups of 16" in method_faults("flowopd", "on_policy", 1, "base", 24)[0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("danceopd", "merge")])
def test_every_method_trains_a_real_network_in_the_one_loop(tiny: Tiny, method: str) -> None:
    backbone, fields = load_teachers(tiny.teachers, [BASE, "local"])
    routes: Router = router([Route("local_edit", "local", 1.0)], [BASE, "local"])
    buckets = load_buckets(tiny.encoded, ["local_edit"], read_records(tiny.teachers)[BASE].sha256)
    student = start_student(backbone, fields, BASE, "adapter", 4, 4, seed=0)
    before = {name: value.detach().clone() for name, value in student.parameters.items()}
    params = loop_params(
        steps=2, batch=4, rollout_steps=2, states="off_policy" if method == "offpolicy" else "on_policy"
    )
    optimizers = build_optimizer("adamw", student.parameters.items(), 1e-3, student.backbone)
    compute = METHODS[method].compute
    assert compute is not None
    whole = Setup(student, fields, buckets, routes, params, euler_grid(2), 0)
    steps = list(distill(whole, optimizers, Ema(dict(student.parameters), 0.0), compute=compute(1)))
    assert len(steps) == 2 and all(step.loss > 0 and step.gradient_norm > 0 for step in steps)
    assert any(not torch.equal(value, before[name]) for name, value in student.parameters.items())


def test_a_made_up_method_costs_one_entry(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It draws the student to a standstill: its loss is the student's velocity at the noise."""

    def standstill(batch: Batch, field: Any, backward: Backward) -> torch.Tensor:
        x_t = batch.noise()
        loss = velocity_gaps(batch.setup.student.field(x_t, batch.at(1.0), batch.condition()), torch.zeros_like(x_t))
        backward(loss)
        return loss.detach()

    method = Method(lambda _: by_batch(standstill), lambda steps, reached, field, count: (1.0, 1), group=4)
    monkeypatch.setitem(METHODS, "standstill", method)
    monkeypatch.chdir(tmp_path)
    arguments = ["distill", "--encoded", str(tiny.encoded), "--teachers", str(tiny.teachers), "--params", "params.yaml"]

    def run(out: str, **changes: Any) -> int:
        write_params(Path("params.yaml"), **{"method": "standstill", "steps": 20, "rollout_steps": 2, **changes})
        return main([*arguments, "--out", out])

    assert run("out", learning_rate=1e-2) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "steps.csv").read_text().splitlines()))
    assert len(rows) == 20 and float(rows[-1]["loss"]) < float(rows[0]["loss"]) / 2
    assert {row["evaluations"] for row in rows} == {"8"}  # one a sample
    capsys.readouterr()
    assert run("bad", method="standstil") == 2 and "did you mean 'standstill'?" in capsys.readouterr().err
    assert run("bad", batch=6, states="off_policy") == 2
    error = capsys.readouterr().err
    assert "batch = 6" in error and "groups of 4" in error and "needs 'on_policy'" in error


@pytest.mark.parametrize(("method", "query_states"), [(method, 1) for method in METHODS] + [("danceopd", 4)])
def test_a_base_is_not_shared_by_processes_that_would_wait_for_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, query_states: int
) -> None:
    document = read_yaml(PROJECT / "params.yaml")
    document["execution"] |= {"processes": 2, "shard_base": True}
    states, start = "off_policy" if method == "offpolicy" else "on_policy", "merged" if method == "merge" else "base"
    document["distill"] |= {"method": method, "query_states": query_states, "states": states, "start": start}
    document["distill"] |= {"trainable": "adapter"}
    path = tmp_path / "params.yaml"
    write_json(path, document)
    main(["check", "--params", str(path)])
    error, padded = capsys.readouterr().err, method in ("danceopd", "offpolicy", "merge") and query_states == 1
    named = f"distill.method = '{method}', query_states = {query_states}: " in error
    assert named != padded and ("execution.shard_base: false" in error) == ("shard_base" in error) == named


def test_merge_is_the_mean_of_the_teachers_without_a_step(tiny: Tiny, tmp_path: Path) -> None:
    params = load_params(
        stage.Params, "distill", write_params(tmp_path / "params.yaml", method="merge", start="merged", trainable="all")
    )
    stage.distill(params, encoded=tiny.encoded, teachers=tiny.teachers, out=tmp_path / "out")
    base = load_base(tiny.teachers)
    student = load_student(tmp_path / "out", base, read_records(tiny.teachers)[BASE].sha256)
    _, fields = load_teachers(tiny.teachers, [BASE, "local", "global"])
    expected = merged_weights(fields[BASE], {name: fields[name] for name in ("local", "global")})
    assert all(torch.equal(value, expected[name]) for name, value in plain_weights(student.field).items())
    assert (tmp_path / "out" / "steps.csv").read_text().count("\n") == 1
