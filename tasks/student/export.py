"""`python -m tasks export`: a distilled student in the forms that other tools load. Every form gives the student's own
output, or is refused.

diffusers   a pipeline folder            diffusers.DiffusionPipeline.from_pretrained(DIR)
merged      the transformer alone        e.g. SD3Transformer2DModel.from_pretrained(DIR)
peft        the adapter as a folder      peft.PeftModel.from_pretrained(transformer, DIR)
comfyui     the adapter as one file      ComfyUI's LoRA loader, or pipeline.load_lora_weights(DIR, weight_name="FILE")

diffusers' load_lora_weights takes nothing from a PEFT folder and only warns: give it the comfyui file. The noise levels
of `python -m tasks sample` are, for a pipeline, sigmas=linspace(1, 1/steps, steps). A micro student, and an SD3 that
reads a source image beside the noise, are run by neither diffusers' pipelines nor ComfyUI: their networks (merged) and
adapters (peft) are exported; sample and the registered model's predict run them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from data.errors import UserError
from data.files import atomic_folder, sha256_file, write_json
from data.weights import PIPELINE
from model.checkpoint import write_tensors
from model.networks.adapters import write_comfyui, write_peft
from model.networks.student import plain_weights, student_adapter
from model.networks.teachers import WEIGHTS
from tasks.student.opening import CARRIED, Model, open_model

RECORD = "export.json"
COMFYUI_FILE = "danceopd_lora.safetensors"
FORMATS = ("diffusers", "peft", "comfyui", "merged")


def _network_folder(folder: Path, model: Model, dtype: torch.dtype) -> None:
    """config.json and the merged weights as diffusers' from_pretrained reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    network = model.student.network
    config = {
        "_class_name": type(network).__name__,
        **{key: value for key, value in dict(network.config).items() if not key.startswith("_")},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    weights = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in plain_weights(model.student.field).items()
    }
    write_tensors(folder / WEIGHTS, weights)


def _diffusers(folder: Path, model: Model, dtype: torch.dtype) -> None:
    for part in sorted(model.origin.iterdir()):
        if part.is_dir() and part.name not in ("transformer", CARRIED):
            shutil.copytree(part, folder / part.name)
    shutil.copyfile(model.origin / PIPELINE, folder / PIPELINE)
    _network_folder(folder / "transformer", model, dtype)


def _merged(folder: Path, model: Model, dtype: torch.dtype) -> None:
    _network_folder(folder, model, dtype)


def _peft(folder: Path, model: Model, dtype: torch.dtype) -> None:
    write_peft(folder, student_adapter(model.student))


def _comfyui(folder: Path, model: Model, dtype: torch.dtype) -> None:
    write_comfyui(folder / COMFYUI_FILE, student_adapter(model.student), model.backbone.name)


WRITERS: dict[str, Callable[[Path, Model, torch.dtype], None]] = {
    "diffusers": _diffusers,
    "peft": _peft,
    "comfyui": _comfyui,
    "merged": _merged,
}


def _check_runnable(kind: str, model: Model) -> None:
    """Raises UserError for a student that neither diffusers' pipelines nor ComfyUI run, with the forms that work."""
    if model.backbone.name == "micro":
        why = (
            "the micro world's text encoder and codec are the project's own, which neither diffusers' pipelines nor "
            "ComfyUI have"
        )
    elif model.backbone.name == "sd3" and model.backbone.supports_edits:
        channels = model.student.network.config.in_channels
        why = (
            f"this SD3 reads a source image beside the noise (in_channels = {channels}), which neither diffusers' "
            "StableDiffusion3Pipeline nor ComfyUI gives it"
        )
    else:
        return
    forms = "merged (the network)" + (" or peft (the adapter)" if model.student.adapter else "")
    raise UserError(
        f"--format {kind}: {why}: export it as {forms}; "
        "`python -m tasks sample` and the registered model's predict draw with it"
    )


def export(model: Model, kind: str, out: Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Writes the student to the folder `out`, whole or not at all, with export.json: what it was made from and the
    SHA-256 of every file.

    `dtype` is that of merged weights; adapters stay fp32. Raises UserError for a form that would not be the student.
    """
    if kind not in WRITERS:
        raise UserError(f"--format {kind}: choose one of {', '.join(FORMATS)}")
    if kind in ("diffusers", "comfyui"):
        _check_runnable(kind, model)
    if kind in ("peft", "comfyui"):
        student_adapter(model.student)  # refused before anything is written
    with atomic_folder(out) as folder:
        WRITERS[kind](folder, model, dtype)
        files = {
            path.relative_to(folder).as_posix(): sha256_file(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        origin = {
            key: model.record.get(key) for key in ("backbone", "base_sha256", "sha256", "stage", "steps", "teachers")
        }
        write_json(
            folder / RECORD,
            {"format": kind, "precision": str(dtype).removeprefix("torch."), "student": origin, "files": files},
        )
    return {"format": kind, "files": len(files), "folder": str(out)}


def cli(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m tasks export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", required=True, metavar="URI", help="a student: folder, hf://..., s3://..., models:/name@alias"
    )
    parser.add_argument("--format", required=True, choices=FORMATS, dest="kind")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="replaced as a whole")
    parser.add_argument(
        "--base",
        default="",
        metavar="URI",
        help="the base of an adapter student, where it is neither carried nor among data/teachers",
    )
    parser.add_argument(
        "--precision",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of merged weights (default: %(default)s, exact)",
    )
    options = parser.parse_args(list(argv))
    # In fp32 whatever the training's precision: the weights' own values are kept, and a merge is not rounded.
    model = open_model(options.model, Path.cwd(), base=options.base, parts=())
    made = export(model, options.kind, options.out, getattr(torch, options.precision))
    print(f"{made['format']}: {made['files']} files in {made['folder']}")
    return 0
