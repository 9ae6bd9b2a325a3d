"""Judging edited images: what remains to be asked, what that costs, and the asking (see `benchmarks.judge.asking`).

A folder of judgements holds `manifest.json` (every sample that is expected, with its images' digests), the settings it
was made with, and the raw replies in append-only shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.gedit import questions
from benchmarks.gedit.price import Preview, preview
from benchmarks.gedit.questions import Entry, Job
from benchmarks.gedit.rows import EditTask, set_digest, set_name
from benchmarks.judge.asking import Asking, ask_all, unanswered
from benchmarks.judge.protocol import JudgeSettings, Question
from benchmarks.store import claim
from data.files import digest, write_json


def _unanswered(
    entries: Sequence[Entry], out: Path, settings: JudgeSettings, asking: Asking
) -> tuple[dict[str, Job], Preview]:
    """What remains to be asked, by key, and the estimate, which is said. Raises UserError for a price too high."""
    identity, every = settings.identity(), questions.jobs_of(entries, settings.repeats)
    keys = {questions.job_key(job, identity, settings.wording): job for job in every}
    jobs, answered = unanswered(keys, lambda job: job.kind, out, asking)
    unjudgeable = sum(entry.status != "ok" for entry in entries)
    estimate = preview(list(jobs.values()), answered, unjudgeable, settings, asking.image_tokens, asking.prices)
    asking.say(estimate.text())
    if not asking.only_preview:
        estimate.check(asking.highest_price)
    return jobs, estimate


def _ask(jobs: Mapping[str, Job], out: Path, settings: JudgeSettings, asking: Asking) -> None:
    def ready(job: Job) -> Question:
        return questions.question_of(job, settings, out)

    ask_all(jobs, ready, out, asking)


def judge_folder(
    tasks: Sequence[EditTask],
    folder: Path,
    out: Path,
    *,
    model: str,
    settings: JudgeSettings,
    asking: Asking,
    anchors: Path | None = None,
) -> Preview:
    """Judges every image of `model` below `folder`, and those of the frozen set `anchors`; the judgements are kept in
    `out`. Raises UserError(s) for a folder of judgements made with other settings, a price too high, and whatever ends
    the run (see `benchmarks.judge.endpoint`)."""
    entries = questions.plan(tasks, folder, out)
    about_set = {"digest": set_digest(tasks), "kind": set_name(tasks)}
    made_with = questions.made_with(folder)
    about: dict[str, Any] = {"model": model, "set": about_set, "repeats": settings.repeats, "made_with": made_with}
    if anchors is not None:
        frozen, about["anchors"] = questions.read_anchors(anchors, out)
        entries += frozen
    jobs, estimate = _unanswered(entries, out, settings, asking)
    if not asking.only_preview:
        claim(out, {"judge": settings.identity(), "model": model, "set": about_set})
        write_json(out / questions.MANIFEST_FILE, {**about, "entries": [asdict(entry) for entry in entries]})
        _ask(jobs, out, settings, asking)
    return estimate


# --- images that a stage has made itself ------------------------------------------------------------------------------


@dataclass(frozen=True)
class MadeEdit:
    """An edited image in any layout: its row, its file, and what its row of scores is to say of it."""

    task: EditTask
    file: Path
    image: str  # the file as the row of scores names it
    k: int
    seed: int


def answers_of(store: Path, settings: JudgeSettings) -> Path:
    """The folder below `store` with this judge's answers."""
    return store / digest(settings.identity())[:16]


def ask_about(
    made: Sequence[MadeEdit], store: Path, settings: JudgeSettings, asking: Asking
) -> tuple[Path, list[Entry]]:
    """Judges images that lie anywhere; answers are kept below `store` by judge, so that a stage that is run again asks
    about new images alone. Returns the folder of answers and an entry an image, in order. Raises as `judge_folder`."""
    folder = answers_of(store, settings)
    entries = [questions.entry_of(edit.task, edit.file, folder, questions.SAMPLE, edit.seed) for edit in made]
    jobs, _ = _unanswered(entries, folder, settings, asking)
    claim(folder, {"judge": settings.identity()})
    _ask(jobs, folder, settings, asking)
    return folder, entries
