"""Judging a folder of edited images: what will be asked, what that costs, and the asking, each question once however often the command is run.

A folder of judgements holds `manifest.json` (every sample that is expected, with its images' digests), the settings it was made with, and the raw replies in
append-only shards. A reply is on the disk before its thread asks the next question, so a kill loses no more than the questions that were under way.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.gedit_data import EditTask, check_folder, edited_path, is_official, set_digest
from benchmarks.judge import (
    KINDS,
    SEMANTIC,
    Ask,
    JudgeSettings,
    Question,
    Reply,
    Wording,
    ask_once_or_twice,
    identity_of_judge,
    match_source,
    outcome,
    prepare_images,
    read_rgb,
    reply_from_json,
    reply_to_json,
)
from benchmarks.parallel import as_they_come
from benchmarks.store import SETTINGS_FILE, Shard, claim, open_shard, read_results, read_settings, result_key, shard_name
from data.errors import UserError, UserErrors
from data.files import digest, read_json, sha256_bytes, sha256_file, write_json
from data.images import ImageFault
from data.progress import Advance, progress

MANIFEST_FILE = "manifest.json"
ANCHORS_FILE = "anchors.json"
SAMPLE, ANCHOR = "sample", "anchor"
ASPECT_TOLERANCE = 0.02  # relative difference of width / height from which an edited image counts as stretched
COMPLETION_TOKENS = 80  # a typical reply
CHARACTERS_A_TOKEN = 4
GIVE_UP_AFTER = 20  # questions without an answer in a row
UNKNOWN_SEED = -1
SUITE = "gedit"
MakeAsk = Callable[[threading.Event, int], Ask]  # opens a judge: an event that ends its waits, and how many processes ask it; to be pickled for other processes


@dataclass(frozen=True)
class Entry:
    """One image to be judged, or the reason why it cannot be. Paths are relative to the folder of judgements, sizes (width, height) in pixels."""

    purpose: str  # SAMPLE, or ANCHOR for one of the frozen set
    id: str
    key: str
    language: str
    category: str
    instruction: str
    intersection: bool
    source: str
    source_sha256: str
    source_size: tuple[int, int]
    edited: str
    edited_sha256: str
    edited_size: tuple[int, int]
    seed: int  # that made the edited image; UNKNOWN_SEED for one made elsewhere
    status: str  # "ok": can be judged; "missing_image" or "bad_image"
    fault: str

    @property
    def stretched(self) -> bool:
        """Whether the edited image has another aspect than its source."""
        if self.status != "ok":
            return False
        a, b = (width / height for width, height in (self.source_size, self.edited_size))
        return abs(a / b - 1.0) > ASPECT_TOLERANCE


@dataclass(frozen=True)
class Job:
    """One question about one entry."""

    entry: Entry
    kind: str
    repeat: int


# --- what is expected -------------------------------------------------------------------------------------------------------


def image_seed(task: EditTask, seed: int) -> int:
    """Of one edited image, from suite, row and base seed alone, so that two models start from the same noise. 63 bits."""
    return int.from_bytes(hashlib.sha256(f"{SUITE}|{task.id}|0|{seed}".encode()).digest()[:8], "big") >> 1


def made_with(folder: Path) -> dict[str, Any]:
    """The settings of a folder that `gedit generate` has filled; empty for a folder made elsewhere."""
    return read_settings(folder) if (folder / SETTINGS_FILE).exists() else {}


def _entry(task: EditTask, edited: Path, out: Path, purpose: str, seed: int) -> Entry:
    status, fault, sha256, size = "ok", "", "", (0, 0)
    try:
        source_size = read_rgb(task.source).size
    except ImageFault as error:
        raise UserError(f"{task.id}: its source image cannot be read ({error}); mend the set") from error
    if not edited.is_file():
        status, fault = "missing_image", "no such file"
    else:
        try:
            size, sha256 = read_rgb(edited).size, sha256_file(edited)
        except ImageFault as error:
            status, fault = "bad_image", str(error)
    source, path = (os.path.relpath(file, out) for file in (task.source, edited))
    return Entry(
        purpose, task.id, task.key, task.language, task.category, task.instruction, task.intersection, source, task.source_sha256, source_size,
        path, sha256, size, seed, status, fault,
    )  # fmt: skip


def plan(tasks: Sequence[EditTask], folder: Path, out: Path) -> list[Entry]:
    """An entry for every task and its image below `folder` (the official layout). Raises UserError(s) for unreadable sources or a folder of something else."""
    check_folder(folder, tasks)
    settings = made_with(folder)
    base = settings.get("seed") if settings.get("suite") == SUITE else None
    seeds = [UNKNOWN_SEED if base is None else image_seed(task, int(base)) for task in tasks]
    return [_entry(task, edited_path(folder, task), out, SAMPLE, seed) for task, seed in zip(tasks, seeds, strict=True)]


def entry_to_json(entry: Entry) -> dict[str, Any]:
    return asdict(entry)


def entry_from_json(value: Mapping[str, Any]) -> Entry:
    return Entry(**{**value, "source_size": tuple(value["source_size"]), "edited_size": tuple(value["edited_size"])})


def read_manifest(out: str | Path) -> tuple[dict[str, Any], list[Entry]]:
    """(what is written about the run, its entries). Raises UserError when the folder holds no judgements."""
    path = Path(out) / MANIFEST_FILE
    value = read_json(path)
    try:
        return value, [entry_from_json(entry) for entry in value["entries"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not a manifest of judgements ({error!r}); run `python -m benchmarks gedit judge` again") from error


# --- anchors ----------------------------------------------------------------------------------------------------------------


def read_anchors(folder: Path, out: Path) -> tuple[list[Entry], dict[str, Any]]:
    """(entries, the frozen record with its reference scores). Raises UserErrors for images that are gone or are no longer the frozen ones."""
    frozen = read_json(folder / ANCHORS_FILE)
    entries, faults = [], []
    try:
        for row in frozen["anchors"]:
            source, edited = folder / row["source"], folder / row["edited"]
            wrong = [
                str(file) for file, sha in ((source, row["source_sha256"]), (edited, row["edited_sha256"])) if not file.is_file() or sha256_file(file) != sha
            ]
            faults += [f"{file}: missing, or not the frozen image" for file in wrong]
            if not wrong:
                task = EditTask(row["id"], row["language"], row["category"], row["instruction"], False, source, row["source_sha256"])
                entries.append(_entry(task, edited, out, ANCHOR, UNKNOWN_SEED))
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / ANCHORS_FILE}: not a set of anchors ({error!r}); make one with `python -m benchmarks gedit anchors`") from error
    if faults:
        raise UserErrors(f"{folder}: the anchors have changed, so no drift can be measured:", faults)
    return entries, dict(frozen)


# --- questions --------------------------------------------------------------------------------------------------------------


def job_key(job: Job, identity: Mapping[str, Any], wording: Wording) -> str:
    """The address of a question's result. An anchor's differs from a sample's, and the same quality question about one image is asked once."""
    entry, semantic = job.entry, job.kind == SEMANTIC
    images = [entry.source_sha256, entry.edited_sha256] if semantic else [entry.edited_sha256, list(entry.source_size)]
    text = sha256_bytes(wording.text(job.kind, entry.instruction).encode())
    return result_key("judge", purpose=entry.purpose, question=job.kind, text=text, images=images, judge=dict(identity), repeat=job.repeat)


