"""The questions that a judge is asked: the manifest's entries, anchors, and the jobs that follow from them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.gedit.rows import EditTask, check_folder, edited_path
from benchmarks.judge.protocol import JudgeSettings, Question, match_source, prepare_images, read_rgb
from benchmarks.judge.wording import KINDS, SEMANTIC, PairWording, Wording
from benchmarks.store import SETTINGS_FILE, read_settings, result_key
from data.errors import UserError, UserErrors
from data.files import read_json, sha256_bytes, sha256_file
from data.images import ImageFault
from data.randomness import seed_of

MANIFEST_FILE = "manifest.json"
ANCHORS_FILE = "anchors.json"
SAMPLE, ANCHOR = "sample", "anchor"
ASPECT_TOLERANCE = 0.02  # relative difference of width / height from which an edited image counts as stretched
UNKNOWN_SEED = -1
SUITE = "gedit"


@dataclass(frozen=True)
class Entry:
    """One image to be judged, or the reason why it cannot be. Paths are relative to the folder of judgements, sizes
    (width, height) in pixels."""

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


def image_seed(task: EditTask, seed: int) -> int:
    """Of an edited image, from suite, row and base seed alone, so that two models start from the same noise."""
    return seed_of(SUITE, task.id, 0, seed)


def made_with(folder: Path) -> dict[str, Any]:
    """The settings of a folder that `gedit generate` has filled; empty for a folder made elsewhere."""
    return read_settings(folder) if (folder / SETTINGS_FILE).exists() else {}


def size_of_source(task: EditTask) -> tuple[int, int]:
    """(width, height) in px. Raises UserError for a source image that cannot be read."""
    try:
        return read_rgb(task.source).size
    except ImageFault as error:
        raise UserError(f"{task.id}: its source image cannot be read ({error}); mend the set") from error


def look_at(image: Path) -> tuple[str, str, str, tuple[int, int]]:
    """(status, fault, SHA-256, (width, height)) of a model's image: status "ok", "missing_image" or "bad_image"."""
    if not image.is_file():
        return "missing_image", "no such file", "", (0, 0)
    try:
        return "ok", "", sha256_file(image), read_rgb(image).size
    except ImageFault as error:
        return "bad_image", str(error), "", (0, 0)


def read_unchanged(file: Path, sha256: str) -> Image.Image:
    """The image that was planned for. Raises UserError when it is no longer there."""
    if not file.is_file() or sha256_file(file) != sha256:
        raise UserError(f"{file}: missing or changed since the command began; run it again")
    return read_rgb(file)


def entry_of(task: EditTask, edited: Path, out: Path, purpose: str, seed: int) -> Entry:
    """The entry of a row and its edited image. Raises UserError for a source image that cannot be read."""
    source_size = size_of_source(task)
    status, fault, sha256, size = look_at(edited)
    source = {"source": os.path.relpath(task.source, out), "source_size": source_size}
    image = {"edited": os.path.relpath(edited, out), "edited_sha256": sha256, "edited_size": size, "seed": seed}
    row: dict[str, Any] = {**vars(task), "id": task.id, **source, **image}
    return Entry(purpose=purpose, status=status, fault=fault, **row)


def plan(tasks: Sequence[EditTask], folder: Path, out: Path) -> list[Entry]:
    """An entry for every task and its image below `folder` (the official layout). Raises UserError(s) for unreadable
    sources or a folder of something else."""
    check_folder(folder, tasks)
    settings = made_with(folder)
    base = settings.get("seed") if settings.get("suite") == SUITE else None
    seeds = [UNKNOWN_SEED if base is None else image_seed(task, int(base)) for task in tasks]
    return [entry_of(task, edited_path(folder, task), out, SAMPLE, seed) for task, seed in zip(tasks, seeds)]


def read_manifest(out: Path) -> tuple[dict[str, Any], list[Entry]]:
    """(what is written about the run, its entries). Raises UserError when the folder holds no judgements."""
    path = out / MANIFEST_FILE
    value = read_json(path)
    try:
        sizes = ("source_size", "edited_size")
        rows = [{**row, **{size: tuple(row[size]) for size in sizes}} for row in value["entries"]]
        return value, [Entry(**row) for row in rows]
    except (KeyError, TypeError) as error:
        advice = "run `python -m benchmarks gedit judge` again"
        raise UserError(f"{path}: not a manifest of judgements ({error!r}); {advice}") from error


def read_anchors(folder: Path, out: Path) -> tuple[list[Entry], dict[str, Any]]:
    """(entries, the frozen record with its reference scores). Raises UserErrors for images that are gone or are no
    longer the frozen ones."""
    path = folder / ANCHORS_FILE
    frozen = read_json(path)
    entries, faults = [], []
    try:
        for row in frozen["anchors"]:
            files = {folder / row[kind]: row[f"{kind}_sha256"] for kind in ("source", "edited")}
            changed = [file for file, sha256 in files.items() if not file.is_file() or sha256_file(file) != sha256]
            faults += [f"{file}: missing, or not the frozen image" for file in changed]
            if not changed:
                key, language, category, text = (row[name] for name in ("id", "language", "category", "instruction"))
                source, sha256 = folder / row["source"], row["source_sha256"]
                task = EditTask(key, language, category, text, False, source, sha256)
                entries.append(entry_of(task, folder / row["edited"], out, ANCHOR, UNKNOWN_SEED))
    except (KeyError, TypeError) as error:
        advice = "make one with `python -m benchmarks gedit anchors`"
        raise UserError(f"{path}: not a set of anchors ({error!r}); {advice}") from error
    if faults:
        raise UserErrors(f"{folder}: the anchors have changed, so no drift can be measured:", faults)
    return entries, dict(frozen)


def job_key(job: Job, identity: Mapping[str, Any], wording: Wording | PairWording) -> str:
    """The address of a question's result. An anchor's differs from a sample's, and the same quality question about one
    image is asked once."""
    entry, kind = job.entry, job.kind
    text = sha256_bytes(wording.text(kind, entry.instruction).encode())
    both = [entry.source_sha256, entry.edited_sha256]
    images = both if kind == SEMANTIC else [entry.edited_sha256, list(entry.source_size)]
    about = {"purpose": entry.purpose, "question": kind, "text": text, "images": images}
    return result_key("judge", **about, judge=dict(identity), repeat=job.repeat)


def jobs_of(entries: Sequence[Entry], repeats: int) -> list[Job]:
    """Every question of the entries that can be judged."""
    judged = [entry for entry in entries if entry.status == "ok"]
    return [Job(entry, kind, repeat) for entry in judged for repeat in range(repeats) for kind in KINDS]


def question_of(job: Job, settings: JudgeSettings, out: Path) -> Question:
    """The request's content. Raises UserError when an image is no longer the one that was planned for."""
    entry = job.entry
    source = read_unchanged(out / entry.source, entry.source_sha256)
    edited = match_source(source.size, read_unchanged(out / entry.edited, entry.edited_sha256), settings)
    images = prepare_images(source if job.kind == SEMANTIC else None, edited, settings)
    text = settings.wording.text(job.kind, entry.instruction)
    return Question(job.kind, text, images, f"image/{settings.image_format}", job.repeat)
