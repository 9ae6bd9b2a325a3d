"""A stage's process never outlives the run that started it, and what a failed one said reaches the user as its own
message.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.errors import TRY_AGAIN, Outage
from tasks.environment import PROJECT
from tasks.running.repro import Ended, StageFailed, error_of, failure, stream


def test_lines_arrive_and_the_status_is_told(tmp_path: Path) -> None:
    seen: list[str] = []
    ended = stream(["bash", "-c", "echo one; echo two >&2; pwd; exit 3"], tmp_path, seen.append)
    assert ended == Ended(3, ("one", "two", str(tmp_path)))
    assert seen == list(ended.lines)


def test_python_of_the_child_is_this_one(tmp_path: Path) -> None:
    ended = stream(["bash", "-c", "command -v python"], tmp_path, lambda text: None)
    assert Path(ended.lines[0]).parent == Path(sys.executable).parent


def alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.parametrize("deaf", [False, True], ids=["ends on TERM", "ignores TERM"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_takes_its_whole_group_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaf: bool, error: type[BaseException]
) -> None:
    """The grandchild stands for the stage below dvc: ending dvc alone would leave it writing."""
    monkeypatch.setattr("tasks.running.repro.GRACE", 0.5)
    trap = "trap '' TERM; " if deaf else ""
    script = f"{trap}bash -c '{trap}echo $$; while true; do sleep 0.1; done' & echo $$; wait; sleep 60"
    numbers: list[int] = []

    def line(text: str) -> None:
        numbers.append(int(text))
        if len(numbers) == 2:
            raise error("stop")

    with pytest.raises(error):
        stream(["bash", "-c", script], tmp_path, line)
    deadline = time.monotonic() + 10
    while any(map(alive, numbers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(numbers) == 2 and not any(map(alive, numbers))


def test_the_stages_own_message_is_found() -> None:
    lines = [
        "Running stage 'curate':",
        "error: first",
        "note",
        "error: params.yaml: 2 faults",
        "  - a = 1: wrong",
        "  - b: missing",
        "ERROR: failed",
    ]
    assert error_of(lines) == "params.yaml: 2 faults\n  - a = 1: wrong\n  - b: missing"
    assert error_of(["all is well"]) == ""


@pytest.mark.parametrize(
    ("status", "lines", "kind", "words"),
    [
        (2, ("error: data/raw: no such file", "ERROR: failed to reproduce"), StageFailed, "^curate: data/raw: no such"),
        (1, ("Traceback", "ERROR: failed to reproduce 'curate'"), StageFailed, "^curate: ERROR: failed to reproduce"),
        (TRY_AGAIN, ("ERROR: another run is at work",), Outage, "^curate: ERROR: another run .* goes on from there"),
        (2, ("error: Connection refused is a prompt here",), StageFailed, "a prompt here$"),
        (1, (), StageFailed, "^curate: it said nothing$"),
    ],
)
def test_the_exit_status_tells_the_kind_of_a_failure(
    status: int, lines: tuple[str, ...], kind: type[Exception], words: str
) -> None:
    error = failure("curate", Ended(status, lines))
    assert type(error) is kind and re.search(words, str(error))


def test_a_killed_stage_is_told_as_such() -> None:
    assert "out of memory" in str(failure("distill", Ended(-9, ("step 3",))))


def test_a_killed_run_takes_its_whole_group_along(tmp_path: Path) -> None:
    """SIGKILL leaves no time for anything: a guard beside the run asks the group to end, so that a stage saves its
    state.
    """
    stage = "trap 'echo saved > state; exit' TERM; echo $$ > number; while true; do sleep 0.1; done"
    call = f"stream(['bash', '-c', {stage!r}], Path({str(tmp_path)!r}), print)"
    script = f"from pathlib import Path; from tasks.running.repro import stream; {call}"
    run = subprocess.Popen([sys.executable, "-c", script], cwd=PROJECT)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "number").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        number = int((tmp_path / "number").read_text(encoding="utf-8"))
    finally:
        run.kill()
        run.wait()
    while alive(number) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(number) and (tmp_path / "state").read_text(encoding="utf-8") == "saved\n"


def test_a_guard_lets_a_finished_group_be(tmp_path: Path) -> None:
    """What a command leaves running on purpose is not the run's to end; the guard itself is gone."""
    before = _children()  # servers of other tests
    ended = stream(["bash", "-c", "sleep 30 >/dev/null 2>&1 & echo $!"], tmp_path, lambda text: None)
    number = int(ended.lines[0])
    time.sleep(0.3)
    assert alive(number)
    os.kill(number, signal.SIGKILL)
    assert _children() <= before


def _children() -> set[int]:
    entries = [entry for entry in Path("/proc").glob("[0-9]*/stat") if _parent(entry) == os.getpid()]
    return {number for number in (int(entry.parent.name) for entry in entries) if alive(number)}


def _parent(stat: Path) -> int:
    try:
        return int(stat.read_text(encoding="utf-8").rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0
