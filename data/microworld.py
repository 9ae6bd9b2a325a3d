"""The micro world: flat shapes on a flat background, whose ground truth is exact. The embedded default's source of
examples.

A scene is a background and up to four things in distinct 8-pixel cells of a small grid. A style is an operator on the
whole picture. Prompts follow GenEval's record schema (djghosh13/geneval), edits follow GEdit-Bench's task types
(stepfun-ai/Step1X-Edit). A quarter of all attribute tuples is held out: what is scored was never trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import permutations, product
from typing import Any

import numpy as np

from data.errors import UserError
from data.records import GLOBAL_EDITS, LOCAL_EDITS

SHAPES = ("circle", "square", "triangle", "cross")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 225),
    "yellow": (240, 210, 50),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "gray": (135, 135, 135),
    "black": (15, 15, 15),
    "pink": (240, 160, 200),
}
STYLES = ("plain", "inverted", "night", "outline")
STYLE_WORDS = {"inverted": "invert the colors", "night": "make it night", "outline": "turn it into an outline drawing"}
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
OPENINGS = ("a photo of", "an image of", "a picture of", "a drawing of")
GROUNDS = ("on", "over")
JITTER = (-0.3, 0.0, 0.3)  # px
RADII = (3.2, 3.5)  # px
HOLD_OUT_EVERY = 4


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


@dataclass(frozen=True)
class Thing:
    """One object: its cell is row * grid + column; dx, dy (px) displace it from the cell's centre."""

    shape: str
    color: str
    cell: int
    dx: float = 0.0
    dy: float = 0.0
    radius: float = 3.5

    def to_json(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "color": self.color,
            "cell": self.cell,
            "dx": self.dx,
            "dy": self.dy,
            "radius": self.radius,
        }


@dataclass(frozen=True)
class Scene:
    background: str
    things: tuple[Thing, ...] = ()
    style: str = "plain"

    def to_json(self) -> dict[str, Any]:
        return {
            "background": self.background,
            "style": self.style,
            "things": [thing.to_json() for thing in self.things],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Scene:
        return cls(value["background"], tuple(Thing(**thing) for thing in value["things"]), value.get("style", "plain"))


@dataclass(frozen=True)
class World:
    """The parameters of a world. `size` is the canvas edge in pixels."""

    shapes: tuple[str, ...] = SHAPES
    colors: tuple[str, ...] = tuple(COLORS)
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)
    styles: tuple[str, ...] = STYLES
    grid: int = 3
    cell: int = 8
    name: str = field(default="microworld", repr=False)

    def __post_init__(self) -> None:
        for key, values, known in (
            ("shapes", self.shapes, SHAPES),
            ("colors", self.colors, COLORS),
            ("backgrounds", self.backgrounds, BACKGROUNDS),
            ("styles", self.styles, STYLES),
        ):
            unknown = [value for value in values if value not in known]
            if unknown or len(values) < 2:
                raise UserError(f"micro world: {key} = {list(values)}: choose two or more of {list(known)}")
        if "plain" not in self.styles:
            raise UserError('micro world: styles must contain "plain"')
        if self.grid < 2 or self.cell != 8:
            raise UserError(f"micro world: grid = {self.grid} (must be 2 or more), cell = {self.cell} (must be 8)")

    @property
    def size(self) -> int:
        return self.grid * self.cell

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """Every word that any prompt of this world uses, sorted."""
        words: set[str] = set()
        for text in (
            *OPENINGS,
            *GROUNDS,
            *self.shapes,
            *map(plural, self.shapes),
            *self.colors,
            *self.backgrounds,
            *RELATIONS,
            *NUMBERS.values(),
            *STYLE_WORDS.values(),
            "a and background",
            "add remove the replace with change color of to make",
        ):
            words.update(text.split())
        return tuple(sorted(words))


