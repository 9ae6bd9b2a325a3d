"""GenEval's verdict on one image: a record of requirements against a list of detections. The micro world and the real
benchmark share it.

Facts follow djghosh13/geneval (evaluation/evaluate_images.py): what counts as detected, which detections a colour or a
position is asked of, when a relation holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.errors import UserError
from data.records import GENEVAL_TAGS

RELATIONS = ("left of", "right of", "above", "below")
THRESHOLD = 0.3  # a detection counts when its score is strictly above
COUNTING_THRESHOLD = 0.9  # the same for the tag "counting"
MAX_PER_CLASS = 16
POSITION_THRESHOLD = 0.1  # share of both boxes' extents that an offset must exceed before it counts
MAX_OVERLAP = 1.0  # IoU from which the less confident of two detections of a class is dropped; 1 drops none


@dataclass(frozen=True)
class Thresholds:
    """What counts as seen. The defaults are the benchmark's; a result made with others is another benchmark's."""

    score: float = THRESHOLD
    counting: float = COUNTING_THRESHOLD
    most: int = MAX_PER_CLASS
    overlap: float = MAX_OVERLAP
    position: float = POSITION_THRESHOLD


OFFICIAL = Thresholds()


@dataclass(frozen=True)
class Detection:
    """One detected object. `score` lies in [0, 1]; `box` is (x0, y0, x1, y1) in pixels, y down; `color` is None where
    nobody classified it.
    """

    class_name: str
    color: str | None
    score: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Clause:
    """`count` objects of a class, perhaps of a colour, perhaps in a relation to the objects of an earlier clause (its
    index).
    """

    class_name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Record:
    """One line of evaluation_metadata.jsonl: all of `include` must hold, none of `exclude` may be reached."""

    tag: str
    prompt: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()


@dataclass(frozen=True)
class Verdict:
    correct: bool
    reasons: tuple[str, ...] = ()  # every failure found; empty when correct


def _clause(value: Any, index: int, where: str) -> Clause:
    try:
        position = value.get("position")
        clause = Clause(
            str(value["class"]),
            int(value["count"]),
            value.get("color"),
            None if position is None else (str(position[0]), int(position[1])),
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(
            f"{where}: clause {index} is {value!r}; it needs class, count and, where asked, color and position = [relation, index]"
        ) from error
    if clause.count < 1:
        raise UserError(f"{where}: clause {index} asks for count = {clause.count}; it must be 1 or more")
    if clause.position is not None and (clause.position[0] not in RELATIONS or not 0 <= clause.position[1] < index):
        raise UserError(
            f"{where}: clause {index} has position = {list(clause.position)}; use one of {list(RELATIONS)} and the index of an earlier clause"
        )
    return clause


def parse_record(value: Mapping[str, Any]) -> Record:
    """A record from its JSON object (keys tag, include, [exclude], prompt). Raises UserError naming the prompt and the
    key at fault.
    """
    where = f"GenEval record {value.get('prompt', '')!r}"
    if value.get("tag") not in GENEVAL_TAGS:
        raise UserError(f"{where}: tag = {value.get('tag')!r}; choose one of {list(GENEVAL_TAGS)}")
    if not value.get("include"):
        raise UserError(f"{where}: include is missing or empty; name at least one class and count")
    include = tuple(_clause(clause, index, where) for index, clause in enumerate(value["include"]))
    exclude = tuple(_clause(clause, index, where) for index, clause in enumerate(value.get("exclude") or ()))
    return Record(value["tag"], str(value.get("prompt", "")), include, exclude)


def relation_table(a: np.ndarray, b: np.ndarray, threshold: float = POSITION_THRESHOLD) -> np.ndarray:
    """Which of RELATIONS box `a[i]` has to box `b[i]`: booleans (N, 4) of boxes (N, 4), each x0, y0, x1, y1, y down.
    None, one or two of them hold.

    The offset of the centres shrinks by `threshold` times both extents, and is then divided by its unshrunken length: a
    component above one half counts.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    offset = (a[:, :2] + a[:, 2:] - b[:, :2] - b[:, 2:]) / 2
    extents = (a[:, 2:] - a[:, :2]) + (b[:, 2:] - b[:, :2])
    shrunken = np.sign(offset) * np.maximum(np.abs(offset) - threshold * extents, 0.0)
    apart = (np.abs(shrunken) >= 1e-3).any(1, keepdims=True)
    x, y = np.divide(
        shrunken, np.linalg.norm(offset, axis=1, keepdims=True), out=np.zeros_like(shrunken), where=apart
    ).T
    return np.stack([x < -0.5, x > 0.5, y < -0.5, y > 0.5], axis=1)


