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
from tasks.student.opening import Drawing, add_model_options, draw, open_model

COLUMNS = 4  # of the grid, where a prompt has one picture


def read_source(path: Path) -> np.ndarray:
    """A picture that the user names, upright: (H, W, 3) uint8. Raises UserError for a file that is no image."""
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"--source {path}: cannot be read as an image ({error})") from error


def _parser() -> argparse.ArgumentParser:
    what = "Draw images from a distilled student: one a prompt, or several with --count."
    parser = argparse.ArgumentParser("python -m tasks sample", description=what)
    add_model_options(parser, "models:/danceopd@champion")
    add = parser.add_argument
    add("--prompt", action="append", required=True, metavar="TEXT", help="may be given several times")
    words = "the image to edit: one for all prompts, or one for each"
    add("--source", type=Path, action="append", default=[], metavar="IMAGE", help=words)
    add("--out", type=Path, required=True, metavar="DIR")
    add("--count", type=int, default=1, help="images a prompt (default: %(default)s)")
    add("--steps", type=int, default=None, help="Euler steps (default: as student.json says)")
    words = "1 is unguided (default: as student.json says: 1 where the student has absorbed guidance)"
    add("--guidance", type=float, default=None, help=words)
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=8, help="images at once (default: %(default)s)")
    words = "edge of a square picture (default: the model's own)"
    add("--resolution", type=int, default=None, metavar="PX", help=words)
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    words = "of the frozen networks (default: %(default)s)"
    add("--precision", default="float32", choices=("float32", "bfloat16"), help=words)
    return parser


def _check(options: argparse.Namespace) -> None:
    """Raises UserError with every number out of its range."""
    names = ("count", "batch", "guidance", "steps")
    numbers = {name: value for name in names if (value := getattr(options, name)) is not None}
    faults = [f"--{name} = {value}: expected 1 or more" for name, value in numbers.items() if value < 1]
    prompts, sources = len(options.prompt), len(options.source)
    if sources not in (0, 1, prompts):
        wanted = f"expected one for all prompts, or one for each of {prompts}"
        faults.append(f"--source is given {sources} times: {wanted}")
    if faults:
        raise UserError("; ".join(faults))


def cli(argv: Sequence[str]) -> int:
    """Writes 000.png, 001.png, ..., grid.png and samples.json (what made them) to --out."""
    options = _parser().parse_args(list(argv))
    _check(options)
    count = options.count
    given: list[np.ndarray | None] = [read_source(path) for path in options.source] or [None]
    if len(given) == 1:
        given *= len(options.prompt)
    prompts = [prompt for prompt in options.prompt for _ in range(count)]
    sources = [source for source in given for _ in range(count)]
    model = open_model(options.model, Path.cwd(), base=options.base, device=options.device, dtype=options.precision)
    how = Drawing(options.steps or 0, options.guidance or 0.0, options.seed, options.resolution or 0).of(model)
    with progress("sample: images", len(prompts)) as advance:
        pictures = draw(model, prompts, sources, how, batch=options.batch, advance=advance)
    shown, titles = [], []
    for index, (picture, prompt, source) in enumerate(zip(pictures, prompts, sources, strict=True)):
        if source is not None and index % count == 0:
            shown.append(np.asarray(Image.fromarray(source).resize((picture.shape[1], picture.shape[0]))))
            titles.append("source")
        shown.append(picture)
        titles.append(prompt)
    columns = count + bool(options.source)
    names = [f"{index:03d}.png" for index in range(len(pictures))]
    with atomic_folder(options.out) as folder:
        for name, picture in zip(names, pictures, strict=True):
            Image.fromarray(picture).save(folder / name)
        sample_grid(shown, titles, folder / "grid.png", columns=columns if columns > 1 else COLUMNS)
        images = [
            {"image": name, "prompt": prompt, "edit": source is not None}
            for name, prompt, source in zip(names, prompts, sources, strict=True)
        ]
        numbers = {"steps": how.steps, "guidance": how.guidance, "seed": how.seed}
        made = {"model": options.model, "sha256": model.record["sha256"], **numbers, "images": images}
        write_json(folder / "samples.json", made)
    print(f"{len(pictures)} images and grid.png in {options.out}")
    return 0
