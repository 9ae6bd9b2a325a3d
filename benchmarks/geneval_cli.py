"""`python -m benchmarks geneval STEP ...`: each step of GenEval by itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from benchmarks.geneval_prompts import as_jsonl, official_records
from data.errors import UserError


def _prompts(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks geneval prompts", description="Print GenEval's 553 records as JSON Lines.")
    parser.add_argument("--text", action="store_true", help="the prompts alone, one a line")
    parsed = parser.parse_args(arguments)
    records = official_records()
    sys.stdout.write("".join(f"{record['prompt']}\n" for record in records) if parsed.text else as_jsonl(records))
    return 0


STEPS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "prompts": (_prompts, "print the 553 records"),
}


def cli(arguments: Sequence[str]) -> int:
    """Runs one step; returns the exit status. Raises UserError for an unknown step."""
    lines = ["usage: python -m benchmarks geneval STEP [--help]", "", *(f"  {name:10}{text}" for name, (_, text) in STEPS.items())]
    name = arguments[0] if arguments else "--help"
    if name in STEPS:
        return STEPS[name][0](arguments[1:])
    if name in ("-h", "--help"):
        print("\n".join(lines))
        return 0
    raise UserError(f"unknown step {name!r}\n" + "\n".join(lines))
