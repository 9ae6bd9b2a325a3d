"""A stage in several data-parallel processes on this machine, started and watched by the stage itself, so that DVC and
Prefect see one command.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from data.errors import Outage, Terminated, UserError
from model.compute.execution import device_of
from model.compute.parallel import ALONE, World, joined
from model.compute.settings import ExecutionParams

START = "spawn"  # a forked child cannot use CUDA, nor threads that its parent had
GRACE = 20.0  # s from asking a process to end until it is ended
_here = [ALONE]  # this process's place, set once by `_work`


def this_process() -> World:
    return _here[0]


def in_processes(stage: str, params: Any, paths: dict[str, Path], execution: ExecutionParams) -> dict[str, Any]:
    """Runs tasks.STAGE's function in `execution.processes` processes and returns rank 0's summary.

    Raises the UserError that any of them met. When one dies all are ended, and that is a UserError too. SIGTERM is
    handed on: they save and stop.
    """
    context: Any = multiprocessing.get_context(START)
    with tempfile.TemporaryDirectory(prefix="processes-") as folder:
        pipes, children = [], list[SpawnProcess]()
        for rank in range(execution.processes):
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(
                target=_work,
                args=(stage, params, paths, rank, execution, Path(folder) / "meeting", theirs),
                daemon=True,
            )
            with _as_module():
                child.start()
            theirs.close()
            pipes.append(ours)
            children.append(child)
        with _handed_on(children) as asked:
            _watch(children)
        words = [_last_word(pipe) for pipe in pipes]
    if (
        asked
        and not any(word and word[0] == "done" for word in words)
        and not any(word and word[0] == "terminated" for word in words)
    ):
        raise Terminated(f"{stage}: stopped by SIGTERM before its first step; the same command starts it again")
    for word in words:
        if word and word[0] == "terminated":
            raise Terminated(word[1])
    for word in words:
        if word and word[0] in ("refused", "outage"):
            raise (Outage if word[0] == "outage" else UserError)(word[1])
    failed = [rank for rank, child in enumerate(children) if child.exitcode != 0]
    if failed:
        # One that lost a peer says so; the cause is the one that says nothing.
        rank = next((rank for rank in failed if not words[rank]), failed[0])
        code = children[rank].exitcode or 0
        how = (
            f"was killed by signal {-code} ({signal.Signals(-code).name})"
            if code < 0
            else f"failed with exit status {code}"
        )
        raise UserError(
            f"{stage}: process {rank + 1} of {len(children)} {how}; all were stopped, and the same command goes on from the last saved state "
            "(out of memory? lower execution.micro_batch or execution.processes)"
        )
    assert words[0] is not None
    summary: dict[str, Any] = words[0][1]
    return summary


@contextmanager
def _as_module() -> Iterator[None]:
    """A spawned child imports its parent's main module again; ours is not worth that, and pytest's cannot be."""
    main: Any = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    main.__spec__ = None
    if file is not None:
        del main.__file__
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


def _watch(children: Sequence[SpawnProcess]) -> None:
    """Until all have ended. The first that fails takes the others along."""
    try:
        left = list(children)
        while left:
            wait([child.sentinel for child in left])
            for child in [child for child in left if child.exitcode is not None]:
                left.remove(child)
                if child.exitcode:
                    return
    finally:
        for child in children:
            child.join(0 if child.exitcode is not None else 2.0)
        for child in children:
            if child.is_alive():
                child.terminate()
        for child in children:
            child.join(GRACE)
            if child.is_alive():
                child.kill()
                child.join()


@contextmanager
def _handed_on(children: Sequence[SpawnProcess]) -> Iterator[list[int]]:
    """SIGTERM goes to every child, and its number into the list; Ctrl-C reaches them by `_watch` ending them."""
    asked: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for child in children:
            if child.is_alive():
                child.terminate()

    before = signal.signal(signal.SIGTERM, hand_on)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def _last_word(pipe: Connection) -> tuple[str, Any] | None:
    try:
        return pipe.recv() if pipe.poll() else None
    except EOFError:
        return None


def _work(
    stage: str,
    params: Any,
    paths: dict[str, Path],
    rank: int,
    execution: ExecutionParams,
    meeting: Path,
    word: Connection,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(
        target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True
    ).start()  # nobody is left to report to
    device = device_of(execution, rank)
    if device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // execution.processes))
    try:
        with joined(rank, execution.processes, meeting, device) as _here[0]:
            summary = getattr(importlib.import_module(f"tasks.stages.{stage}"), stage)(params, **paths)
        word.send(("done", summary))
    except Terminated as error:
        word.send(("terminated", str(error)))
        raise SystemExit(3) from None
    except UserError as error:
        word.send(("outage" if isinstance(error, Outage) else "refused", str(error)))
        raise SystemExit(3) from None
    except torch.distributed.DistBackendError as error:
        word.send(("lost", str(error)))
        raise SystemExit(4) from None
    except RuntimeError as error:
        if "onnection" not in str(error) and "gloo" not in str(error):
            raise
        word.send(("lost", str(error)))
        raise SystemExit(4) from None
