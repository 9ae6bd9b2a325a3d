"""Property: what is scored was never trained on, every attribute is still seen in training, and pictures and prompts
follow from their address alone.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from data.errors import UserError
from data.microworld import (
    BACKGROUNDS,
    COLORS,
    NUMBERS,
    RELATIONS,
    SHAPES,
    TEACHING,
    Scene,
    Thing,
    World,
    evaluation_examples,
    example,
    render,
    split_tuples,
    tuples_of,
)
from data.randomness import numpy_generator
from data.records import GENEVAL_TAGS, GLOBAL_EDITS, LOCAL_EDITS, SPLITS

EDITS = LOCAL_EDITS + GLOBAL_EDITS
CATEGORIES = GENEVAL_TAGS + EDITS
FULL = World()
SMALL = World(shapes=("circle", "square", "triangle"), backgrounds=("white", "gray", "black"))
WORLDS = pytest.mark.parametrize("world", [FULL, SMALL], ids=["full", "small"])
EACH = pytest.mark.parametrize("category", CATEGORIES)
DRAWS = 60


def draws(
    world: World, category: str, split: str, count: int = DRAWS
) -> list[tuple[dict[str, Any], Scene | None, Scene]]:
    return [example(world, numpy_generator(0, step, 0, f"test/{category}"), category, split) for step in range(count)]


def tuple_of(category: str, record: dict[str, Any], source: Scene | None, target: Scene) -> tuple[Any, ...]:
    """The attribute tuple read back from the record or the scenes, not from how they were drawn."""
    if source is not None:
        before, after = set(source.things), set(target.things)
        gone, new = next(iter(before - after), None), next(iter(after - before), None)
        ground, lead = source.background, source.things[0].shape
        if category == "subject-add" and new:
            return (new.shape, new.color, ground)
        if category == "subject-remove" and gone:
            return (gone.shape, gone.color, ground)
        if category == "subject-replace" and gone and new:
            return (gone.shape, gone.color, new.shape, ground)
        if category == "color_alter" and gone and new:
            return (gone.shape, gone.color, new.color, ground)
        return (ground, target.background, lead) if category == "background_change" else (target.style, ground, lead)
    first, last = record["include"][0], record["include"][-1]
    if category == "position":
        return (last["class"], last["position"][0], first["class"])
    if category == "colors":
        return (first["class"], first["color"])
    if category == "color_attr":
        return (first["class"], first["color"], last["class"], last["color"])
    if category == "counting":
        return (first["class"], first["count"], record["background"])
    return (
        (first["class"], record["background"])
        if category == "single_object"
        else (first["class"], last["class"], record["background"])
    )


@WORLDS
@EACH
def test_a_split_draws_its_own_tuples_alone(world: World, category: str) -> None:
    for split in (*SPLITS, TEACHING):
        for record, source, target in draws(world, category, split):
            values = tuple_of(category, record, source, target)
            assert values in tuples_of(world, category)
            assert values in split_tuples(world, category, split), (values, record["prompt"])


@WORLDS
@EACH
def test_splits_divide_the_tuples_and_every_attribute_is_trained(world: World, category: str) -> None:
    everything = tuples_of(world, category)
    train, dev, evaluation = (split_tuples(world, category, split) for split in SPLITS)
    assert train and dev and evaluation and len(set(everything)) == len(everything)
    assert sorted([*train, *dev, *evaluation]) == sorted(everything)
    assert set(split_tuples(world, category, TEACHING)) == set(everything) - set(evaluation)
    for place in range(len(everything[0])):
        assert {values[place] for values in train} == {values[place] for values in everything}


@WORLDS
def test_no_prompt_is_in_two_splits(world: World) -> None:
    prompts = [
        {record["prompt"] for tag in GENEVAL_TAGS for record, _, _ in draws(world, tag, split, 200)} for split in SPLITS
    ]
    assert not any(one & other for one, other in combinations(prompts, 2))


@WORLDS
@EACH
def test_vocabulary_covers_every_prompt(world: World, category: str) -> None:
    words = {
        word for split in SPLITS for record, _, _ in draws(world, category, split) for word in record["prompt"].split()
    }
    assert words <= set(world.vocabulary)


@EACH
def test_examples_follow_from_their_address_alone(category: str) -> None:
    forward = draws(FULL, category, "train", 10)
    backward = [
        example(FULL, numpy_generator(0, step, 0, f"test/{category}"), category, "train")
        for step in reversed(range(10))
    ]
    assert forward == backward[::-1]
    assert len({str(drawn) for drawn in forward}) > 1
    for _, _, target in forward:
        np.testing.assert_array_equal(render(FULL, target), render(FULL, Scene.from_json(target.to_json())))


def test_render_is_exact() -> None:
    scene = Scene("white", (Thing("square", "red", cell=4, radius=3.5),))
    image = render(FULL, scene)
    assert image.shape == (24, 24, 3) and image.dtype == np.uint8
    assert tuple(image[12, 12]) == COLORS["red"] and tuple(image[0, 0]) == BACKGROUNDS["white"]
    outside = np.ones((24, 24), bool)
    outside[8:16, 8:16] = False
    assert (image[outside] == BACKGROUNDS["white"]).all()
    # half-edge 0.88 * 3.5 = 3.08 px: pixel centres at 2.5 px are covered whole, those at 3.5 px by 0.5 - (3.5 - 3.08) =
    # 0.08
    row = image[12, 8:16, 1].astype(float)
    white, red = BACKGROUNDS["white"][1], COLORS["red"][1]
    np.testing.assert_array_equal(row[1:7], red)
    np.testing.assert_array_equal(row[[0, 7]], np.rint(white + 0.08 * (red - white)))


def test_styles_act_on_the_whole_picture() -> None:
    scene = Scene("gray", (Thing("circle", "blue", 0),))
    plain = render(FULL, scene).astype(float)
    np.testing.assert_allclose(render(FULL, replace(scene, style="inverted")), 255 - plain, atol=1)
    np.testing.assert_allclose(render(FULL, replace(scene, style="night")), 0.4 * plain + [0, 0, 45], atol=1)
    outline = render(FULL, replace(scene, style="outline"))
    assert tuple(outline[4, 4]) == BACKGROUNDS["gray"] and (outline != plain).any()


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_hold_along_the_dominant_axis(relation: str) -> None:
    for record, _, scene in draws(FULL, "position", "train", 150):
        if record["include"][1]["position"][0] != relation:
            continue
        subject, reference = scene.things
        down, right = np.subtract(divmod(subject.cell, FULL.grid), divmod(reference.cell, FULL.grid))
        along, across = {
            "left of": (-right, down),
            "right of": (right, down),
            "above": (-down, right),
            "below": (down, right),
        }[relation]
        assert along > 0 and along > abs(across)


@pytest.mark.parametrize("category", EDITS)
def test_edits_change_what_they_say_and_nothing_else(category: str) -> None:
    world = replace(FULL, shapes=SHAPES[:3])  # the bars of a cross are as thin as an outline
    for record, source, target in draws(world, category, "train"):
        assert source is not None and record["category"] == category
        assert Scene.from_json(record["source"]) == source and Scene.from_json(record["target"]) == target
        changed = (render(FULL, source) != render(FULL, target)).any(axis=2)  # (24, 24)
        assert changed.any()
        cells = {int(cell) for cell in np.unique((np.indices((24, 24)) // 8 * [[[3]], [[1]]]).sum(axis=0)[changed])}
        assert category in GLOBAL_EDITS or cells == set(record["touched"])
        looks = [(thing.shape, thing.color) for thing in source.things]
        assert len(set(looks)) == len(looks) and len({thing.cell for thing in target.things}) == len(target.things)


def test_counting_shows_as_many_as_it_says() -> None:
    for record, _, scene in draws(FULL, "counting", "eval"):
        number = record["include"][0]["count"]
        assert (
            len(scene.things) == number
            and f" {NUMBERS[number]} " in record["prompt"]
            and record["exclude"][0]["count"] == number + 1
        )


def test_evaluation_examples_are_distinct_and_never_too_few() -> None:
    for category in ("single_object", "subject-add"):
        found = list(evaluation_examples(FULL, numpy_generator(0, 0, 0, "test"), category, "eval", 24))
        assert len({(record["prompt"], source) for record, source, _ in found}) == 24
    with pytest.raises(UserError, match="single_object"):
        list(
            evaluation_examples(SMALL, numpy_generator(0, 0, 0, "test"), "single_object", "eval", 8 * 2 + 1)
        )  # 4 openings, 2 grounds, 2 tuples
