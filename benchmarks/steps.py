"""What the command lines of both benchmarks share: steps with their options as a table, and sampling a prompt set."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.commands import overview
from data.files import write_json

Options = Mapping[str, Mapping[str, Any]]  # flag -> what argparse's add_argument takes
# step -> the function that runs it and returns the exit status (None: 0), and its options; the function's docstring is
# the step's help, the first sentence of it stands in the overview
Steps = Mapping[str, tuple[Callable[[argparse.Namespace], int | None], Options]]


def setting(default: Any, text: str, metavar: str = "N", **more: Any) -> dict[str, Any]:
    """An option with a default, which gives its type and stands in the help."""
    shown = " (default: %(default)s)" if default != "" else ""
    return {"type": type(default), "default": default, "metavar": metavar, "help": text + shown, **more}


def path(text: str = "", metavar: str = "DIR", **more: Any) -> dict[str, Any]:
    return {"type": Path, "metavar": metavar, "help": text, **more}


def run_step(benchmark: str, steps: Steps, arguments: Sequence[str]) -> int:
    """Runs the step that the first argument names; returns the exit status. Raises UserError for an unknown step."""
    name, *others = arguments or ["--help"]
    usage = f"python -m benchmarks {benchmark}"
    texts = {key: " ".join((run.__doc__ or "").split()) for key, (run, _) in steps.items()}
    if name not in steps:
        sentences = {key: text.split(". ")[0].rstrip(".") for key, text in texts.items()}
        return overview(f"{usage} STEP", name, {"": sentences})
    run, options = steps[name]
    parser = argparse.ArgumentParser(f"{usage} {name}", description=texts[name])
    for flag, settings in options.items():
        parser.add_argument(flag, **settings)
    return run(parser.parse_args(others)) or 0


# options of a step that samples; the words behind `--` go to `sample`
SAMPLER: Options = {
    "--model": {"required": True, "metavar": "URI", "help": "as `python -m tasks sample-set --model` takes it"},
    "--seed": setting(0, "base seed, from which every image's seed follows"),
    "sampler": {
        "nargs": argparse.REMAINDER,
        "metavar": "-- OPTIONS",
        "help": "passed on to `python -m tasks sample-set`, e.g. -- --steps 28 --guidance 1",
    },
}


def sample(model: str, images: Path, settings: Mapping[str, Any], jobs: Sequence[Mapping[str, Any]], words: Any) -> int:
    """Samples the jobs into the folder `images` by `python -m tasks sample-set`, with further `words` of its command
    line; returns its exit status.

    tasks/ may not be imported here, so it runs as a process of its own."""
    with tempfile.TemporaryDirectory(prefix="sample-") as folder:
        file = Path(folder) / "jobs.json"
        write_json(file, {"settings": settings, "jobs": jobs})
        command = [sys.executable, "-m", "tasks", "sample-set", "--model", model, "--jobs", str(file)]
        command += ["--out", str(images), *(word for word in words if word != "--")]
        return subprocess.run(command, check=False).returncode
