"""`python -m benchmarks pairwise STEP ...`: which of several models a judge prefers, on any folders of images in the
official layouts of GEdit-Bench or GenEval."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gedit.cli import (
    INTERVALS,
    JUDGE,
    JUDGEMENTS,
    RUN,
    SEED,
    SERVER,
    TASKS,
    choice,
    how_of,
    judge_of,
    tasks_of,
)
from benchmarks.gedit.questions import made_with
from benchmarks.gedit.rows import set_digest, set_name
from benchmarks.gedit.rules import LANGUAGES
from benchmarks.geneval import prompts
from benchmarks.judge.wording import load_pair_wording
from benchmarks.pairwise.card import write_pairwise
from benchmarks.pairwise.contests import Contest, of_edits, of_prompts
from benchmarks.pairwise.judging import judge_pairs
from benchmarks.pairwise.verdict import pairwise, read_judged
from benchmarks.steps import Options, Steps, path, run_step, setting
from data.errors import UserError, UserErrors

CARD_FILE = "pairwise.json"
OFFICIAL = "official"
WORDING: Options = {"--wording": path("a folder with other texts than ours: preferred_edit.txt, preferred_image.txt")}
SET: Options = {
    **TASKS,
    "--data": {**TASKS["--data"], "required": False},
    "--language": choice("en", "which rows are taken", LANGUAGES),
    "--prompts": {
        "metavar": "FILE",
        "help": f"images of prompts instead of edits: GenEval's metadata, or `{OFFICIAL}`",
    },
}
IMAGES: Options = {
    "--images": path("the candidate's folder; its name is the model's", required=True),
    "--against": path("the other models' folders, e.g. the champion's", nargs="+", required=True),
}
CARD: Options = {
    **JUDGEMENTS,
    **WORDING,
    **SEED,
    **INTERVALS,
    "--to": path(f"where the win rates go (default: {CARD_FILE} beside the judgements)", "FILE"),
    "--highest-lean": setting(0.1, "how far the judge may lean to the place that an image is shown in, 0 to 1"),
    "--allow-partial": {"action": "store_true", "help": "give win rates although too few contests have a verdict"},
}


def _folders(given: Namespace) -> dict[str, Path]:
    """Model -> its folder, the candidate first. Raises UserErrors for two folders of one name."""
    folders: dict[str, Path] = {}
    faults = []
    for folder in (given.images, *given.against):
        name = folder.resolve().name
        if name in folders:
            faults.append(f"{folder} and {folders[name]} have one name: rename one, a folder's name is its model's")
        folders.setdefault(name, folder)
    if faults:
        raise UserErrors("models cannot be told apart:", faults)
    return folders


def _contests(given: Namespace, folders: dict[str, Path]) -> tuple[list[Contest], dict[str, Any]]:
    """The contests and what is written about their set."""
    if bool(given.data) == bool(given.prompts):
        raise UserError("name one set: --data for edits, or --prompts for images of prompts")
    if given.data:
        tasks = tasks_of(given, given.out)
        about = {"suite": "gedit", "digest": set_digest(tasks), "kind": set_name(tasks)}
        return of_edits(tasks, folders, given.out), about
    records = prompts.official_records() if given.prompts == OFFICIAL else prompts.read_prompts(given.prompts)
    about = {"suite": "geneval", "digest": prompts.set_digest(records), "kind": prompts.set_name(records)}
    return of_prompts(records, folders, given.out), about


def _judge(given: Namespace) -> None:
    """Ask a judge which of every two models' images is better, in both orders. What was answered is kept, and the same
    command goes on from there."""
    settings, asking = judge_of(given, load_pair_wording(given.wording))
    folders = _folders(given)
    contests, about_set = _contests(given, folders)
    about = {"set": about_set, "made_with": {name: made_with(folder) for name, folder in folders.items()}}
    judge_pairs(contests, list(folders), given.out, about=about, settings=settings, asking=asking)


def _verdict(given: Namespace) -> None:
    """Turn the raw replies into the candidate's win rates and every model's strength. Asks nobody; the same replies
    give the same bytes."""
    judged = read_judged(given.judgements, load_pair_wording(given.wording))
    card, to = (
        pairwise(judged, highest_lean=given.highest_lean, **how_of(given)),
        given.to or given.judgements / CARD_FILE,
    )
    write_pairwise(to, card)
    print("\n".join([*card.lines(), str(to)]))


STEPS: Steps = {"judge": (_judge, {**SET, **IMAGES, **WORDING, **JUDGE, **SERVER, **RUN}), "verdict": (_verdict, CARD)}


def cli(arguments: Sequence[str]) -> int:
    """Runs one step; returns the exit status. Raises UserError for an unknown step."""
    return run_step("pairwise", STEPS, arguments)
