"""Property: two processes give what one gives; when one dies all stop with a message, and the run goes on with whatever
number of processes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import model.setup
import tasks.stages.distill
import tasks.training.processes
import tasks.training.run
from benchmarks.speed import build, sd3_case, sd3_size
from data.files import read_json, write_json
from model.checkpoint import Ema, write_tensors
from model.compute.execution import WHOLE_BATCH, EvaluationCounter, Execution, blocks_of, recompute_blocks
from model.compute.optimizer import build_optimizer
from model.compute.parallel import ALONE, World, deal, joined, shard_frozen
from model.distill import distill
from model.methods import METHODS
from model.rollout import euler_grid
from model.route import Route, Router
from model.setup import Setup
from tasks.__main__ import main
from tasks.training.run import run_training
from tests.tiny import Tiny, loop_params, write_params
from tests.tiny import build as build_tiny

ROUTER = Router((Route("t2i", "teacher0", 1.0), Route("local_edit", "teacher1", 1.0)))
PARAMS = loop_params(batch=5, rollout_steps=6, steps=3, learning_rate=1e-3, ema=0.5)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    signal.signal(signal.SIGTERM, handler)


def forked(act: Callable[[int], None], size: int) -> list[int]:
    """Exit statuses of `size` forked processes that each ran `act(rank)`."""
    children = []
    for rank in range(size):
        child = os.fork()
        if not child:
            status = 1
            try:
                act(rank)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def test_dealing_balances_and_loses_no_slot() -> None:
    rng = np.random.default_rng(0)
    lockstep, balanced = [], []
    for _ in range(200):
        costs = (rng.beta(5, 2, size=16) * 16).astype(int).tolist()
        dealt = deal(costs, 4)
        assert sorted(slot for slots in dealt for slot in slots) == list(range(16))
        assert dealt == deal(costs, 4)
        sums = [sum(costs[slot] for slot in slots) for slots in dealt]
        assert max(sums) - min(sums) <= max(costs)
        balanced.append(max(sums))
        lockstep.append(max(sum(costs[slot] for slot in range(rank, 16, 4)) for rank in range(4)))
    assert np.mean(balanced) < 0.95 * np.mean(lockstep)  # against dealing in turn
    assert deal([3, 1], 3) == [[0], [1], []] and deal([1, 2, 3], 1) == [[0, 1, 2]]


@pytest.mark.parametrize(("size", "method"), [(2, "danceopd"), (3, "danceopd"), (2, "diffusionopd")])
def test_several_processes_give_the_result_of_one(size: int, method: str, tmp_path: Path) -> None:
    case = sd3_case("tiny", sd3_size(32, 2, 4, 3), 4, 5, None, 6)
    params = replace(PARAMS, routing=METHODS[method].routing or "hard")

    def run(world: World) -> tuple[dict[str, torch.Tensor], list[list[float]]]:
        student, teachers, bucket = build(case, torch.device("cpu"), 0)
        optimizers, ema = (
            build_optimizer("adamw", student.parameters.items(), PARAMS.learning_rate, student.backbone),
            Ema(dict(student.parameters), PARAMS.ema),
        )
        buckets = {"t2i": bucket, "local_edit": bucket}
        counter = EvaluationCounter([student.network])
        execution = replace(WHOLE_BATCH, merged=True)
        setup = Setup(student, teachers, buckets, ROUTER, params, euler_grid(6), 3, execution)
        loop = distill(setup, optimizers, ema, 0, world, lambda: world.rank == 1, METHODS[method])
        numbers = [
            [
                step.loss,
                step.gradient_norm,
                float(step.evaluations),
                float(step.floor),
                float(step.stopped),
                *step.losses,
            ]
            for step in loop
        ]
        numbers.append([float(counter.take())])
        return {f"trained.{k}": v for k, v in student.parameters.items()} | {
            f"ema.{k}": v for k, v in ema.shadow.items()
        }, numbers

    def act(rank: int) -> None:
        with joined(rank, size, tmp_path / "meeting", torch.device("cpu")) as world:
            tensors, numbers = run(world)
        write_tensors(tmp_path / f"{rank}.safetensors", tensors)
        write_json(tmp_path / f"{rank}.json", numbers)

    assert forked(act, size) == [0] * size
    expected, numbers = run(ALONE)
    work = []
    for rank in range(size):
        trained, theirs = load_file(tmp_path / f"{rank}.safetensors"), read_json(tmp_path / f"{rank}.json")
        for name, value in expected.items():
            torch.testing.assert_close(
                trained[name], value.detach(), rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
        for mine, alone in zip(theirs[:-1], numbers[:-1], strict=True):
            assert (
                mine[2] == mine[3] == alone[2] and mine[4] == 1.0
            )  # counted over all, and asked to stop by one: known to all
            np.testing.assert_allclose(mine[:2] + mine[5:], alone[:2] + alone[5:], rtol=1e-5, atol=1e-6)
        work.append(theirs[-1][0])
    assert sum(work) == numbers[-1][0] and max(work) < 0.75 * sum(work)


@pytest.mark.parametrize(("recompute", "routing"), [(0, "hard"), (1, "mixed")])
def test_a_sharded_base_gives_the_result_of_a_whole_one(recompute: int, routing: str, tmp_path: Path) -> None:
    params = replace(PARAMS, routing=routing)
    case = sd3_case("tiny", sd3_size(32, 2, 4, 3), 4, 5, None, 6)
    execution = replace(WHOLE_BATCH, merged=True, micro_batch=2, rollout_batch=2)

    def run(world: World, execution: Execution) -> tuple[dict[str, torch.Tensor], int, int]:
        student, teachers, bucket = build(case, torch.device("cpu"), 0)
        whole = sum(value.numel() for value in student.network.parameters())
        if execution.lockstep:
            shard_frozen(blocks_of(student.network), torch.device("cpu"))
        recompute_blocks(student.network, recompute)
        optimizers, ema = (
            build_optimizer("adamw", student.parameters.items(), PARAMS.learning_rate, student.backbone),
            Ema(dict(student.parameters), PARAMS.ema),
        )
        buckets = {"t2i": bucket, "local_edit": bucket}
        setup = Setup(student, teachers, buckets, ROUTER, params, euler_grid(6), 3, execution)
        list(distill(setup, optimizers, ema, 0, world))
        held = sum(
            value.to_local().numel() if isinstance(value, DTensor) else value.numel()
            for value in student.network.parameters()
        )
        return dict(student.parameters), whole, held

    def act(rank: int) -> None:
        with joined(rank, 2, tmp_path / "meeting", torch.device("cpu")) as world:
            tensors, whole, held = run(world, replace(execution, lockstep=True))
        assert held < 0.75 * whole
        write_tensors(tmp_path / f"{rank}.safetensors", tensors)

    assert forked(act, 2) == [0, 0]
    expected, whole, held = run(ALONE, execution)
    assert held == whole
    for rank in range(2):
        trained = load_file(tmp_path / f"{rank}.safetensors")
        for name, value in expected.items():
            torch.testing.assert_close(
                trained[name], value.detach(), rtol=1e-6, atol=5e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


# --- the stage --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def stage(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the stage with changed parameters. Processes are forked: their imports are done."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks.training.processes, "START", "fork")

    def run(out: str, **changes: Any) -> int:
        params = write_params(
            tmp_path / "params.yaml",
            **{
                "batch": 4,
                "rollout_steps": 4,
                "optimizer": "adamw",
                "trainable": "adapter",
                "start": "base",
                **changes,
            },
        )
        arguments = [
            "distill",
            "--encoded",
            str(tiny.encoded),
            "--teachers",
            str(tiny.teachers),
            "--out",
            out,
            "--params",
            str(params),
        ]
        return main(arguments)

    return run


def weights(out: str) -> dict[str, torch.Tensor]:
    return load_file(Path(out) / "adapter_model.safetensors")


def test_a_run_stopped_in_two_processes_goes_on_in_one(
    stage: Callable[..., int], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stage("alone") == 0
    for folder in Path("runs").glob("distill-*"):
        folder.rename(f"{folder}.done")
    assert len(list(Path("runs").glob("distill-*.done"))) == 1

    original = run_training

    def dying(*arguments: Any, **named: Any) -> Any:
        if tasks.training.processes.this_process().rank == 1:
            noise = model.setup.noise_for

            def die(seed: int, index: int, *others: Any) -> torch.Tensor:
                if index == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                return noise(seed, index, *others)

            monkeypatch.setattr(model.setup, "noise_for", die)
        return original(*arguments, **named)

    with monkeypatch.context() as context:
        context.setattr(tasks.stages.distill, "run_training", dying)
        begun = time.monotonic()
        assert stage("two", processes=2) == 2
        assert time.monotonic() - begun < 120  # not the collective's patience
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert "process 2 of 2 was killed by signal 9 (SIGKILL)" in error and "same command" in error
    assert not Path("two").exists() and sorted(
        path.name for path in Path("runs").glob("distill-*/step-*") if ".done" not in str(path)
    ) == ["step-00000002"]
    assert stage("two") == 0
    assert "goes on at step 2 of 4" in capfd.readouterr().out
    for name, value in weights("alone").items():
        torch.testing.assert_close(weights("two")[name], value, rtol=1e-5, atol=1e-6)


def test_the_stage_spreads_its_base_where_that_can_be(
    stage: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert stage("alone", steps=2) == 0
    for folder in Path("runs").glob("distill-*"):
        folder.rename(f"{folder}.done")
    assert stage("spread", steps=2, processes=2, shard_base=True) == 0
    for name, value in weights("alone").items():
        torch.testing.assert_close(weights("spread")[name], value, rtol=1e-5, atol=1e-6)
    assert stage("whole", steps=2, processes=2, shard_base=True, trainable="all") == 2
    assert "shard_base" in capfd.readouterr().err


def test_sigterm_to_the_stage_saves_in_two_processes(
    stage: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    child = os.fork()
    if not child:
        os._exit(stage("out", processes=2, steps=5000, save_every=5000))
    deadline = time.monotonic() + 120
    while not list(Path("runs").glob("distill-*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert (
        "stopped by SIGTERM after step" in error
        and len(list(Path("runs").glob("distill-*/step-*"))) == 1
        and not Path("out").exists()
    )


def test_sigterm_to_one_process_stops_all_after_the_same_step(
    stage: Callable[..., int], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes while a step's numbers are on their way, as on a device that runs ahead: only a common wish counts."""
    original, fitted = tasks.training.run.distill, tasks.training.run._fitted
    monkeypatch.setattr(tasks.training.run, "_fitted", lambda *given: replace(fitted(*given), deferred=True))
    assert stage("straight", processes=2, steps=8, save_every=50) == 0
    for folder in Path("runs").glob("distill-*"):
        folder.rename(f"{folder}.done")

    def signalled(*arguments: Any) -> Iterator[Any]:
        for step in original(*arguments):
            if tasks.training.processes.this_process().rank == 1 and step.index == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield step

    with monkeypatch.context() as context:
        context.setattr(tasks.training.run, "distill", signalled)
        child = os.fork()
        if not child:
            os._exit(stage("out", processes=2, steps=8, save_every=50))
        deadline = time.monotonic() + 60
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.05)
        if ended == (0, 0):  # waits for a process that waits for it
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the processes wait for each other")
    assert os.waitstatus_to_exitcode(ended[1]) == 143
    assert "stopped by SIGTERM after step 5 of 8" in capfd.readouterr().err
    (state,) = [path for path in Path("runs").glob("distill-*/step-*") if ".done" not in str(path)]
    assert state.name == "step-00000005"
    assert stage("out", processes=2, steps=8, save_every=50) == 0
    for name, value in weights("straight").items():
        assert torch.equal(weights("out")[name], value)


def test_a_refusal_in_a_process_is_the_stages_own(stage: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    assert stage("out", processes=2, start="nobody") == 2
    assert "start = 'nobody'" in capfd.readouterr().err
