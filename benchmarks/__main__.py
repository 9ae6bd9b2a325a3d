"""`python -m benchmarks NAME STEP ...`: GenEval, GEdit-Bench and pairwise judging, step by step on any model or folder
of images, and the table beside the paper's rows. data/commands.py says how they end."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from data import commands

# name -> (module with `cli(arguments) -> exit status`, what it is for); imported on use: torch costs seconds
COMMANDS = {
    "geneval": ("benchmarks.geneval.cli", "GenEval: prompts, generate, detect, verdict, report"),
    "gedit": ("benchmarks.gedit.cli", "GEdit-Bench: prompts, generate, judge, verdict, report"),
    "pairwise": ("benchmarks.pairwise.cli", "which of two models a judge prefers on the same prompts: judge, verdict"),
    "compare": ("benchmarks.compare", "a scorecard beside the paper's rows, with what differs"),
}
ENVIRONMENT = {  # read by libraries when they are imported; what the user has set stays
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MPLBACKEND": "Agg",
    "TOKENIZERS_PARALLELISM": "false",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status, as data.commands.run does."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return commands.run(lambda: _dispatch(arguments))


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in COMMANDS:
        return int(importlib.import_module(COMMANDS[name][0]).cli(arguments[1:]) or 0)
    texts = {key: text for key, (_, text) in COMMANDS.items()}
    return commands.overview("python -m benchmarks NAME STEP", name, {"": texts})


if __name__ == "__main__":
    sys.exit(main())
