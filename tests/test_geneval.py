"""Defends: GenEval's relation rule and verdict, case by case, and that the micro world's own scenes fulfil their
records.
"""

import numpy as np
import pytest

from benchmarks.geneval.rules import (
    OFFICIAL,
    RELATIONS,
    Detection,
    parse_record,
    relation_table,
    relations,
    surviving,
    verdict,
)
from benchmarks.geneval.shapes import detect
from data.errors import UserError
from data.microworld import World, render, t2i_example
from data.randomness import numpy_generator
from data.records import GENEVAL_TAGS

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# boxes x0, y0, x1, y1 and the relations of the first to the second, as the reference implementation gives them
GOLDEN = [
    ((0, 0, 100, 100), (200, 0, 300, 100), {"left of"}),
    ((0, 0, 100, 100), (40, 0, 140, 100), set()),  # the component is exactly one half
    ((0, 0, 100, 100), (10, 0, 110, 100), set()),
    ((0, 0, 100, 100), (200, 200, 300, 300), {"left of", "above"}),
    ((0, 0, 100, 100), (60, 60, 160, 160), set()),
    ((0, 0, 100, 100), (70, 70, 170, 170), {"left of", "above"}),
    ((0, 0, 400, 400), (150, 0, 250, 60), {"below"}),
    ((200, 0, 300, 100), (0, 150, 100, 250), {"right of", "above"}),
    ((0, 0, 100, 100), (0, 0, 100, 100), set()),
]


def seen(*things: tuple) -> dict[str, list[Detection]]:
    """(class, score[, colour[, box]]) -> class -> detections."""
    found: dict[str, list[Detection]] = {}
    for name, score, *rest in things:
        found.setdefault(name, []).append(
            Detection(name, rest[0] if rest else None, score, rest[1] if len(rest) > 1 else (0, 0, 10, 10))
        )
    return found


def record(tag: str, *include: dict, exclude: tuple = ()) -> dict:
    return {
        "tag": tag,
        "prompt": "a prompt",
        "include": list(include),
        **({"exclude": list(exclude)} if exclude else {}),
    }


A, B = {"class": "cat", "count": 1}, {"class": "dog", "count": 1}
THREE = record("counting", {"class": "cat", "count": 3}, exclude=({"class": "cat", "count": 4},))
RED_CAT = record("colors", {**A, "color": "red"})
LEFT = record("position", B, {**A, "position": ["left of", 0]})
WEST, EAST = (0, 0, 100, 100), (200, 0, 300, 100)
OBJECTS = [("cat", 0.95)] * 3
JUST_ABOVE = np.nextafter(np.float32(0.3), np.float32(1))

