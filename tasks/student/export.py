"""`python -m tasks export`: a distilled student in the forms that other tools load. Every form gives the student's own
output, or is refused.

diffusers' load_lora_weights takes nothing from a PEFT folder and only warns: give it the comfyui file. The noise levels
of `python -m tasks sample` are, for a pipeline, sigmas=linspace(1, 1/steps, steps). A micro student, and an SD3 that
reads a source image beside the noise, are run by neither diffusers' pipelines nor ComfyUI: their networks (merged) and
adapters (peft) are exported; sample and the registered model's predict run them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data.errors import UserError
from data.files import atomic_folder, sha256_file, write_json
from tasks.student.exports import FORMS
from tasks.student.opening import Model, add_model_options, open_model

RECORD = "export.json"
ORIGIN = (
    "backbone",
    "base_sha256",
    "sha256",
    "stage",
    "trained_steps",
    "steps",
    "guidance",
    "teachers",
)  # of student.json


def export(model: Model, kind: str, out: Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Writes the student to the folder `out`, whole or not at all, with export.json: what it was made from and the
    SHA-256 of every file. `kind` is a name in FORMS; `dtype` is that of merged weights, adapters stay fp32.

    Raises UserError for a form that would not be the student, with the forms that are.
    """
    why = FORMS[kind].refusal(model)
    if why:
        forms = " or ".join(f"{name} ({form.holds})" for name, form in FORMS.items() if not form.refusal(model))
        raise UserError(
            f"--format {kind}: {why}: export it as {forms}; "
            "`python -m tasks sample` and the registered model's predict draw with it"
        )
    with atomic_folder(out) as folder:
        FORMS[kind].write(folder, model, dtype)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        record = {
            "format": kind,
            "precision": str(dtype).removeprefix("torch."),
            "student": {key: model.record.get(key) for key in ORIGIN},
            "files": {path.relative_to(folder).as_posix(): sha256_file(path) for path in files},
        }
        write_json(folder / RECORD, record)
    return {"format": kind, "files": len(files), "folder": str(out)}


def cli(argv: Sequence[str]) -> int:
    rows = [f"{name:12}{form.holds:25}{form.loaded_by}" for name, form in FORMS.items()]
    text = "\n".join([str(__doc__), *rows])
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tasks export", description=text, formatter_class=raw)
    add_model_options(parser)
    parser.add_argument("--format", required=True, choices=tuple(FORMS), dest="kind")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="replaced as a whole")
    precisions, words = ("float32", "bfloat16", "float16"), "of merged weights (default: %(default)s, exact)"
    parser.add_argument("--precision", default="float32", choices=precisions, help=words)
    options = parser.parse_args(list(argv))
    # In fp32 whatever the training's precision: the weights' own values are kept, and a merge is not rounded.
    model = open_model(options.model, Path.cwd(), base=options.base, parts=())
    made = export(model, options.kind, options.out, getattr(torch, options.precision))
    print(f"{made['format']}: {made['files']} files in {made['folder']}")
    return 0
