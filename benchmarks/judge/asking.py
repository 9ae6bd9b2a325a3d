"""Asking a judge many questions, and reading its answers again: no question is asked twice, however often a command is
run.

A reply is on the disk before its thread asks the next question, so a kill loses no more than the questions that were
under way."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.judge.protocol import Ask, Question, Reply, ask_once_or_twice, outcome, stored_replies
from benchmarks.judge.reading import Outcome
from benchmarks.parallel import as_they_come
from benchmarks.store import Shard, open_shard, read_results, shard_name
from data.errors import UserError, UserErrors
from data.progress import Advance, progress

J = TypeVar("J")  # whatever a question is made of
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


def unanswered(jobs: Mapping[str, J], kind: Callable[[J], str], out: Path, asking: Asking) -> tuple[dict[str, J], int]:
    """The share of the jobs (by key) that is `asking.shard`'s and has no answer in `out` yet, and how many of the share
    have one; `kind` tells a job's kind of question."""
    first, step = asking.shard
    wanted, stored = dict(islice(jobs.items(), first, None, step)), read_results(out)

    def answered(key: str, job: J) -> bool:
        return key in stored and outcome(stored_replies(stored[key]), kind(job)).status not in asking.retry

    left = {key: job for key, job in wanted.items() if not answered(key, job)}
    return left, len(wanted) - len(left)


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


Ready = Callable[[J], Question]  # the request that a job is; may read files


def _ask_here(jobs: Mapping[str, J], ready: Ready[J], asking: Asking, watch: _Watch) -> None:
    """Asks with threads of this process."""
    halt = threading.Event()
    ask = asking.make_ask(halt, 1)

    def work(key: str, job: J) -> None:
        question = ready(job)
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


def _ask_in_workers(jobs: Mapping[str, J], ready: Ready[J], asking: Asking, watch: _Watch) -> None:
    keys = list(jobs)

    def prepared(key: str, processes: int) -> tuple[MakeAsk, int, Question]:
        return asking.make_ask, processes, ready(jobs[key])

    def done(place: int, answered: tuple[str, list[Reply]]) -> None:
        watch.keep(keys[place], *answered)

    how: dict[str, Any] = {"workers": asking.workers, "scheduler": asking.scheduler}
    as_they_come(answer, keys, prepared, done, at_once=asking.concurrency, **how)


def ask_all(jobs: Mapping[str, J], ready: Ready[J], out: Path, asking: Asking) -> None:
    """Asks every job's question and keeps each answer in `out` under the job's key, also those that are under way at a
    mistake: they are paid for. Raises UserError for whatever ends the run (see `benchmarks.judge.endpoint`)."""
    if not jobs:
        return
    with open_shard(out, shard_name(asking.shard)) as shard, progress("judge: questions", len(jobs)) as advance:
        watch = _Watch(shard, advance)
        ask = _ask_here if asking.workers == 1 and not asking.scheduler else _ask_in_workers
        ask(jobs, ready, asking, watch)
        watch.end()


# --- answers ----------------------------------------------------------------------------------------------------------


class Answers:
    """The answers in a folder, read one by one; counts what is missing, who answered and what it took."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._results = folder, read_results(folder)
        self._counted: set[str] = set()
        self._unanswered = 0
        self._models: Counter[str] = Counter()
        self.usage: Counter[str] = Counter()

    def outcome(self, key: str, kind: str) -> Outcome | None:
        """How the question of this key and kind ended; None where it has no answer yet."""
        if key not in self._results:
            self._unanswered += 1
            return None
        replies = stored_replies(self._results[key])
        if key not in self._counted:  # equal images share a question
            self._counted.add(key)
            self._models.update({reply.model for reply in replies if reply.status == "ok" and reply.model})
            for reply in replies:
                self.usage.update({"requests": reply.attempts, **(reply.usage or {})})
        return outcome(replies, kind)

    def answered_by(self) -> str:
        """Who gave the answers that were read. Raises UserErrors where some are missing or several models answered."""
        faults = []
        if self._unanswered:
            faults.append(f"{self._unanswered} questions have no answer yet; run its judge step again, it goes on")
        if len(self._models) > 1:
            advice = "name one with its date, and judge anew into another folder"
            faults.append(f"{len(self._models)} models answered: {dict(sorted(self._models.items()))}; {advice}")
        if faults:
            raise UserErrors(f"{self._folder}: these judgements make no score:", faults)
        return next(iter(self._models), "")
