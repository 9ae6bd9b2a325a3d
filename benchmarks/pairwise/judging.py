"""Asking a judge which of two models' images is better: what remains to be asked, what that costs, and the asking (see
`benchmarks.judge.asking`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gedit.price import Preview, estimate
from benchmarks.judge.asking import Asking, ask_all, unanswered
from benchmarks.judge.protocol import JudgeSettings, Question
from benchmarks.pairwise.contests import MANIFEST_FILE, Contest, Job, job_key, jobs_of, question_of, sizes_of, text_of
from benchmarks.store import claim
from data.errors import UserError
from data.files import write_json


def judge_pairs(
    contests: Sequence[Contest],
    models: Sequence[str],
    out: Path,
    *,
    about: Mapping[str, Any],
    settings: JudgeSettings,
    asking: Asking,
) -> Preview:
    """Asks about every two of the models, the first of which is the candidate; the judgements are kept in `out`.
    `about` says which set was judged ("set", JSON values) and how the images were made ("made_with").

    Raises UserError(s) for a folder of judgements made with other settings, a price too high, and whatever ends the run
    (see `benchmarks.judge.endpoint`)."""
    if len(set(models)) < 2:
        raise UserError(f"pairwise: models {list(models)}; name two or more, each once")
    identity = settings.identity()
    keys = {job_key(job, identity, settings.wording): job for job in jobs_of(contests, models, settings.repeats)}
    jobs, answered = unanswered(keys, lambda job: job.kind, out, asking)
    asked = [(text_of(job, settings.wording), sizes_of(job, settings)) for job in jobs.values()]
    unjudgeable = sum(picture.status != "ok" for contest in contests for picture in contest.pictures.values())
    preview = estimate(asked, (answered, unjudgeable), settings.resize, asking.image_tokens, asking.prices)
    asking.say(preview.text())
    if asking.only_preview:
        return preview
    preview.check(asking.highest_price)
    claim(out, {"judge": identity, "models": list(models), "set": about["set"]})
    manifest = {**about, "models": list(models), "repeats": settings.repeats}
    write_json(out / MANIFEST_FILE, {**manifest, "contests": [asdict(contest) for contest in contests]})

    def ready(job: Job) -> Question:
        return question_of(job, settings, out)

    ask_all(jobs, ready, out, asking)
    return preview
