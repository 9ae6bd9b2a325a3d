"""Runs DVC as a child: a stage at a time, in its own process group, so that nothing of it outlives the run that started
it.

DVC does not end its stage when it is ended itself: the stage would go on beside the next run and both would write the
same files. So the whole group is ended, by this process when it is cancelled, and by a guard beside it when this
process is killed and can do nothing any more.
"""

from __future__ import annotations

import contextlib
import itertools
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
from data.yaml_files import read_yaml
from tasks.environment import PROJECT, TEACHERS, for_children
from tasks.params.reading import PARAMS_FILE
from tasks.running.guard import GUARD

GRACE = 60.0  # s between asking a group to end and ending it: a training step ends and its state is saved meanwhile
BUNDLED = "bundled"  # the remote in .dvc/config that travels with the repository
DVC = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from tasks.running.dvc_child import main
sys.exit(main(sys.argv[1:]))
"""
KILLED = 128 + signal.SIGKILL
Listener = Callable[[str], None]  # is given each line of a child as it appears


class StageFailed(RuntimeError):
    """A stage ended with an error; the message is the stage's own."""


@dataclass(frozen=True)
class Ended:
    """A child that ended by itself: its exit status and all its lines (stdout and stderr, as they came)."""

    status: int
    lines: tuple[str, ...]


def stream(command: Sequence[str], project: Path, line: Listener) -> Ended:
    """Runs `command` in `project`, hands on its lines, and ends its process group on any exception."""
    output, into = os.pipe()
    guard = _guard(output)
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": into, "stderr": subprocess.STDOUT, "text": True}
    environment = for_children(sys.executable)
    try:
        child = subprocess.Popen(command, cwd=project, env=environment, start_new_session=True, **pipes)
        _watch(guard, child.pid)
    except BaseException:
        os.close(output)
        guard.communicate()  # it ends the group that it knows of
        raise
    finally:
        os.close(into)
    lines = []
    with os.fdopen(output, encoding="utf-8", errors="replace") as printed:
        try:
            for text in printed:
                lines.append(text.rstrip())
                line(lines[-1])
            return Ended(child.wait(), tuple(lines))
        except BaseException:
            end_group(child)
            raise
        finally:
            guard.communicate(b".")  # nothing is left for it to end


def _guard(output: int) -> subprocess.Popen[bytes]:
    """A small process in its own session that ends the child's group when this process dies."""
    command = [sys.executable, "-I", "-S", "-c", GUARD, str(GRACE), str(output)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(output,), start_new_session=True)


def _watch(guard: subprocess.Popen[bytes], group: int) -> None:
    assert guard.stdin is not None  # it was opened with PIPE
    with contextlib.suppress(BrokenPipeError):
        guard.stdin.write(f"{group}\n".encode())
        guard.stdin.flush()


def end_group(child: subprocess.Popen[str]) -> None:
    """TERM to the child's whole process group, then KILL to what is left of it after `GRACE` seconds."""
    deadline = time.monotonic() + GRACE
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            child.poll()  # a zombie leader would count as alive
            os.killpg(child.pid, 0)
            time.sleep(0.05)
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def dvc(project: Path, line: Listener, *action: str) -> Ended:
    """Runs an action of tasks/running/dvc_child.py in `project`: this code, whatever revision is checked out there."""
    return stream([sys.executable, "-P", "-c", DVC, str(PROJECT), *action], project, line)


def reproduce(stage: str, project: Path, line: Listener) -> dict[str, Any]:
    """Runs a stage, unless nothing that it reads has changed. Returns {"stage", "seconds", "summary"}.

    Raises Outage when another run holds the same files or the stage met an outage, StageFailed with the stage's own
    message otherwise.
    """
    begun = time.monotonic()
    require_success(stage, dvc(project, line, "repro", stage))
    path = project / "runs" / "summaries" / f"{stage}.json"
    summary = read_json(path) if path.exists() else {}
    return {"stage": stage, "seconds": round(time.monotonic() - begun, 1), "summary": summary}


def require_success(what: str, ended: Ended) -> None:
    """Raises the `failure` of a child that ended with an error."""
    if ended.status:
        raise failure(what, ended)


def failure(what: str, ended: Ended) -> Outage | StageFailed:
    """The exception for a child that ended with an error: its kind by the exit status, its text from its lines."""
    message = _reason(ended) or "it said nothing"
    if ended.status == TRY_AGAIN:
        return Outage(f"{what}: {message}; nothing is lost, the same command goes on from there")
    if ended.status in (KILLED, -signal.SIGKILL):
        message += " (killed from outside: perhaps the machine ran out of memory)"
    return StageFailed(f"{what}: {message}")


def _reason(ended: Ended) -> str:
    printed = [text for text in ended.lines if text.strip()]
    errors = [text for text in printed if text.startswith(("ERROR", "Error", "MemoryError"))]
    return error_of(ended.lines) or " / ".join((errors or printed)[-3:])


def error_of(lines: Sequence[str]) -> str:
    """The last `error: ...` message among a command's lines with the list of faults under it, or ""."""
    starts = [index for index, text in enumerate(lines) if text.startswith("error: ")]
    if not starts:
        return ""
    below = itertools.takewhile(lambda text: text.startswith("  "), lines[starts[-1] + 1 :])
    return "\n".join([lines[starts[-1]].removeprefix("error: "), *below])


def pull(path: str, project: Path, line: Listener) -> None:
    """Pulls `path` from the remote inside the repository, so that no server and no credentials are needed.

    What dvc.lock names is fetched unless it is there already. Raises UserError naming what to do.

    Teachers that the params bring along are no part of dvc.lock until then: they are fetched and checked by their
    stage, which is frozen, and committed.
    """
    if path == str(TEACHERS) and (read_yaml(project / PARAMS_FILE).get("teachers") or {}).get("sources"):
        require_success(path, stream([sys.executable, "-m", "tasks", "teachers", "--out", path], project, line))
        require_success(path, dvc(project, line, "commit", "teachers"))
        return
    ended = dvc(project, line, "pull", BUNDLED, path)
    if not ended.status and (project / path).exists():
        return
    if ended.status == TRY_AGAIN:
        raise failure(path, ended)
    reason = _reason(ended) or "it is in no remote"
    remedy = f"To throw away changes made there: dvc checkout --force {path}; to train them anew: make teachers"
    raise UserError(f"{path}: could not be fetched: {reason}\n{remedy}")
