"""GenEval's verdict on an image: a record of requirements against a list of detections, for the micro world and the
real benchmark alike.

Facts follow djghosh13/geneval (evaluation/evaluate_images.py): which detections count, which of them need the colour or
the position of their clause, when a relation holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from data.errors import UserError
from data.microworld import RELATIONS
from data.records import GENEVAL_TAGS


@dataclass(frozen=True)
class Thresholds:
    """What counts as seen. The defaults are the benchmark's; a result made with others is another benchmark's."""

    score: float = 0.3  # a detection counts when its score is strictly above
    counting: float = 0.9  # the same for the tag "counting"
    most: int = 16  # detections of a class
    overlap: float = 1.0  # IoU from which the less confident of two detections of a class is dropped; 1 drops none
    position: float = 0.1  # share of both boxes' extents that an offset must exceed


OFFICIAL = Thresholds()
DETECTOR, CLASSIFIER = "facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"  # on the hub


@dataclass(frozen=True)
class Detection:
    """A detected object. `score` lies in [0, 1]; `box` is (x0, y0, x1, y1) in pixels, y down; `color` None: not
    classified. Raises UserError for an inverted box, or one that is no box at all (NaN)."""

    class_name: str
    color: str | None
    score: float
    box: tuple[float, float, float, float]

    def __post_init__(self) -> None:
        x0, y0, x1, y1 = self.box
        if not (x0 <= x1 and y0 <= y1):
            needs = "x0 <= x1 and y0 <= y1 are needed: detect this image again"
            raise UserError(f"a detected {self.class_name} has the box {self.box}; {needs}")


class _HasScore(Protocol):
    @property
    def score(self) -> float: ...


Scored = TypeVar("Scored", bound=_HasScore)
Detections = Mapping[str, Sequence[Detection]]  # by class


@dataclass(frozen=True)
class Clause:
    """`count` objects of a class, perhaps of a colour, perhaps in a relation to the objects of the clause with this
    index."""

    class_name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Record:
    """A line of evaluation_metadata.jsonl: all of `include` must hold, the counts of `exclude` must not be reached."""

    tag: str
    prompt: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()


@dataclass(frozen=True)
class Verdict:
    correct: bool
    reasons: tuple[str, ...] = ()  # why not; empty when correct


def _clause(value: Any, index: int, where: str) -> Clause:
    where = f"{where}: clause {index}"
    try:
        position = value.get("position")
        place = None if position is None else (str(position[0]), int(position[1]))
        clause = Clause(str(value["class"]), int(value["count"]), value.get("color"), place)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        needs = "it needs class, count and, where wanted, color and position = [relation, index]"
        raise UserError(f"{where} is {value!r}; {needs}") from error
    if clause.count < 1:
        raise UserError(f"{where} asks for count = {clause.count}; it must be 1 or more")
    if place is not None and (place[0] not in RELATIONS or not 0 <= place[1] < index):
        needs = f"use one of {list(RELATIONS)} and the index of an earlier clause"
        raise UserError(f"{where} has position = {list(place)}; {needs}")
    return clause


def parse_record(value: Mapping[str, Any]) -> Record:
    """A record from its JSON object (keys tag, include, [exclude], prompt). Raises UserError naming the prompt and the
    key at fault."""
    where = f"GenEval record {value.get('prompt', '')!r}"
    if value.get("tag") not in GENEVAL_TAGS:
        raise UserError(f"{where}: tag = {value.get('tag')!r}; choose one of {list(GENEVAL_TAGS)}")
    if not value.get("include"):
        raise UserError(f"{where}: include is missing or empty; name at least one class and count")
    include, exclude = (
        tuple(_clause(clause, index, where) for index, clause in enumerate(value.get(key) or ()))
        for key in ("include", "exclude")
    )
    return Record(value["tag"], str(value.get("prompt", "")), include, exclude)


def relation_table(a: np.ndarray, b: np.ndarray, threshold: float = OFFICIAL.position) -> np.ndarray:
    """Which of RELATIONS box `a[i]` has to box `b[i]`: booleans (N, 4) of boxes (N, 4), each x0, y0, x1, y1, y down.
    None, one or two of them hold.

    The offset of the centres shrinks by `threshold` times both extents, and is then divided by its unshrunken length: a
    component above one half counts. The corners of a box may come in any order."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    offset = (a[:, :2] + a[:, 2:] - b[:, :2] - b[:, 2:]) / 2
    extents = np.abs(a[:, 2:] - a[:, :2]) + np.abs(b[:, 2:] - b[:, :2])
    shrunken = np.sign(offset) * np.maximum(np.abs(offset) - threshold * extents, 0.0)
    apart = (np.abs(shrunken) >= 1e-3).any(1, keepdims=True)
    length = np.linalg.norm(offset, axis=1, keepdims=True)
    x, y = np.divide(shrunken, length, out=np.zeros_like(shrunken), where=apart).T
    return np.stack([x < -0.5, x > 0.5, y < -0.5, y > 0.5], axis=1)


