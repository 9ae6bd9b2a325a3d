"""Judging a folder of edited images: what will be asked, what that costs, and the asking, each question once however
often the command is run.

A folder of judgements holds `manifest.json` (every sample that is expected, with its images' digests), the settings it
was made with, and the raw replies in append-only shards. A reply is on the disk before its thread asks the next
question, so a kill loses no more than the questions that were under way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gedit.price import Preview, preview
from benchmarks.gedit.questions import (
    MANIFEST_FILE,
    SAMPLE,
    Entry,
    Job,
    _entry,
    entry_to_json,
    job_key,
    jobs_of,
    made_with,
    plan,
    question_of,
    read_anchors,
    value_status,
)
from benchmarks.gedit.rows import EditTask, is_official, set_digest
from benchmarks.judge.protocol import (
    Ask,
    JudgeSettings,
    Question,
    Reply,
    ask_once_or_twice,
    identity_of_judge,
    reply_to_json,
)
from benchmarks.judge.wording import Wording
from benchmarks.parallel import as_they_come
from benchmarks.store import Shard, claim, open_shard, read_results, shard_name
from data.errors import UserError, UserErrors
from data.files import digest, write_json
from data.progress import Advance, progress

GIVE_UP_AFTER = 20  # questions without an answer in a row
MakeAsk = Callable[
    [threading.Event, int], Ask
]  # opens a judge: an event that ends its waits, and how many processes ask it; to be pickled for other processes


# --- asking -----------------------------------------------------------------------------------------------------------


class _Watch:
    """Keeps answers as they come and notices a server that answers nothing; threads share it."""

    def __init__(self, shard: Shard, advance: Advance) -> None:
        self._shard, self._advance, self._silent, self._answered = shard, advance, 0, 0
        self._last = ""
        self._lock = threading.Lock()

    def keep(self, key: str, question: str, replies: Sequence[Reply]) -> None:
        """Returns once the replies to a question (its digest) are on the disk. Raises UserError after GIVE_UP_AFTER
        questions without an answer in a row.
        """
        self._shard.append(key, {"question": question, "replies": [reply_to_json(reply) for reply in replies]})
        with self._lock:
            self._advance()
            silent = replies[-1].status == "api_error"
            self._silent, self._answered, self._last = (
                self._silent + 1 if silent else 0,
                self._answered + (not silent),
                replies[-1].error,
            )
            if self._silent == GIVE_UP_AFTER:
                raise UserError(self._fault(f"{self._silent} questions in a row got no answer"))

    def end(self) -> None:
        """Raises UserError where questions were asked and not one was answered."""
        if self._silent and not self._answered:
            raise UserError(self._fault(f"none of {self._silent} questions got an answer"))

    def _fault(self, what: str) -> str:
        again = "what was judged is kept: see to the server, then run the same command again (the command line's with --retry api_error)"
        return f"judge: {what}, the last one: {self._last}; {again}"


def _work(
    job: Job,
    key: str,
    ask: Ask,
    settings: JudgeSettings,
    wording: Wording,
    out: Path,
    watch: _Watch,
    halt: threading.Event,
) -> None:
    question = question_of(job, settings, wording, out)
    replies = ask_once_or_twice(ask, question)
    if halt.is_set() and replies[-1].status == "api_error":
        return  # given up because the run ends, not because of the server
    watch.keep(key, question.digest(), replies)


@dataclass(frozen=True)
class _Asked:
    """What a worker needs: the judge, how many processes share it, and the question."""

    make_ask: MakeAsk
    processes: int
    question: Question


_open: list[tuple[MakeAsk, Ask]] = []  # the judge that this worker has open, at most one
_opening = threading.Lock()


def answer(asked: _Asked) -> list[Reply]:
    """The judge's replies to one question. Runs in a worker, which opens a judge once."""
    with _opening:
        if not _open or _open[0][0] != asked.make_ask:
            _open[:] = [(asked.make_ask, asked.make_ask(threading.Event(), asked.processes))]
        ask = _open[0][1]
    return ask_once_or_twice(ask, asked.question)


def judge_folder(
    tasks: Sequence[EditTask],
    folder: str | Path,
    out: str | Path,
    *,
    model: str,
    settings: JudgeSettings,
    wording: Wording,
    make_ask: MakeAsk,
    concurrency: int | None,
    workers: int = 1,
    scheduler: str = "",
    anchors: Path | None = None,
    retry: Sequence[str] = (),
    shard: tuple[int, int] = (0, 1),
    image_tokens: str = "tiles",
    prices: tuple[float, float] | None = None,
    highest_price: float | None = None,
    only_preview: bool = False,
    say: Callable[[str], None] = print,
) -> Preview:
    """Judges every image of `model` below `folder`; the judgements are kept in `out`, and no question that has been
    answered is asked again.

    `make_ask` (see MakeAsk) is called only when something is to be asked, after the preview was said. `concurrency`
    questions are under way at once (None: one a worker), asked by threads of this process, by `workers` processes of
    this machine, or by those of the dask `scheduler`. `retry` names statuses ("api_error", "refused", "unparseable")
    whose questions are asked anew. Raises UserError(s) for faulty settings, a folder of judgements made with others, a
    price above `highest_price`, and whatever ends the run (see `benchmarks.judge.endpoint`).
    """
    out = Path(out)
    faults = settings.faults() + (
        [] if concurrency is None or concurrency >= 1 else [f"concurrency = {concurrency}: expected 1 or more"]
    )
    if faults:
        raise UserErrors("the judge's settings:", faults)
    entries = plan(tasks, Path(folder), out)
    identity = identity_of_judge(settings, wording)
    about_set = {"digest": set_digest(tasks), "kind": "official" if is_official(tasks) else "custom"}
    about: dict[str, Any] = {
        "model": model,
        "set": about_set,
        "repeats": settings.repeats,
        "made_with": made_with(Path(folder)),
    }
    if anchors is not None:
        frozen, about["anchors"] = read_anchors(anchors, out)
        entries += frozen
    known = read_results(out)
    wanted = {job_key(job, identity, wording): job for job in jobs_of(entries, settings.repeats)}
    own = [key for place, key in enumerate(wanted) if place % shard[1] == shard[0]]
    open_keys = [key for key in own if key not in known or value_status(known[key]) in retry]
    unjudgeable = sum(entry.status != "ok" for entry in entries)
    estimate = preview(
        [wanted[key] for key in open_keys],
        len(own) - len(open_keys),
        unjudgeable,
        settings,
        wording,
        image_tokens,
        prices,
    )
    say(estimate.text())
    if only_preview:
        return estimate
    _check_price(estimate, highest_price)
    claim(out, {"judge": identity, "model": model, "set": about_set})
    write_json(out / MANIFEST_FILE, {**about, "entries": [entry_to_json(entry) for entry in entries]})
    asked = {key: wanted[key] for key in open_keys}
    _ask_all(
        asked,
        out,
        settings,
        wording,
        make_ask,
        concurrency=concurrency,
        workers=workers,
        scheduler=scheduler,
        shard=shard,
    )
    return estimate


