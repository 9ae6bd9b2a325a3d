"""A distilled student for use: opened from a folder, a bucket or the registry, and images drawn from it."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import UserError
from data.files import read_json
from data.progress import Advance
from data.randomness import seed_of
from model import drawing
from model.backbones import Backbone, load_backbone
from model.families import FAMILIES
from model.networks.student import RECORD, Student, load_student, sampled
from model.networks.teachers import BASE, weights_sha256
from tasks.environment import TEACHERS
from tasks.weights.sources import Source, resolve

CARRIED = "base"  # the folder of a registered model that holds the base of an adapter student
PURPOSE = "sample"


@dataclass(frozen=True)
class Drawing:
    """How a student is drawn from. `steps` and `guidance` 0: as its record says; `resolution`: edge of a square picture
    in px, 0: that of its training."""

    steps: int = 0
    guidance: float = 0.0
    seed: int = 0
    resolution: int = 0

    def of(self, model: Model) -> Drawing:
        """The same with the student's own numbers in the place of zeros."""
        own = sampled(model.record, FAMILIES[model.backbone.name].steps)
        return replace(self, steps=self.steps or own.steps, guidance=self.guidance or own.guidance)


DEFAULTS = asdict(Drawing())


@dataclass(frozen=True)
class Model:
    """A student with its backbone, and what student.json says of it. `origin` is the pipeline folder with the parts
    around its transformer."""

    student: Student
    record: dict[str, Any]
    origin: Path

    @property
    def backbone(self) -> Backbone:
        return self.student.backbone


def add_model_options(parser: ArgumentParser, default: str | None = None, more: str = "") -> None:
    """The options --model and --base of a command that opens a student; `more` is added to what --model may be."""
    words = f"a student: folder, hf://..., s3://..., models:/name@alias{more}"
    words += " (default: %(default)s)" if default else ""
    parser.add_argument("--model", default=default, required=default is None, metavar="URI", help=words)
    words = "the base of an adapter student, where it is neither carried nor among data/teachers"
    parser.add_argument("--base", default="", metavar="URI", help=words)


def base_of(folder: Path, record: dict[str, Any], project: Path, base: str = "") -> Path:
    """The pipeline folder of the base that an adapter student lies on: `base` (an address), the one it carries, or the
    project's teachers'. Raises UserError when none of them has the hash that the student was trained on."""
    tried = []
    for place in [resolve(base, project).path] if base else [folder / CARRIED, project / TEACHERS / BASE]:
        if not (place / "model_index.json").is_file():
            tried.append(f"{place} is no pipeline folder")
            continue
        sha256 = weights_sha256(place, BASE)
        if sha256 == record["base_sha256"]:
            return place
        tried.append(f"{place} has {sha256[:12]}")
    raise UserError(
        f"{folder}: this student lies on the base {str(record['base_sha256'])[:12]}, which is not here "
        f"({'; '.join(tried)}); name its pipeline folder with --base"
    )


def open_model(
    origin: str | Source, project: Path, *, base: str = "", parts: Sequence[str] = ("text", "vae"), **options: Any
) -> Model:
    """The student behind an address (see tasks/weights/sources.py), or at a source that has been resolved, verified.
    `parts`: what is loaded besides the network; `options`: those of `load_backbone`.

    Raises UserError when it is no student of this pipeline, is damaged, or its base is not here.
    """
    source = origin if isinstance(origin, Source) else resolve(origin, project, pin=False)
    folder = source.path
    if not (folder / RECORD).is_file():
        raise UserError(f"{source.uri}: no {RECORD} in it; expected a student as the distill or absorb stage writes it")
    record = read_json(folder / RECORD)
    for name in ("resolution", "max_tokens"):  # a student answers sizes and prompts as it was taught to
        if record.get(name) and options.get(name) is None:
            options[name] = record[name]
    whole = bool(record.get("own_start"))  # a start of its own comes with the student
    pipeline = folder if whole else base_of(folder, record, project, base)
    backbone = load_backbone(pipeline, need=parts if whole else ("transformer", *parts), **options)
    student = load_student(folder, backbone, str(record.get("base_sha256")), options.get("device", "cpu"))
    student.network.requires_grad_(False)
    return Model(student, record, pipeline)


def draw(
    model: Model,
    prompts: Sequence[str],
    sources: Sequence[np.ndarray | None],
    how: Drawing,
    *,
    batch: int,
    advance: Advance = lambda n=1, **fields: None,
) -> list[np.ndarray]:
    """One picture (H, W, 3) uint8 a prompt; prompt i with a source edits it, and starts from noise (seed, i).

    A source keeps its aspect at about resolution^2 pixels; T2I is square. Raises UserError for words that the text
    encoder does not know, an edit that the network cannot read, or a size it has no positions for.
    """
    backbone = model.backbone
    backbone.check_prompts(prompts)
    if any(source is not None for source in sources) and not backbone.supports_edits:
        raise UserError("this student reads no source image: sample it without --source")
    jobs = [
        drawing.PictureJob(prompt, seed_of(how.seed, 0, row, PURPOSE), source)
        for row, (prompt, source) in enumerate(zip(prompts, sources, strict=True))
    ]
    how = how.of(model)
    sampler: dict[str, Any] = {"steps": how.steps, "guidance": how.guidance, "resolution": how.resolution}
    drawn: dict[int, np.ndarray] = {}
    for rows, pictures in drawing.draw(model.student.field, backbone, jobs, batch=batch, **sampler):
        drawn.update(zip(rows, pictures, strict=True))
        advance(len(rows))
    return [drawn[row] for row in range(len(jobs))]


def carried(project: Path, checkpoint: Path) -> dict[str, Path]:
    """Name in the artifact -> file: the base's pipeline where the student is an adapter on it; nothing where the
    checkpoint is a whole pipeline. Raises UserError when an adapter's base is not among the project's teachers."""
    record = read_json(checkpoint / RECORD) if (checkpoint / RECORD).is_file() else {"own_start": True}
    if record.get("own_start"):
        return {}
    base = base_of(checkpoint, record, project)
    files = [base / "model_index.json", *(path for path in sorted(base.glob("*/**/*")) if path.is_file())]
    return {f"{CARRIED}/{path.relative_to(base).as_posix()}": path for path in files}
