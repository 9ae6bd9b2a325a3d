"""A distilled student for use: opened from a folder, a bucket or the registry, and images drawn from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.aspect import bucket_of, fit
from data.errors import UserError
from data.files import read_json
from data.progress import Advance
from model.backbones import Backbone, check_sizes, load_backbone
from model.drawing import as_images, as_pictures
from model.fields.base import condition_of
from model.fields.guided import Guided
from model.networks.student import RECORD, Student, load_student
from model.networks.teachers import BASE, weights_sha256
from model.randomness import noise_for
from model.rollout import euler_grid, sample
from tasks.weights.sources import Source, resolve

TEACHERS = Path("data/teachers")
PURPOSE = "sample"


@dataclass(frozen=True)
class Model:
    """A student with its backbone, and what student.json says of it. `origin` is the pipeline folder with the parts
    around its transformer.
    """

    student: Student
    record: dict[str, Any]
    origin: Path

    @property
    def backbone(self) -> Backbone:
        return self.student.backbone


def base_of(folder: Path, record: dict[str, Any], project: Path, base: str = "") -> Path:
    """The pipeline folder of the base that an adapter student lies on: `base` (an address), the one it carries, or the
    project's teachers'.

    Raises UserError when none of them has the hash that the student was trained on.
    """
    tried = []
    candidates = [resolve(base, project).path] if base else [folder / CARRIED, project / TEACHERS / BASE]
    for candidate in candidates:
        if (candidate / "model_index.json").is_file():
            sha256 = weights_sha256(candidate, BASE)
            if sha256 == record["base_sha256"]:
                return candidate
            tried.append(f"{candidate} has {sha256[:12]}")
        else:
            tried.append(f"{candidate} is no pipeline folder")
    wanted = str(record["base_sha256"])[:12]
    raise UserError(
        f"{folder}: this student lies on the base {wanted}, which is not here ({'; '.join(tried)}); name its pipeline folder with --base"
    )


def open_model(
    uri: str, project: Path, *, base: str = "", parts: Sequence[str] = ("text", "vae"), **options: Any
) -> Model:
    """The student behind an address (see tasks/weights/sources.py), verified. `parts`: what is loaded besides the
    network; `options`: those of `load_backbone`.

    Raises UserError when it is no student of this pipeline, is damaged, or its base is not here.
    """
    return open_folder(resolve(uri, project, pin=False), project, base=base, parts=parts, **options)


def open_folder(
    source: Source, project: Path, *, base: str = "", parts: Sequence[str] = ("text", "vae"), **options: Any
) -> Model:
    """As `open_model`, of a source that has been resolved."""
    folder = source.path
    if not (folder / RECORD).is_file():
        raise UserError(f"{source.uri}: no {RECORD} in it; expected a student as the distill or absorb stage writes it")
    record = read_json(folder / RECORD)
    own = bool(record.get("own_start"))
    trained = {
        name: record.get(name) for name in ("resolution", "max_tokens")
    }  # it answers prompts and sizes as it was taught to
    options |= {name: value for name, value in trained.items() if value and options.get(name) is None}
    origin = folder if own else base_of(folder, record, project, base)
    backbone = load_backbone(
        origin, need=parts if own else ("transformer", *parts), **options
    )  # a start of its own comes with the student
    student = load_student(folder, backbone, str(record.get("base_sha256")), options.get("device", "cpu"))
    student.network.requires_grad_(False)
    return Model(student, record, origin)


@torch.no_grad()
def draw(
    model: Model,
    prompts: Sequence[str],
    sources: Sequence[np.ndarray | None],
    *,
    steps: int,
    guidance: float,
    seed: int,
    batch: int,
    resolution: int | None = None,
    advance: Advance | None = None,
) -> list[np.ndarray]:
    """One picture (H, W, 3) uint8 a prompt; prompt i with a source edits it, and starts from noise (seed, i).

    `guidance` 1 is the student itself, which has absorbed its guidance. A source keeps its aspect at about
    `resolution`^2 pixels (None: the size that the student was trained at); T2I is square. Raises UserError for words
    that the text encoder does not know, an edit that the network cannot read, or a size it has no positions for.
    """
    backbone = model.backbone
    backbone.check_prompts(prompts)
    if any(source is not None for source in sources) and not backbone.supports_edits:
        raise UserError("this student reads no source image: sample it without --source")
    edge = resolution or backbone.latent_shape[1] * backbone.pixels_per_latent
    sizes = [
        (edge, edge) if source is None else bucket_of(source.shape[1], source.shape[0], edge, backbone.size_multiple)
        for source in sources
    ]
    check_sizes(backbone, set(sizes))
    grid = euler_grid(steps, float(backbone.scheduler["shift"]))
    device = next(model.student.network.parameters()).device
    drawn: dict[int, np.ndarray] = {}
    groups = sorted({(source is not None, size) for source, size in zip(sources, sizes, strict=True)})
    for edits, size in groups:
        rows = [row for row, source in enumerate(sources) if (source is not None, sizes[row]) == (edits, size)]
        empty = backbone.encode_prompts([""], edits)
        for first in range(0, len(rows), batch):
            chosen = rows[first : first + batch]
            encoded = None
            if edits:
                pictures = np.stack([fit(source, size) for row in chosen if (source := sources[row]) is not None])
                encoded = backbone.encode_image(as_images(pictures))
            condition = condition_of(
                backbone.encode_prompts([prompts[row] for row in chosen], edits), empty, encoded
            ).to(device)
            shape = (
                backbone.latent_shape[0],
                size[1] // backbone.pixels_per_latent,
                size[0] // backbone.pixels_per_latent,
            )
            latents = sample(
                Guided(model.student.field, guidance),
                noise_for(seed, 0, chosen, shape, PURPOSE).to(device),
                condition,
                grid,
            )
            for row, picture in zip(chosen, as_pictures(backbone.decode(latents)), strict=True):
                drawn[row] = picture
            if advance is not None:
                advance(len(chosen))
    return [drawn[row] for row in range(len(prompts))]


CARRIED = "base"  # the folder of a registered model that holds the base of an adapter student
STEPS = {"micro": 16}  # of the other families: 28, as the paper samples
DEFAULTS: dict[str, Any] = {"steps": 0, "guidance": 1.0, "seed": 0, "resolution": 0}


def carried(project: Path, checkpoint: Path) -> dict[str, Path]:
    """Name in the artifact -> file: the base's pipeline where the student is an adapter on it; nothing where the
    checkpoint is a whole pipeline.

    Raises UserError when an adapter's base is not among the project's teachers.
    """
    record = read_json(checkpoint / "student.json") if (checkpoint / "student.json").is_file() else {"own_start": True}
    if record.get("own_start"):
        return {}
    pass  # loads torch, which a student that is whole does not need

    base = base_of(checkpoint, record, project)
    files = [
        base / "model_index.json",
        *(
            path
            for part in sorted(base.iterdir())
            if part.is_dir()
            for path in sorted(part.rglob("*"))
            if path.is_file()
        ),
    ]
    return {f"{CARRIED}/{path.relative_to(base).as_posix()}": path for path in files}
