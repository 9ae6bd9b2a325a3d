"""The micro world: flat shapes on a flat background, whose ground truth is exact.

A scene is a background and up to four things in distinct 8-pixel cells of a small grid. A style is an operator on the
whole picture. Prompts follow GenEval's record schema (djghosh13/geneval), edits follow GEdit-Bench's task types
(stepfun-ai/Step1X-Edit). Half of all attribute tuples is held out from the student: a quarter to choose numbers on,
a quarter to report.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from itertools import permutations, product
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge

from data.bounds import OneOf
from data.errors import UserError
from data.records import EDITS

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 225), "yellow": (240, 210, 50)}  # RGB
BACKGROUNDS = {"white": (245, 245, 245), "gray": (135, 135, 135), "black": (15, 15, 15), "pink": (240, 160, 200)}
STYLES = ("plain", "inverted", "night", "outline")
STYLE_WORDS = {"inverted": "invert the colors", "night": "make it night", "outline": "turn it into an outline drawing"}
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
OPENINGS = ("a photo of", "an image of", "a picture of", "a drawing of")
GROUNDS = ("on", "over")
JITTER = (-0.3, 0.0, 0.3)  # px
RADII = (3.2, 3.5)  # px
# Split -> its remainders of a tuple's sum of ranks by 4: a Latin square each. TEACHING is everything but "eval".
TEACHING = "teaching"
REMAINDERS = {"train": (1, 3), "dev": (2,), "eval": (0,), TEACHING: (1, 2, 3)}


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


@dataclass(frozen=True)
class Thing:
    """An object in the cell number row * grid + column; dx, dy (px) displace it from the cell's centre."""

    shape: str
    color: str
    cell: int
    dx: float = 0.0
    dy: float = 0.0
    radius: float = 3.5


