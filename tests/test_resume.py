"""Property: a distillation that was killed, terminated or interrupted goes on from the same command and ends bit for
bit as if it never had been.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import model.setup
import tasks.training.run
from data.files import read_json
from model.checkpoint import TENSORS
from model.randomness import noise_for
from tasks.__main__ import main
from tasks.training.metrics import read_metrics, speed_file
from tests.tiny import Tiny, build, write_params

OUT = Path("student")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own, one thread (sums in another order are other bits), and the signals' handlers as they
    were.
    """
    monkeypatch.chdir(tmp_path)
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


def command(tiny: Tiny, params: Path, out: Path = OUT) -> list[str]:
    return [
        "distill",
        "--encoded",
        str(tiny.encoded),
        "--teachers",
        str(tiny.teachers),
        "--out",
        str(out),
        "--params",
        str(params),
    ]


def result(folder: Path) -> dict[str, bytes]:
    """Every byte that DVC hashes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def straight(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, bytes]:
    """What an uninterrupted run gives."""
    folder = tmp_path / "straight"
    folder.mkdir(parents=True)
    with monkeypatch.context() as context:
        context.chdir(folder)
        assert main(command(tiny, write_params(folder / "params.yaml", **changes))) == 0
    return result(folder / OUT)


def states(folder: Path = Path(".")) -> list[str]:
    return sorted(path.name for path in folder.glob("runs/distill-*/step-*"))


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Lets `act` happen in the middle of the step of that index, once its rows are drawn."""

    def acting(seed: int, index: int, *others: Any) -> torch.Tensor:
        if index == step:
            act()
        return noise_for(seed, index, *others)

    monkeypatch.setattr(model.setup, "noise_for", acting)


def in_a_child(arguments: list[str], folder: Path) -> int:
    """Runs the command in a forked process, whose imports are done, and returns its id."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.chdir(folder)
        os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        status = main(arguments)
    finally:
        os._exit(status)


def at_work(child: int) -> bool:
    """Whether the child runs; one that has ended is taken off the process table."""
    try:
        return os.waitpid(child, os.WNOHANG) == (0, 0)
    except ChildProcessError:
        return False


def test_two_undisturbed_runs_give_equal_bytes_and_the_speed_lies_apart(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among them the pictures and gaps of validations; what a clock or the memory tells is beside the states."""
    changes = {"held_out": 2, "validate_every": 2, "cosine_every": 2}
    first = straight(tiny, tmp_path / "first", monkeypatch, **changes)
    second = straight(tiny, tmp_path / "second", monkeypatch, **changes)
    assert first == second and {"steps.csv", "metrics.jsonl", "student.json"} <= set(first)
    out = tmp_path / "first/straight" / OUT
    speed = speed_file(out.parent, out)
    assert speed is not None and speed_file(tmp_path, out) is None  # as on a machine that only pulled the outs
    lines = [(line["step"], line["name"]) for line in read_metrics(speed)]
    assert lines == [(n, name) for n in range(1, 5) for name in ("seconds", "samples_per_second", "memory_bytes")]
    assert min(line["value"] for line in read_metrics(speed)) > 0