def relations(a: Sequence[float], b: Sequence[float], threshold: float = OFFICIAL.position) -> frozenset[str]:
    """The names of the relations that box `a` has to box `b`."""
    (held,) = relation_table(np.asarray([a]), np.asarray([b]), threshold)
    return frozenset(name for name, holds in zip(RELATIONS, held, strict=True) if holds)


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes in [0, 1], sides counted one pixel longer as the reference counts them."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + 1)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + 1)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def ranked(things: Iterable[Scored]) -> list[Scored]:
    """Most confident first, scores compared as the reference's float32. Of equal scores the later given comes first:
    the reference sorts upwards and reads that backwards. (In the numpy that it pins, up to 16 equals keep their order;
    newer ones may sort them otherwise from machine to machine.)"""
    return sorted(things, key=lambda thing: np.float32(thing.score))[::-1]


def surviving(record: Record, detections: Detections, thresholds: Thresholds = OFFICIAL) -> dict[str, list[Detection]]:
    """Class -> its detections that count, as `ranked`: above the tag's threshold (as float32, like the scores), at most
    `thresholds.most`, then without overlaps."""
    threshold = np.float32(thresholds.counting if record.tag == "counting" else thresholds.score)
    survivors: dict[str, list[Detection]] = {}
    for name, objects in detections.items():
        kept = survivors[name] = []
        above = [detection for detection in ranked(objects) if np.float32(detection.score) > threshold]
        for detection in above[: thresholds.most]:
            if thresholds.overlap >= 1.0 or all(overlap(detection.box, k.box) < thresholds.overlap for k in kept):
                kept.append(detection)
    return survivors


Group = Sequence[Detection] | None  # the objects that fulfil a clause; None where it fails


def _failure(clause: Clause, top: Sequence[Detection], target: Group, target_name: str, offset: float) -> str | None:
    """Why the most confident detections `top` do not fulfil an include clause; `target` are the objects that its
    position refers to, `offset` is `Thresholds.position`."""
    name = clause.class_name
    if len(top) < clause.count:
        return f"expected {name} >= {clause.count}, found {len(top)}"
    if clause.color is not None:
        colors = [str(detection.color) for detection in top]
        matching = colors.count(clause.color)
        if matching < clause.count:
            seen = ", ".join(colors)
            return f"expected {clause.color} {name} >= {clause.count}, found {matching} (seen: {seen})"
    if clause.position is not None:
        relation = clause.position[0]
        expected = f"expected {name} {relation} {target_name}"
        if target is None:
            return f"{expected}, but no {target_name} fulfils its own clause"
        for held in (relations(detection.box, other.box, offset) for detection in top for other in target):
            if relation not in held:
                return f"{expected}, found {' and '.join(sorted(held)) or 'no relation'}"
    return None


def verdict(record: Record | Mapping[str, Any], detections: Detections, thresholds: Thresholds = OFFICIAL) -> Verdict:
    """Whether the detections (any order; it decides between equal scores, see `ranked`) fulfil the record, with every
    reason why not.

    Only the `count` most confident objects of a class need the colour and position of their clause. Extra objects are
    free, except where `exclude` forbids them (it does so for counting alone). Raises UserError for a malformed record.
    """
    record = record if isinstance(record, Record) else parse_record(record)
    survivors = surviving(record, detections, thresholds)
    groups: list[Group] = []
    reasons: list[str] = []
    for clause in record.include:
        top = survivors.get(clause.class_name, [])[: clause.count]
        index = clause.position[1] if clause.position else None
        target, name = (None, "") if index is None else (groups[index], record.include[index].class_name)
        failure = _failure(clause, top, target, name, thresholds.position)
        groups.append(None if failure else top)
        reasons += [failure] if failure else []
    for clause in record.exclude:
        number = len(survivors.get(clause.class_name, []))
        if number >= clause.count:
            reasons.append(f"expected {clause.class_name} < {clause.count}, found {number}")
    return Verdict(not reasons, tuple(reasons))
