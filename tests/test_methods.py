"""Property: every baseline computes the loss and the gradient that its formula says, on toys where both are known, and
runs in the one loop.
"""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import model.setup
from data.files import write_json
from data.randomness import numpy_generator
from model.checkpoint import Ema
from model.compute.optimizer import build_optimizer
from model.distill import distill, plan_step
from model.examples import Bucket, load_buckets
from model.fields.base import VelocityField, velocity_gaps
from model.instruments import t_bin
from model.methods import METHODS, method_faults
from model.methods.base import Backward, Method, by_batch
from model.methods.flowopd import ADVANTAGE_CLAMP, ETA, transition
from model.networks.student import load_student, merged_weights, plain_weights, start_student
from model.networks.teachers import BASE, load_base, load_teachers, read_records
from model.randomness import noise_for
from model.rollout import QUERY_BIAS, euler_grid, query_indices
from model.route import Route, Router, router
from model.setup import Batch, Setup
from model.step import Plan
from tasks.__main__ import main
from tasks.environment import PROJECT
from tasks.params.reading import load_params, read_yaml
from tasks.stages import distill as stage
from tasks.training.numbers import step_metrics
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


ROUTE = Route("t2i", "teacher", 1.0)


def setup(student: Any, field: Any, examples: Bucket, **changes: Any) -> Setup:
    params = loop_params(rollout_steps=STEPS, **changes)
    return Setup(student, {"teacher": field}, {"t2i": examples}, Router((ROUTE,)), params, GRID, 7)


def step(method: str, student: Any, query_states: int = 1, field: Any = teacher) -> tuple[torch.Tensor, float]:
    """Losses by slot (or slot and state) and the gradient of theta, of a plan whose slots ask row and index alike."""
    compute, states = METHODS[method].compute, STEPS if METHODS[method].dense else query_states
    assert compute is not None
    whole = setup(student, field, bucket(), query_states=query_states)
    query = tuple(tuple((slot + k) % STEPS for k in range(states)) for slot in range(4))
    losses, _ = compute(whole, field, Plan(3, (ROUTE,) * 4, (0, 1, 2, 3), query), range(4))
    return losses, float(student.network.theta.grad)


def test_diffusionopd_weights_every_state_by_its_own_squared_step() -> None:
    student = toy()
    losses, gradient = step("diffusionopd", student)
    weight = float((GRID[1:] - GRID[:-1]).square().sum())
    gap = 0.2 - AIM
    torch.testing.assert_close(losses.mean(1), torch.full((4,), 0.5 * weight * gap**2))
    assert gradient == pytest.approx(weight * gap, rel=1e-5)
    squares = (euler_grid(16, 3.0)[1:] - euler_grid(16, 3.0)[:-1]).square()
    assert float(squares.max() / squares.min()) == pytest.approx(58.8, abs=0.1)  # what a uniform weight would ignore


def test_diffusionopd_compares_where_the_student_goes() -> None:
    """A teacher that tells the state: the losses are those of the states of the student's own Euler path."""
    student = toy()
    losses, _ = step("diffusionopd", student, field=lambda x, t, condition: x)
    noise = noise_for(7, 3, range(4), SHAPE)
    expected = torch.zeros(4)
    for k in range(STEPS):
        x_k = noise + (GRID[k] - 1.0) * 0.2  # theta for all the way down from t = 1
        expected += 0.5 * (GRID[k + 1] - GRID[k]) ** 2 * (0.2 - x_k).square().mean((1, 2, 3))
    torch.testing.assert_close(losses.mean(1), expected, rtol=1e-5, atol=1e-6)


def test_several_query_states_are_the_mean_of_their_losses() -> None:
    several, single = toy(), toy()
    losses, gradient = step("danceopd", several, 3)
    alone, slope = step("danceopd", single, 1)
    torch.testing.assert_close(losses, alone[:, None].expand(4, 3))  # the gap is the same everywhere
    assert gradient == pytest.approx(slope, rel=1e-5)
    spread, _ = step("danceopd", toy(), 3, field=lambda x, t, condition: t.reshape(-1, 1, 1, 1) * torch.ones_like(x))
    gaps = (0.2 - GRID[:-1]).square()
    torch.testing.assert_close(spread, torch.stack([gaps[[(slot + k) % STEPS for k in range(3)]] for slot in range(4)]))


