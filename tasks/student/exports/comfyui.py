"""The adapter as one file. For adapters of the families that ComfyUI and diffusers' pipelines run."""

from __future__ import annotations

from pathlib import Path

import torch

from model.networks.adapters import write_comfyui
from model.networks.student import no_adapter, student_adapter
from tasks.student.exports.form import Form, no_pipeline
from tasks.student.opening import Model

FILE = "danceopd_lora.safetensors"


def refusal(model: Model) -> str:
    return no_pipeline(model) or no_adapter(model.student)


def write(folder: Path, model: Model, dtype: torch.dtype) -> None:
    """Adapters stay in fp32 whatever `dtype` is."""
    write_comfyui(folder / FILE, student_adapter(model.student), model.backbone.name)


LOADERS = f'ComfyUI\'s LoRA loader, or pipeline.load_lora_weights(DIR, weight_name="{FILE}")'
FORM = Form("the adapter as one file", LOADERS, refusal, write)
