"""Runs DVC as a child: one stage at a time, in a process group of its own, so that nothing of it outlives the run that
started it.

DVC does not end its stage when it is ended itself: the stage would go on beside the next run and both would write the
same files. So the whole group is ended, by this process when it is cancelled, and by a guard beside it when this
process is killed and can do nothing any more.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import TRY_AGAIN, Outage, UserError
from data.files import read_json
from tasks.environment import PROJECT, for_children
from tasks.running.guard import GUARD

GRACE = 60.0  # s between asking a group to end and ending it: a training step ends and its state is saved meanwhile
BUNDLED = "bundled"  # the remote in .dvc/config that travels with the repository
DVC = "import sys; sys.path.insert(0, sys.argv.pop(1)); from tasks.running.dvc_child import main; sys.exit(main(sys.argv[1:]))"
KILLED = 128 + signal.SIGKILL


class StageFailed(RuntimeError):
    """A stage ended with an error; the message is the stage's own."""


@dataclass(frozen=True)
class Ended:
    """A child that ended by itself: its exit status and all its lines (stdout and stderr as one)."""

    status: int
    lines: tuple[str, ...]


def stream(command: Sequence[str], project: Path, line: Callable[[str], None]) -> Ended:
    """Runs `command` in `project` and hands on each line as it appears. On any exception, cancellation included, its
    process group is ended first.
    """
    output, into = os.pipe()
    guard = _guard(output)
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": into, "stderr": subprocess.STDOUT, "text": True}
    try:
        child = subprocess.Popen(
            command, cwd=project, env=for_children(sys.executable), start_new_session=True, **pipes
        )
        _tell(guard, f"{child.pid}\n")
    except BaseException:
        os.close(output)
        _dismiss(guard, "")  # it ends what it has been told of
        raise
    finally:
        os.close(into)
    lines = []
    with os.fdopen(output, encoding="utf-8", errors="replace") as told:
        try:
            for text in told:
                lines.append(text.rstrip())
                line(lines[-1])
            return Ended(child.wait(), tuple(lines))
        except BaseException:
            end_group(child)
            raise
        finally:
            _dismiss(guard)


def _guard(output: int) -> subprocess.Popen[bytes]:
    """A small process in a session of its own that ends the child's group when this process dies."""
    command = [sys.executable, "-I", "-S", "-c", GUARD, str(GRACE), str(output)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(output,), start_new_session=True)


def _tell(guard: subprocess.Popen[bytes], word: str) -> None:
    assert guard.stdin is not None  # asked for with PIPE
    with contextlib.suppress(BrokenPipeError):
        guard.stdin.write(word.encode())
        guard.stdin.flush()


def _dismiss(guard: subprocess.Popen[bytes], word: str = ".") -> None:
    assert guard.stdin is not None  # asked for with PIPE
    _tell(guard, word)
    with contextlib.suppress(BrokenPipeError):
        guard.stdin.close()
    guard.wait()


def end_group(child: subprocess.Popen[str]) -> None:
    """TERM to the child's whole process group, then KILL to what is left of it after `GRACE` seconds."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline and _group_lives(child):
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _group_lives(child: subprocess.Popen[str]) -> bool:
    child.poll()  # a zombie leader would count as alive
    try:
        os.killpg(child.pid, 0)
    except ProcessLookupError:
        return False
    return True


def dvc(project: Path, line: Callable[[str], None], *action: str) -> Ended:
    """Runs an action of tasks/running/dvc_child.py in `project`: this code, whatever revision is checked out there."""
    return stream([sys.executable, "-P", "-c", DVC, str(PROJECT), *action], project, line)


def reproduce(stage: str, project: Path, line: Callable[[str], None]) -> dict[str, Any]:
    """Runs one stage, unless nothing that it reads has changed. Returns {"stage", "seconds", "summary"}.

    Raises Outage when another run holds the same files or the stage met one, StageFailed with the stage's own message
    otherwise.
    """
    begun = time.monotonic()
    ended = dvc(project, line, "repro", stage)
    if ended.status:
        raise failure(stage, ended)
    summary = project / "runs" / "summaries" / f"{stage}.json"
    found = read_json(summary) if summary.exists() else {}
    return {"stage": stage, "seconds": round(time.monotonic() - begun, 1), "summary": found}


def failure(what: str, ended: Ended) -> Outage | StageFailed:
    """The exception for a child that ended with an error: its kind by the exit status, its text from its lines."""
    told = [text for text in ended.lines if text.strip()]
    reasons = [text for text in told if text.startswith(("ERROR", "Error", "MemoryError"))] or told[-3:]
    message = error_of(ended.lines) or " / ".join(reasons[-3:]) or "it said nothing"
    if ended.status == TRY_AGAIN:
        return Outage(f"{what}: {message}; nothing is lost, the same command goes on from there")
    if ended.status in (KILLED, -signal.SIGKILL):
        message += " (killed from outside: perhaps the machine ran out of memory)"
    return StageFailed(f"{what}: {message}")


def error_of(lines: Sequence[str]) -> str:
    """The last `error: ...` message among a command's lines with the list of faults under it; empty if there is
    none.
    """
    starts = [index for index, text in enumerate(lines) if text.startswith("error: ")]
    if not starts:
        return ""
    first = starts[-1]
    message = [lines[first].removeprefix("error: ")]
    for text in lines[first + 1 :]:
        if not text.startswith("  "):
            break
        message.append(text)
    return "\n".join(message)


def pull(path: str, project: Path, line: Callable[[str], None]) -> None:
    """Pulls `path` from the remote inside the repository, so that no server and no credentials are asked for.

    What dvc.lock names is fetched unless it is there already. Raises UserError naming what to do.

    Teachers that the params bring along are no part of dvc.lock until then: they are fetched and checked by their
    stage, which is frozen, and committed.
    """
    from data.yaml_files import read_yaml
    from tasks.params.reading import PARAMS_FILE

    if path == "data/teachers" and (read_yaml(project / PARAMS_FILE).get("teachers") or {}).get("sources"):
        ended = stream([sys.executable, "-m", "tasks", "teachers", "--out", path], project, line)
        if not ended.status:
            ended = dvc(project, line, "commit", "teachers")
        if ended.status:
            raise failure(path, ended)
        return
    ended = dvc(project, line, "pull", BUNDLED, path)
    if not ended.status and (project / path).exists():
        return
    error = failure(path, ended)
    if isinstance(error, Outage):
        raise error
    told = [text for text in ended.lines if text.strip()]
    reason = " / ".join([text for text in told if text.startswith("ERROR")] or told[-2:]) or "it is in no remote"
    raise UserError(
        f"{path}: could not be fetched: {reason}\nTo throw away changes made there: dvc checkout --force {path}; to train them anew: make teachers"
    )