@pytest.mark.parametrize("bias", sorted(QUERY_BIAS))
def test_query_states_of_a_rollout_differ_and_all_of_them_are_dense(bias: str) -> None:
    for count in (1, 2, 4, 7):
        drawn = [query_indices(8, bias, count, numpy_generator(0, 0, slot, "query")) for slot in range(50)]
        assert all(len(set(indices)) == count and set(indices) <= set(range(8)) for indices in drawn)
    assert query_indices(8, bias, 8, np.random.default_rng(0)) == tuple(range(8))
    # The first is drawn as a single one is, and so is the rest where it does not repeat.
    several, alone = (query_indices(8, bias, count, numpy_generator(0, 0, 0, "query")) for count in (4, 1))
    assert several[:1] == alone


def test_as_many_query_states_as_steps_are_all_states() -> None:
    """K = N: the loss of a slot is the plain mean over the whole rollout, as DiffusionOPD's on a uniform grid is."""
    whole = setup(toy(), teacher, bucket(), query_states=STEPS)
    assert plan_step(whole, 0).query == (tuple(range(STEPS)),) * 4 == plan_step(whole, 5, METHODS["flowopd_kl"]).query


def test_joint_training_asks_no_teacher() -> None:
    def forbidden(*_: Any) -> torch.Tensor:
        raise AssertionError("no teacher in joint training")

    losses, gradient = step("joint", toy(), field=forbidden)
    aim = noise_for(7, 3, range(4), SHAPE) - noise_for(9, 0, range(5), SHAPE, "clean")[[0, 1, 2, 3]]
    torch.testing.assert_close(losses[:, 0], (0.2 - aim).square().mean((1, 2, 3)))
    assert gradient == pytest.approx(float(2.0 * (0.2 - aim).mean()), rel=1e-4)


@pytest.mark.parametrize("t", [0.9, 0.5, 0.1])
def test_the_stochastic_step_keeps_the_marginals(t: float) -> None:
    """Data at 0: x_t has deviation t, and so must x_{t + dt} have t + dt, to second order in dt."""
    errors = []
    for dt in (-0.02, -0.01):
        mean, _, deviation = transition(
            torch.tensor(t, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64), t, t + dt, 0.99
        )
        errors.append(abs(float(mean) ** 2 + deviation**2 - (t + dt) ** 2))
    assert deviation == pytest.approx(ETA * (t / (1 - t)) ** 0.5 * 0.01**0.5)
    assert errors[1] < 0.3 * errors[0] and errors[0] < 0.02


def test_the_first_stochastic_step_has_the_published_noise() -> None:
    """s = eta sqrt(sigma / (1 - sigma)) at sigma = 1: both codebases take the next level below the fraction alone."""
    _, scale, deviation = transition(torch.zeros(1), torch.zeros(1), 1.0, 0.75, 0.75)
    assert scale == pytest.approx(ETA * 2.0) and deviation == pytest.approx(ETA)


# --- Flow-OPD: the expected gradient ----------------------------------------------------------------------------------

FORMS = ["flowopd_published", "flowopd_reached", "flowopd_kl"]
PAIR = (2, 1, 1)


def expected_gradient(form: str, monkeypatch: pytest.MonkeyPatch, aim: float = 0.5) -> tuple[float, float]:
    """Of a student that says theta x, whose states, KLs and scores depend on one another: the gradient of theta
    averaged over the noise of a rollout, and that of the mean KL over its states, from the formula.

    Two elements, two steps. The average is exact: a gradient is a polynomial of second degree in a step's noise, which
    has the same mean over normal values as over -1 and 1.
    """
    student, grid, slots = toy(), euler_grid(2), range(16)
    signs = torch.tensor(list(product((-1.0, 1.0), repeat=4))).reshape(16, 2, *PAIR)
    start = torch.tensor([0.8, -0.3]).reshape(PAIR).expand(16, *PAIR)

    def noise(seed: int, index: int, slots: Any, shape: Any, purpose: str = "noise") -> torch.Tensor:
        return start if purpose == "noise" else signs[:, int(purpose.removeprefix("transition/"))]

    def times(factor: Any) -> Any:
        return lambda x, t, condition: factor * x

    monkeypatch.setattr(model.setup, "noise_for", noise)
    student.field = times(student.network.theta)
    whole = setup(student, times(aim), replace(bucket(), target=torch.zeros(5, *PAIR)))
    compute = METHODS[form].compute
    assert compute is not None
    plan = Plan(0, (ROUTE,) * 16, (0,) * 16, ((0, 1),) * 16)
    compute(replace(whole, grid=grid), times(aim), plan, slots)

    analytic, x = 0.0, start
    for k, (now, after) in enumerate(pairwise(grid.tolist())):
        mean, scale, deviation = transition(x, 0.2 * x, now, after, 0.5)
        gain, _, _ = transition(torch.zeros(1), torch.ones(1), now, after, 0.5)
        analytic += float(gain**2 * (0.2 - aim) * x.square().mean()) / scale**2 / 2
        x = mean + deviation * signs[:, k]
    return float(student.network.theta.grad), analytic


