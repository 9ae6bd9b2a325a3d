"""The micro twins of GenEval and GEdit-Bench: the detector's parse scored by GenEval's verdict, and a judge of edits
that reads pixels and asks no model.

The judge answers on GEdit's scale (0 to 10): SC1 the share of the edit's predicates that hold, all of them false in the
source; SC2 how much else stayed; PQ1 how much of the foreground is a thing; PQ2 how near the palette the pixels are. An
unedited copy earns SC1 = 0 and SC2 = 10, the ground truth 10 everywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.gedit.rules import overall
from benchmarks.geneval.confusion import confusions
from benchmarks.geneval.rules import OFFICIAL, Detection, verdict
from benchmarks.geneval.shapes import Detections, check_image, detect
from benchmarks.scores.scorecard import ExampleScore
from benchmarks.scores.scorer import CONTROLS, DrawnImage, Scorer
from data.errors import UserError
from data.images import read_picture
from data.microworld import Scene, World, render
from data.randomness import numpy_generator
from data.records import CAPABILITIES, EDITS, Example

INVISIBLE = 4.0  # levels of 255 by which a pixel may differ from the source and still be unchanged
# mean visible change outside the edited place, in levels, that earns SC2 = 0; the loss of another thing costs half
OVER_EDITED = 12.0
SAME_PLACE = 0.3  # box IoU from which a replacement stands where the old thing stood

Predicates = list[tuple[str, bool]]  # a property that the edit must bring about, and whether the picture has it
Layout = Mapping[int, tuple[str, str]]  # cell -> (shape, colour)


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


def _layout_f1(drawn: Layout, wanted: Layout) -> float:
    """F1 of things matched by place, shape and colour. A cell holds one thing, so they are matched cell by cell."""
    if not drawn and not wanted:
        return 1.0
    return 2.0 * sum(drawn.get(cell) == look for cell, look in wanted.items()) / (len(drawn) + len(wanted))


def _preservation(world: World, source_image: np.ndarray, image: np.ndarray, edited: int) -> float:
    """SC2 of a local edit: how little the picture changed outside the edited cell."""
    change = np.maximum(np.abs(image.astype(np.float64) - source_image).mean(-1) - INVISIBLE, 0.0)
    row, column = divmod(edited, world.grid)
    outside = np.ones(change.shape, dtype=bool)
    outside[row * world.cell : (row + 1) * world.cell, column * world.cell : (column + 1) * world.cell] = False
    return 10.0 * float(np.clip(1.0 - change[outside].mean() / OVER_EDITED, 0.0, 1.0))


def _thing_in(parse: Detections, cell: int) -> Detection | None:
    """The confident thing in a cell, if any."""
    things = zip(parse.cells, parse.things, strict=True)
    return next((thing for place, thing in things if place == cell and thing.score > OFFICIAL.score), None)


def _added(before: Detections, after: Detections, target: Scene, touched: int) -> tuple[int, Predicates]:
    """The new thing may land in any free cell: the best match is judged, and what else appeared is over-editing."""
    new = layout_of(target)[touched]
    taken = set(layout_of(target)) - {touched}
    free = [(cell, look) for cell, look in after.layout().items() if cell not in taken]  # most confident first
    place, look = max(free, key=lambda item: (item[1][0] == new[0]) + (item[1][1] == new[1]), default=(touched, None))
    return place, [
        ("a new thing stands on free ground", look is not None),
        (f"the new thing is a {new[0]}", look is not None and look[0] == new[0]),
        (f"the new thing is {new[1]}", look is not None and look[1] == new[1]),
    ]


def _removed(before: Detections, after: Detections, target: Scene, touched: int) -> tuple[int, Predicates]:
    old = before.layout().get(touched)
    return touched, [
        (f"no {' '.join(reversed(old or ()))} is left", old not in after.layout().values()),
        ("its place is empty", touched not in after.layout()),
    ]


def _replaced(before: Detections, after: Detections, target: Scene, touched: int) -> tuple[int, Predicates]:
    old, now, new = _thing_in(before, touched), _thing_in(after, touched), layout_of(target)[touched]
    in_place = (
        now is not None and old is not None and now.class_name == new[0] and _box_iou(now.box, old.box) >= SAME_PLACE
    )
    return touched, [
        ("the old shape is gone", now is None or old is None or now.class_name != old.class_name),
        (f"a {new[0]} stands in its place", in_place),
        (f"a {new[1]} {new[0]} stands in its place", in_place and now is not None and now.color == new[1]),
    ]


def _recolored(before: Detections, after: Detections, target: Scene, touched: int) -> tuple[int, Predicates]:
    now, new = after.layout().get(touched), layout_of(target)[touched]
    return touched, [
        (f"the thing in its place is {new[1]}", now is not None and now[1] == new[1]),
        (f"a {new[1]} {new[0]} stands in its place", now == new),
    ]


# (parse of the source, parse of the result, target scene, touched cell) -> (the edited cell, predicates)
LOCAL_JUDGES: dict[str, Callable[[Detections, Detections, Scene, int], tuple[int, Predicates]]] = {
    "subject-add": _added,
    "subject-remove": _removed,
    "subject-replace": _replaced,
    "color_alter": _recolored,
}


def judge_edit(world: World, record: Mapping[str, Any], source_image: np.ndarray, image: np.ndarray) -> EditJudgement:
    """Judges an edited picture against its record (as `data.microworld.edit_example` makes it); both pictures (size,
    size, 3) uint8.

    Raises UserError for a record without the keys that its category needs, or for a picture of another size or type."""
    check_image(world, source_image)
    check_image(world, image)
    try:
        category = record["category"]
        source, target = Scene.from_json(record["source"]), Scene.from_json(record["target"])
        touched = int(record["touched"][0]) if category in LOCAL_JUDGES else -1
    except (KeyError, TypeError, IndexError, ValueError) as error:
        needs = "it needs category, source, target and, for local edits, one touched cell"
        raise UserError(f"edit record {record.get('prompt', '')!r}: {error!r}; {needs}") from error
    if category not in EDITS:
        fault = f"category = {category!r}; choose one of {list(EDITS)}"
        raise UserError(f"edit record {record.get('prompt', '')!r}: {fault}")
    style = nearest_style(world, source, image) if category == "style_change" else "plain"
    parse, wanted = detect(world, image, style), layout_of(target)
    if category in LOCAL_JUDGES:
        place, predicates = LOCAL_JUDGES[category](detect(world, source_image, source.style), parse, target, touched)
        if category == "subject-add":
            wanted = {**{cell: look for cell, look in wanted.items() if cell != touched}, place: wanted[touched]}
        sc2 = _preservation(world, source_image, image, place)
    else:
        predicates = [(f"the background is {target.background}", parse.background == target.background)]
        if category == "style_change":
            predicates = [(f"the style is {target.style}", style == target.style)]
        sc2 = 10.0 * _layout_f1(parse.layout(), layout_of(source))
    exact = parse.background == target.background and style == target.style and parse.layout() == wanted
    sc1 = 10.0 * sum(held for _, held in predicates) / len(predicates)
    pq1, pq2 = 10.0 * (1.0 - parse.unexplained), 10.0 * (1.0 - parse.palette_distance)
    levels = {"kept as it was": sc2, "foreground explained": pq1, "palette": pq2}
    reasons = [f"not so: {name}" for name, held in predicates if not held]
    reasons += [f"{name} = {value:.1f} of 10" for name, value in levels.items() if value < 9.0]
    return EditJudgement(sc1, sc2, pq1, pq2, exact, tuple(reasons))


@dataclass(frozen=True)
class MicroScorer(Scorer):
    """Scores all examples of the micro world: values {"correct"} for T2I, {"O", "sc", "pq", "exact"} for edits."""

    world: World

    @property
    def edge(self) -> int:
        return self.world.size

    def score(self, drawn: Sequence[DrawnImage]) -> list[ExampleScore]:
        """Raises UserError for a picture of another size, an edit without a source, or a malformed record."""
        return [self._score(image) for image in drawn]

    def _score(self, image: DrawnImage) -> ExampleScore:
        example, picture = image.example, read_picture(image.file)
        if not CAPABILITIES[example.capability].is_edit:
            outcome = verdict(example.record, detect(self.world, picture).by_class())
            return image.score({"correct": float(outcome.correct)}, outcome.reasons)
        if image.source is None:
            raise UserError(f"{example.id}: an edit without a source image cannot be judged")
        judged = judge_edit(self.world, example.record, read_picture(image.source), picture)
        sc, pq, o = overall((judged.sc1, judged.sc2), (judged.pq1, judged.pq2))
        return image.score({"O": o, "sc": sc, "pq": pq, "exact": float(judged.exact)}, judged.reasons)

    def controls(self, targets: Sequence[DrawnImage], seed: int) -> list[ExampleScore]:
        """Shuffled targets are dealt round a seeded random circle, so that none meets its own example.

        Raises UserError for a category with a single example."""
        givers = dict(enumerate(targets))
        for category in dict.fromkeys(target.example.category for target in targets):
            members = [place for place, target in enumerate(targets) if target.example.category == category]
            if len(members) < 2:
                advice = "score two or more of every category"
                raise UserError(f"shuffled floor: {category} has a single example; {advice}")
            order = numpy_generator(seed, 0, 0, f"shuffled/{category}").permutation(len(members))
            circle = [members[int(place)] for place in order]
            givers |= {taker: targets[giver] for taker, giver in zip(circle, circle[1:] + circle[:1], strict=True)}
        truth, shuffled = CONTROLS
        dealt = [replace(targets[place], image=giver.image, file=giver.file) for place, giver in sorted(givers.items())]
        return self.score(
            [replace(target, model=truth) for target in targets] + [replace(target, model=shuffled) for target in dealt]
        )

    def confusions(self, scores: Sequence[ExampleScore], examples: Sequence[Example]) -> list[dict[str, Any]]:
        return confusions(scores, {example.id: example.record for example in examples})