@dataclass(frozen=True)
class Scene:
    background: str
    things: tuple[Thing, ...] = ()
    style: str = "plain"

    def to_json(self) -> dict[str, Any]:
        return {"background": self.background, "style": self.style, "things": [asdict(thing) for thing in self.things]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Scene:
        return cls(value["background"], tuple(Thing(**thing) for thing in value["things"]), value.get("style", "plain"))


@dataclass(frozen=True)
class World:
    """Section `world`: which micro world every stage speaks of. `cell` is in pixels, `grid` in cells per edge."""

    shapes: tuple[Annotated[str, OneOf(SHAPES)], ...] = SHAPES
    colors: tuple[Annotated[str, OneOf(COLORS)], ...] = tuple(COLORS)
    backgrounds: tuple[Annotated[str, OneOf(BACKGROUNDS)], ...] = tuple(BACKGROUNDS)
    styles: tuple[Annotated[str, OneOf(STYLES)], ...] = STYLES
    grid: Annotated[int, Ge(2)] = 3
    cell: Literal[8] = 8

    def faults(self) -> list[str]:
        names = ("shapes", "colors", "backgrounds", "styles")
        given = {name: list(getattr(self, name)) for name in names}
        faults = [f"{name} = {values}: expected two or more" for name, values in given.items() if len(values) < 2]
        if "plain" not in self.styles:
            faults.append(f'styles = {given["styles"]}: expected "plain" among them')
        return faults

    @property
    def size(self) -> int:
        """The canvas edge in pixels."""
        return self.grid * self.cell

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """Every word that any prompt of this world uses, sorted."""
        nouns = (*self.shapes, *map(plural, self.shapes), *self.colors, *self.backgrounds)
        fixed = "a and background add remove the replace with change color of to make"
        texts = (*OPENINGS, *GROUNDS, *nouns, *RELATIONS, *NUMBERS.values(), *STYLE_WORDS.values(), fixed)
        return tuple(sorted({word for text in texts for word in text.split()}))


# --- pictures ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def coverage(shape: str, dx: float, dy: float, radius: float, outline: bool, cell: int) -> np.ndarray:
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
        flat = np.maximum(np.abs(x) - radius, np.abs(y) - bar)
        distance = np.minimum(flat, np.maximum(np.abs(y) - radius, np.abs(x) - bar))
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
        outline = scene.style == "outline"
        alpha = coverage(thing.shape, thing.dx, thing.dy, thing.radius, outline, world.cell)[..., None]
        window *= 1.0 - alpha
        window += alpha * np.array(COLORS[thing.color], dtype=np.float64)
    return np.clip(np.rint(style_colors(scene.style, canvas)), 0, 255).astype(np.uint8)


# --- which tuples are held out ----------------------------------------------------------------------------------------


def tuples_of(world: World, category: str) -> list[tuple[Any, ...]]:
    """Every attribute tuple of a GenEval tag or a GEdit task type, in a fixed order."""
    shapes, colors, grounds = world.shapes, world.colors, world.backgrounds
    pairs, color_pairs = list(permutations(shapes, 2)), list(permutations(colors, 2))
    match category:
        case "single_object":
            return list(product(shapes, grounds))
        case "two_object":
            return [(a, b, ground) for (a, b), ground in product(pairs, grounds)]
        case "counting":
            return list(product(shapes, NUMBERS, grounds))
        case "colors":
            return list(product(shapes, colors))
        case "position":
            return [(a, relation, b) for (a, b), relation in product(pairs, RELATIONS)]
        case "color_attr":
            return [(a, c, b, d) for (a, b), (c, d) in product(pairs, color_pairs)]
        case "subject-add" | "subject-remove":
            return list(product(shapes, colors, grounds))
        case "subject-replace":
            return [(a, color, b, ground) for (a, b), color, ground in product(pairs, colors, grounds)]
        case "color_alter":
            return [(shape, c, d, ground) for shape, (c, d), ground in product(shapes, color_pairs, grounds)]
        case "background_change":
            return [(old, new, shape) for (old, new), shape in product(permutations(grounds, 2), shapes)]
        case "style_change":
            return list(product([style for style in world.styles if style != "plain"], grounds, shapes))
    raise UserError(f"micro world: unknown category {category!r}")


@lru_cache(maxsize=256)
def split_tuples(world: World, category: str, split: str) -> tuple[tuple[Any, ...], ...]:
    """The tuples of "train" (half of all), "dev" or "eval" (a quarter each), or TEACHING (all but "eval").

    Each quarter is spread like a Latin square, so that training still sees every single attribute. The frozen teachers
    learned from TEACHING, so they have seen the tuples of "dev"; the student has not. Neither has seen those of "eval".
    """
    ranks: dict[Any, int] = {}
    for names in (world.shapes, world.colors, world.backgrounds, world.styles, RELATIONS, tuple(NUMBERS)):
        ranks.update({name: rank for rank, name in enumerate(names)})
    wanted = REMAINDERS[split]
    return tuple(values for values in tuples_of(world, category) if sum(ranks[value] for value in values) % 4 in wanted)


# --- scenes, prompts and edits ----------------------------------------------------------------------------------------


def _pick(rng: np.random.Generator, values: Any) -> Any:
    return values[int(rng.integers(len(values)))]


def _place(rng: np.random.Generator, shape: str, color: str, cell: int) -> Thing:
    return Thing(shape, color, int(cell), _pick(rng, JITTER), _pick(rng, JITTER), _pick(rng, RADII))


@lru_cache(maxsize=64)
def _cells_in_relation(grid: int, relation: str) -> tuple[tuple[int, int], ...]:
    """All (subject, reference) cells on opposite edges whose relation holds along the dominant axis, beyond doubt."""
    cells = []
    for a, b in permutations(range(grid * grid), 2):
        down, right = a // grid - b // grid, a % grid - b % grid
        along, across = (right, down) if relation in ("left of", "right of") else (down, right)
        along = -along if relation in ("left of", "above") else along
        if along == grid - 1 and along > abs(across):
            cells.append((a, b))
    return tuple(cells)


def t2i_example(world: World, rng: np.random.Generator, tag: str, split: str) -> tuple[dict[str, Any], Scene]:
    """A GenEval-shaped record (tag, include, [exclude], prompt, plus the background) and a scene that fulfils it."""
    values = _pick(rng, split_tuples(world, tag, split))
    ground = values[-1] if tag in ("single_object", "two_object", "counting") else _pick(rng, world.backgrounds)
    cells = [int(cell) for cell in rng.permutation(world.grid**2)]
    colors = [_pick(rng, world.colors) for _ in range(2)]
    record: dict[str, Any] = {"tag": tag}
    match tag, values:
        case "single_object", (shape, _):
            record["include"] = [{"class": shape, "count": 1}]
            words, things = f"a {shape}", [_place(rng, shape, colors[0], cells[0])]
        case "two_object", (a, b, _):
            record["include"] = [{"class": a, "count": 1}, {"class": b, "count": 1}]
            words = f"a {a} and a {b}"
            things = [_place(rng, a, colors[0], cells[0]), _place(rng, b, colors[1], cells[1])]
        case "counting", (shape, number, _):
            record["include"] = [{"class": shape, "count": number}]
            record["exclude"] = [{"class": shape, "count": number + 1}]
            words = f"{NUMBERS[number]} {plural(shape)}"
            # In neighbouring cells, in reading order: a small network can count what stands together.
            first = int(rng.integers(world.grid**2 - number + 1))
            things = [_place(rng, shape, colors[0], cell) for cell in range(first, first + number)]
        case "colors", (shape, color):
            record["include"] = [{"class": shape, "count": 1, "color": color}]
            words, things = f"a {color} {shape}", [_place(rng, shape, color, cells[0])]
        case "position", (a, relation, b):
            record["include"] = [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}]
            words = f"a {a} {relation} a {b}"
            near, far = _pick(rng, _cells_in_relation(world.grid, relation))
            things = [_place(rng, a, colors[0], near), _place(rng, b, colors[1], far)]
        case "color_attr", (a, c, b, d):
            record["include"] = [{"class": a, "count": 1, "color": c}, {"class": b, "count": 1, "color": d}]
            words = f"a {c} {a} and a {d} {b}"
            things = [_place(rng, a, c, cells[0]), _place(rng, b, d, cells[1])]
        case _:
            raise UserError(f"micro world: unknown GenEval tag {tag!r}")
    record["prompt"] = f"{_pick(rng, OPENINGS)} {words} {_pick(rng, GROUNDS)} a {ground} background"
    record["background"] = ground
    return record, Scene(ground, tuple(things))