def test_the_published_flowopd_has_no_expected_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    gradient, analytic = expected_gradient("flowopd_published", monkeypatch)
    assert abs(gradient) < 1e-6 and abs(analytic) > 0.05


@pytest.mark.parametrize("form", ["flowopd_reached", "flowopd_kl"])
def test_the_other_forms_follow_the_gradient_of_the_kl(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gradient, analytic = expected_gradient(form, monkeypatch)
    assert gradient == pytest.approx(analytic, rel=1e-5)


@pytest.mark.parametrize("form", ["flowopd_published", "flowopd_reached"])
def test_an_advantage_is_clamped(form: str) -> None:
    """Far from the teacher every advantage is -5, and the gradient that of five times the log-density."""
    student = toy(1000.0)
    _, gradient = step(form, student)
    expected, sums = 0.0, 1 if form == "flowopd_published" else math.prod(SHAPE)
    for k, (now, after) in enumerate(pairwise(GRID.tolist())):
        gain, _, deviation = transition(torch.zeros(1), torch.ones(1), now, after, float(GRID[1]))
        drawn = noise_for(7, 3, range(4), SHAPE, f"transition/{k}")
        expected += ADVANTAGE_CLAMP * sums * float(gain) * float(drawn.mean()) / deviation / STEPS
    assert gradient == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_tells_the_kl_of_every_state(form: str) -> None:
    losses, _ = step(form, toy())
    kls = []
    for now, after in pairwise(GRID.tolist()):
        gain, scale, _ = transition(torch.zeros(1), torch.ones(1), now, after, float(GRID[1]))
        kls.append(float(gain * (0.2 - AIM)) ** 2 / (2 * scale**2))
    torch.testing.assert_close(losses, torch.tensor(kls).expand(4, STEPS), rtol=1e-4, atol=1e-6)


# --- which routes a step takes ----------------------------------------------------------------------------------------

TWO = (Route("t2i", "a", 1.0), Route("local_edit", "b", 1.0))


def mixed_setup(routes: tuple[Route, ...], batch: int, teachers: dict[str, Any]) -> Setup:
    params = loop_params(rollout_steps=STEPS, batch=batch, routing="mixed", learning_rate=0.0)
    buckets = {route.capability: bucket() for route in routes}
    return Setup(toy(), teachers, buckets, Router(routes), params, GRID, 7)


def test_a_mixed_step_holds_a_group_of_each_route_and_a_group_one_example() -> None:
    whole = mixed_setup(TWO, 32, {})
    for index in range(5):
        plan = plan_step(whole, index, METHODS["flowopd_reached"])
        assert plan.routes == (TWO[0],) * 16 + (TWO[1],) * 16
        assert len(set(plan.rows[:16])) == len(set(plan.rows[16:])) == 1
        assert len(set(plan_step(whole, index).rows)) > 2  # without groups, every slot has its own


def test_slots_are_dealt_by_the_routes_weights() -> None:
    routes = (Route("t2i", "a", 7.0), Route("local_edit", "b", 4.0), Route("global_edit", "c", 2.0))
    whole, counts = mixed_setup(routes, 8, {}), np.zeros((400, 3))
    for index in range(400):
        plan = plan_step(whole, index, METHODS["joint"])
        counts[index] = [plan.routes.count(route) for route in routes]
    shares = 8 * np.array([7, 4, 2]) / 13
    assert (np.abs(counts - shares) < 1).all()  # never more than rounding away from the share,
    np.testing.assert_allclose(counts.mean(0), shares, atol=0.1)  # which is met on average


class Says(VelocityField):
    """A teacher that says `value` everywhere and counts what it is asked."""

    def __init__(self, value: float) -> None:
        self.value, self.asked = value, 0

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, condition: Any) -> torch.Tensor:
        self.asked += len(x_t)
        return torch.full_like(x_t, self.value)


