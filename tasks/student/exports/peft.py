"""The adapter as PEFT's folder. For a student of any family that is an adapter on the shared base."""

from __future__ import annotations

from pathlib import Path

import torch

from model.networks.adapters import write_peft
from model.networks.student import no_adapter, student_adapter
from tasks.student.exports.form import Form
from tasks.student.opening import Model


def write(folder: Path, model: Model, dtype: torch.dtype) -> None:
    """Adapters stay in fp32 whatever `dtype` is."""
    write_peft(folder, student_adapter(model.student))


FORM = Form("the adapter", "peft.PeftModel.from_pretrained(TRANSFORMER, DIR)", lambda m: no_adapter(m.student), write)
