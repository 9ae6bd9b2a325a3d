"""`python -m benchmarks NAME STEP ...`: GenEval and GEdit-Bench step by step on any model or folder of images, and the
table beside the paper's rows.

A user's mistake is one clear message on stderr and exit status 2; an outage, worth another try, is one line and 75
(EX_TEMPFAIL of sysexits.h); Ctrl-C is one line and 130. Anything else is a defect and keeps its traceback.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from types import FrameType
from typing import NoReturn

from data.errors import TRY_AGAIN, Outage, UserError

# name -> (module with `cli(arguments) -> exit status`, what it is for); imported only when asked for: torch costs
# seconds
COMMANDS = {
    "geneval": ("benchmarks.geneval.cli", "GenEval: prompts, generate, detect, verdict, report"),
    "gedit": ("benchmarks.gedit.cli", "GEdit-Bench: prompts, generate, judge, verdict, report"),
    "compare": ("benchmarks.compare", "a scorecard beside the paper's rows, with what differs"),
}
ENVIRONMENT = {  # read by libraries when they are imported; what the user has set stays
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MPLBACKEND": "Agg",
    "TOKENIZERS_PARALLELISM": "false",
}


class _Terminated(BaseException):
    pass


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated  # so that temporary files are removed on the way out


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status.

    0 done, 2 a user's mistake, 75 an outage (try again), 130 interrupted, 143 terminated.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _dispatch(arguments)
    except UserError as error:
        return _refuse(str(error), TRY_AGAIN if isinstance(error, Outage) else 2)
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _refuse("interrupted; what was finished is kept, the same command goes on from there", 130)
    except _Terminated:
        return _refuse("terminated; what was finished is kept, the same command goes on from there", 143)
    finally:
        signal.signal(signal.SIGTERM, before)


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in COMMANDS:
        return int(importlib.import_module(COMMANDS[name][0]).cli(arguments[1:]) or 0)
    lines = [
        "usage: python -m benchmarks NAME STEP [--help]",
        "",
        *(f"  {name:10}{text}" for name, (_, text) in COMMANDS.items()),
    ]
    if name in ("-h", "--help", "help"):
        print("\n".join(lines))
        return 0
    near = get_close_matches(name, COMMANDS, n=1)
    raise UserError(f"unknown command {name!r}{f'; did you mean {near[0]!r}?' if near else ''}\n" + "\n".join(lines))


def _refuse(message: str, status: int) -> int:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