def test_each_slot_of_a_mixed_step_learns_from_its_own_teacher() -> None:
    """Teachers at +-1, a student at 0.2: losses and gradient are the means over both groups."""
    teachers = {"a": Says(1.0), "b": Says(-1.0)}
    whole = mixed_setup(TWO, 6, teachers)
    optimizers = build_optimizer("adamw", whole.student.parameters.items(), 0.0, whole.student.backbone)
    first = next(distill(whole, optimizers, Ema(dict(whole.student.parameters), 0.0)))
    torch.testing.assert_close(torch.tensor(first.losses), torch.tensor([0.8**2] * 3 + [1.2**2] * 3))
    assert first.loss == pytest.approx((0.8**2 + 1.2**2) / 2)
    assert first.gradient_norm == pytest.approx(abs((2 * -0.8 + 2 * 1.2) / 2), rel=1e-5)
    assert teachers["a"].asked == teachers["b"].asked == 3
    assert (first.route, first.teacher) == ("t2i-local_edit", "a-b")


def test_choices_that_do_not_fit_are_named_all_at_once() -> None:
    def faults(method: str, start: str = "base", routes: Any = TWO, **changes: Any) -> list[str]:
        return method_faults(method, loop_params(rollout_steps=16, **changes), start, routes)

    mixed: dict[str, Any] = {"routing": "mixed", "batch": 32}
    assert faults("danceopd", query_states=4) == faults("danceopd", states="off_policy") == []
    assert faults("offpolicy", states="off_policy") == faults("merge", "merged") == faults("danceopd", **mixed) == []
    assert all(faults(method, **mixed) == [] for method in (*FORMS, "diffusionopd", "joint"))
    for method in (*FORMS, "diffusionopd", "joint"):
        (fault,) = faults(method)
        assert "routes_taken = 'hard'" in fault and "'mixed'" in fault
    assert "needs 'off_policy'" in faults("offpolicy")[0] and "start: merged" in faults("merge")[0]
    assert "32" in faults("flowopd_kl", routing="mixed", batch=16)[0]  # a group of 16 for each of two routes
    assert "groups of 16" in faults("flowopd_kl", routing="mixed", batch=24)[0]
    rare = (Route("t2i", "a", 7.0), Route("edit", "b", 1.0))
    assert "weights 8" in faults("diffusionopd", routes=rare, routing="mixed", batch=4)[0]
    assert "no more states" in method_faults("danceopd", loop_params(rollout_steps=8, query_states=16), "base", TWO)[0]
    wrong = faults("joint", states="off_policy", query_states=16, batch=1, routing="mixed")
    assert [fault.split(" = ")[0] for fault in wrong] == ["query_states", "states", "batch"]
    assert faults("danceopd", routes=(), routing="mixed") == []  # which the routes' own check tells


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build(tmp_path_factory.mktemp("tiny"))


def real_setup(tiny: Tiny, method: str, **changes: Any) -> Setup:
    """Two routes with a teacher each, a student on the base they share."""
    backbone, fields = load_teachers(tiny.teachers, [BASE, "local"])
    routes: Router = router([Route("t2i", BASE, 1.0), Route("local_edit", "local", 1.0)], [BASE, "local"])
    buckets = load_buckets(tiny.encoded, ["t2i", "local_edit"], read_records(tiny.teachers)[BASE].sha256)
    student = start_student(backbone, fields, BASE, "adapter", 4, 4, seed=0)
    routing, states = METHODS[method].routing or "hard", METHODS[method].states or "on_policy"
    chosen: dict[str, Any] = {"steps": 2, "batch": 4, "rollout_steps": 3, "routing": routing, "states": states}
    params = loop_params(**{**chosen, **changes})
    return Setup(student, fields, buckets, routes, params, euler_grid(3, 3.0), 0)


TRAINED = [(method, 1) for method in METHODS if method != "merge"] + [("danceopd", 2), ("danceopd", 3)]


