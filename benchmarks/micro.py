"""The micro twins of GenEval and GEdit-Bench: the detector's parse scored by GenEval's verdict, and a judge of edits
that reads pixels and asks no model.

The judge answers on GEdit's scale (0 to 10): SC1 the share of the edit's predicates that hold, all of them false in the
source; SC2 how much else stayed; PQ1 how much of the foreground is a thing; PQ2 how near the palette the pixels are. An
unedited copy earns SC1 = 0 and SC2 = 10, the ground truth 10 everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.gedit.rules import overall
from benchmarks.geneval.rules import OFFICIAL, Detection, verdict
from benchmarks.geneval.shapes import Detections, check_image, detect
from benchmarks.scores.scorecard import ExampleScore
from data.errors import UserError, UserErrors
from data.microworld import Scene, World, render
from data.randomness import numpy_generator
from data.records import CAPABILITIES, GLOBAL_EDITS, LOCAL_EDITS, Example

INVISIBLE = 4.0  # levels of 255 by which a pixel may differ from the source and still be unchanged
# mean visible change outside the edited place, in levels, that earns SC2 = 0; losing one other thing costs half of it
# or more
OVER_EDITED = 12.0
CONTROLS = ("ground_truth", "shuffled")  # the ends of the scale, whose images are the examples' own targets
SAME_PLACE = 0.3  # box IoU from which a replacement stands where the old thing stood

Predicates = list[tuple[str, bool]]  # what the edit asks for, and whether it holds


@dataclass(frozen=True)
class EditJudgement:
    """The judge's four scores in [0, 10], whether the parsed picture is the target scene, and what is wrong."""

    sc1: float
    sc2: float
    pq1: float
    pq2: float
    exact: bool
    reasons: tuple[str, ...]


def layout_of(scene: Scene) -> dict[int, tuple[str, str]]:
    """cell -> (shape, colour), as `Detections.layout` gives it for a picture."""
    return {thing.cell: (thing.shape, thing.color) for thing in scene.things}


def nearest_style(world: World, source: Scene, image: np.ndarray) -> str:
    """The style whose rendering of the source scene differs least (squared error) from the image."""
    errors = {
        style: float(((image.astype(np.float64) - render(world, replace(source, style=style))) ** 2).mean())
        for style in world.styles
    }
    return min(errors, key=errors.__getitem__)


def _box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height)


def _layout_f1(found: Mapping[int, tuple[str, str]], wanted: Mapping[int, tuple[str, str]]) -> float:
    """F1 of things matched by place, shape and colour. A cell holds one thing, so the optimal matching is cell by
    cell.
    """
    if not found and not wanted:
        return 1.0
    return 2.0 * sum(found.get(cell) == look for cell, look in wanted.items()) / (len(found) + len(wanted))


def _preservation(world: World, source_image: np.ndarray, image: np.ndarray, edited: int) -> float:
    """SC2 of a local edit: how little the picture changed outside the edited cell."""
    change = np.maximum(np.abs(image.astype(np.float64) - source_image).mean(-1) - INVISIBLE, 0.0)
    row, column = divmod(edited, world.grid)
    outside = np.ones(change.shape, dtype=bool)
    outside[row * world.cell : (row + 1) * world.cell, column * world.cell : (column + 1) * world.cell] = False
    return 10.0 * float(np.clip(1.0 - change[outside].mean() / OVER_EDITED, 0.0, 1.0))


def _thing_in(found: Detections, cell: int) -> Detection | None:
    """The confident thing in a cell, if any."""
    return next(
        (
            thing
            for index, thing in zip(found.cells, found.things, strict=True)
            if index == cell and thing.score > OFFICIAL.score
        ),
        None,
    )


def _added(before: Detections, found: Detections, target: Scene, touched: int) -> tuple[int, Predicates]:
    """The new thing may land in any free cell; the best one found is judged, anything else that appeared counts as
    over-editing.
    """
    new = layout_of(target)[touched]
    taken = set(layout_of(target)) - {touched}
    free = [
        (cell, look) for cell, look in found.layout().items() if cell not in taken
    ]  # most confident first, and max keeps the first of equals
    place, look = max(free, key=lambda item: (item[1][0] == new[0]) + (item[1][1] == new[1]), default=(touched, None))
    return place, [
        ("a new thing stands on free ground", look is not None),
        (f"the new thing is a {new[0]}", look is not None and look[0] == new[0]),
        (f"the new thing is {new[1]}", look is not None and look[1] == new[1]),
    ]