VERDICTS = [
    ("one is there", record("single_object", A), seen(("cat", 0.5)), []),
    ("none is there", record("single_object", A), seen(("dog", 0.99)), ["expected cat >= 1, found 0"]),
    ("extras are free", record("single_object", A), seen(("cat", 0.5), ("cat", 0.5), ("dog", 0.9)), []),
    ("a score of 0.3 is not above 0.3", record("single_object", A), seen(("cat", 0.3)), ["expected cat >= 1, found 0"]),
    ("a score just above 0.3", record("single_object", A), seen(("cat", float(JUST_ABOVE))), []),
    (
        "a score that is 0.3 as a float32 is not above it",
        record("single_object", A),
        seen(("cat", float(np.float32(0.3)))),
        ["expected cat >= 1, found 0"],
    ),
    (
        "of equal scores the later comes first",
        RED_CAT,
        seen(("cat", 0.9, "red"), ("cat", 0.9, "blue")),
        ["expected red cat >= 1, found 0 (seen: blue)"],
    ),
    ("equal as float32", RED_CAT, seen(("cat", np.nextafter(0.9, 1), "blue"), ("cat", 0.9, "red")), []),
    (
        "both missing, both reported",
        record("two_object", A, B),
        {},
        ["expected cat >= 1, found 0", "expected dog >= 1, found 0"],
    ),
    ("exactly three", THREE, seen(*OBJECTS), []),
    ("four", THREE, seen(*OBJECTS, ("cat", 0.95)), ["expected cat < 4, found 4"]),
    ("the fourth is not above 0.9", THREE, seen(*OBJECTS, ("cat", 0.9)), []),
    ("two", THREE, seen(*OBJECTS[:2], ("cat", 0.9)), ["expected cat >= 3, found 2"]),
    ("other classes do not count", THREE, seen(*OBJECTS, ("dog", 0.99)), []),
    ("right colour", RED_CAT, seen(("cat", 0.9, "red"), ("cat", 0.5, "blue")), []),
    (
        "wrong colour first",
        RED_CAT,
        seen(("cat", 0.5, "red"), ("cat", 0.9, "blue")),
        ["expected red cat >= 1, found 0 (seen: blue)"],
    ),
    (
        "colours swapped",
        record("color_attr", {**A, "color": "red"}, {**B, "color": "blue"}),
        seen(("cat", 0.9, "blue"), ("dog", 0.9, "red")),
        ["expected red cat >= 1, found 0 (seen: blue)", "expected blue dog >= 1, found 0 (seen: red)"],
    ),
    ("in place", LEFT, seen(("cat", 0.9, None, WEST), ("dog", 0.9, None, EAST)), []),
    (
        "on the wrong side",
        LEFT,
        seen(("cat", 0.9, None, EAST), ("dog", 0.9, None, WEST)),
        ["expected cat left of dog, found right of"],
    ),
    (
        "on top of it",
        LEFT,
        seen(("cat", 0.9, None, WEST), ("dog", 0.9, None, WEST)),
        ["expected cat left of dog, found no relation"],
    ),
    (
        "nothing to be left of",
        LEFT,
        seen(("cat", 0.9, None, WEST)),
        ["expected dog >= 1, found 0", "expected cat left of dog, but no dog fulfils its own clause"],
    ),
    (
        "every pair must hold",
        record("position", {"class": "dog", "count": 2}, {**A, "position": ["left of", 0]}),
        seen(("cat", 0.9, None, (150, 0, 250, 100)), ("dog", 0.9, None, (400, 0, 500, 100)), ("dog", 0.8, None, WEST)),
        ["expected cat left of dog, found right of"],
    ),
    (
        "a failed colour is not asked for its place",
        record("position", B, {**A, "color": "red", "position": ["left of", 0]}),
        seen(("cat", 0.9, "blue", EAST), ("dog", 0.9, None, WEST)),
        ["expected red cat >= 1, found 0 (seen: blue)"],
    ),
]


@pytest.mark.parametrize(("a", "b", "expected"), GOLDEN)
def test_golden_relations(a, b, expected):
    assert relations(a, b) == expected
    assert relations(b, a) == {OPPOSITE[name] for name in expected}


def test_relations_are_antisymmetric_and_do_not_depend_on_where():
    """10,000 random pairs at once, a hundred of them one by one, too."""
    rng, count = numpy_generator(0, 0, 0, "boxes"), 10_000
    corners = rng.integers(0, 400, (count, 2, 2)).astype(float)
    boxes = np.concatenate([corners, corners + rng.integers(1, 200, (count, 2, 2))], axis=-1)
    shifts = np.tile(rng.integers(-300, 300, (count, 2)), 2).astype(float)
    a, b = boxes[:, 0], boxes[:, 1]
    forward = relation_table(a, b)
    west, east, north, south = forward.T
    np.testing.assert_array_equal(relation_table(b, a), np.stack([east, west, south, north], axis=1))
    np.testing.assert_array_equal(relation_table(a + shifts, b + shifts), forward)
    assert not (west & east).any() and not (north & south).any()
    assert 0.1 * count < forward.any(1).sum() < count and ((west | east) & (north | south)).any()
    for row in range(100):
        assert (
            relations(a[row], b[row])
            == {OPPOSITE[name] for name in relations(b[row], a[row])}
            == {n for n, one in zip(RELATIONS, forward[row]) if one}
        )


def reference_order(scores: list[float], threshold: float, most: int) -> list[int]:
    """Which detections of a class the reference takes, in its order: float32, sorted upwards and read backwards."""
    values = np.array(scores, dtype=np.float32)
    order = np.argsort(values, kind="stable")[::-1]
    return order[values[order] > threshold][:most].tolist()


