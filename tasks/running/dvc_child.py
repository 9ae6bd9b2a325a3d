"""DVC in a separate process. Its exit status tells the types of DVC's exceptions, so that nobody reads its English.

    repro STAGE         that stage alone
    pull REMOTE PATH    what dvc.lock names there, from that remote
    fetch               what dvc.lock names and the default remote has, with the record of earlier runs
    push                to the default remote, with that record
    commit STAGE        takes the files that are there as the stage's

0: done. 75 (EX_TEMPFAIL): a store does not answer, a file was not transferred, or another run holds the lock. A stage's
own status where its command failed, 128 + N where signal N ended it. 1: anything else that DVC refuses. DVC's locks are
held by a process, so DVC is imported nowhere else.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import dvc.stage.run
from dvc.exceptions import CheckoutError, DownloadError, FileTransferError
from dvc.lock import LockError
from dvc.repo import Repo
from dvc.stage.exceptions import StageCmdFailedError

from data.errors import TRY_AGAIN, causes
from tasks.s3 import objects

LOGGERS = ("dvc", "dvc_data", "dvc_objects")
BUSY = "another run is at work on the same files; wait until it ends"
ADVICE = ("dvc.dvcfile", "dvc.repo.reproduce", "dvc.repo.scm_context")  # on git, and that a frozen stage is frozen


class _CommandFailed(StageCmdFailedError):
    """DVC keeps a command's exit status in the message alone."""

    def __init__(self, cmd: str, status: int) -> None:
        super().__init__(cmd, status)
        self.status = status


class _Skipped(logging.Handler):
    """What DVC logs and goes on from: files that were not transferred. Of its run cache it raises nothing later."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.errors: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self.errors.append(record.exc_info[1])


ACTIONS: dict[str, Callable[..., None]] = {
    "repro": lambda repo, stage: repo.reproduce(stage, single_item=True),
    "pull": lambda repo, remote, path: repo.pull(path, remote=remote),
    "fetch": lambda repo: repo.pull(run_cache=True, allow_missing=True, force=True),
    "push": lambda repo: repo.push(run_cache=True),
    "commit": lambda repo, stage: repo.commit(stage, force=True),
}


def status_of(error: BaseException | None, skipped: list[BaseException]) -> int:
    """The exit status for what was raised (None: nothing) and what was logged on the way."""
    chain = [cause for first in (error, *skipped) for cause in causes(first)]
    failed = next((cause for cause in chain if isinstance(cause, _CommandFailed)), None)
    if failed is not None:
        return failed.status if failed.status > 0 else 128 - failed.status
    if any(isinstance(cause, PermissionError) for cause in chain):
        return 1
    if any(isinstance(cause, LockError) or objects.is_outage(cause) for cause in chain):
        return TRY_AGAIN
    if skipped and (error is None or isinstance(error, FileTransferError)):
        return TRY_AGAIN
    return 0 if error is None else 1


def main(argv: list[str]) -> int:
    skipped = _Skipped()
    error: BaseException | None = None
    dvc.stage.run.StageCmdFailedError = _CommandFailed
    for name in ADVICE:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in LOGGERS:
        logging.getLogger(name).addHandler(skipped)
    try:
        with Repo() as repo:
            ACTIONS[argv[0]](repo, *argv[1:])
    except (DownloadError, CheckoutError) as missing:
        error = missing if skipped.errors or argv[0] != "fetch" else None
    except Exception as raised:
        error = raised
    if error is not None:
        chain = list(causes(error))
        busy = any(isinstance(cause, LockError) for cause in chain)
        said = BUSY if busy else ": ".join(str(cause) or type(cause).__name__ for cause in chain)
        print(f"ERROR: {said}", file=sys.stderr, flush=True)
    return status_of(error, skipped.errors)