def _removed(before: Detections, found: Detections, target: Scene, touched: int) -> tuple[int, Predicates]:
    old = before.layout().get(touched)
    return touched, [
        (f"no {' '.join(reversed(old or ()))} is left", old not in found.layout().values()),
        ("its place is empty", touched not in found.layout()),
    ]


def _replaced(before: Detections, found: Detections, target: Scene, touched: int) -> tuple[int, Predicates]:
    old, now, new = _thing_in(before, touched), _thing_in(found, touched), layout_of(target)[touched]
    in_place = (
        now is not None and old is not None and now.class_name == new[0] and _box_iou(now.box, old.box) >= SAME_PLACE
    )
    return touched, [
        ("the old shape is gone", now is None or old is None or now.class_name != old.class_name),
        (f"a {new[0]} stands in its place", in_place),
        (f"a {new[1]} {new[0]} stands in its place", in_place and now is not None and now.color == new[1]),
    ]


def _recolored(before: Detections, found: Detections, target: Scene, touched: int) -> tuple[int, Predicates]:
    now, new = found.layout().get(touched), layout_of(target)[touched]
    return touched, [
        (f"the thing in its place is {new[1]}", now is not None and now[1] == new[1]),
        (f"a {new[1]} {new[0]} stands in its place", now == new),
    ]


# what a local edit did: (parse of the source, parse of the result, target scene, touched cell) -> (the cell that was
# edited, predicates false in the source)
LOCAL_JUDGES: dict[str, Callable[[Detections, Detections, Scene, int], tuple[int, Predicates]]] = {
    "subject-add": _added,
    "subject-remove": _removed,
    "subject-replace": _replaced,
    "color_alter": _recolored,
}


def judge_edit(world: World, record: Mapping[str, Any], source_image: np.ndarray, image: np.ndarray) -> EditJudgement:
    """Judges an edited picture against its record (as `data.microworld.edit_example` makes it); both pictures (size,
    size, 3) uint8.

    Raises UserError for a record without the keys that its category needs, or for a picture of another size or type.
    """
    check_image(world, source_image)
    check_image(world, image)
    try:
        category, source, target = (
            record["category"],
            Scene.from_json(record["source"]),
            Scene.from_json(record["target"]),
        )
        touched = int(record["touched"][0]) if category in LOCAL_JUDGES else -1
    except (KeyError, TypeError, IndexError, ValueError) as error:
        needs = "it needs category, source, target and, for local edits, one touched cell"
        raise UserError(f"edit record {record.get('prompt', '')!r}: {error!r}; {needs}") from error
    style = nearest_style(world, source, image) if category == "style_change" else "plain"
    found = detect(world, image, style)
    wanted = layout_of(target)
    if category in LOCAL_JUDGES:
        place, predicates = LOCAL_JUDGES[category](detect(world, source_image, source.style), found, target, touched)
        if category == "subject-add":
            wanted = {**{cell: look for cell, look in wanted.items() if cell != touched}, place: wanted[touched]}
        sc2 = _preservation(world, source_image, image, place)
    elif category == "background_change":
        predicates = [(f"the background is {target.background}", found.background == target.background)]
        sc2 = 10.0 * _layout_f1(found.layout(), layout_of(source))
    elif category == "style_change":
        predicates = [(f"the style is {target.style}", style == target.style)]
        sc2 = 10.0 * _layout_f1(found.layout(), layout_of(source))
    else:
        raise UserError(
            f"edit record {record.get('prompt', '')!r}: category = {category!r}; choose one of {[*LOCAL_EDITS, *GLOBAL_EDITS]}"
        )
    exact = found.background == target.background and style == target.style and found.layout() == wanted
    sc1 = 10.0 * sum(held for _, held in predicates) / len(predicates)
    pq1, pq2 = 10.0 * (1.0 - found.unexplained), 10.0 * (1.0 - found.palette_distance)
    reasons = [f"not so: {name}" for name, held in predicates if not held]
    reasons += [
        f"{name} = {value:.1f} of 10"
        for name, value in (("kept as it was", sc2), ("foreground explained", pq1), ("palette", pq2))
        if value < 9.0
    ]
    return EditJudgement(sc1, sc2, pq1, pq2, exact, tuple(reasons))


