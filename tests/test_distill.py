"""Property: the loop asks the routed teacher alone, at the states that the student itself visits; ablations share the
loop and are other algorithms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from data.errors import UserError
from data.randomness import numpy_generator
from model.checkpoint import Ema
from model.compute.optimizer import build_optimizer
from model.distill import distill
from model.examples import Bucket, load_buckets
from model.fields.base import Condition, VelocityField, velocity_mse
from model.fields.guided import Guided
from model.networks.student import Student, start_student
from model.networks.teachers import BASE, load_teachers, read_records
from model.randomness import noise_for
from model.rollout import euler_grid, query_index, roll_out_to_query
from model.route import Route, Router
from model.setup import Setup
from model.step import LoopParams, Step
from tests.tiny import Tiny, build, loop_params

LATENT = (2, 1, 1)
CAPABILITIES = ("t2i", "local_edit")


class Affine(nn.Module):
    """v = weight x + bias, elementwise."""

    def __init__(self, weight: float = 0.0, bias: float = 0.0) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.tensor(weight)), nn.Parameter(torch.tensor(bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x + self.bias


class Root(Affine):
    """v = bias + sqrt(weight^2), whose gradient at weight 0 is not finite although its value is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bias + self.weight.square().sqrt() + 0.0 * x


@dataclass(frozen=True)
class Toy:
    """The part of a backbone that the loop needs."""

    latent_shape: tuple[int, int, int] = LATENT

    def velocity(self, network: nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        result: torch.Tensor = network(x_t)
        return result


class Constant(VelocityField):
    """A teacher that answers `value` everywhere and remembers what it was asked."""

    def __init__(self, value: float) -> None:
        self.value, self.asked = value, list[tuple[torch.Tensor, torch.Tensor, Condition]]()

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        self.asked.append((x_t.clone(), t.clone(), condition))
        return torch.full_like(x_t, self.value)


def toy_student(network: nn.Module) -> Student:
    return Student(Toy(), network, None, dict(network.named_parameters()))  # type: ignore[arg-type]


def toy_bucket(rows: int = 5, target: float | None = 4.0) -> Bucket:
    table = torch.arange(float(rows))
    return Bucket(
        torch.arange(rows),
        table.reshape(-1, 1, 1),
        table.reshape(-1, 1),
        torch.zeros(1, 1),
        torch.zeros(1),
        None,
        None if target is None else target + torch.arange(float(rows)).reshape(-1, 1, 1, 1).expand(-1, *LATENT),
    )


def toy_run(
    student: Student,
    teachers: Mapping[str, VelocityField],
    params: LoopParams,
    start: int = 0,
    seed: int = 7,
    **bucket: Any,
) -> Iterator[Step]:
    routes = tuple(Route(capability, name, 1.0) for capability, name in zip(CAPABILITIES, teachers, strict=False))
    optimizers = build_optimizer(params.optimizer, student.parameters.items(), params.learning_rate, student.backbone)
    buckets = {capability: toy_bucket(**bucket) for capability in CAPABILITIES}
    setup = Setup(student, teachers, buckets, Router(routes), params, euler_grid(params.rollout_steps), seed)
    return distill(setup, optimizers, Ema(dict(student.parameters), params.ema), start)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- the algorithm, on fields whose answer is known -------------------------------------------------------------------


def test_on_policy_states_lie_on_the_students_own_path() -> None:
    teacher, slope = Constant(1.0), 0.75
    params = loop_params(steps=3, batch=6, learning_rate=0.0)
    for step in toy_run(toy_student(Affine(bias=slope)), {"a": teacher}, params):
        x_t, t, _ = teacher.asked[step.index]
        noise = noise_for(7, step.index, range(6), LATENT)
        torch.testing.assert_close(
            x_t, noise + (t.reshape(-1, 1, 1, 1) - 1.0) * slope
        )  # Euler's method is exact on a constant field
        assert step.loss == pytest.approx((slope - 1.0) ** 2) and step.t == pytest.approx(float(t.mean()))
        assert step.gradient_norm > 0


def test_off_policy_states_are_forward_noised_data() -> None:
    teacher = Constant(1.0)
    params = loop_params(steps=3, batch=6, learning_rate=0.0, states="off_policy")
    for step in toy_run(toy_student(Affine(bias=0.75)), {"a": teacher}, params):
        x_t, t, condition = teacher.asked[step.index]
        target = 4.0 + condition.pooled.reshape(-1, 1, 1, 1)  # row r of the bucket has prompt r and target 4 + r
        weight = t.reshape(-1, 1, 1, 1)
        torch.testing.assert_close(x_t, (1.0 - weight) * target + weight * noise_for(7, step.index, range(6), LATENT))
        assert step.evaluations == 2 * 6


def test_off_policy_needs_targets() -> None:
    with pytest.raises(UserError, match="target"):
        next(toy_run(toy_student(Affine()), {"a": Constant(1.0)}, loop_params(states="off_policy"), target=None))


def test_a_step_asks_one_teacher_and_routes_take_their_shares() -> None:
    teachers = {"a": Constant(1.0), "b": Constant(-1.0)}
    steps = list(
        toy_run(toy_student(Affine()), teachers, loop_params(steps=300, batch=1, rollout_steps=2, learning_rate=0.0))
    )
    assert len(teachers["a"].asked) + len(teachers["b"].asked) == 300
    for name, capability in (("a", "t2i"), ("b", "local_edit")):
        assert len(teachers[name].asked) == sum(step.teacher == name and step.route == capability for step in steps)
    assert abs(len(teachers["a"].asked) - 150) < 45  # five standard deviations
    picks = [
        Router((Route("t2i", "a", 1.0), Route("local_edit", "b", 1.0)))
        .pick(numpy_generator(7, step, 0, "route"))
        .teacher
        for step in range(300)
    ]
    assert [step.teacher for step in steps] == picks


def test_soft_routing_pulls_to_the_mean_and_hard_routing_to_one_teacher() -> None:
    # Two teachers that disagree exactly: their mean is where the student already is, so soft routing learns nothing and
    # hard routing does.
    params = loop_params(steps=6, batch=4, learning_rate=0.1)
    soft_student, hard_student = toy_student(Affine()), toy_student(Affine())
    teachers = {"a": Constant(1.0), "b": Constant(-1.0)}
    for step in toy_run(soft_student, teachers, replace(params, routing="soft")):
        assert step.loss == 0.0 and step.gradient_norm == 0.0
    assert all(float(value.detach()) == 0.0 for value in soft_student.parameters.values())
    assert len(teachers["a"].asked) == len(teachers["b"].asked) == 6
    first = next(toy_run(hard_student, teachers, params))
    assert first.loss == pytest.approx(1.0) and first.gradient_norm > 0
    sign = 1.0 if first.teacher == "a" else -1.0
    assert sign * float(hard_student.parameters["bias"].detach()) > 0


def test_the_gradient_is_that_of_the_velocity_gap_alone() -> None:
    # With v = bias and target 1 the derivative of the mean square is 2 (bias - 1); nothing flows through the rollout,
    # whose states depend on bias too.
    step = next(toy_run(toy_student(Affine(bias=0.25)), {"a": Constant(1.0)}, loop_params(batch=3, clip=1e9)))
    bias = 2.0 * (0.25 - 1.0)
    network = Affine(bias=0.25)
    index = torch.tensor([query_index(8, "low", numpy_generator(7, 0, slot, "query")) for slot in range(3)])
    query = roll_out_to_query(
        toy_student(network).field, noise_for(7, 0, range(3), LATENT), toy_bucket().at([0, 0, 0]), euler_grid(8), index
    )
    weight = float((2.0 * (0.25 - 1.0) * query.x_t).mean())
    assert step.gradient_norm == pytest.approx((bias**2 + weight**2) ** 0.5, rel=1e-5)


def test_evaluations_are_counted_at_the_floor() -> None:
    calls: list[int] = []

    class Counted(Affine):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(len(x))
            return super().forward(x)

    teacher = Constant(1.0)
    step = next(toy_run(toy_student(Counted()), {"a": teacher}, loop_params(batch=5, rollout_steps=16)))
    indices = [query_index(16, "low", numpy_generator(7, 0, slot, "query")) for slot in range(5)]
    assert sum(calls) == sum(indices) + 5  # the rollout, then the student's own answer
    assert step.evaluations == sum(calls) + 5
    guided = next(
        toy_run(toy_student(Affine()), {"a": Guided(Constant(1.0), 2.0)}, loop_params(batch=5, rollout_steps=16))
    )
    assert guided.evaluations == sum(indices) + 3 * 5


def test_draws_depend_on_seed_step_and_slot_only() -> None:
    def asked(batch: int, start: int = 0, seed: int = 7) -> list[tuple[torch.Tensor, torch.Tensor, Condition]]:
        teacher = Constant(1.0)
        list(
            toy_run(
                toy_student(Affine(bias=0.5)), {"a": teacher}, loop_params(batch=batch, learning_rate=0.0), start, seed
            )
        )
        return teacher.asked

    small, large, late, other = asked(3), asked(6), asked(3, start=2), asked(3, seed=8)
    for (x, t, c), (larger_x, larger_t, larger_c) in zip(small, large, strict=True):
        assert (
            torch.equal(x, larger_x[:3]) and torch.equal(t, larger_t[:3]) and torch.equal(c.pooled, larger_c.pooled[:3])
        )
    for (x, t, c), (later_x, later_t, later_c) in zip(small[2:], late, strict=True):
        assert torch.equal(x, later_x) and torch.equal(t, later_t) and torch.equal(c.pooled, later_c.pooled)
    assert not torch.equal(small[0][0], small[1][0]) and not torch.equal(small[0][0], other[0][0])


@pytest.mark.parametrize("poisoned", ["teacher", "gradient"])
def test_a_step_that_is_not_finite_stops_with_one_message_and_leaves_the_weights(poisoned: str) -> None:
    class Poisoned(Constant):
        def __call__(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
            value = super().__call__(x_t, t, condition)
            return value * float("nan") if poisoned == "teacher" and len(self.asked) == 3 else value

    student = toy_student(Affine() if poisoned == "teacher" else Root())
    seen = {name: value.detach().clone() for name, value in student.parameters.items()}
    done = []
    with pytest.raises(UserError, match=r"step \d .*not finite.*learning_rate"):
        for step in toy_run(student, {"a": Poisoned(1.0)}, loop_params()):
            done.append(step.index)
            seen = {name: value.detach().clone() for name, value in student.parameters.items()}
    assert done == ([0, 1] if poisoned == "teacher" else [])
    for name, value in student.parameters.items():
        assert bool(torch.isfinite(value)) and torch.equal(value, seen[name])


def test_the_learning_rate_follows_the_schedule_and_ema_the_weights() -> None:
    student = toy_student(Affine())
    params = loop_params(steps=10, learning_rate=0.1, warmup=2, decay_from=0.5)
    optimizers = build_optimizer(params.optimizer, student.parameters.items(), params.learning_rate, student.backbone)
    ema = Ema(dict(student.parameters), 0.0)
    rates = []
    router, buckets = Router((Route("t2i", "a", 1.0),)), {"t2i": toy_bucket()}
    setup = Setup(student, {"a": Constant(1.0)}, buckets, router, params, euler_grid(8), 7)
    for _ in distill(setup, optimizers, ema):
        rates.append(optimizers.optimizers[0].param_groups[0]["lr"])
        assert all(torch.equal(ema.shadow[name], value) for name, value in student.parameters.items())
    np.testing.assert_allclose(rates, [0.05, 0.1, 0.1, 0.1, 0.1, 0.1, 0.08, 0.06, 0.04, 0.02])


# --- the algorithm, on real networks ----------------------------------------------------------------------------------


def tiny_run(
    tiny: Tiny, student: Student, fields: Mapping[str, VelocityField], routes: list[Route], params: LoopParams
) -> list[Step]:
    buckets = load_buckets(
        tiny.encoded, [route.capability for route in routes], read_records(tiny.teachers)[BASE].sha256
    )
    optimizers = build_optimizer(params.optimizer, student.parameters.items(), params.learning_rate, student.backbone)
    grid = euler_grid(params.rollout_steps)
    setup = Setup(student, fields, buckets, Router(tuple(routes)), params, grid, seed=3)
    return list(distill(setup, optimizers, Ema(dict(student.parameters), params.ema)))


def gap(tiny: Tiny, student: Student, field: VelocityField, capability: str) -> float:
    """Mean squared velocity gap on the student's own states, at draws that training does not use."""
    bucket = load_buckets(tiny.encoded, [capability], read_records(tiny.teachers)[BASE].sha256)[capability]
    condition, index = bucket.at(list(range(8))), torch.arange(8)
    query = roll_out_to_query(
        student.field, noise_for(99, 0, range(8), student.backbone.latent_shape), condition, euler_grid(8), index
    )
    with torch.no_grad():
        return float(velocity_mse(student.field(query.x_t, query.t, condition), field(query.x_t, query.t, condition)))


@pytest.mark.parametrize(
    ("start", "trainable"), [(BASE, "all"), (BASE, "adapter"), ("global", "all"), ("global", "adapter")]
)
def test_a_student_equal_to_its_teacher_has_loss_exactly_zero(tiny: Tiny, start: str, trainable: str) -> None:
    backbone, fields = load_teachers(tiny.teachers, [BASE, "local", "global"])
    student = start_student(backbone, fields, start, trainable, 4, 4, seed=0)
    capability = "t2i" if start == BASE else "global_edit"
    before = {name: value.detach().clone() for name, value in student.parameters.items()}
    for step in tiny_run(tiny, student, fields, [Route(capability, start, 1.0)], loop_params(steps=2)):
        assert step.loss == 0.0 and step.gradient_norm == 0.0
    assert all(torch.equal(value, before[name]) for name, value in student.parameters.items())


@pytest.mark.parametrize(("trainable", "rate"), [("all", 2e-3), ("adapter", 1e-2)])
def test_distilling_closes_the_gap_to_the_teacher_on_the_students_own_states(
    tiny: Tiny, trainable: str, rate: float
) -> None:
    backbone, fields = load_teachers(tiny.teachers, [BASE, "local"])
    student = start_student(backbone, fields, BASE, trainable, 8, 8, seed=0)
    before = gap(tiny, student, fields["local"], "local_edit")
    params = loop_params(steps=40, batch=8, learning_rate=rate, rollout_steps=4, decay_from=0.5)
    steps = tiny_run(tiny, student, fields, [Route("local_edit", "local", 1.0)], params)
    assert gap(tiny, student, fields["local"], "local_edit") < before / 3 and steps[-1].loss < steps[0].loss / 3


def test_absorbing_guidance_moves_the_unguided_student_to_the_guided_field(tiny: Tiny) -> None:
    backbone, fields = load_teachers(tiny.teachers, [BASE])
    student = start_student(backbone, fields, BASE, "all", 4, 4, seed=0)
    frozen = student.frozen_copy()
    guided = Guided(frozen, 3.0)
    frozen_weights = {name: value.clone() for name, value in frozen.network.state_dict().items()}
    before = gap(tiny, student, guided, "t2i")
    params = loop_params(steps=40, batch=8, learning_rate=2e-3, rollout_steps=4, decay_from=0.5)
    tiny_run(tiny, student, {"guided t2i": guided}, [Route("t2i", "guided t2i", 1.0)], params)
    assert gap(tiny, student, guided, "t2i") < before / 5
    assert all(torch.equal(value, frozen_weights[name]) for name, value in frozen.network.state_dict().items())


def test_teachers_do_not_move_while_a_student_on_the_same_base_trains(tiny: Tiny) -> None:
    backbone, fields = load_teachers(tiny.teachers, [BASE, "local", "global"])
    student = start_student(backbone, fields, BASE, "adapter", 4, 4, seed=0)
    before = {
        name: value.detach().clone() for name, value in backbone.network.state_dict().items() if ".student." not in name
    }
    routes = [Route("t2i", BASE, 1.0), Route("local_edit", "local", 1.0), Route("global_edit", "global", 1.0)]
    steps = tiny_run(tiny, student, fields, routes, loop_params(steps=12, batch=2))
    assert len({step.teacher for step in steps}) > 1
    after = backbone.network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any(float(value.detach().abs().max()) > 0 for name, value in student.parameters.items() if "lora_B" in name)


def test_the_fast_path_equals_the_plain_one_on_a_network(tiny: Tiny) -> None:
    # Batches of one, rolled out in full and picked afterwards, against the loop's own shrinking batch.
    backbone, fields = load_teachers(tiny.teachers, [BASE])
    bucket = load_buckets(tiny.encoded, ["local_edit"], read_records(tiny.teachers)[BASE].sha256)["local_edit"]
    condition, grid, index = bucket.at([0, 3, 5]), euler_grid(8), torch.tensor([6, 2, 7])
    noise = noise_for(1, 0, range(3), backbone.latent_shape)
    query = roll_out_to_query(fields[BASE], noise, condition, grid, index)
    for row, steps in enumerate(index.tolist()):
        x, single = noise[row : row + 1].clone(), condition[slice(row, row + 1)]
        states = [x.clone()]
        with torch.no_grad():
            for now, after in pairwise(grid):
                x = x + (after - now) * fields[BASE](x, now.expand(1), single)
                states.append(x.clone())
        torch.testing.assert_close(query.x_t[row : row + 1], states[steps], rtol=1e-5, atol=1e-5)
