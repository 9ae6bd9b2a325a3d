"""A stage in several data-parallel processes on this machine, started and watched by the stage itself, so that DVC and
Prefect see one command."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from data.errors import Outage, Terminated, UserError
from model.compute.execution import device_of
from model.compute.parallel import ALONE, World, joined

START = "spawn"  # a forked child cannot use CUDA, nor threads that its parent had
GRACE = 20.0  # s from asking a process to end until it is ended
ERRORS = {"terminated": Terminated, "outage": Outage, "refused": UserError}  # word of a process -> what it met
SILENT = ("", None)  # the last word of a process that said nothing
_here = [ALONE]  # this process's place, set once by `_work`


def this_process() -> World:
    """This process's place among those of its stage."""
    return _here[0]


def in_processes(stage: str, params: Any, paths: dict[str, Path]) -> dict[str, Any]:
    """Runs a stage's function in `params.execution.processes` processes and returns rank 0's summary.

    Raises the UserError that any of them met. When one dies all are ended, and that is a UserError too. SIGTERM is
    handed on: they save and stop.
    """
    context: Any = multiprocessing.get_context(START)
    with tempfile.TemporaryDirectory(prefix="processes-") as folder:
        pipes, children = [], list[SpawnProcess]()
        for rank in range(params.execution.processes):
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(
                target=_work, args=(stage, params, paths, rank, Path(folder) / "meeting", theirs), daemon=True
            )
            with _as_module():
                child.start()
            theirs.close()
            pipes.append(ours)
            children.append(child)
        asked: list[bool] = []

        def hand_on() -> None:
            asked.append(True)
            for child in children:
                if child.is_alive():
                    child.terminate()

        with on_sigterm(hand_on):
            _watch(children)
        words = [_last_word(pipe) for pipe in pipes]
    _raise_what_they_met(stage, words, [child.exitcode or 0 for child in children], bool(asked))
    summary: dict[str, Any] = words[0][1]
    return summary


def _raise_what_they_met(stage: str, words: list[tuple[str, Any]], codes: list[int], asked: bool) -> None:
    """The error that a process told as its last word, by importance; nothing where all have ended well."""
    said = {word for word, _ in words}
    if asked and not said & {"done", "terminated"}:
        raise Terminated(f"{stage}: stopped by SIGTERM before its first step; the same command starts it again")
    for word, error in ERRORS.items():
        if word in said:
            raise error(next(text for name, text in words if name == word))
    failed = [rank for rank, code in enumerate(codes) if code]
    if failed:
        # A process that lost a peer says so; the cause is the silent one.
        rank = next((rank for rank in failed if words[rank] == SILENT), failed[0])
        code = codes[rank]
        killed = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else ""
        raise UserError(
            f"{stage}: process {rank + 1} of {len(codes)} {killed or f'failed with exit status {code}'}; all were "
            "stopped, and the same command goes on from the last saved state "
            "(out of memory? lower execution.micro_batch or execution.processes)"
        )


@contextmanager
def _as_module() -> Iterator[None]:
    """Within it a spawned child does not import its parent's main module, which it has no use for."""
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
    """Until all have ended. The first that fails takes the others along; Ctrl-C ends them all."""
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
def on_sigterm(act: Callable[[], None]) -> Iterator[None]:
    """Within it SIGTERM calls `act` instead of ending this process."""
    before = signal.signal(signal.SIGTERM, lambda *_: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _last_word(pipe: Connection) -> tuple[str, Any]:
    try:
        return pipe.recv() if pipe.poll() else SILENT
    except EOFError:
        return SILENT


def _end_with(parent: Any) -> None:
    """Nobody is left to report to."""
    wait([parent.sentinel])
    os._exit(1)


def _work(stage: str, params: Any, paths: dict[str, Path], rank: int, meeting: Path, word: Connection) -> None:
    execution = params.execution
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    device = device_of(execution, rank)
    if device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // execution.processes))
    try:
        with joined(rank, execution.processes, meeting, device) as _here[0]:
            summary = getattr(importlib.import_module(f"tasks.stages.{stage}"), stage)(params, **paths)
        word.send(("done", summary))
    except (Terminated, UserError, RuntimeError) as error:
        kind = _kind(error)
        if kind is None:
            raise
        word.send((kind, str(error)))
        raise SystemExit(4 if kind == "lost" else 3) from None


def _kind(error: Exception) -> str | None:
    """The word for an error that the stage knows; None for a defect."""
    for word, kind in ERRORS.items():
        if isinstance(error, kind):
            return word
    # gloo tells a lost peer as a bare RuntimeError, by its text alone.
    lost = isinstance(error, torch.distributed.DistBackendError) or "onnection" in str(error) or "gloo" in str(error)
    return "lost" if lost else None
