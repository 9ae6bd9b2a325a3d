"""`python -m tasks sample-set`: a list of prompts with seeds and file names, sampled with one model into a folder. The
benchmarks' own commands call it.

Every image has its own seed, so that it depends neither on its batch's place nor on the number of workers. What is in
the folder already stays.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.parallel import batches, each
from benchmarks.store import claim
from data.aspect import bucket_of
from data.errors import UserError, UserErrors
from data.files import atomic_file, read_json
from data.images import encode_png, picture_size, read_picture
from data.progress import progress
from model.backbones import Backbone
from model.drawing import as_pictures, encode_sources, network_device
from model.fields.base import VelocityField, condition_of
from model.fields.guided import Guided
from model.networks.teachers import RECORD as TEACHER_RECORD
from model.networks.teachers import load_teachers, read_records
from model.rollout import euler_grid, sample
from tasks.params.reading import PARAMS_FILE, faults_of, load_params
from tasks.params.sections import BackboneParams, SamplingParams
from tasks.student.opening import open_model


@dataclass(frozen=True)
class Job:
    """One image to make: `path` is relative to the output folder, `source` the picture to edit ("" for T2I)."""

    id: str
    prompt: str
    seed: int
    path: str
    source: str = ""


@dataclass(frozen=True)
class _Batch:
    """What a worker needs to know."""

    model: str
    base: str
    backbone: BackboneParams
    jobs: tuple[Job, ...]
    size: tuple[int, int]  # width and height in px
    sources: tuple[bytes, ...]  # PNG, one a job, or none at all
    steps: int
    guidance: float


@dataclass(frozen=True)
class _Sections:
    """What is read of params.yaml: shared sections alone."""

    backbone: BackboneParams
    sampling: SamplingParams


@lru_cache(maxsize=1)
def open_field(model: str, base: str, backbone: BackboneParams) -> tuple[Backbone, VelocityField, dict[str, Any]]:
    """The backbone, the field and what identifies it. `model`: a student's address (see tasks/weights/sources.py) or a
    teacher's folder, with its base beside it.

    Raises UserError for an address with neither behind it, or files that do not belong together.
    """
    folder, loading = Path(model), backbone.loading()
    if (folder / TEACHER_RECORD).exists():
        shared, fields = load_teachers(folder.parent, [folder.name], **loading)
        return (
            shared,
            fields[folder.name],
            {"kind": f"teacher {folder.name}", "sha256": read_records(folder.parent)[folder.name].sha256},
        )
    opened = open_model(model, Path.cwd(), base=base, **loading)
    return opened.backbone, opened.student.field, {"kind": "student", "sha256": opened.record["sha256"]}


def _read_jobs(path: Path) -> tuple[dict[str, Any], list[Job]]:
    """{"settings": {...}, "jobs": [{"id", "prompt", "seed", "path", ["source"]}]}. Raises UserErrors with every job at
    fault.
    """
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


@torch.no_grad()
def _draw(field: VelocityField, backbone: Backbone, batch: _Batch, sources: Sequence[np.ndarray]) -> list[np.ndarray]:
    """One picture (H, W, 3) uint8 a job; `sources` is empty or has one picture a job."""
    grid = euler_grid(batch.steps, float(backbone.scheduler["shift"]))
    edits, (width, height), device = bool(sources), batch.size, network_device(backbone)
    shape = (backbone.latent_shape[0], height // backbone.pixels_per_latent, width // backbone.pixels_per_latent)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(job.seed)) for job in batch.jobs])
    source = encode_sources(backbone, sources, batch.size) if edits else None
    condition = condition_of(
        backbone.encode_prompts([job.prompt for job in batch.jobs], edits), backbone.encode_prompts([""], edits), source
    )
    return as_pictures(
        backbone.decode(sample(Guided(field, batch.guidance), noise.to(device), condition.to(device), grid))
    )


def draw_batch(batch: _Batch) -> list[bytes]:
    """The batch's images as PNG files. Runs in a worker."""
    backbone, field, _ = open_field(batch.model, batch.base, batch.backbone)
    sources = [np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) for content in batch.sources]
    return [encode_png(picture) for picture in _draw(field, backbone, batch, sources)]