# --- pictures ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _coverage(shape: str, dx: float, dy: float, radius: float, outline: bool, cell: int) -> np.ndarray:
    """Share of each pixel of a cell that the shape covers, from its signed distance; (cell, cell) float32 in [0, 1]."""
    axis = np.arange(cell, dtype=np.float64) + 0.5 - cell / 2
    x, y = axis[None, :] - dx, axis[:, None] - dy
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.88 * radius
    elif shape == "triangle":  # apex up
        slope = np.hypot(2.0, 1.0)
        distance = np.maximum((2.0 * np.abs(x) - (y + radius)) / slope, y - 0.9 * radius)
    elif shape == "cross":
        bar = 0.3 * radius
        distance = np.minimum(
            np.maximum(np.abs(x) - radius, np.abs(y) - bar), np.maximum(np.abs(y) - radius, np.abs(x) - bar)
        )
    else:
        raise UserError(f"micro world: unknown shape {shape!r}; choose of {list(SHAPES)}")
    if outline:
        distance = np.abs(distance + 0.55) - 0.55
    return np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32)


def style_colors(style: str, rgb: np.ndarray) -> np.ndarray:
    """The colour operator of a style on RGB values in [0, 255]; any shape (..., 3)."""
    if style == "inverted":
        return 255.0 - rgb
    if style == "night":
        return 0.4 * rgb + np.array([0.0, 0.0, 45.0])
    return rgb