def test_killed_at_random_moments_equals_never_stopped(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL at no less than 20 moments over the whole run: between steps, within them, and while states, tables and
    the student are written.
    """
    changes = {
        "trainable": "adapter",
        "optimizer": "adamw",
        "start": "base",
        "steps": 24,
        "save_every": 1,
        "batch": 2,
        "rollout_steps": 3,
        "keep_every": 8,
    }
    begun = time.monotonic()
    expected = straight(tiny, tmp_path, monkeypatch, **changes)
    whole = time.monotonic() - begun
    folder = tmp_path / "killed"
    folder.mkdir()
    arguments = command(tiny, write_params(folder / "params.yaml", **changes))
    rng, kills, reached, torn = random.Random(0), 0, [], 0
    while kills < 20:
        before, child = states(folder)[-1:], in_a_child(arguments, folder)
        # A quarter while it loads, the others a moment after its first new state, however slow the machine is just now.
        loading, moment = rng.random() < 0.25, rng.uniform(0.0, 0.1) * whole
        while not loading and states(folder)[-1:] == before and at_work(child):
            time.sleep(0.002)
        deadline = time.monotonic() + moment
        while time.monotonic() < deadline and at_work(child):
            time.sleep(0.0005)
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
        except (
            ProcessLookupError,
            ChildProcessError,
        ):  # it had ended: begin again, so that every kill meets a run at work
            assert result(folder / OUT) == expected
            shutil.rmtree(folder / OUT)
            shutil.rmtree(folder / "runs")
        torn += len(list(folder.glob("runs/distill-*/.step-*")))
        reached.append(len(states(folder)) and int(states(folder)[-1].removeprefix("step-")))
    assert len(set(reached)) > 5  # the kills did hit different steps
    child = in_a_child(arguments, folder)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, (folder / "log").read_text()
    assert result(folder / OUT) == expected
    assert states(folder) == [
        "step-00000008",
        "step-00000016",
        "step-00000023",
        "step-00000024",
    ]  # the last two, every eighth, and nothing half-written
    assert not list(folder.glob("runs/distill-*/.*"))


LOOKS = {"held_out": 2, "validate_every": 2, "cosine_every": 2, "save_every": 50}


def test_a_look_at_the_student_that_fails_loses_no_step(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state is saved before a validation, which is made again from it."""
    expected = straight(tiny, tmp_path, monkeypatch, **LOOKS)
    arguments = command(tiny, write_params(tmp_path / "params.yaml", **LOOKS))

    def crash(*_: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as context:
        context.setattr(tasks.training.run, "held_out_pictures", crash)
        with pytest.raises(ZeroDivisionError):
            main(arguments)
    assert states() == ["step-00000002"] and not OUT.exists()
    with monkeypatch.context() as context:
        at_step(context, 3, lambda: crash())  # after the validation, before the next state
        with pytest.raises(ZeroDivisionError):
            main(arguments)
    assert states() == ["step-00000002"]
    with monkeypatch.context() as context:
        at_step(context, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main(arguments) == 0  # it was the last step
    assert result(OUT) == expected


def test_sigterm_comes_before_the_look_that_is_due(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = straight(tiny, tmp_path, monkeypatch, **LOOKS)
    arguments = command(tiny, write_params(tmp_path / "params.yaml", **LOOKS))
    with monkeypatch.context() as context:
        at_step(context, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main(arguments) == 143
    (metrics,) = Path().glob("runs/distill-*/metrics.jsonl")
    assert states() == ["step-00000002"] and "held_out_gap" not in metrics.read_text()
    assert main(arguments) == 0
    assert result(OUT) == expected


def test_a_state_of_another_layout_is_left_aside_and_said(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(tiny, write_params(tmp_path / "params.yaml"))
    with monkeypatch.context() as context:
        context.setattr(tasks.training.states, "LAYOUT", 1)
        assert main(arguments) == 0
    assert main(arguments) == 0
    assert "starts anew" in (printed := capsys.readouterr().out) and "differs in state_layout" in printed


@pytest.mark.parametrize(
    "changes",
    [
        {"trainable": "all", "optimizer": "muon", "start": "merged"},
        {"trainable": "adapter", "optimizer": "adamw", "start": "base"},
        {"trainable": "adapter", "optimizer": "muon", "start": "merged"},
    ],
)
def test_two_and_two_steps_are_four(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    expected = straight(tiny, tmp_path, monkeypatch, **changes)
    arguments = command(tiny, write_params(tmp_path / "params.yaml", **changes))

    def crash() -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as context:
        at_step(context, 3, crash)
        with pytest.raises(ZeroDivisionError):
            main(arguments)
    assert states() == ["step-00000002"] and not OUT.exists()
    assert main(arguments) == 0
    assert result(OUT) == expected


def test_sigterm_saves_the_step_and_says_so(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = straight(tiny, tmp_path, monkeypatch)
    arguments = command(tiny, write_params(tmp_path / "params.yaml"))
    with monkeypatch.context() as context:
        at_step(context, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        capsys.readouterr()
        assert main(arguments) == 143  # as SIGTERM ends a process: DVC must not take the stage for done
    errors = capsys.readouterr().err.splitlines()
    assert (
        len(errors) == 1
        and errors[0].startswith("error: ")
        and "SIGTERM after step 3 of 4" in errors[0]
        and "same command" in errors[0]
    )
    assert states() == ["step-00000002", "step-00000003"] and not OUT.exists()
    assert main(arguments) == 0
    assert result(OUT) == expected


def test_ctrl_c_is_one_line_and_goes_on(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = straight(tiny, tmp_path, monkeypatch)
    arguments = command(tiny, write_params(tmp_path / "params.yaml"))
    inherited = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job starts with Ctrl-C ignored
    try:
        with monkeypatch.context() as context:
            at_step(context, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
            capsys.readouterr()
            assert main(arguments) == 130
    finally:
        signal.signal(signal.SIGINT, inherited)
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1 and "interrupted" in printed.err and "same command" in printed.err
    assert "interrupted" not in printed.out and "Traceback" not in printed.out
    assert states() == ["step-00000002"] and not OUT.exists()
    assert main(arguments) == 0
    assert result(OUT) == expected


def test_a_step_not_finite_keeps_the_rest(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(tiny, write_params(tmp_path / "params.yaml", save_every=50))
    monkeypatch.setattr(
        model.setup,
        "noise_for",
        lambda seed, index, *others: noise_for(seed, index, *others) * (float("nan") if index == 3 else 1.0),
    )
    assert main(arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and "step 3" in errors[0] and "not finite" in errors[0]
    assert states() == ["step-00000003"] and not OUT.exists()
    (folder,) = Path().glob("runs/distill-*/not-finite-00000003")
    assert str(folder) in errors[0]
    plan, samples = read_json(folder / "samples.json"), load_file(folder / "samples.safetensors")
    assert (
        plan["step"] == 3 and len(plan["rows"]) == len(plan["query"]) == 8 and plan["rows"] == samples["rows"].tolist()
    )
    assert sum(name.startswith("x_t.") for name in samples) == 8 and any(
        bool(value.isnan().any()) for value in samples.values()
    )


def test_a_truncated_state_is_one_clear_message(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = command(tiny, write_params(tmp_path / "params.yaml"))
    assert main(arguments) == 0
    (newest,) = Path().glob("runs/distill-*/step-00000004")
    content = (newest / TENSORS).read_bytes()
    (newest / TENSORS).write_bytes(content[: len(content) // 2])
    capsys.readouterr()
    assert main(arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and "truncated" in errors[0] and "remove" in errors[0]


def test_other_params_never_go_on_from_this_state(tiny: Tiny, tmp_path: Path) -> None:
    for seed in (0, 1):
        assert main(command(tiny, write_params(tmp_path / "params.yaml", seed=seed), Path(f"student-{seed}"))) == 0
    assert len(list(Path("runs").glob("distill-*"))) == 2
    first, second = (result(Path(f"student-{seed}")) for seed in (0, 1))
    assert first["steps.csv"] != second["steps.csv"]


def test_a_finished_run_only_writes_its_result_again(tiny: Tiny, tmp_path: Path) -> None:
    arguments = command(tiny, write_params(tmp_path / "params.yaml"))
    assert main(arguments) == 0
    before = result(OUT)
    for path in sorted(OUT.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert main(arguments) == 0
    assert result(OUT) == before