def _dealt(backbone: Backbone, jobs: Sequence[Job], batch: int) -> list[tuple[tuple[int, int], tuple[Job, ...]]]:
    """Batches of one size each, T2I in the usual square first, edits in their sources' bucket. They follow from the
    full list alone: what a network makes of an image may depend on the batch in the last bits. Raises UserError for an
    edit that the base cannot read."""
    groups: dict[tuple[bool, tuple[int, int]], list[Job]] = {}
    edge = backbone.latent_shape[1] * backbone.pixels_per_latent
    for job in jobs:
        if job.source and not backbone.supports_edits:
            raise UserError(
                f"job {job.id}: it edits {job.source}, but this base reads no source image; take a model that does"
            )
        size = bucket_of(*picture_size(Path(job.source)), edge, backbone.size_multiple) if job.source else (edge, edge)
        groups.setdefault((bool(job.source), size), []).append(job)
    return [
        (size, members)
        for (_, size), group in sorted(groups.items(), key=lambda item: item[0])
        for members in batches(group, batch)
    ]


def sample_set(
    model: str,
    jobs: Sequence[Job],
    settings: dict[str, Any],
    *,
    out: Path,
    base: str,
    backbone: BackboneParams,
    steps: int,
    guidance: float,
    batch: int,
    workers: int,
    scheduler: str,
) -> dict[str, int]:
    """Writes every job's image that is not there yet, each whole or not at all. Returns {"images", "made"}.

    Raises UserErrors for a folder whose images were made by another model or sampler, and for words that the text
    encoder does not know.
    """
    loaded, _, identity = open_field(model, base, backbone)
    loaded.check_prompts([job.prompt for job in jobs])
    sampler = {"steps": steps, "guidance": guidance, "scheduler": loaded.scheduler, "loading": backbone.loading()}
    claim(out, {**settings, "model": identity, "sampler": sampler})
    todo = [
        (size, members)
        for size, members in _dealt(loaded, jobs, batch)
        if any(not (out / job.path).exists() for job in members)
    ]
    total = sum(len(members) for _, members in todo)
    made = 0

    def prepared(dealt: tuple[tuple[int, int], tuple[Job, ...]]) -> _Batch:
        size, members = dealt
        sources = tuple(encode_png(read_picture(Path(job.source))) for job in members if job.source)
        return _Batch(model, base, backbone, members, size, sources, steps, guidance)

    with progress("sample: images", total) as advance:

        def done(index: int, contents: list[bytes]) -> None:
            nonlocal made
            for job, content in zip(todo[index][1], contents, strict=True):
                if not (out / job.path).exists():
                    with atomic_file(out / job.path) as temporary:
                        temporary.write_bytes(content)
                    made += 1
            advance(len(contents))

        each(draw_batch, todo, prepared, done, workers=workers, scheduler=scheduler)
    return {"images": len(jobs), "made": made}


def cli(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m tasks sample-set", description="Sample a list of prompts with one model; images that are there stay."
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="URI",
        help="a student: folder, s3://..., models:/name@alias; or a teacher's folder (data/teachers/base)",
    )
    parser.add_argument(
        "--base",
        default="",
        metavar="URI",
        help="the base of an adapter student, where it is neither carried nor among data/teachers",
    )
    parser.add_argument(
        "--jobs",
        type=Path,
        required=True,
        metavar="FILE",
        help='{"settings": {}, "jobs": [{"id", "prompt", "seed", "path", "source"}]}',
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--params",
        type=Path,
        default=Path(PARAMS_FILE),
        metavar="FILE",
        help="its section `sampling` has the defaults (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int)
    parser.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        help="1 is unguided, as a student with absorbed guidance is sampled (default: %(default)s)",
    )
    parser.add_argument("--batch", type=int)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--scheduler", default="", metavar="ADDRESS")
    parsed = parser.parse_args(arguments)
    params = load_params(_Sections, "sample-set", parsed.params)
    given = {name: value for name in ("steps", "guidance", "batch") if (value := getattr(parsed, name)) is not None}
    chosen = replace(params.sampling, **given)
    faults = faults_of(chosen)
    if faults:
        raise UserErrors("sample-set:", faults)
    settings, jobs = _read_jobs(parsed.jobs)
    counts = sample_set(
        parsed.model,
        jobs,
        settings,
        out=parsed.out,
        base=parsed.base,
        backbone=params.backbone,
        steps=chosen.steps,
        guidance=chosen.guidance,
        batch=chosen.batch,
        workers=parsed.workers,
        scheduler=parsed.scheduler,
    )
    print(f"sample-set: {counts['made']} of {counts['images']} images made, the others were there")
    return 0
