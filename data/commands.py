"""What every command line here does alike: commands by name, a mistake in one line, an exit status for each ending."""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import NoReturn

from data.errors import TRY_AGAIN, Outage, Terminated, UserError
from data.files import explain

REFUSALS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.EISDIR,
    errno.ENOTDIR,
}
KEPT = "what was finished is kept, nothing half-written was left, the same command goes on from there"


class _Asked(BaseException):
    """SIGTERM, as an exception: temporary files are removed on the way out."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Asked


def run(command: Callable[[], int]) -> int:
    """The command's exit status; 2 after a user's mistake, 75 an outage (try again), 130 interrupted, 141 unheard, 143
    terminated.

    Whatever else is raised is a defect and keeps its traceback.
    """
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        status = command()
        sys.stdout.flush()
        return status
    except Terminated as error:
        return _refuse(str(error), 143)
    except UserError as error:
        return _refuse(str(error), TRY_AGAIN if isinstance(error, Outage) else 2)
    except KeyboardInterrupt as error:
        return _refuse(str(error) or f"interrupted; {KEPT}", 130)
    except _Asked:
        return _refuse(f"terminated; {KEPT}", 143)
    except MemoryError:
        return _refuse("not enough memory; lower the batch or the model's size, or close other programs", 2)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _unheard():
            return 141
        if error.errno not in REFUSALS:
            raise
        return _refuse(str(explain(error, Path(os.fsdecode(error.filename or ".")))), 2)
    except RuntimeError as error:
        if "allocate memory" not in str(error) and "out of memory" not in str(error):  # how torch says MemoryError
            raise
        return _refuse(f"not enough memory ({str(error).splitlines()[0]}); lower the batch or the model's size", 2)
    finally:
        signal.signal(signal.SIGTERM, before)


def _unheard() -> bool:
    """Whether it is the standard output that nobody reads any more, as after `... | head`; then it is closed for
    good.
    """
    poll = select.poll()
    poll.register(1, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return True


def _refuse(message: str, status: int) -> int:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    return status


def overview(usage: str, name: str, groups: Mapping[str, Mapping[str, str]]) -> int:
    """Prints what there is (title -> name -> text) where help is asked for; 0.

    Raises UserError, with the nearest name and the overview, for any other name.
    """
    lines, known = [f"usage: {usage} [--help]"], [entry for group in groups.values() for entry in group]
    for title, group in groups.items():
        lines += ["", *([f"{title}:"] if title else []), *(f"  {entry:12}{text}" for entry, text in group.items())]
    if name in ("-h", "--help", "help"):
        print("\n".join(lines))
        return 0
    near = get_close_matches(name, known, n=1)
    kind = usage.split()[-1].lower()
    raise UserError("\n".join([f"unknown {kind} {name!r}{f'; did you mean {near[0]!r}?' if near else ''}", *lines]))