def jobs_of(entries: Sequence[Entry], repeats: int) -> list[Job]:
    """Every question of the entries that can be judged."""
    return [Job(entry, kind, repeat) for entry in entries if entry.status == "ok" for repeat in range(repeats) for kind in KINDS]


def question_of(job: Job, settings: JudgeSettings, wording: Wording, out: Path) -> Question:
    """The request's content. Raises UserError when an image is no longer the one that was planned for."""
    entry = job.entry
    for name, expected in ((entry.source, entry.source_sha256), (entry.edited, entry.edited_sha256)):
        if not (out / name).is_file() or sha256_file(out / name) != expected:
            raise UserError(f"{out / name}: missing or changed since the command began; run it again")
    source = read_rgb(out / entry.source)
    edited = match_source(source.size, read_rgb(out / entry.edited), settings)
    images = prepare_images(source if job.kind == SEMANTIC else None, edited, settings)
    return Question(job.kind, wording.text(job.kind, entry.instruction), images, f"image/{settings.image_format}", job.repeat)


def value_status(value: Mapping[str, Any]) -> str:
    """The status of a stored result, read from its raw replies."""
    return outcome([reply_from_json(reply) for reply in value["replies"]]).status


# --- what it costs ----------------------------------------------------------------------------------------------------------


def tile_tokens(width: float, height: float) -> int:
    """Tokens of an image by OpenAI's rule for tiles: to 2048 px at most, short side to 768 px at most, 85 + 170 a 512 px tile."""
    scale = min(1.0, 2048 / max(width, height))
    scale *= min(1.0, 768 / (min(width, height) * scale))
    return 85 + 170 * math.ceil(width * scale / 512) * math.ceil(height * scale / 512)