@pytest.mark.parametrize("tag", ["counting", "single_object"])
def test_detections_survive_in_the_reference_s_order(tag):
    """Scores from a coarse grid round the thresholds, so that many are equal, some only as float32."""
    rng = numpy_generator(0, 0, 0, f"order/{tag}")
    steps = [0.1, 0.3, float(np.float32(0.3)), 0.5, np.nextafter(0.5, 1), 0.9, float(np.float32(0.9)), 0.95]
    threshold = 0.9 if tag == "counting" else 0.3
    for _ in range(300):
        scores = [steps[int(place)] for place in rng.integers(len(steps), size=rng.integers(1, 30))]
        found = seen(*(("cat", score, None, (0, 0, place, 1)) for place, score in enumerate(scores)))
        kept = surviving(parse_record(record(tag, A)), found)["cat"]
        assert [thing.box[2] for thing in kept] == reference_order(scores, threshold, 16)


@pytest.mark.parametrize(("a", "b", "expected"), GOLDEN)
def test_corners_may_come_in_any_order(a, b, expected):
    for flipped in ((a[2], a[1], a[0], a[3]), (a[0], a[3], a[2], a[1]), (a[2], a[3], a[0], a[1])):
        assert relations(flipped, b) == expected and relations(flipped, flipped) == set()


@pytest.mark.parametrize("box", [(10, 0, 0, 10), (0, 10, 10, 0), (np.nan, 0, 1, 1)])
def test_an_impossible_box_is_refused(box):
    with pytest.raises(UserError, match="a detected cat has the box .* x0 <= x1 and y0 <= y1 are needed"):
        seen(("cat", 0.9, None, box))
    assert seen(("cat", 0.9, None, (5, 5, 5, 5)))  # the box of an empty mask


@pytest.mark.parametrize(("a_width", "holds"), [(99, True), (100, False), (101, False)])
def test_along_one_axis_the_offset_must_exceed_two_tenths_of_both_extents(a_width, holds):
    # o = 40, w_B = 100: the relation holds iff 40 > 0.2 (w_A + w_B)
    a, b = (-a_width / 2, 0, a_width / 2, 10), (-10, 0, 90, 10)
    assert (relations(a, b) == {"left of"}) is holds


@pytest.mark.parametrize(
    ("row", "found", "reasons"), [case[1:] for case in VERDICTS], ids=[case[0] for case in VERDICTS]
)
def test_verdict_table(row, found, reasons):
    outcome = verdict(row, found)
    assert list(outcome.reasons) == reasons
    assert outcome.correct is not bool(reasons)


def test_at_most_sixteen_of_a_class():
    most = record("counting", {"class": "cat", "count": 16}, exclude=({"class": "cat", "count": 17},))
    assert verdict(most, seen(*[("cat", 0.95)] * 40)).correct
    assert OFFICIAL.most == 16


def test_the_order_of_detections_does_not_matter():
    found = seen(("cat", 0.5, "red"), ("cat", 0.9, "blue"), ("cat", 0.7, "red"))
    again = {name: list(reversed(things)) for name, things in found.items()}
    assert verdict(RED_CAT, found) == verdict(RED_CAT, again)


def test_adding_an_unrelated_class_never_changes_a_verdict():
    for _, row, found, reasons in VERDICTS:
        assert (
            list(verdict(row, {**found, "zebra": [Detection("zebra", "red", 1.0, (0, 0, 500, 500))]}).reasons)
            == reasons
        )


@pytest.mark.parametrize("tag", GENEVAL_TAGS)
def test_micro_scenes_fulfil_their_records_and_mostly_not_each_others(tag):
    world, rng = World(), numpy_generator(0, 0, 0, tag)
    pairs = [t2i_example(world, rng, tag, "eval") for _ in range(120)]
    found = [detect(world, render(world, scene)).by_class() for _, scene in pairs]
    assert all(verdict(row, things).correct for (row, _), things in zip(pairs, found, strict=True))
    elsewhere = [verdict(row, things).correct for (row, _), things in zip(pairs, found[1:] + found[:1], strict=True)]
    assert np.mean(elsewhere) < 0.5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tag": "size", "prompt": "p", "include": [A]}, "tag = 'size'"),
        ({"tag": "colors", "prompt": "p"}, "include is missing"),
        (record("colors", {"class": "cat"}), "needs class, count"),
        (record("colors", {"class": "cat", "count": 0}), "count = 0"),
        (record("position", {**A, "position": ["left of", 0]}), "earlier clause"),
        (record("position", B, {**A, "position": ["near", 0]}), "near"),
    ],
)
def test_malformed_records_are_named(row, message):
    with pytest.raises(UserError, match=message):
        parse_record(row)
