"""What a judge decides between: the pictures that several models made of one prompt, and of one source where it is an
edit. Every two of them are shown in both orders."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

from benchmarks.gedit.questions import look_at, read_unchanged, size_of_source
from benchmarks.gedit.rows import EditTask, check_folder, edited_path
from benchmarks.geneval.images import Records, read_images
from benchmarks.judge.protocol import JudgeSettings, Question, encoded, match_source
from benchmarks.judge.wording import PREFERRED_EDIT, PREFERRED_IMAGE, PairWording, Wording
from benchmarks.store import result_key
from data.errors import UserError
from data.files import read_json, sha256_bytes

MANIFEST_FILE = "manifest.json"
Size = tuple[int, int]  # (width, height) in px; (0, 0) where there is no image


@dataclass(frozen=True)
class Picture:
    """A model's image, or why it cannot be shown: `status` is "ok", "missing_image" or "bad_image". `file` is relative
    to the folder of judgements."""

    file: str
    status: str
    fault: str
    sha256: str
    size: Size


@dataclass(frozen=True)
class Contest:
    """A prompt's k-th sample by every model; without a source image (`source` is "") it was drawn from the text."""

    example_id: str
    k: int
    category: str
    instruction: str
    source: str
    source_sha256: str
    source_size: Size
    pictures: dict[str, Picture]  # by model

    @property
    def kind(self) -> str:
        return PREFERRED_EDIT if self.source else PREFERRED_IMAGE

    def status_of(self, pair: Sequence[str]) -> str:
        """ "ok" where both of the pair's pictures can be shown, else what is wrong with the first that cannot."""
        return next((self.pictures[model].status for model in pair if self.pictures[model].status != "ok"), "ok")

    def same(self, pair: Sequence[str]) -> bool:
        """Whether two good pictures are one and the same: a tie that nobody needs to be asked about."""
        return self.status_of(pair) == "ok" and len({self.pictures[model].sha256 for model in pair}) == 1


@dataclass(frozen=True)
class Job:
    """One question: the pictures of two models in this order, for the `repeat`-th time."""

    contest: Contest
    first: str
    second: str
    repeat: int

    @property
    def kind(self) -> str:
        return self.contest.kind

    @property
    def pictures(self) -> tuple[Picture, Picture]:
        return self.contest.pictures[self.first], self.contest.pictures[self.second]


# --- contests ---------------------------------------------------------------------------------------------------------


def _pictures(files: Mapping[str, Path], out: Path) -> dict[str, Picture]:
    return {model: Picture(os.path.relpath(file, out), *look_at(file)) for model, file in files.items()}


def of_edits(tasks: Sequence[EditTask], folders: Mapping[str, Path], out: Path) -> list[Contest]:
    """A contest a row of an edit set; `folders` has each model's images in GEdit-Bench's layout. Raises UserError(s)
    for unreadable sources or a folder of something else."""
    for folder in folders.values():
        check_folder(folder, tasks)
    contests = []
    for task in tasks:
        pictures = _pictures({model: edited_path(folder, task) for model, folder in folders.items()}, out)
        source = (os.path.relpath(task.source, out), task.source_sha256, size_of_source(task))
        contests.append(Contest(task.id, 0, task.category, task.instruction, *source, pictures))
    return contests


def of_prompts(records: Records, folders: Mapping[str, Path], out: Path) -> list[Contest]:
    """A contest a prompt and sample; `folders` has each model's images in GenEval's layout. Raises UserErrors for an
    incomplete folder, or models with unlike numbers of images a prompt."""
    sets = {model: read_images(folder, records) for model, folder in folders.items()}
    samples = {model: images.samples for model, images in sets.items()}
    if len(set(samples.values())) > 1:
        raise UserError(f"images a prompt: {samples}; as many of every model are needed")
    contests = []
    for items in zip(*(images.items for images in sets.values()), strict=True):
        files = {model: sets[model].root / item.path for model, item in zip(sets, items, strict=True)}
        one, record = items[0], items[0].record
        about = (one.example_id, one.k, record["tag"], record["prompt"], "", "", (0, 0))
        contests.append(Contest(*about, _pictures(files, out)))
    return contests


def read_manifest(out: Path) -> tuple[dict[str, Any], list[Contest]]:
    """(what is written about the run, its contests). Raises UserError when the folder holds no such judgements."""
    path = out / MANIFEST_FILE
    value = read_json(path)
    try:
        contests = []
        for row in value["contests"]:
            pictures = {name: Picture(**{**one, "size": tuple(one["size"])}) for name, one in row["pictures"].items()}
            contests.append(Contest(**{**row, "source_size": tuple(row["source_size"]), "pictures": pictures}))
        return value, contests
    except (KeyError, TypeError, AttributeError) as error:
        advice = "run `python -m benchmarks pairwise judge` again"
        raise UserError(f"{path}: not a manifest of pairwise judgements ({error!r}); {advice}") from error


# --- questions --------------------------------------------------------------------------------------------------------


def orders(contest: Contest, pair: Sequence[str], repeat: int) -> list[Job]:
    """The questions that decide a contest of two models once: both orders; none where nobody needs to be, or can be,
    asked."""
    if contest.status_of(pair) != "ok" or contest.same(pair):
        return []
    return [Job(contest, first, second, repeat) for first, second in permutations(pair)]


def jobs_of(contests: Sequence[Contest], models: Sequence[str], repeats: int) -> list[Job]:
    """Every question about every two of the models."""
    pairs = list(combinations(models, 2))
    every = [(contest, pair, repeat) for contest in contests for pair in pairs for repeat in range(repeats)]
    return [job for contest, pair, repeat in every for job in orders(contest, pair, repeat)]


def text_of(job: Job, wording: Wording | PairWording) -> str:
    return wording.text(job.kind, job.contest.instruction)


def job_key(job: Job, identity: Mapping[str, Any], wording: Wording | PairWording) -> str:
    """The address of a question's result; `identity` is the judge's."""
    images = [job.contest.source_sha256, *(picture.sha256 for picture in job.pictures)]
    about = {"question": job.kind, "text": sha256_bytes(text_of(job, wording).encode()), "images": images}
    return result_key("judge", **about, judge=dict(identity), repeat=job.repeat)


def question_of(job: Job, settings: JudgeSettings, out: Path) -> Question:
    """The request's content. Raises UserError when an image is no longer the one that was planned for."""
    contest = job.contest
    images = [read_unchanged(out / picture.file, picture.sha256) for picture in job.pictures]
    if contest.source:
        source = read_unchanged(out / contest.source, contest.source_sha256)
        images = [source, *(match_source(source.size, image, settings) for image in images)]
    text, shown = text_of(job, settings.wording), encoded(images, settings)
    return Question(job.kind, text, shown, f"image/{settings.image_format}", job.repeat)


def sizes_of(job: Job, settings: JudgeSettings) -> list[Size]:
    """Of the images that the question sends."""
    if not job.contest.source:
        return [picture.size for picture in job.pictures]
    source = job.contest.source_size
    return [source, *(source if settings.resize == "match-source" else picture.size for picture in job.pictures)]
