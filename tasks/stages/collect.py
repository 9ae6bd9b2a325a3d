"""Stage collect: raw manifests with their images, drawn from the micro world or brought from a folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from data.bounds import Count, OneOf
from data.curation.filters import BUCKETS
from data.errors import UserError, UserErrors
from data.files import atomic_folder
from data.images import encode_png
from data.manifests import manifest_paths, read_manifests, write_manifest
from data.microworld import Scene, World, evaluation_examples, example, render, split_tuples
from data.progress import callback
from data.randomness import numpy_generator
from data.records import CAPABILITIES
from tasks.params.sections import WorldParams

CATEGORIES = CAPABILITIES["t2i"].categories + CAPABILITIES["edit"].categories


@dataclass(frozen=True)
class Params:
    """Where examples come from. The counts speak of the micro world; a folder is taken as it is."""

    source: Literal["microworld", "folder"]
    folder: str  # with manifests and images; read when source is "folder"
    seed: int
    train: dict[Annotated[str, OneOf(BUCKETS)], Count]  # capability -> rows, spread evenly over its categories
    evaluation: dict[Annotated[str, OneOf(CATEGORIES)], Count]  # category -> held-out rows
    world: WorldParams

    def faults(self) -> list[str]:
        found = []
        if self.source == "folder" and not self.folder:
            found.append('folder = "": expected the folder with your manifests, as source is "folder"')
        if self.source == "microworld" and not sum(self.train.values()):
            found.append(f"train = {self.train}: expected at least one row")
        return found


Drawn = tuple[str, str, str, dict[str, Any], Scene | None, Scene]


def collect(params: Params, *, out: Path) -> dict[str, Any]:
    """Raw rows and images for curation: `*.csv`, `*.jsonl` or `*.parquet` with the images beside them.

    From the micro world: `train.jsonl`, `eval.jsonl` and `images/`, the same for the same parameters. From a folder:
    its manifests, unchanged, and every image that they name and that lies inside it. `out` is replaced as a whole.
    Raises UserError(s) when the folder cannot be read or the world is too small.
    """
    return _from_folder(Path(params.folder), out) if params.source == "folder" else _from_world(params, out)


# --- the micro world --------------------------------------------------------------------------------------------------


def draw_examples(params: Params, world: World) -> Iterator[Drawn]:
    """(id, split, capability, record, source scene, target scene) of every row. Row i of a category depends on the
    seed, the category and i alone.
    """
    for capability, count in params.train.items():
        categories = CAPABILITIES[capability].categories
        for index in range(count):
            category, step = categories[index % len(categories)], index // len(categories)
            rng = numpy_generator(params.seed, step, 0, f"collect/train/{category}")
            yield f"train-{category}-{step:05d}", "train", capability, *example(world, rng, category, "train")
    for category, count in params.evaluation.items():
        capability = next(name for name in BUCKETS if category in CAPABILITIES[name].categories)
        rng = numpy_generator(params.seed, 0, 0, f"collect/eval/{category}")
        for step, drawn in enumerate(evaluation_examples(world, rng, category, count)):
            yield f"eval-{category}-{step:05d}", "eval", capability, *drawn


def _check_splits(params: Params, world: World) -> None:
    """A small world may have no tuple at all to train on, or none to hold out, in some category."""
    asked = [("eval", category) for category, count in params.evaluation.items() if count]
    asked += [
        ("train", category)
        for capability, count in params.train.items()
        if count
        for category in CAPABILITIES[capability].categories
    ]
    words = {"train": "left to train on", "eval": "held out"}
    faults = [
        f"{category}: this world has no examples that are {words[split]}"
        for split, category in asked
        if not split_tuples(world, category, split)
    ]
    if faults:
        raise UserErrors(
            "the micro world is too small; add shapes, colors, backgrounds or styles (section world)", faults
        )


def _from_world(params: Params, out: Path) -> dict[str, Any]:
    world = params.world.world()
    _check_splits(params, world)
    total = sum(params.train.values()) + sum(params.evaluation.values())
    report = callback()
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    with atomic_folder(out) as folder:
        (folder / "images").mkdir()

        def save(name: str, scene: Scene) -> str:
            pixels: np.ndarray = render(world, scene)  # (H, W, 3) uint8
            path = f"images/{name}.png"
            (folder / path).write_bytes(encode_png(pixels))
            return path

        for done, (name, split, capability, record, source, target) in enumerate(draw_examples(params, world), 1):
            category = record.get("category") or record["tag"]
            row = {
                "id": name,
                "split": split,
                "capability": capability,
                "category": category,
                "prompt": record["prompt"],
                "record": record,
            }
            if source is not None:
                row["source"] = save(f"{name}-source", source)
            row["target"] = save(f"{name}-target", target)
            rows[split].append(row)
            report(done, total, "render")
        for split, found in rows.items():
            if found:
                write_manifest(folder, f"{split}.jsonl", found)
        images = sum(1 for _ in (folder / "images").iterdir())
    return {"source": "microworld", "train": len(rows["train"]), "eval": len(rows["eval"]), "images": images}


# --- a folder of the user's -------------------------------------------------------------------------------------------


def _from_folder(source: Path, out: Path) -> dict[str, Any]:
    """Copies what curation will read. Rows that it will reject come along, so that they are listed there with their
    reasons.
    """
    manifests = read_manifests(source)
    if out.resolve().is_relative_to(source.resolve()) or source.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{source}: the folder and the output {out} lie inside each other; keep your files elsewhere")
    named = sorted({path for row in manifests.rows for path in (row.source, row.target) if path})
    report = callback()
    copied = 0
    with atomic_folder(out) as folder:
        for path in manifest_paths(source):
            shutil.copyfile(path, folder / path.name)
        for done, name in enumerate(named, 1):
            if (source / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, folder / name)
                copied += 1
            report(done, len(named), "copy images")
    return {
        "source": str(source),
        "rows": manifests.count,
        "bad_rows": len(manifests.rejected),
        "images": copied,
        "missing_images": len(named) - copied,
    }