def _score(
    world: World, example: Example, image: np.ndarray, source: np.ndarray | None
) -> tuple[dict[str, float], tuple[str, ...]]:
    if source is None:
        outcome = verdict(example.record, detect(world, image).by_class())
        return {"correct": float(outcome.correct)}, outcome.reasons
    judged = judge_edit(world, example.record, source, image)
    sc, pq, o = overall((judged.sc1, judged.sc2), (judged.pq1, judged.pq2))
    return {"O": o, "sc": sc, "pq": pq, "exact": float(judged.exact)}, judged.reasons


def score_images(
    world: World,
    examples: Sequence[Example],
    images: Sequence[np.ndarray],
    *,
    model: str,
    paths: Sequence[str],
    seeds: Sequence[int],
    k: Sequence[int],
    sources: Mapping[str, np.ndarray],
) -> list[ExampleScore]:
    """One ExampleScore an image: values {"correct"} for T2I, {"O", "sc", "pq", "exact"} for edits.

    `images[i]`, (size, size, 3) uint8, was made for `examples[i]` as its `k[i]`-th sample from `seeds[i]` and lies at
    `paths[i]`; `sources` holds every edit's source image by example id. Raises UserError(s) for lists of unequal
    length, a missing source, or a malformed record.
    """
    lengths = {"examples": len(examples), "images": len(images), "paths": len(paths), "seeds": len(seeds), "k": len(k)}
    if len(set(lengths.values())) > 1:
        raise UserError(f"scores of {model}: lists of unequal length {lengths}; give one entry an image")
    missing = sorted(
        {example.id for example in examples if CAPABILITIES[example.capability].is_edit and example.id not in sources}
    )
    if missing:
        raise UserErrors(f"scores of {model}: {len(missing)} edits without a source image:", missing[:5])
    scores = []
    for example, image, path, seed, index in zip(examples, images, paths, seeds, k, strict=True):
        capability = CAPABILITIES[example.capability]
        values, reasons = _score(world, example, image, sources[example.id] if capability.is_edit else None)
        scores.append(
            ExampleScore(model, capability.benchmark, example.category, example.id, index, seed, values, reasons, path)
        )
    return scores


def controls(
    world: World,
    examples: Sequence[Example],
    targets: Sequence[np.ndarray],
    *,
    paths: Sequence[str],
    sources: Mapping[str, np.ndarray],
    seed: int,
) -> dict[str, list[ExampleScore]]:
    """The ends of the scale: "ground_truth" scores every target image against its own example, "shuffled" against
    another example of the same category.

    `targets[i]` (size, size, 3) uint8 at `paths[i]` is the target of `examples[i]`. Shuffled targets are dealt round a
    seeded random circle, so that none meets its own example. Raises UserError for a category with a single example.
    """
    donor = list(range(len(examples)))
    for category in dict.fromkeys(example.category for example in examples):
        members = [index for index, example in enumerate(examples) if example.category == category]
        if len(members) < 2:
            raise UserError(f"shuffled floor: {category} has a single example; score two or more of every category")
        circle = [
            members[int(i)] for i in numpy_generator(seed, 0, 0, f"shuffled/{category}").permutation(len(members))
        ]
        for taker, giver in zip(circle, circle[1:] + circle[:1], strict=True):
            donor[taker] = giver
    orders = dict(zip(CONTROLS, (list(range(len(examples))), donor), strict=True))
    return {
        model: score_images(
            world,
            examples,
            [targets[index] for index in order],
            model=model,
            paths=[paths[index] for index in order],
            seeds=[seed] * len(examples),
            k=[0] * len(examples),
            sources=sources,
        )
        for model, order in orders.items()
    }