def patch_tokens(width: float, height: float) -> int:
    """Tokens of an image for Qwen2.5-VL: one a patch of 28 px."""
    return math.ceil(width / 28) * math.ceil(height / 28)


IMAGE_TOKENS: dict[str, Callable[[float, float], int]] = {"tiles": tile_tokens, "patches": patch_tokens}


@dataclass(frozen=True)
class Preview:
    """What is about to be asked: questions by purpose, those already answered, and an estimate of tokens and price (None where no price was given)."""

    questions: int
    answered: int
    unjudgeable: int
    prompt_tokens: int
    completion_tokens: int
    price: float | None  # in the currency of the prices given

    def text(self) -> str:
        cost = "no price was given" if self.price is None else f"about {self.price:.2f} in the prices' currency"
        return (
            f"judge: {self.questions} questions to ask, {self.answered} answered before, {self.unjudgeable} images missing or unreadable; "
            f"about {self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion tokens; {cost}"
        )


def preview(
    jobs: Sequence[Job], answered: int, unjudgeable: int, settings: JudgeSettings, wording: Wording, rule: str, prices: tuple[float, float] | None
) -> Preview:
    """An estimate for `jobs`; `rule` is one of IMAGE_TOKENS, `prices` are per million prompt and completion tokens."""
    tokens = 0
    for job in jobs:
        tokens += math.ceil(len(wording.text(job.kind, job.entry.instruction)) / CHARACTERS_A_TOKEN)
        edited = job.entry.source_size if settings.resize == "match-source" else job.entry.edited_size
        for width, height in (job.entry.source_size, edited) if job.kind == SEMANTIC else (edited,):
            scale = math.sqrt(512 * 512 / (width * height)) if settings.resize == "area512" else 1.0
            tokens += IMAGE_TOKENS[rule](width * scale, height * scale)
    completion = COMPLETION_TOKENS * len(jobs)
    price = None if prices is None else (tokens * prices[0] + completion * prices[1]) / 1e6
    return Preview(len(jobs), answered, unjudgeable, tokens, completion, price)


# --- asking -----------------------------------------------------------------------------------------------------------------


class _Watch:
    """Keeps answers as they come and notices a server that answers nothing; threads share it."""

    def __init__(self, shard: Shard, advance: Advance) -> None:
        self._shard, self._advance, self._silent, self._answered = shard, advance, 0, 0
        self._last = ""
        self._lock = threading.Lock()

    def keep(self, key: str, question: str, replies: Sequence[Reply]) -> None:
        """Returns once the replies to a question (its digest) are on the disk. Raises UserError after GIVE_UP_AFTER questions without an answer in a row."""
        self._shard.append(key, {"question": question, "replies": [reply_to_json(reply) for reply in replies]})
        with self._lock:
            self._advance()
            silent = replies[-1].status == "api_error"
            self._silent, self._answered, self._last = self._silent + 1 if silent else 0, self._answered + (not silent), replies[-1].error
            if self._silent == GIVE_UP_AFTER:
                raise UserError(self._fault(f"{self._silent} questions in a row got no answer"))

    def end(self) -> None:
        """Raises UserError where questions were asked and not one was answered."""
        if self._silent and not self._answered:
            raise UserError(self._fault(f"none of {self._silent} questions got an answer"))

    def _fault(self, what: str) -> str:
        again = "what was judged is kept: see to the server, then run the same command again (the command line's with --retry api_error)"
        return f"judge: {what}, the last one: {self._last}; {again}"


