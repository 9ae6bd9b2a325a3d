"""`python -m tasks sample-set`: a list of prompts with seeds and file names, sampled with one model into a folder. The
benchmarks' own commands call it.

Every image has its own seed, so that it depends neither on its batch's place nor on the number of workers. What is in
the folder already stays.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.parallel import each
from benchmarks.store import claim
from data.errors import UserError, UserErrors
from data.files import atomic_file, read_json
from data.images import encode_png, picture_size, read_picture
from data.progress import progress
from model.backbones import Backbone
from model.drawing import PictureJob, deal, draw
from model.networks.network import NetworkField
from model.networks.student import Sampled, sampled
from model.networks.teachers import RECORD as TEACHER_RECORD
from model.networks.teachers import load_teachers, read_records
from tasks.params.reading import PARAMS_FILE, faults_of, load_params
from tasks.params.sections import BackboneParams, SamplingParams
from tasks.student.opening import add_model_options, open_model


@dataclass(frozen=True)
class Job:
    """One image to make: `path` is relative to the output folder, `source` the picture to edit ("" for T2I)."""

    id: str
    prompt: str
    seed: int
    path: str
    source: str = ""


@dataclass(frozen=True)
class Sampler:
    """What draws. `model`: a student's address (see tasks/weights/sources.py) or a teacher's folder, with its base
    beside it; `base`: that of an adapter student, "" where it is carried or among the project's teachers. `steps` and
    `guidance` 0: as a student's record says; a teacher is drawn in `usual_steps`, unguided."""

    model: str
    base: str
    backbone: BackboneParams
    usual_steps: int
    steps: int = 0
    guidance: float = 0.0


@dataclass(frozen=True)
class _Batch:
    """What a worker needs to know. `sources`: PNG files, one a job; empty for T2I."""

    sampler: Sampler
    jobs: tuple[Job, ...]
    sources: tuple[bytes, ...]


@dataclass(frozen=True)
class _Sections:
    """What is read of params.yaml: shared sections alone."""

    backbone: BackboneParams
    sampling: SamplingParams


@lru_cache(maxsize=1)
def open_field(sampler: Sampler) -> tuple[Backbone, NetworkField, dict[str, Any], Sampled]:
    """The backbone, the field, what identifies it and how it is drawn. Raises UserError for an address with neither a
    student nor a teacher behind it, or files that do not belong together."""
    folder, loading = Path(sampler.model), sampler.backbone.loading()
    if (folder / TEACHER_RECORD).exists():
        backbone, fields = load_teachers(folder.parent, [folder.name], **loading)
        sha256 = read_records(folder.parent)[folder.name].sha256
        identity, own = {"kind": f"teacher {folder.name}", "sha256": sha256}, Sampled(sampler.usual_steps, 1.0)
        field = fields[folder.name]
    else:
        model = open_model(sampler.model, Path.cwd(), base=sampler.base, **loading)
        identity, own = (
            {"kind": "student", "sha256": model.record["sha256"]},
            sampled(model.record, sampler.usual_steps),
        )
        backbone, field = model.backbone, model.student.field
    how = Sampled(sampler.steps or own.steps, sampler.guidance or own.guidance)
    return backbone, field, identity, how


def _read_jobs(path: Path) -> tuple[dict[str, Any], list[Job]]:
    """{"settings": {...}, "jobs": [{"id", "prompt", "seed", "path", ["source"]}]}. Raises UserErrors with every job at
    fault."""
    value = read_json(path)
    jobs, faults = [], []
    for number, row in enumerate(value.get("jobs") or [] if isinstance(value, dict) else []):
        try:
            job = Job(**row)
        except TypeError as error:
            faults.append(f"job {number}: {error}")
            continue
        place = PurePosixPath(job.path)
        if place.is_absolute() or ".." in place.parts or place.suffix != ".png":
            faults.append(f"job {number}: path = {job.path!r}; a .png below the output folder is needed")
        if not job.prompt.strip():
            faults.append(f"job {number} ({job.id}): the prompt is empty")
        jobs.append(job)
    if len({job.path for job in jobs}) < len(jobs):
        faults.append("two jobs have the same path")
    if faults or not jobs:
        raise UserErrors(f"{path}: the list of images cannot be used:", faults or ["it holds no job"])
    return dict(value.get("settings") or {}), jobs