@pytest.mark.parametrize(("method", "query_states"), TRAINED)
def test_every_method_trains_a_real_network_in_the_one_loop(tiny: Tiny, method: str, query_states: int) -> None:
    """And is counted by what it asked: evaluations at the networks are at the floor, levels those of the states."""
    batch = 32 if METHODS[method].group > 1 else 4
    whole = real_setup(tiny, method, query_states=query_states, batch=batch)
    student = whole.student
    before = {name: value.detach().clone() for name, value in student.parameters.items()}
    optimizers = build_optimizer("adamw", student.parameters.items(), 1e-3, student.backbone)
    asked: list[float] = []
    field = type(student.field)

    def listening(self: Any, x_t: torch.Tensor, t: torch.Tensor, condition: Any) -> torch.Tensor:
        if self.adapter == student.adapter and torch.is_grad_enabled():
            asked.extend(t.tolist())
        return original(self, x_t, t, condition)

    original = field.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(field, "__call__", listening)
        steps = list(distill(whole, optimizers, Ema(dict(student.parameters), 0.0), method=METHODS[method]))
    assert len(steps) == 2 and all(step.loss > 0 and step.gradient_norm > 0 for step in steps)
    assert all(step.evaluations == step.floor for step in steps)
    assert sorted(level for step in steps for level in step.levels) == pytest.approx(sorted(asked))
    for step in steps:
        assert step.loss == pytest.approx(np.mean(step.losses), rel=1e-5) and len(step.losses) == len(step.levels)
        mixed = METHODS[method].routing == "mixed"
        assert (step.route == "t2i-local_edit") == mixed and step.route in ("t2i-local_edit", "t2i", "local_edit")
    assert any(not torch.equal(value, before[name]) for name, value in student.parameters.items())


def test_a_steps_numbers_are_told_by_route_and_by_the_level_that_was_asked(tiny: Tiny) -> None:
    whole = real_setup(tiny, "diffusionopd")
    optimizers = build_optimizer("adamw", whole.student.parameters.items(), 1e-3, whole.student.backbone)
    step = next(distill(whole, optimizers, Ema(dict(whole.student.parameters), 0.0), method=METHODS["diffusionopd"]))
    named = step_metrics(step, 4)
    bins = {f"loss/{capability}/t{t_bin(level)}" for capability in ("t2i", "local_edit") for level in (1.0, 6 / 7, 0.6)}
    assert {name for name in named if name.startswith("loss/")} == bins
    losses = torch.tensor(step.losses).reshape(4, 3)
    assert named["loss/local_edit/t2"] == pytest.approx(float(losses[2:, 2].mean()))
    assert named["loss/t2i/t3"] == pytest.approx(float(losses[:2, :2].mean()))


@pytest.mark.parametrize("method", ["diffusionopd", "flowopd_reached", "joint", "danceopd"])
def test_mixed_steps_resume_exactly_and_do_not_depend_on_batches(tiny: Tiny, method: str) -> None:
    def run(start: int, states: Any = None, micro_batch: int = 1 << 30) -> Any:
        whole = real_setup(tiny, method, routing="mixed", steps=3, batch=32, learning_rate=1e-2)
        whole = replace(whole, execution=replace(whole.execution, micro_batch=micro_batch))
        student = whole.student
        optimizers = build_optimizer("adamw", student.parameters.items(), 1e-2, student.backbone)
        if states:
            student.load(states[0])
            optimizers.load_tensors(states[1])
        kept = []
        for step in distill(whole, optimizers, Ema(dict(student.parameters), 0.0), start, method=METHODS[method]):
            values = {name: value.detach().clone() for name, value in student.parameters.items()}
            kept.append((values, optimizers.tensors(), [step.gradient_norm, *step.losses]))
        return kept

    straight = run(0)
    for value, other in zip(straight[-1][0].values(), run(2, straight[1])[-1][0].values(), strict=True):
        assert torch.equal(value, other)
    np.testing.assert_allclose(run(0, micro_batch=5)[0][2], straight[0][2], rtol=1e-4, atol=1e-6)


def test_a_made_up_method_costs_one_entry(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It draws the student to a standstill: its loss is the student's velocity at the noise."""

    def standstill(batch: Batch, field: Any, backward: Backward) -> torch.Tensor:
        x_t = batch.noise()
        loss = velocity_gaps(batch.setup.student.field(x_t, batch.at(1.0), batch.condition()), torch.zeros_like(x_t))
        backward(loss)
        return loss.detach()

    method = Method(by_batch(standstill), lambda steps, reached, field, count: (1.0, 1), group=4)
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
    document["distill"] |= {"routes_taken": METHODS[method].routing or "hard"}
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
    expected = merged_weights(fields[BASE], fields)  # the base is routed, so it counts
    assert all(torch.equal(value, expected[name]) for name, value in plain_weights(student.field).items())
    assert (tmp_path / "out" / "steps.csv").read_text().count("\n") == 1
