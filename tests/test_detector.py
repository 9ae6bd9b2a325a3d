"""Defends: the detector reads every rendered scene without an error, still does under noise, blur and a linear codec,
and doubts half-formed things.
"""

import time
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.geneval.shapes import Detections, detect
from data.errors import UserError
from data.microworld import BACKGROUNDS, COLORS, SHAPES, STYLES, Scene, Thing, World, example, render
from data.randomness import numpy_generator
from data.records import GENEVAL_TAGS, GLOBAL_EDITS, LOCAL_EDITS

WORLD = World()


def scenes(world: World, count: int, purpose: str) -> list[Scene]:
    rng = numpy_generator(0, 0, 0, purpose)
    categories = (*GENEVAL_TAGS, *LOCAL_EDITS, *GLOBAL_EDITS)
    return [
        example(world, rng, categories[index % len(categories)], ("train", "eval")[index // len(categories) % 2])[2]
        for index in range(count)
    ]


def reads(found: Detections, scene: Scene) -> bool:
    return found.background == scene.background and found.layout() == {
        thing.cell: (thing.shape, thing.color) for thing in scene.things
    }


def accuracy(disturb, style: str, count: int = 300) -> float:
    drawn = [replace(scene, style=style) for scene in scenes(WORLD, count, "accuracy")]
    return float(np.mean([reads(detect(WORLD, disturb(render(WORLD, scene)), style), scene) for scene in drawn]))


def to_bytes(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    axis = np.arange(-8, 9)
    kernel = np.exp(-(axis**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    wide = np.pad(image.astype(np.float64), ((8, 8), (8, 8), (0, 0)), mode="edge")
    size = image.shape[0]
    rows = sum(weight * wide[index : index + size] for index, weight in enumerate(kernel))
    return to_bytes(sum(weight * rows[:, index : index + size] for index, weight in enumerate(kernel)))


def patches(image: np.ndarray) -> np.ndarray:
    n = image.shape[0] // 8
    return image.astype(np.float64).reshape(n, 8, n, 8, 3).transpose(0, 2, 1, 3, 4).reshape(n * n, 192)


def linear_codec(components: int):
    """Principal components of rendered 8-pixel patches of all styles: the error that a linear codec makes."""
    data = np.concatenate(
        [
            patches(render(WORLD, replace(scene, style=STYLES[index % 4])))
            for index, scene in enumerate(scenes(WORLD, 600, "codec"))
        ]
    )
    mean = data.mean(0)
    basis = np.linalg.eigh(np.cov(data, rowvar=False))[1][:, ::-1][:, :components].T

    def there_and_back(image: np.ndarray) -> np.ndarray:
        n = image.shape[0] // 8
        flat = (patches(image) - mean) @ basis.T @ basis + mean
        return to_bytes(flat.reshape(n, n, 8, 8, 3).transpose(0, 2, 1, 3, 4).reshape(image.shape))

    return there_and_back


@pytest.mark.parametrize("style", STYLES)
def test_clean_renders_are_read_without_an_error(style):
    for scene in scenes(WORLD, 300, "clean"):
        found = detect(WORLD, render(WORLD, replace(scene, style=style)), style)
        assert reads(found, scene)
        assert all(thing.score > 0.95 for thing in found.things)
        assert found.unexplained == 0.0 and found.palette_distance == 0.0


@pytest.mark.parametrize("style", STYLES)
def test_noise_and_blur_leave_at_least_99_percent(style):
    rng = numpy_generator(0, 0, 0, "noise")
    assert accuracy(lambda image: to_bytes(image + 8 * rng.standard_normal(image.shape)), style) >= 0.99
    assert accuracy(lambda image: blurred(image, 0.6), style) >= 0.99


def test_a_linear_codec_leaves_plain_counting_confidence():
    codec = linear_codec(40)
    assert accuracy(codec, "plain") >= 0.99
    plain = [replace(scene, style="plain") for scene in scenes(WORLD, 150, "confident")]
    scores = [thing.score for scene in plain for thing in detect(WORLD, codec(render(WORLD, scene))).things]
    assert np.mean(np.array(scores) > 0.9) >= 0.99


def test_other_worlds_are_read_too():
    small = World(shapes=SHAPES[:3], colors=tuple(COLORS)[:3], backgrounds=tuple(BACKGROUNDS)[1:], grid=4)
    assert all(reads(detect(small, render(small, scene), scene.style), scene) for scene in scenes(small, 150, "small"))


@pytest.mark.parametrize("shape", SHAPES)
def test_touching_neighbours_of_one_colour_stay_apart(shape):
    things = tuple(Thing(shape, "red", cell, radius=3.5, dx=0.3 if cell % 3 == 0 else -0.3) for cell in (0, 1, 3, 4))
    found = detect(WORLD, render(WORLD, Scene("white", things)))
    assert sorted(found.cells) == [0, 1, 3, 4] and min(thing.score for thing in found.things) > 0.95


def mixture(a: Scene, b: Scene, share: float) -> np.ndarray:
    return to_bytes(share * render(WORLD, a).astype(np.float64) + (1 - share) * render(WORLD, b))


@pytest.mark.parametrize("ground", BACKGROUNDS)
@pytest.mark.parametrize("color", COLORS)
def test_half_formed_things_stay_below_the_threshold(ground, color):
    other = next(name for name in COLORS if name != color)
    for shape in SHAPES:
        whole, empty = Scene(ground, (Thing(shape, color, 4),)), Scene(ground)
        halves = [
            mixture(whole, empty, 0.5),
            mixture(whole, empty, 0.6),
            mixture(whole, Scene(ground, (Thing(shape, other, 4),)), 0.5),
        ]
        if shape == "circle":
            halves.append(mixture(whole, Scene(ground, (Thing("square", color, 4),)), 0.5))
        for image in (*halves, *(blurred(render(WORLD, whole), sigma) for sigma in (1.5, 2.0, 3.0))):
            assert all(thing.score < 0.3 for thing in detect(WORLD, image).things)
        assert [
            thing.class_name for thing in detect(WORLD, mixture(whole, empty, 0.9)).things if thing.score > 0.9
        ] == [shape]


def test_boxes_are_tight_and_in_pixels():
    (thing,) = detect(WORLD, render(WORLD, Scene("black", (Thing("square", "yellow", 5, radius=3.5),)))).things
    assert thing.box == (17.0, 9.0, 23.0, 15.0)
    assert (thing.class_name, thing.color) == ("square", "yellow")


def test_what_no_thing_explains_is_reported():
    image = render(WORLD, Scene("white", (Thing("circle", "blue", 0),)))
    image[8:16, 8:16] = np.where(np.indices((8, 8)).sum(0)[..., None] % 2, COLORS["red"], COLORS["green"])
    found = detect(WORLD, image)
    assert found.layout() == {0: ("circle", "blue")}
    blue = (np.abs(render(WORLD, Scene("white", (Thing("circle", "blue", 0),))).astype(int) - 245).sum(-1) > 60).sum()
    assert found.unexplained == pytest.approx(64 / (64 + blue), abs=0.05)
    foreign = render(WORLD, Scene("black"))
    foreign[8:16, 8:16] = (255, 255, 255)
    assert detect(WORLD, foreign).palette_distance == 1.0


def test_a_blank_and_a_noise_image_show_nothing():
    assert detect(WORLD, render(WORLD, Scene("gray"))).things == ()
    rng = numpy_generator(1, 0, 0, "static")
    for _ in range(50):
        static = rng.integers(0, 256, (WORLD.size, WORLD.size, 3), dtype=np.uint8)
        assert all(thing.score < 0.3 for thing in detect(WORLD, static).things)


def test_wrong_input_is_named():
    with pytest.raises(UserError, match=r"\(8, 8, 3\).*\(24, 24, 3\) uint8"):
        detect(WORLD, np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="float64"):
        detect(WORLD, np.zeros((24, 24, 3)))
    with pytest.raises(UserError, match="sepia"):
        detect(WORLD, np.zeros((24, 24, 3), np.uint8), "sepia")


def test_three_hundred_images_a_second():
    images = [render(WORLD, scene) for scene in scenes(WORLD, 200, "speed")]
    detect(WORLD, images[0])
    start = time.thread_time()  # of this thread, so that a busy machine does not matter
    for image in images:
        detect(WORLD, image)
    assert time.thread_time() - start < len(images) / 300
