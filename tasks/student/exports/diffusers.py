"""A pipeline folder: the student in the place of its base's transformer. For the families that diffusers runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from data.weights import PIPELINE
from tasks.student.exports import merged
from tasks.student.exports.form import Form, no_pipeline
from tasks.student.opening import CARRIED, Model


def write(folder: Path, model: Model, dtype: torch.dtype) -> None:
    for part in sorted(model.origin.iterdir()):
        if part.is_dir() and part.name not in ("transformer", CARRIED):
            shutil.copytree(part, folder / part.name)
    shutil.copyfile(model.origin / PIPELINE, folder / PIPELINE)
    merged.write(folder / "transformer", model, dtype)


FORM = Form("the pipeline", "diffusers.DiffusionPipeline.from_pretrained(DIR)", no_pipeline, write)