def render(world: World, scene: Scene) -> np.ndarray:
    """The picture of a scene: (size, size, 3) uint8."""
    canvas = np.empty((world.size, world.size, 3), dtype=np.float64)
    canvas[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        row, column = divmod(thing.cell, world.grid)
        window = canvas[row * world.cell : (row + 1) * world.cell, column * world.cell : (column + 1) * world.cell]
        alpha = _coverage(thing.shape, thing.dx, thing.dy, thing.radius, scene.style == "outline", world.cell)[
            ..., None
        ]
        window *= 1.0 - alpha
        window += alpha * np.array(COLORS[thing.color], dtype=np.float64)
    return np.clip(np.rint(style_colors(scene.style, canvas)), 0, 255).astype(np.uint8)


# --- which tuples are held out ----------------------------------------------------------------------------------------


def tuples_of(world: World, category: str) -> list[tuple[Any, ...]]:
    """Every attribute tuple of a GenEval tag or a GEdit task type, in a fixed order."""
    shapes, colors, grounds = world.shapes, world.colors, world.backgrounds
    pairs = list(permutations(shapes, 2))
    if category == "single_object":
        return list(product(shapes, grounds))
    if category == "two_object":
        return [(a, b, ground) for (a, b), ground in product(pairs, grounds)]
    if category == "counting":
        return list(product(shapes, NUMBERS, grounds))
    if category == "colors":
        return list(product(shapes, colors))
    if category in ("subject-add", "subject-remove"):
        return list(product(shapes, colors, grounds))
    if category == "position":
        return [(a, relation, b) for (a, b), relation in product(pairs, RELATIONS)]
    if category == "color_attr":
        return [(a, c, b, d) for (a, b), (c, d) in product(pairs, permutations(colors, 2))]
    if category == "subject-replace":
        return [(a, color, b, ground) for (a, b), color, ground in product(pairs, colors, grounds)]
    if category == "color_alter":
        return [(shape, c, d, ground) for shape, (c, d), ground in product(shapes, permutations(colors, 2), grounds)]
    if category == "background_change":
        return [(old, new, shape) for (old, new), shape in product(permutations(grounds, 2), shapes)]
    if category == "style_change":
        return list(product([style for style in world.styles if style != "plain"], grounds, shapes))
    raise UserError(f"micro world: unknown category {category!r}")


def is_held_out(world: World, category: str, values: tuple[Any, ...]) -> bool:
    """One tuple in four, spread like a Latin square so that every single attribute is still seen in training."""
    scales: dict[Any, int] = {}
    for names in (world.shapes, world.colors, world.backgrounds, world.styles, RELATIONS, tuple(NUMBERS)):
        scales.update({name: index for index, name in enumerate(names)})
    return sum(scales[value] for value in values) % HOLD_OUT_EVERY == 0


def split_tuples(world: World, category: str, split: str) -> list[tuple[Any, ...]]:
    """The tuples of one split, "train" or "eval"."""
    return [
        values for values in tuples_of(world, category) if is_held_out(world, category, values) == (split == "eval")
    ]


# --- scenes, prompts and edits ----------------------------------------------------------------------------------------


def _pick(rng: np.random.Generator, values: Any) -> Any:
    return values[int(rng.integers(len(values)))]


def _place(rng: np.random.Generator, shape: str, color: str, cell: int) -> Thing:
    return Thing(shape, color, int(cell), _pick(rng, JITTER), _pick(rng, JITTER), _pick(rng, RADII))


@lru_cache(maxsize=64)
def _cells_in_relation(grid: int, relation: str) -> tuple[tuple[int, int], ...]:
    """All (subject, reference) cells on opposite edges for which the relation holds along the dominant axis, so that it
    is never in doubt.
    """
    found = []
    for a, b in permutations(range(grid * grid), 2):
        down, right = a // grid - b // grid, a % grid - b % grid
        offset, across = {
            "left of": (-right, down),
            "right of": (right, down),
            "above": (-down, right),
            "below": (down, right),
        }[relation]
        if offset == grid - 1 and offset > abs(across):
            found.append((a, b))
    return tuple(found)


def t2i_example(world: World, rng: np.random.Generator, tag: str, split: str) -> tuple[dict[str, Any], Scene]:
    """A GenEval-shaped record (tag, include, [exclude], prompt, plus the background) and a scene that fulfils it."""
    values = _pick(rng, split_tuples(world, tag, split))
    ground = values[-1] if tag in ("single_object", "two_object", "counting") else _pick(rng, world.backgrounds)
    cells = [int(cell) for cell in rng.permutation(world.grid**2)]
    colors = [_pick(rng, world.colors) for _ in range(2)]
    record: dict[str, Any] = {"tag": tag}
    if tag == "single_object":
        record["include"] = [{"class": values[0], "count": 1}]
        words, things = f"a {values[0]}", [_place(rng, values[0], colors[0], cells[0])]
    elif tag == "two_object":
        record["include"] = [{"class": values[0], "count": 1}, {"class": values[1], "count": 1}]
        words = f"a {values[0]} and a {values[1]}"
        things = [_place(rng, values[i], colors[i], cells[i]) for i in range(2)]
    elif tag == "counting":
        shape, number = values[0], values[1]
        record["include"] = [{"class": shape, "count": number}]
        record["exclude"] = [{"class": shape, "count": number + 1}]
        words = f"{NUMBERS[number]} {plural(shape)}"
        first = int(
            rng.integers(world.grid**2 - number + 1)
        )  # a run in reading order: a small network can count what stands together
        things = [_place(rng, shape, colors[0], cell) for cell in range(first, first + number)]
    elif tag == "colors":
        record["include"] = [{"class": values[0], "count": 1, "color": values[1]}]
        words, things = f"a {values[1]} {values[0]}", [_place(rng, values[0], values[1], cells[0])]
    elif tag == "position":
        subject, relation, reference = values
        record["include"] = [
            {"class": reference, "count": 1},
            {"class": subject, "count": 1, "position": [relation, 0]},
        ]
        words = f"a {subject} {relation} a {reference}"
        a, b = _pick(rng, _cells_in_relation(world.grid, relation))
        things = [_place(rng, subject, colors[0], a), _place(rng, reference, colors[1], b)]
    elif tag == "color_attr":
        a, c, b, d = values
        record["include"] = [{"class": a, "count": 1, "color": c}, {"class": b, "count": 1, "color": d}]
        words = f"a {c} {a} and a {d} {b}"
        things = [_place(rng, a, c, cells[0]), _place(rng, b, d, cells[1])]
    else:
        raise UserError(f"micro world: unknown GenEval tag {tag!r}")
    record["prompt"] = f"{_pick(rng, OPENINGS)} {words} {_pick(rng, GROUNDS)} a {ground} background"
    record["background"] = ground
    return record, Scene(ground, tuple(things))


def _source_scene(
    world: World,
    rng: np.random.Generator,
    first: tuple[str, str] | None,
    ground: str | None = None,
    without: tuple[tuple[str, str], ...] = (),
) -> Scene:
    """One to three things, no two alike in shape and colour, so that every description is unique; `first` is among
    them, `without` are not.
    """
    cells = [int(cell) for cell in rng.permutation(world.grid**2)]
    looks = [look for look in product(world.shapes, world.colors) if look != first and look not in without]
    number = int(rng.integers(1, 4))
    chosen = ([first] if first else []) + [looks[int(i)] for i in rng.choice(len(looks), size=number, replace=False)]
    things = tuple(_place(rng, shape, color, cells[i]) for i, (shape, color) in enumerate(chosen[:number]))
    return Scene(ground or _pick(rng, world.backgrounds), things)


def edit_example(
    world: World, rng: np.random.Generator, category: str, split: str
) -> tuple[dict[str, Any], Scene, Scene]:
    """An edit record (category, prompt = the instruction, source and target scene, touched cells) with both scenes."""
    values = _pick(rng, split_tuples(world, category, split))
    touched: list[int] = []
    if category == "subject-add":
        shape, color, ground = values
        source = _source_scene(world, rng, None, ground, without=((shape, color),))
        taken = {thing.cell for thing in source.things}
        cell = _pick(rng, [cell for cell in range(world.grid**2) if cell not in taken])
        target = replace(source, things=(*source.things, _place(rng, shape, color, cell)))
        prompt, touched = f"add a {color} {shape}", [cell]
    elif category == "subject-remove":
        shape, color, ground = values
        source = _source_scene(world, rng, (shape, color), ground)
        target = replace(source, things=source.things[1:])
        prompt, touched = f"remove the {color} {shape}", [source.things[0].cell]
    elif category == "subject-replace":
        shape, color, new, ground = values
        source = _source_scene(world, rng, (shape, color), ground, without=((new, color),))
        target = replace(source, things=(replace(source.things[0], shape=new), *source.things[1:]))
        prompt, touched = f"replace the {color} {shape} with a {new}", [source.things[0].cell]
    elif category == "color_alter":
        shape, color, new, ground = values
        source = _source_scene(world, rng, (shape, color), ground, without=((shape, new),))
        target = replace(source, things=(replace(source.things[0], color=new), *source.things[1:]))
        prompt, touched = f"change the color of the {color} {shape} to {new}", [source.things[0].cell]
    elif category == "background_change":
        old, new, shape = values
        source = _source_scene(world, rng, (shape, _pick(rng, world.colors)), old)
        target = replace(source, background=new)
        prompt = f"change the background to {new}"
    elif category == "style_change":
        style, ground, shape = values
        source = _source_scene(world, rng, (shape, _pick(rng, world.colors)), ground)
        target = replace(source, style=style)
        prompt = STYLE_WORDS[style]
    else:
        raise UserError(f"micro world: unknown GEdit category {category!r}")
    record = {
        "category": category,
        "prompt": prompt,
        "source": source.to_json(),
        "target": target.to_json(),
        "touched": touched,
    }
    return record, source, target


def example(
    world: World, rng: np.random.Generator, category: str, split: str
) -> tuple[dict[str, Any], Scene | None, Scene]:
    """(record, source scene or None, target scene) of any GenEval tag or GEdit task type; `split` is "train" or
    "eval".
    """
    if category in LOCAL_EDITS or category in GLOBAL_EDITS:
        return edit_example(world, rng, category, split)
    record, scene = t2i_example(world, rng, category, split)
    return record, None, scene


def evaluation_examples(
    world: World, rng: np.random.Generator, category: str, count: int
) -> Iterator[tuple[dict[str, Any], Scene | None, Scene]]:
    """`count` held-out examples that differ in prompt (T2I) or in prompt and source scene (edits).

    Raises UserError when the world has fewer of them.
    """
    seen: set[Any] = set()
    for _ in range(200 * count):
        if len(seen) == count:
            return
        record, source, target = example(world, rng, category, "eval")
        key = (record["prompt"], source)
        if key not in seen:
            seen.add(key)
            yield record, source, target
    if len(seen) < count:
        raise UserError(
            f"micro world: only {len(seen)} distinct held-out examples of {category}, {count} asked for; ask for fewer or enlarge the world"
        )


MICRO = "micro"  # the detector of the micro world's pictures, which needs no weights