def draw_batch(batch: _Batch) -> list[bytes]:
    """The batch's images as PNG files. Runs in a worker."""
    backbone, field, _, how = open_field(batch.sampler)
    sources: list[np.ndarray | None] = [np.asarray(Image.open(io.BytesIO(content))) for content in batch.sources]
    sources = sources or [None] * len(batch.jobs)
    jobs = [PictureJob(job.prompt, job.seed, source) for job, source in zip(batch.jobs, sources, strict=True)]
    ((_, pictures),) = draw(field, backbone, jobs, batch=len(jobs), steps=how.steps, guidance=how.guidance)
    return [encode_png(picture) for picture in pictures]


def _dealt(backbone: Backbone, jobs: Sequence[Job], batch: int) -> list[tuple[Job, ...]]:
    """Batches of one kind and one size each. Raises UserError for an edit that the base cannot read."""
    edit = next((job for job in jobs if job.source), None)
    if edit and not backbone.supports_edits:
        words = "but this base reads no source image; take a model that does"
        raise UserError(f"job {edit.id}: it edits {edit.source}, {words}")
    sizes = [picture_size(Path(job.source)) if job.source else None for job in jobs]
    return [tuple(jobs[row] for row in dealt.rows) for dealt in deal(backbone, sizes, batch)]


def sample_set(
    sampler: Sampler,
    jobs: Sequence[Job],
    settings: dict[str, Any],
    *,
    out: Path,
    batch: int,
    workers: int,
    scheduler: str,
) -> dict[str, int]:
    """Writes every job's image that is not there yet, each whole or not at all. Returns {"images", "made"}.

    Raises UserErrors for a folder whose images were made by another model or sampler, and for words that the text
    encoder does not know.
    """
    backbone, _, identity, how = open_field(sampler)
    backbone.check_prompts([job.prompt for job in jobs])
    loading = {"scheduler": backbone.scheduler, "loading": sampler.backbone.loading()}
    claimed = {**asdict(how), **loading}
    claim(out, {**settings, "model": identity, "sampler": claimed})
    dealt = _dealt(backbone, jobs, batch)
    todo = [members for members in dealt if any(not (out / job.path).exists() for job in members)]
    made = 0

    def prepared(members: tuple[Job, ...]) -> _Batch:
        sources = tuple(encode_png(read_picture(Path(job.source))) for job in members if job.source)
        return _Batch(sampler, members, sources)

    with progress("sample: images", sum(map(len, todo))) as advance:

        def done(index: int, contents: list[bytes]) -> None:
            nonlocal made
            for job, content in zip(todo[index], contents, strict=True):
                if not (out / job.path).exists():
                    with atomic_file(out / job.path) as temporary:
                        temporary.write_bytes(content)
                    made += 1
            advance(len(contents))

        each(draw_batch, todo, prepared, done, workers=workers, scheduler=scheduler)
    return {"images": len(jobs), "made": made}


def cli(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    what = "Sample a list of prompts with one model; images that are there stay."
    parser = argparse.ArgumentParser("python -m tasks sample-set", description=what)
    add = parser.add_argument
    add_model_options(parser, more="; or a teacher's folder (data/teachers/base)")
    words = '{"settings": {}, "jobs": [{"id", "prompt", "seed", "path", "source"}]}'
    add("--jobs", type=Path, required=True, metavar="FILE", help=words)
    add("--out", type=Path, required=True, metavar="DIR")
    words = "its section `sampling` has the defaults (default: %(default)s)"
    add("--params", type=Path, default=Path(PARAMS_FILE), metavar="FILE", help=words)
    add("--steps", type=int, help="(default: as student.json says, else those of the section)")
    add("--guidance", type=float, help="1 is unguided (default: as student.json says; a teacher: 1)")
    add("--batch", type=int)
    add("--workers", type=int, default=1)
    add("--scheduler", default="", metavar="ADDRESS")
    parsed = parser.parse_args(arguments)
    params = load_params(_Sections, "sample-set", parsed.params)
    given = {name: value for name in ("steps", "guidance", "batch") if (value := getattr(parsed, name)) is not None}
    sampling = replace(params.sampling, **given)
    faults = faults_of(sampling)
    if faults:
        raise UserErrors("sample-set:", faults)
    settings, jobs = _read_jobs(parsed.jobs)
    given.pop("batch", None)
    sampler = Sampler(parsed.model, parsed.base, params.backbone, params.sampling.steps, **given)
    pool = {"workers": parsed.workers, "scheduler": parsed.scheduler}
    counts = sample_set(sampler, jobs, settings, out=parsed.out, batch=sampling.batch, **pool)
    print(f"sample-set: {counts['made']} of {counts['images']} images made, the others were there")
    return 0
