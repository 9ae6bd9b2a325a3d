"""Property: a distillation that was killed, terminated or interrupted goes on from the same command and ends bit for bit as if it never had been."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import model.distill
from model.checkpoint import TENSORS
from model.randomness import noise_for
from tasks.__main__ import main
from tests.tiny import Tiny, build, write_params

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("student")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own, one thread (sums in another order are other bits), and the signals' handlers as they were."""
    monkeypatch.chdir(tmp_path)
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


def command(tiny: Tiny, params: Path, out: Path = OUT) -> list[str]:
    return ["distill", "--encoded", str(tiny.encoded), "--teachers", str(tiny.teachers), "--out", str(out), "--params", str(params)]


def result(folder: Path) -> dict[str, Any]:
    """Every byte of the student, and the step table without the column that tells time."""
    files: dict[str, Any] = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "steps.csv"}
    with open(folder / "steps.csv", newline="") as file:
        files["steps.csv"] = [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]
    return files


def straight(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, Any]:
    """What an uninterrupted run gives."""
    folder = tmp_path / "straight"
    folder.mkdir()
    with monkeypatch.context() as context:
        context.chdir(folder)
        assert main(command(tiny, write_params(folder / "params.yaml", **changes))) == 0
    return result(folder / OUT)


def states(folder: Path = Path(".")) -> list[str]:
    return sorted(path.name for path in folder.glob("runs/distill-*/*"))


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Lets `act` happen in the middle of the step of that index, once its rows are drawn."""

    def acting(seed: int, index: int, *others: Any) -> torch.Tensor:
        if index == step:
            act()
        return noise_for(seed, index, *others)

    monkeypatch.setattr(model.distill, "noise_for", acting)


def test_killed_and_run_again_equals_never_stopped(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = straight(tiny, tmp_path, monkeypatch)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for attempt in range(4):  # the kill must land between the state of step 2 and the end
        folder = tmp_path / f"killed-{attempt}"
        folder.mkdir()
        arguments = [sys.executable, "-m", "tasks", *command(tiny, write_params(folder / "params.yaml"))]
        with open(folder / "log", "w") as log:
            process = subprocess.Popen(arguments, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
            deadline = time.monotonic() + 240
            while not list(folder.glob("runs/distill-*/step-00000002")) and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            assert process.wait() in (-signal.SIGKILL, 0), (folder / "log").read_text()
        if "step-00000004" not in states(folder):
            break
    assert "step-00000002" in states(folder) and "step-00000004" not in states(folder) and not (folder / OUT).exists()
    again = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    assert "goes on at step 2 of 4" in again.stdout
    assert result(folder / OUT) == expected
    assert states(folder) == ["step-00000002", "step-00000004"]  # and nothing half-written beside them


@pytest.mark.parametrize(
    "changes",
    [
        {"trainable": "all", "optimizer": "muon", "start": "merged"},
        {"trainable": "adapter", "optimizer": "adamw", "start": "base"},
        {"trainable": "adapter", "optimizer": "muon", "start": "merged"},
    ],
)
def test_two_and_two_steps_are_four(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
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


def test_sigterm_saves_the_step_and_says_so(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    expected = straight(tiny, tmp_path, monkeypatch)
    arguments = command(tiny, write_params(tmp_path / "params.yaml"))
    with monkeypatch.context() as context:
        at_step(context, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        capsys.readouterr()
        assert main(arguments) != 0
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and "SIGTERM after step 3 of 4" in errors[0] and "same command" in errors[0]
    assert states() == ["step-00000002", "step-00000003"] and not OUT.exists()
    assert main(arguments) == 0
    assert result(OUT) == expected


def test_ctrl_c_is_one_line_and_goes_on(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    expected = straight(tiny, tmp_path, monkeypatch)
    arguments = command(tiny, write_params(tmp_path / "params.yaml"))
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with Ctrl-C ignored
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


def test_a_step_not_finite_keeps_the_rest(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = command(tiny, write_params(tmp_path / "params.yaml", save_every=50))
    monkeypatch.setattr(model.distill, "noise_for", lambda seed, index, *others: noise_for(seed, index, *others) * (float("nan") if index == 3 else 1.0))
    assert main(arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and "step 3" in errors[0] and "not finite" in errors[0]
    assert states() == ["step-00000003"] and not OUT.exists()


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
