"""Source `microworld`: examples drawn from the micro world, the same for the same request."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from data.errors import UserErrors
from data.files import atomic_folder
from data.images import encode_png
from data.manifests import write_manifest
from data.microworld import Scene, evaluation_examples, example, render, split_tuples
from data.progress import callback
from data.randomness import numpy_generator
from data.records import BUCKETS, CAPABILITIES, HELD_OUT, SPLITS
from data.sources.base import Request, Source

Drawn = tuple[str, str, str, dict[str, Any], Scene | None, Scene]


def draw_examples(request: Request) -> Iterator[Drawn]:
    """(id, split, capability, record, source scene, target scene) of every row.

    Row i of a category depends on the seed, the category and i alone.
    """
    for capability, count in request.train.items():
        categories = CAPABILITIES[capability].categories
        for index in range(count):
            category, step = categories[index % len(categories)], index // len(categories)
            rng = numpy_generator(request.seed, step, 0, f"collect/train/{category}")
            yield f"train-{category}-{step:05d}", "train", capability, *example(request.world, rng, category, "train")
    for split, (category, count) in product(HELD_OUT, request.evaluation.items()):
        capability = next(name for name in BUCKETS if category in CAPABILITIES[name].categories)
        rng = numpy_generator(request.seed, 0, 0, f"collect/{split}/{category}")
        for step, drawn in enumerate(evaluation_examples(request.world, rng, category, split, count)):
            yield f"{split}-{category}-{step:05d}", split, capability, *drawn


def _check_splits(request: Request) -> None:
    """A small world may have no tuple at all to train on, or none to choose on or to report, in some category."""
    wanted = [(split, category) for category, count in request.evaluation.items() if count for split in HELD_OUT]
    trained = [capability for capability, count in request.train.items() if count]
    wanted += [("train", category) for name in trained for category in CAPABILITIES[name].categories]
    words = {"train": "left to train on", "dev": "held out for the dev split", "eval": "held out for the eval split"}
    faults = [
        f"{category}: this world has no examples that are {words[split]}"
        for split, category in wanted
        if not split_tuples(request.world, category, split)
    ]
    if faults:
        remedy = "add shapes, colors, backgrounds or styles (section world)"
        raise UserErrors(f"the micro world is too small; {remedy}", faults)


def collect(request: Request, out: Path) -> dict[str, Any]:
    """Writes a manifest a split (`train.jsonl`, ...) and `images/`. Raises UserError(s) when the world is too small."""
    _check_splits(request)
    total = sum(request.train.values()) + len(HELD_OUT) * sum(request.evaluation.values())
    report = callback()
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    with atomic_folder(out) as folder:
        (folder / "images").mkdir()

        def save(name: str, scene: Scene) -> str:
            path = f"images/{name}.png"
            (folder / path).write_bytes(encode_png(render(request.world, scene)))
            return path

        for done, (name, split, capability, record, source, target) in enumerate(draw_examples(request), 1):
            row: dict[str, Any] = {"id": name, "split": split, "capability": capability}
            row |= {"category": record.get("category") or record["tag"], "prompt": record["prompt"], "record": record}
            if source is not None:
                row["source"] = save(f"{name}-source", source)
            row["target"] = save(f"{name}-target", target)
            rows[split].append(row)
            report(done, total, "render")
        for split, drawn in rows.items():
            if drawn:
                write_manifest(folder, f"{split}.jsonl", drawn)
        images = sum(1 for _ in (folder / "images").iterdir())
    return {"source": "microworld", **{split: len(drawn) for split, drawn in rows.items()}, "images": images}


def faults(request: Request) -> list[str]:
    return [] if sum(request.train.values()) else [f"train = {request.train}: expected at least one row"]


SOURCE = Source(collect, faults, made_to_order=True)