def _work(job: Job, key: str, ask: Ask, settings: JudgeSettings, wording: Wording, out: Path, watch: _Watch, halt: threading.Event) -> None:
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
    """Judges every image of `model` below `folder`; the judgements are kept in `out`, and no question that has been answered is asked again.

    `make_ask` (see MakeAsk) is called only when something is to be asked, after the preview was said. `concurrency` questions are under way at once (None: one
    a worker), asked by threads of this process, by `workers` processes of this machine, or by those of the dask `scheduler`. `retry` names statuses
    ("api_error", "refused", "unparseable") whose questions are asked anew. Raises UserError(s) for faulty settings, a folder of judgements made with others, a
    price above `highest_price`, and whatever ends the run (see `benchmarks.judge_endpoint`).
    """
    out = Path(out)
    faults = settings.faults() + ([] if concurrency is None or concurrency >= 1 else [f"concurrency = {concurrency}: expected 1 or more"])
    if faults:
        raise UserErrors("the judge's settings:", faults)
    entries = plan(tasks, Path(folder), out)
    identity = identity_of_judge(settings, wording)
    about_set = {"digest": set_digest(tasks), "kind": "official" if is_official(tasks) else "custom"}
    about: dict[str, Any] = {"model": model, "set": about_set, "repeats": settings.repeats, "made_with": made_with(Path(folder))}
    if anchors is not None:
        frozen, about["anchors"] = read_anchors(anchors, out)
        entries += frozen
    known = read_results(out)
    wanted = {job_key(job, identity, wording): job for job in jobs_of(entries, settings.repeats)}
    own = [key for place, key in enumerate(wanted) if place % shard[1] == shard[0]]
    open_keys = [key for key in own if key not in known or value_status(known[key]) in retry]
    unjudgeable = sum(entry.status != "ok" for entry in entries)
    estimate = preview([wanted[key] for key in open_keys], len(own) - len(open_keys), unjudgeable, settings, wording, image_tokens, prices)
    say(estimate.text())
    if only_preview:
        return estimate
    _check_price(estimate, highest_price)
    claim(out, {"judge": identity, "model": model, "set": about_set})
    write_json(out / MANIFEST_FILE, {**about, "entries": [entry_to_json(entry) for entry in entries]})
    asked = {key: wanted[key] for key in open_keys}
    _ask_all(asked, out, settings, wording, make_ask, concurrency=concurrency, workers=workers, scheduler=scheduler, shard=shard)
    return estimate


def _check_price(estimate: Preview, highest_price: float | None) -> None:
    if highest_price is not None and estimate.questions and (estimate.price is None or estimate.price > highest_price):
        raise UserError(f"judge: that is not within the highest price, {highest_price:g}: raise it, give the prices, or judge fewer images")


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
    """Asks every question, `concurrency` at a time, each answer kept under its key. What is under way at a mistake is paid for: its answers are kept, too."""
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

            as_they_come(answer, range(len(keys)), prepared, done, at_once=concurrency, workers=workers, scheduler=scheduler)
        watch.end()


def _ask_here(jobs: Mapping[str, Job], out: Path, settings: JudgeSettings, wording: Wording, make_ask: MakeAsk, concurrency: int, watch: _Watch) -> None:
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


# --- images that a stage has made itself ------------------------------------------------------------------------------------


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
    """Judges images that lie anywhere; answers are kept below `store` by judge, so that a stage that is run again asks about new images alone.

    Returns the folder of answers and an entry an image, in order. The other arguments are those of `judge_folder`, and so are the faults.
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
    _ask_all(wanted, folder, settings, wording, make_ask, concurrency=concurrency, workers=workers, scheduler=scheduler, shard=(0, 1))
    return folder, entries
