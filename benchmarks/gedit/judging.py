"""Judging edited images: what remains to be asked, what that costs, and the asking; no question is asked twice, however
often the command is run.

A folder of judgements holds `manifest.json` (every sample that is expected, with its images' digests), the settings it
was made with, and the raw replies in append-only shards. A reply is on the disk before its thread asks the next
question, so a kill loses no more than the questions that were under way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.gedit import questions
from benchmarks.gedit.price import Preview, preview
from benchmarks.gedit.questions import Entry, Job
from benchmarks.gedit.rows import EditTask, set_digest, set_name
from benchmarks.judge.protocol import Ask, JudgeSettings, Question, Reply, ask_once_or_twice, outcome, stored_replies
from benchmarks.parallel import as_they_come
from benchmarks.store import Shard, claim, open_shard, read_results, shard_name
from data.errors import UserError
from data.files import digest, write_json
from data.progress import Advance, progress

GIVE_UP_AFTER = 20  # questions without an answer in a row
# Opens a judge, given an event that ends its waits and the number of processes that ask; can be pickled for workers.
MakeAsk = Callable[[threading.Event, int], Ask]


@dataclass(frozen=True)
class Asking:
    """How a judge is asked; nothing of it changes a score. `make_ask` is called only when something is to be asked,
    after the preview was said. Raises UserError for a `concurrency` below 1."""

    make_ask: MakeAsk
    concurrency: int | None  # questions under way at once; None: one a worker
    workers: int = 1  # processes of this machine that ask; 1: threads of this process
    scheduler: str = ""  # a dask scheduler, whose workers ask instead
    retry: Sequence[str] = ()  # statuses ("api_error", "refused", "unparseable") whose questions are asked again
    shard: tuple[int, int] = (0, 1)  # (i, n): every n-th question from the i-th on
    image_tokens: str = "tiles"  # one of price.IMAGE_TOKENS
    prices: tuple[float, float] | None = None  # per million prompt and completion tokens
    highest_price: float | None = None  # nothing is asked above it
    only_preview: bool = False  # nothing is asked at all
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        if self.concurrency is not None and self.concurrency < 1:
            raise UserError(f"judge: concurrency = {self.concurrency}: expected 1 or more")


# --- asking -----------------------------------------------------------------------------------------------------------


class _Watch:
    """Keeps answers as they come and notices a server that answers nothing; threads share it."""

    def __init__(self, shard: Shard, advance: Advance) -> None:
        self._shard, self._advance, self._lock = shard, advance, threading.Lock()
        self._silent, self._answered, self._last = 0, False, ""

    def keep(self, key: str, question: str, replies: Sequence[Reply]) -> None:
        """Returns once the replies to a question (its digest) are on the disk. Raises UserError after GIVE_UP_AFTER
        questions without an answer in a row."""
        self._shard.append(key, {"question": question, "replies": [asdict(reply) for reply in replies]})
        with self._lock:
            self._advance()
            silent, self._last = replies[-1].status == "api_error", replies[-1].error
            self._silent = self._silent + 1 if silent else 0
            self._answered = self._answered or not silent
            if self._silent == GIVE_UP_AFTER:
                raise UserError(self._fault(f"{self._silent} questions in a row got no answer"))

    def end(self) -> None:
        """Raises UserError where questions were asked and none was answered."""
        if self._silent and not self._answered:
            raise UserError(self._fault(f"none of {self._silent} questions got an answer"))

    def _fault(self, what: str) -> str:
        again = "run the same command again (the command line's with --retry api_error)"
        return f"judge: {what}, the last one: {self._last}; what was judged is kept: see to the server, then {again}"


def _ask_here(jobs: Mapping[str, Job], out: Path, settings: JudgeSettings, asking: Asking, watch: _Watch) -> None:
    """Asks with threads of this process."""
    halt = threading.Event()
    ask = asking.make_ask(halt, 1)

    def work(key: str, job: Job) -> None:
        question = questions.question_of(job, settings, out)
        replies = ask_once_or_twice(ask, question)
        # Once the run ends, a question is given up because of that, not because of the server.
        if not (halt.is_set() and replies[-1].status == "api_error"):
            watch.keep(key, question.digest(), replies)

    pool = ThreadPoolExecutor(asking.concurrency or 1)
    try:
        futures = [pool.submit(work, key, job) for key, job in jobs.items()]
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
    except BaseException:
        halt.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_open: list[tuple[MakeAsk, Ask]] = []  # the judge that this worker has open, at most one
_opening = threading.Lock()


def answer(asked: tuple[MakeAsk, int, Question]) -> tuple[str, list[Reply]]:
    """(the question's digest, the judge's replies) for a judge, the number of processes that ask it, and a question.
    Runs in a worker, which opens a judge once."""
    make_ask, processes, question = asked
    with _opening:
        if not _open or _open[0][0] != make_ask:
            _open[:] = [(make_ask, make_ask(threading.Event(), processes))]
        ask = _open[0][1]
    return question.digest(), ask_once_or_twice(ask, question)


def _ask_in_workers(jobs: Mapping[str, Job], out: Path, settings: JudgeSettings, asking: Asking, watch: _Watch) -> None:
    keys = list(jobs)

    def prepared(key: str, processes: int) -> tuple[MakeAsk, int, Question]:
        return asking.make_ask, processes, questions.question_of(jobs[key], settings, out)

    def done(place: int, answered: tuple[str, list[Reply]]) -> None:
        watch.keep(keys[place], *answered)

    how: dict[str, Any] = {"workers": asking.workers, "scheduler": asking.scheduler}
    as_they_come(answer, keys, prepared, done, at_once=asking.concurrency, **how)


def _ask_all(jobs: Mapping[str, Job], out: Path, settings: JudgeSettings, asking: Asking) -> None:
    """Asks every question and keeps each answer under its key, also those that are under way at a mistake: they are
    paid for."""
    if not jobs:
        return
    with open_shard(out, shard_name(asking.shard)) as shard, progress("judge: questions", len(jobs)) as advance:
        watch = _Watch(shard, advance)
        ask = _ask_here if asking.workers == 1 and not asking.scheduler else _ask_in_workers
        ask(jobs, out, settings, asking, watch)
        watch.end()


def _unanswered(
    entries: Sequence[Entry], out: Path, settings: JudgeSettings, asking: Asking
) -> tuple[dict[str, Job], Preview]:
    """What remains to be asked, by key, and the estimate, which is said. Raises UserError for a price too high."""
    identity, every = settings.identity(), questions.jobs_of(entries, settings.repeats)
    keys = {questions.job_key(job, identity, settings.wording): job for job in every}
    statuses = {key: outcome(stored_replies(value)).status for key, value in read_results(out).items()}
    answered = {key for key, status in statuses.items() if status not in asking.retry}
    first, step = asking.shard
    wanted = dict(islice(keys.items(), first, None, step))
    jobs = {key: job for key, job in wanted.items() if key not in answered}
    counts = len(wanted) - len(jobs), sum(entry.status != "ok" for entry in entries)
    estimate = preview(list(jobs.values()), *counts, settings, asking.image_tokens, asking.prices)
    asking.say(estimate.text())
    if not asking.only_preview:
        estimate.check(asking.highest_price)
    return jobs, estimate


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
        _ask_all(jobs, out, settings, asking)
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
    _ask_all(jobs, folder, settings, asking)
    return folder, entries