def _check_price(estimate: Preview, highest_price: float | None) -> None:
    if highest_price is not None and estimate.questions and (estimate.price is None or estimate.price > highest_price):
        raise UserError(
            f"judge: that is not within the highest price, {highest_price:g}: raise it, give the prices, or judge fewer images"
        )


def _ask_all(
    jobs: Mapping[str, Job],
    out: Path,
    settings: JudgeSettings,
    wording: Wording,
    make_ask: MakeAsk,
    *,
    concurrency: int | None,
    workers: int,
    scheduler: str,
    shard: tuple[int, int],
) -> None:
    """Asks every question, `concurrency` at a time, each answer kept under its key. What is under way at a mistake is
    paid for: its answers are kept, too.
    """
    if not jobs:
        return
    with open_shard(out, shard_name(shard)) as writer, progress("judge: questions", len(jobs)) as advance:
        watch = _Watch(writer, advance)
        if workers == 1 and not scheduler:
            _ask_here(jobs, out, settings, wording, make_ask, concurrency or 1, watch)
        else:
            keys, questions = list(jobs), dict[int, str]()

            def prepared(place: int, processes: int) -> _Asked:
                question = question_of(jobs[keys[place]], settings, wording, out)
                questions[place] = question.digest()
                return _Asked(make_ask, processes, question)

            def done(place: int, replies: list[Reply]) -> None:
                watch.keep(keys[place], questions.pop(place), replies)

            as_they_come(
                answer, range(len(keys)), prepared, done, at_once=concurrency, workers=workers, scheduler=scheduler
            )
        watch.end()


def _ask_here(
    jobs: Mapping[str, Job],
    out: Path,
    settings: JudgeSettings,
    wording: Wording,
    make_ask: MakeAsk,
    concurrency: int,
    watch: _Watch,
) -> None:
    """Asks with threads of this process."""
    halt = threading.Event()
    ask = make_ask(halt, 1)
    pool = ThreadPoolExecutor(concurrency)
    try:
        futures = [pool.submit(_work, job, key, ask, settings, wording, out, watch, halt) for key, job in jobs.items()]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    except BaseException:
        halt.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# --- images that a stage has made itself ------------------------------------------------------------------------------


@dataclass(frozen=True)
class MadeEdit:
    """An edited image in any layout: its row, its file, and what its row of scores is to say of it."""

    task: EditTask
    file: Path
    image: str  # the file as the row of scores names it
    k: int
    seed: int


def answers_of(store: str | Path, settings: JudgeSettings, wording: Wording) -> Path:
    """The folder below `store` with this judge's answers."""
    return Path(store) / digest(identity_of_judge(settings, wording))[:16]


def ask_about(
    made: Sequence[MadeEdit],
    store: str | Path,
    *,
    settings: JudgeSettings,
    wording: Wording,
    make_ask: MakeAsk,
    concurrency: int | None,
    workers: int = 1,
    scheduler: str = "",
    retry: Sequence[str] = (),
    prices: tuple[float, float] | None = None,
    highest_price: float | None = None,
    say: Callable[[str], None] = print,
) -> tuple[Path, list[Entry]]:
    """Judges images that lie anywhere; answers are kept below `store` by judge, so that a stage that is run again asks
    about new images alone.

    Returns the folder of answers and an entry an image, in order. The other arguments are those of `judge_folder`, and
    so are the faults.
    """
    if settings.faults():
        raise UserErrors("the judge's settings:", settings.faults())
    identity = identity_of_judge(settings, wording)
    folder = answers_of(store, settings, wording)
    entries = [_entry(one.task, one.file, folder, SAMPLE, one.seed) for one in made]
    known = read_results(folder)
    every = {job_key(job, identity, wording): job for job in jobs_of(entries, settings.repeats)}
    wanted = {key: job for key, job in every.items() if key not in known or value_status(known[key]) in retry}
    failed = sum(entry.status != "ok" for entry in entries)
    estimate = preview(list(wanted.values()), len(every) - len(wanted), failed, settings, wording, "tiles", prices)
    say(estimate.text())
    _check_price(estimate, highest_price)
    claim(folder, {"judge": identity})
    _ask_all(
        wanted,
        folder,
        settings,
        wording,
        make_ask,
        concurrency=concurrency,
        workers=workers,
        scheduler=scheduler,
        shard=(0, 1),
    )
    return folder, entries
