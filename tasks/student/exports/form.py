"""What a form of export is, and which students the common programs cannot run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tasks.student.opening import Model


@dataclass(frozen=True)
class Form:
    """`holds` and `loaded_by` describe it to people. `refusal(model)` says why the form would not be the student, ""
    where it is. `write(folder, model, dtype)` fills an empty folder; `dtype` is that of merged weights."""

    holds: str
    loaded_by: str
    refusal: Callable[[Model], str]
    write: Callable[[Path, Model, torch.dtype], None]


def no_pipeline(model: Model) -> str:
    """Why neither diffusers' pipelines nor ComfyUI run this student, "" where they do."""
    return model.backbone.no_pipeline
