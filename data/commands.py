"""What all command lines here share: commands by name, a mistake in one line, an exit status for each ending."""

from __future__ import annotations

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
from data.files import MISSING, NO_PERMISSION, NO_SPACE, explain

KEPT = "what was finished is kept, nothing half-written was left, the same command goes on from there"
SMALLER = "lower the batch or the model's size"


class _Sigterm(BaseException):
    """SIGTERM as an exception, so that temporary files are removed on the way out."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Sigterm


def run(command: Callable[[], int]) -> int:
    """The command's exit status, or after an error: 2 a user's mistake, 75 an outage (try again), 130 interrupted,
    141 nobody reads the output, 143 terminated.

    Every other exception is a defect and keeps its traceback.
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
    except _Sigterm:
        return _refuse(f"terminated; {KEPT}", 143)
    except MemoryError:
        return _refuse(f"not enough memory; {SMALLER}, or close other programs", 2)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 141
        if error.errno not in (*NO_SPACE, *NO_PERMISSION, *MISSING):
            raise
        return _refuse(str(explain(error, Path(os.fsdecode(error.filename or ".")))), 2)
    except RuntimeError as error:
        if "allocate memory" not in str(error) and "out of memory" not in str(error):  # how torch says MemoryError
            raise
        return _refuse(f"not enough memory ({str(error).splitlines()[0]}); {SMALLER}", 2)
    finally:
        signal.signal(signal.SIGTERM, before)


def _nobody_reads() -> bool:
    """Whether the broken pipe is the standard output, as after `... | head`; then later output goes nowhere."""
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
    """Prints the commands (title -> name -> text) when `name` asks for help, and returns 0.

    Raises UserError, with the nearest name and the commands, for any other name.
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