Look = tuple[str, str]  # shape and colour


def _source_scene(
    world: World, rng: np.random.Generator, first: Look | None, ground: str, without: tuple[Look, ...] = ()
) -> Scene:
    """One to three things, no two of one look, so that every description is unique; with `first`, not `without`."""
    cells = [int(cell) for cell in rng.permutation(world.grid**2)]
    looks = [look for look in product(world.shapes, world.colors) if look != first and look not in without]
    number = int(rng.integers(1, 4))
    chosen = ([first] if first else []) + [looks[int(i)] for i in rng.choice(len(looks), size=number, replace=False)]
    return Scene(ground, tuple(_place(rng, *look, cells[i]) for i, look in enumerate(chosen[:number])))


def edit_example(
    world: World, rng: np.random.Generator, category: str, split: str
) -> tuple[dict[str, Any], Scene, Scene]:
    """An edit record (category, prompt = the instruction, source and target scene, touched cells) with both scenes."""
    values = _pick(rng, split_tuples(world, category, split))
    match category, values:
        case "subject-add", (shape, color, ground):
            source = _source_scene(world, rng, None, ground, without=((shape, color),))
            taken = {thing.cell for thing in source.things}
            cell = _pick(rng, [cell for cell in range(world.grid**2) if cell not in taken])
            target = replace(source, things=(*source.things, _place(rng, shape, color, cell)))
            prompt = f"add a {color} {shape}"
        case "subject-remove", (shape, color, ground):
            source = _source_scene(world, rng, (shape, color), ground)
            target = replace(source, things=source.things[1:])
            prompt = f"remove the {color} {shape}"
        case "subject-replace", (shape, color, new, ground):
            source = _source_scene(world, rng, (shape, color), ground, without=((new, color),))
            target = replace(source, things=(replace(source.things[0], shape=new), *source.things[1:]))
            prompt = f"replace the {color} {shape} with a {new}"
        case "color_alter", (shape, color, new, ground):
            source = _source_scene(world, rng, (shape, color), ground, without=((shape, new),))
            target = replace(source, things=(replace(source.things[0], color=new), *source.things[1:]))
            prompt = f"change the color of the {color} {shape} to {new}"
        case "background_change", (old, new, shape):
            source = _source_scene(world, rng, (shape, _pick(rng, world.colors)), old)
            target = replace(source, background=new)
            prompt = f"change the background to {new}"
        case "style_change", (style, ground, shape):
            source = _source_scene(world, rng, (shape, _pick(rng, world.colors)), ground)
            target = replace(source, style=style)
            prompt = STYLE_WORDS[style]
        case _:
            raise UserError(f"micro world: unknown GEdit category {category!r}")
    touched = sorted({thing.cell for thing in {*source.things} ^ {*target.things}})
    scenes = {"source": source.to_json(), "target": target.to_json()}
    return {"category": category, "prompt": prompt, **scenes, "touched": touched}, source, target


Drawn = tuple[dict[str, Any], Scene | None, Scene]


def example(world: World, rng: np.random.Generator, category: str, split: str) -> Drawn:
    """(record, source scene or None, target scene) of a GenEval tag or GEdit task type; `split`: see `split_tuples`."""
    if category in EDITS:
        return edit_example(world, rng, category, split)
    record, scene = t2i_example(world, rng, category, split)
    return record, None, scene


def evaluation_examples(
    world: World, rng: np.random.Generator, category: str, split: str, count: int
) -> Iterator[Drawn]:
    """`count` examples of "dev" or "eval" that differ in prompt (T2I) or in prompt and source scene (edits).

    Raises UserError when the world has fewer of them.
    """
    seen: set[Any] = set()
    for _ in range(200 * count):
        if len(seen) == count:
            return
        record, source, target = example(world, rng, category, split)
        key = (record["prompt"], source)
        if key not in seen:
            seen.add(key)
            yield record, source, target
    if len(seen) < count:
        number = f"only {len(seen)} distinct {split} examples of {category}, {count} asked for"
        raise UserError(f"micro world: {number}; ask for fewer or enlarge the world")
