"""Property: batches, merging, recomputation and late reading change no result beyond rounding; the plain path is the
step that all must equal.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch._dynamo.testing

from benchmarks.speed import Case, build, sd3_case, sd3_size
from data.errors import UserError
from model.backbones.sizes import SIZES, NetworkSize
from model.checkpoint import Ema
from model.compute.execution import (
    WHOLE_BATCH,
    EvaluationCounter,
    Execution,
    activation_bytes,
    blocks_of,
    fit,
    merged_adapter,
    moved,
    prepare_networks,
    recompute_blocks,
)
from model.compute.optimizer import Optimizers, build_optimizer
from model.compute.settings import ExecutionParams
from model.distill import distill, plan_step
from model.examples import Bucket
from model.fields.base import VelocityField
from model.fields.guided import Guided
from model.instruments import gradient_cosines, held_out_gaps, weights_of
from model.methods import danceopd
from model.methods.danceopd import accumulate
from model.networks.student import Student
from model.plain import accumulate_plain, own_networks
from model.rollout import euler_grid
from model.route import Route, Router
from model.setup import Setup
from model.step import NotFinite, Plan
from tasks.params.reading import faults_of
from tests.tiny import EXECUTION, loop_params

CPU = torch.device("cpu")
GRID = euler_grid(6, 3.0)
ROUTER = Router((Route("t2i", "teacher0", 1.0), Route("local_edit", "teacher1", 1.0)))
PARAMS = loop_params(batch=5, rollout_steps=6, steps=3)


def micro_case() -> Case:
    """As the micro world: all parameters train, teachers are networks of their alike, one latent token a cell."""
    return sd3_case("tiny micro", sd3_size(32, 2, 4, 3), 0, 5, None, 6)


def zimage_case() -> Case:
    """Z-Image's class and call, small."""
    config = {
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 24,
        "axes_dims": [4, 6, 6],
        "axes_lens": [64, 16, 16],
    }
    size = NetworkSize("zimage", SIZES["zimage"].config | config, 3)
    return replace(CASES["sd3"], name="tiny zimage", size=size, resolution=32)


CASES = {"micro": micro_case(), "sd3": sd3_case("tiny sd3", sd3_size(32, 2, 4, 3), 4, 5, None, 6)}
CASES["zimage"] = zimage_case()


def prepared(name: str, seed: int = 0) -> Setup:
    student, teachers, bucket = build(CASES[name], CPU, seed)
    if student.adapter:  # a fresh adapter answers zero: nothing would be seen of its merging
        with torch.no_grad():
            for row, (key, value) in enumerate(student.parameters.items()):
                if "lora_B" in key:
                    value.normal_(std=0.1, generator=torch.Generator().manual_seed(row))
    return Setup(student, teachers, {"t2i": bucket, "local_edit": bucket}, ROUTER, PARAMS, GRID, 3)


def gradients(student: Student) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in student.parameters.items()}


