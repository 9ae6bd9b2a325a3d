"""The transformer alone, an adapter's difference added to its weights. Every family has it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from model.checkpoint import write_tensors
from model.networks.student import plain_weights
from model.networks.teachers import WEIGHTS
from tasks.student.exports.form import Form
from tasks.student.opening import Model


def write(folder: Path, model: Model, dtype: torch.dtype) -> None:
    """config.json and the weights as diffusers' from_pretrained reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    network = model.student.network
    settings = {key: value for key, value in dict(network.config).items() if not key.startswith("_")}
    config = {"_class_name": type(network).__name__, **settings}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    weights = plain_weights(model.student.field).items()
    write_tensors(folder / WEIGHTS, {key: v.to(dtype) if v.is_floating_point() else v for key, v in weights})


FORM = Form("the network", "SD3Transformer2DModel.from_pretrained(DIR) or its like", lambda model: "", write)
