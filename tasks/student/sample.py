"""`python -m tasks sample`: images from a distilled student, for people."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from benchmarks.scores.figures import sample_grid
from data.errors import UserError
from data.files import atomic_folder, write_json
from data.progress import progress
from tasks.student.opening import draw, open_model

COLUMNS = 4  # of the grid, where a prompt has one picture
STEPS = {"micro": 16}  # of the other families: 28, as the paper samples


def read_source(path: Path) -> np.ndarray:
    """A picture that the user names, as its camera meant it: (H, W, 3) uint8. Raises UserError for a file that is no
    image.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"--source {path}: cannot be read as an image ({error})") from error


def cli(argv: Sequence[str]) -> int:
    """Writes 000.png, 001.png, ..., grid.png and samples.json (what made them) to --out."""
    parser = argparse.ArgumentParser(
        "python -m tasks sample",
        description="Draw images from a distilled student: one a prompt, or several with --count.",
    )
    parser.add_argument(
        "--model",
        default="models:/danceopd@champion",
        metavar="URI",
        help="a student: folder, s3://..., models:/name@alias (default: %(default)s)",
    )
    parser.add_argument(
        "--base",
        default="",
        metavar="URI",
        help="the base of an adapter student, where it is neither carried nor among data/teachers",
    )
    parser.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="may be given several times")
    parser.add_argument(
        "--source",
        type=Path,
        action="append",
        default=[],
        metavar="IMAGE",
        help="the image to edit: one for all prompts, or one for each",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--count", type=int, default=1, help="images a prompt (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=None, help="Euler steps (default: 16 for micro, else 28)")
    parser.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        help="1 is the student itself, which has absorbed its guidance (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8, help="images at once (default: %(default)s)")
    parser.add_argument(
        "--resolution", type=int, default=None, metavar="PX", help="edge of a square picture (default: the model's own)"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--precision",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of the frozen networks (default: %(default)s)",
    )
    options = parser.parse_args(list(argv))
    faults = [
        f"--{name} = {getattr(options, name)}: expected 1 or more"
        for name in ("count", "batch", "guidance")
        if getattr(options, name) < 1
    ]
    if options.steps is not None and options.steps < 1:
        faults.append(f"--steps = {options.steps}: expected 1 or more")
    if len(options.source) not in (0, 1, len(options.prompt)):
        faults.append(
            f"--source is given {len(options.source)} times: expected one for all prompts, or one for each of {len(options.prompt)}"
        )
    if faults:
        raise UserError("; ".join(faults))
    given = [read_source(path) for path in options.source]
    sources = [
        given[0 if len(given) == 1 else index] if given else None
        for index in range(len(options.prompt))
        for _ in range(options.count)
    ]
    prompts = [prompt for prompt in options.prompt for _ in range(options.count)]
    model = open_model(options.model, Path.cwd(), base=options.base, device=options.device, dtype=options.precision)
    numbers = {
        "steps": options.steps or STEPS.get(model.backbone.name, 28),
        "guidance": options.guidance,
        "seed": options.seed,
    }
    with progress("sample: images", len(prompts)) as advance:
        pictures = draw(
            model, prompts, sources, **numbers, batch=options.batch, resolution=options.resolution, advance=advance
        )
    shown, titles = [], []
    for index, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        source = sources[index]
        if source is not None and index % options.count == 0:
            shown.append(np.asarray(Image.fromarray(source).resize((picture.shape[1], picture.shape[0]))))
            titles.append("source")
        shown.append(picture)
        titles.append(prompt)
    a_prompt = options.count + bool(given)
    with atomic_folder(options.out) as folder:
        for index, picture in enumerate(pictures):
            Image.fromarray(picture).save(folder / f"{index:03d}.png")
        sample_grid(shown, titles, folder / "grid.png", columns=a_prompt if a_prompt > 1 else COLUMNS)
        made = [
            {"image": f"{index:03d}.png", "prompt": prompt, "edit": sources[index] is not None}
            for index, prompt in enumerate(prompts)
        ]
        write_json(
            folder / "samples.json",
            {"model": options.model, "sha256": model.record["sha256"], **numbers, "images": made},
        )
    print(f"{len(pictures)} images and grid.png in {options.out}")
    return 0