def one_step(
    s: Setup, execution: Execution = WHOLE_BATCH, compute: Any = accumulate, index: int = 0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    for parameter in s.student.parameters.values():
        parameter.grad = None
    plan = plan_step(s, index)
    losses, _ = compute(replace(s, execution=execution), s.teachers[plan.routes[0].teacher], plan, range(PARAMS.batch))
    return losses, gradients(s.student)


def trained(s: Setup) -> tuple[Optimizers, Ema]:
    """Optimizer and average of the student's trainables, before the first step."""
    params = s.params
    optimizers = build_optimizer(
        params.optimizer, s.student.parameters.items(), params.learning_rate, s.student.backbone
    )
    return optimizers, Ema(dict(s.student.parameters), params.ema)


def same(
    a: tuple[torch.Tensor, dict[str, torch.Tensor]],
    b: tuple[torch.Tensor, dict[str, torch.Tensor]],
    tolerance: float = 1e-6,
) -> None:
    torch.testing.assert_close(a[0], b[0], rtol=tolerance, atol=tolerance)
    for name, gradient in a[1].items():
        torch.testing.assert_close(
            gradient, b[1][name], rtol=10 * tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
def test_the_plain_path_gives_the_same_losses_and_gradients(name: str) -> None:
    fast, slow = prepared(name), prepared(name)
    slow = replace(slow, teachers=own_networks(slow.teachers))
    recompute_blocks(slow.student.network, 2)
    for index in range(2):
        expected = one_step(slow, compute=accumulate_plain, index=index)
        assert float(expected[0].min()) > 0 and sum(float(g.abs().sum()) for g in expected[1].values()) > 0
        same(one_step(fast, replace(WHOLE_BATCH, merged=True), index=index), expected)


@pytest.mark.parametrize("name", CASES)
def test_batches_merging_and_recomputation_change_rounding_alone(name: str) -> None:
    s = prepared(name)
    whole = one_step(s)
    for changes in ({"micro_batch": 2, "rollout_batch": 3}, {"micro_batch": 1, "rollout_batch": 1}, {"merged": True}):
        execution = replace(WHOLE_BATCH, **changes)  # type: ignore[arg-type]
        same(one_step(s, execution), whole)
    recompute_blocks(s.student.network, 1)
    same(one_step(s), whole)
    recompute_blocks(s.student.network, 0)


def test_a_merged_adapter_answers_as_the_unmerged_and_leaves_no_trace() -> None:
    s = prepared("sd3")
    before = {name: value.clone() for name, value in s.student.network.state_dict().items()}
    x, t, condition = (
        torch.randn(3, 16, 4, 4, generator=torch.Generator().manual_seed(0)),
        torch.full((3,), 0.5),
        s.buckets["t2i"].at([0, 1, 2]),
    )
    with torch.no_grad():
        expected = s.student.field(x, t, condition)
        with merged_adapter(s.student.network, s.student.adapter):
            merged = s.student.field(x, t, condition)
        again = s.student.field(x, t, condition)
        unadapted = s.teachers["teacher0"](x, t, condition)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(again, expected) and not torch.equal(unadapted, expected)
    assert all(torch.equal(value, before[name]) for name, value in s.student.network.state_dict().items())
    with pytest.raises(ZeroDivisionError), merged_adapter(s.student.network, s.student.adapter):
        raise ZeroDivisionError
    assert not [name for name, module in s.student.network.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("name", CASES)
def test_compiled_rollouts_change_rounding_alone_and_nothing_is_compiled_twice(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = (
        torch._dynamo.testing.CompileCounter()
    )  # traces and guards as in earnest, and runs what was traced without making kernels of it
    monkeypatch.setattr(
        "model.compute.execution.compiled_forward",
        cache(lambda kind: torch.compile(kind.forward, dynamic=True, backend=counter)),
    )
    s, fast = prepared(name), replace(WHOLE_BATCH, merged=True, compiled_rollout=True, rollout_batch=3)
    for index in range(2):
        same(one_step(s, fast, index=index), one_step(s, index=index))
    made = counter.frame_count
    assert made > 0
    for index in range(2, 5):
        one_step(s, fast, index=index)
    assert counter.frame_count == made
    assert not [key for key, module in s.student.network.named_modules() if "forward" in vars(module)]
    alike = replace(s, teachers=dict.fromkeys(s.teachers, s.student.field))
    assert torch.equal(one_step(alike, fast)[0], torch.zeros(PARAMS.batch))


def test_compiling_without_a_compiler_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"execution.compile: torch.compile needs no-such-compiler .* choose none"):
        prepare_networks(replace(ExecutionParams(**EXECUTION), compile="rollout"), CPU, torch.nn.Linear(1, 1), [], [])


def test_in_bf16_equal_weights_give_loss_zero_and_the_rest_is_near() -> None:
    s = prepared("sd3")
    half = replace(WHOLE_BATCH, dtype=torch.bfloat16)
    exact, rounded = one_step(s), one_step(s, half)
    torch.testing.assert_close(
        rounded[0], exact[0], rtol=0.1, atol=0.02
    )  # bfloat16 has 8 bits; a rollout of 6 steps adds them up
    with torch.no_grad():
        for key, value in s.student.parameters.items():
            if "lora_B" in key:
                value.zero_()
    alike = replace(s, teachers=dict.fromkeys(s.teachers, s.student.field))
    for execution in (half, replace(half, micro_batch=2)):
        losses, gradient = one_step(alike, execution)
        assert torch.equal(losses, torch.zeros_like(losses)) and all(
            torch.equal(g, torch.zeros_like(g)) for g in gradient.values()
        )


def test_evaluations_are_counted_at_the_networks_and_equal_the_floor() -> None:
    s = prepared("sd3")
    guided: dict[str, VelocityField] = {name: Guided(field, 2.0) for name, field in s.teachers.items()}
    for teachers, cost in ((s.teachers, 1), (guided, 2)):
        execution = replace(WHOLE_BATCH, micro_batch=2, rollout_batch=3, merged=True)
        for step in distill(replace(s, teachers=teachers, execution=execution), *trained(s)):
            assert step.evaluations == step.floor == sum(j for (j,) in step.plan.query) + PARAMS.batch * (1 + cost)
            s.student.field(
                torch.zeros(1, 16, 4, 4), torch.ones(1), s.buckets["t2i"].at([0])
            )  # the caller's own question is not the step's
    counter = EvaluationCounter([s.student.network])
    recompute_blocks(s.student.network, 2)
    one_step(s, compute=accumulate_plain)
    assert counter.take() == PARAMS.batch * (
        6 + 2
    )  # the plain path: all rollout steps, teacher and student; recomputed blocks are no evaluations
    counter.close()
    recompute_blocks(s.student.network, 0)


def test_rows_of_several_shapes_are_computed_apart_and_weigh_the_same() -> None:
    @dataclass(frozen=True)
    class Mixed:
        """Even rows are square, odd ones wide."""

        of: Bucket

        def __len__(self) -> int:
            return len(self.of)

        def shape_of(self, row: int) -> tuple[int, ...]:
            return (16, 4, 4) if row % 2 == 0 else (16, 2, 4)

        def at(self, rows: list[int]) -> Any:
            assert len({self.shape_of(row) for row in rows}) == 1
            return self.of.at(rows)

    s = prepared("sd3")
    mixed: Any = Mixed(s.buckets["t2i"])
    s = replace(s, buckets=dict.fromkeys(s.buckets, mixed))
    plan = plan_step(s, 0)
    assert len({mixed.shape_of(row) for row in plan.rows}) == 2
    together = one_step(s)
    same(together, one_step(s, compute=accumulate_plain))
    torch.testing.assert_close(together[0], one_step(s, replace(WHOLE_BATCH, micro_batch=1))[0], rtol=1e-6, atol=1e-6)
    batches = list(s.batches(plan, range(5), 2, lambda slot: -plan.query[slot][0]))
    assert sorted(slot for batch in batches for slot in batch.slots) == list(range(5))
    assert all(len({mixed.shape_of(row) for row in batch.rows}) == 1 for batch in batches)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_read_late_is_withheld_by_the_device_itself(optimizer: str) -> None:
    def run(deferred: bool, poisoned: int | None) -> tuple[Setup, Ema, Any, int | None]:
        params = replace(PARAMS, steps=5, learning_rate=1e-2, optimizer=optimizer, ema=0.9)
        s = replace(prepared("sd3"), params=params, execution=replace(WHOLE_BATCH, deferred=deferred))
        optimizers, ema = trained(s)

        def compute(setup: Setup, teacher: Any, plan: Plan, slots: Any) -> Any:
            losses, batch = accumulate(setup, teacher, plan, slots)
            for parameter in setup.student.parameters.values() if plan.index == poisoned else ():
                assert parameter.grad is not None
                parameter.grad.fill_(float("nan"))
            return losses, batch

        try:
            for step in distill(s, optimizers, ema, method=replace(danceopd.METHOD, compute=compute)):
                if step.index + 1 == poisoned and not deferred:
                    break
        except NotFinite as error:
            return s, ema, optimizers, error.plan.index
        return s, ema, optimizers, None

    healthy, late = run(False, None), run(True, None)
    for name, value in healthy[0].student.parameters.items():
        torch.testing.assert_close(value, late[0].student.parameters[name], rtol=1e-5, atol=1e-6)
    stopped, expected = run(True, 2), run(False, 2)
    assert stopped[3] == 2 and expected[3] is None
    for name, value in expected[0].student.parameters.items():  # stopped by hand before the bad step
        torch.testing.assert_close(value, stopped[0].student.parameters[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(expected[1].shadow[name], stopped[1].shadow[name], rtol=1e-5, atol=1e-6)
    for key, state in expected[2].tensors().items():
        torch.testing.assert_close(state, stopped[2].tensors()[key], rtol=1e-5, atol=1e-6, msg=key)


def test_an_exploding_gradient_stops_as_one_that_is_not_finite_does() -> None:
    s = prepared("sd3")
    before = {name: value.detach().clone() for name, value in s.student.parameters.items()}
    with pytest.raises(NotFinite, match=r"step 0 .*max_gradient_norm = 1e-09") as caught:
        next(distill(replace(s, params=replace(PARAMS, max_gradient_norm=1e-9)), *trained(s)))
    assert all(torch.equal(value, before[name]) for name, value in s.student.parameters.items())
    assert {"x_t.000", "target.004", "rows", "query"} <= set(caught.value.batch)


def test_what_fits_follows_the_memory_and_recomputes_only_when_it_must() -> None:
    s = prepared("sd3")
    x, t, condition = torch.zeros(1, 16, 4, 4), torch.ones(1), s.buckets["t2i"].at([0])
    params = ExecutionParams(**EXECUTION)

    def row() -> torch.Tensor:
        return s.student.field(x, t, condition)

    def chosen(budget: int, **changes: Any) -> Execution:
        return fit(replace(params, **changes), CPU, s.student.network, row, 64, budget)

    recompute_blocks(s.student.network, 0)
    whole = activation_bytes(row, [s.student.network])
    assert activation_bytes(row, [s.student.network]) == whole > 0
    recompute_blocks(s.student.network, 2)
    assert activation_bytes(row, [s.student.network]) < whole / 2
    plenty = chosen(10 * whole + 5)
    assert (plenty.micro_batch, plenty.recompute, plenty.rollout_batch, plenty.merged) == (10, 0, 64, True)
    assert chosen(10**12).micro_batch == 64 and chosen(10 * whole, micro_batch=3).micro_batch == 3
    tight = chosen(whole // 2)
    assert tight.micro_batch >= 1 and tight.recompute == len(blocks_of(s.student.network)) == 2
    assert (
        chosen(whole // 2, checkpointing="never").recompute == 0
        and chosen(10**12, checkpointing="always").recompute == 2
    )
    assert (
        not chosen(10**12, precision="bf16").merged and chosen(10**12, precision="bf16", merge_rollout="always").merged
    )
    assert chosen(10**12, rollout_batch=7).rollout_batch == 7
    recompute_blocks(s.student.network, 0)


def test_faults_of_the_execution_are_named_together() -> None:
    assert faults_of(ExecutionParams(**EXECUTION)) == []
    wrong = {"device": "tpu", "precision": "fp8", "micro_batch": -1, "processes": 0, "attention": "fast"}
    faults = faults_of(ExecutionParams(**{**EXECUTION, **wrong}))
    assert len(faults) == 5 and any("'tpu'" in fault and "cuda" in fault for fault in faults)


def test_instruments_leave_the_run_as_it_was() -> None:
    s = prepared("sd3")
    s = replace(s, held_out={name: bucket.only([1, 0, 2]) for name, bucket in s.buckets.items()})
    losses, before = one_step(s)
    values = {name: value.detach().clone() for name, value in s.student.parameters.items()}
    cosines = gradient_cosines(s, 0)
    alike = gradient_cosines(replace(s, teachers=dict.fromkeys(s.teachers, s.teachers["teacher0"])), 0)
    assert set(cosines) == {("t2i", "local_edit")} and -1 <= cosines["t2i", "local_edit"] < 0.999
    assert alike["t2i", "local_edit"] == pytest.approx(1.0, abs=1e-5)  # one teacher, one batch: one gradient
    gaps = held_out_gaps(s)
    assert gaps == held_out_gaps(s) and min(gaps.values()) > 0
    with weights_of(s.student, {name: torch.zeros_like(value) for name, value in values.items()}):
        assert held_out_gaps(s) != gaps
    for name, parameter in s.student.parameters.items():
        assert (
            torch.equal(parameter, values[name])
            and parameter.grad is not None
            and torch.equal(parameter.grad, before[name])
        )
    others = replace(s, held_out={name: bucket.only([3, 0, 2]) for name, bucket in s.buckets.items()})
    assert all(gap != held_out_gaps(others)[name] for name, gap in gaps.items())  # these rows are what is looked at
    assert len(losses) == 5


def test_what_is_moved_keeps_its_values() -> None:
    condition = prepared("sd3").buckets["t2i"].at([0, 1])
    there = moved(condition, torch.device("meta"))
    assert there.embeds.device.type == "meta" and there.source is None and there.embeds.shape == condition.embeds.shape
    assert copy.copy(moved(condition.embeds, CPU)) is condition.embeds or torch.equal(
        moved(condition.embeds, CPU), condition.embeds
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_step_waits_for_the_device() -> None:
    device = torch.device("cuda")
    student, teachers, bucket = build(CASES["sd3"], device, 0)
    execution = replace(WHOLE_BATCH, device=device, deferred=True)
    buckets = {"t2i": bucket, "local_edit": bucket}
    setup = Setup(student, teachers, buckets, ROUTER, PARAMS, GRID, 3, execution)
    loop = distill(setup, *trained(setup))
    next(loop)
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(loop)
    finally:
        torch.cuda.set_sync_debug_mode("default")