def relations(a: Sequence[float], b: Sequence[float], threshold: float = POSITION_THRESHOLD) -> frozenset[str]:
    """The names of the relations that `relation_table` finds between two boxes."""
    (held,) = relation_table(np.asarray([a]), np.asarray([b]), threshold)
    return frozenset(name for name, one in zip(RELATIONS, held, strict=True) if one)


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes in [0, 1], sides counted one pixel longer as the reference counts them."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + 1)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + 1)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def _without_overlaps(found: Sequence[Detection], highest: float) -> list[Detection]:
    kept: list[Detection] = []
    for detection in found:
        if all(overlap(detection.box, other.box) < highest for other in kept):
            kept.append(detection)
    return kept


def surviving(
    record: Record, detections: Mapping[str, Sequence[Detection]], thresholds: Thresholds = OFFICIAL
) -> dict[str, list[Detection]]:
    """Per class, most confident first: the detections above the tag's threshold, at most `thresholds.most`, without
    overlaps where those are asked for.
    """
    threshold = thresholds.counting if record.tag == "counting" else thresholds.score
    ranked = {name: sorted(found, key=lambda detection: -detection.score) for name, found in detections.items()}
    alive = {
        name: [detection for detection in found if detection.score > threshold][: thresholds.most]
        for name, found in ranked.items()
    }
    return (
        alive
        if thresholds.overlap >= 1.0
        else {name: _without_overlaps(found, thresholds.overlap) for name, found in alive.items()}
    )


def _failures(
    clause: Clause,
    found: Sequence[Detection],
    groups: Sequence[Sequence[Detection] | None],
    names: Sequence[str],
    position_threshold: float,
) -> list[str]:
    """Why the top detections `found` do not fulfil an include clause; empty when they do."""
    if len(found) < clause.count:
        return [f"expected {clause.class_name} >= {clause.count}, found {len(found)}"]
    failures = []
    if clause.color is not None:
        matching = sum(detection.color == clause.color for detection in found)
        if matching < clause.count:
            colors = ", ".join(str(detection.color) for detection in found)
            failures.append(
                f"expected {clause.color} {clause.class_name} >= {clause.count}, found {matching} (seen: {colors})"
            )
    if clause.position is not None and not failures:
        relation, index = clause.position
        target = groups[index]
        if target is None:
            return [
                f"expected {clause.class_name} {relation} {names[index]}, but no {names[index]} fulfils its own clause"
            ]
        for detection in found:
            for other in target:
                held = relations(detection.box, other.box, position_threshold)
                if relation not in held:
                    return [
                        f"expected {clause.class_name} {relation} {names[index]}, found {' and '.join(sorted(held)) or 'no relation'}"
                    ]
    return failures


def verdict(
    record: Record | Mapping[str, Any], detections: Mapping[str, Sequence[Detection]], thresholds: Thresholds = OFFICIAL
) -> Verdict:
    """Whether the detections (class -> objects, any order) fulfil the record, with every reason why not.

    Only the `count` most confident objects of a class are asked for colour and position. Extra objects are free, except
    where `exclude` forbids them (it does so for counting alone). Raises UserError for a malformed record.
    """
    record = record if isinstance(record, Record) else parse_record(record)
    alive = surviving(record, detections, thresholds)
    names = [clause.class_name for clause in record.include]
    groups: list[Sequence[Detection] | None] = []
    reasons: list[str] = []
    for clause in record.include:
        found = alive.get(clause.class_name, [])[: clause.count]
        failures = _failures(clause, found, groups, names, thresholds.position)
        groups.append(None if failures else found)
        reasons.extend(failures)
    for clause in record.exclude:
        number = len(alive.get(clause.class_name, []))
        if number >= clause.count:
            reasons.append(f"expected {clause.class_name} < {clause.count}, found {number}")
    return Verdict(not reasons, tuple(reasons))
