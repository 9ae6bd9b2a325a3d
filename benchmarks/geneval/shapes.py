"""The micro world's detector: reads a picture back into things, without learning anything.

Every 8-pixel cell is read alone, so two squares that touch stay two. In a cell a hypothesis is a picture: the
background with one shape in one colour at one of the positions and radii that the world draws, sharp or a little soft.
The hypothesis with the least squared error wins (maximum likelihood under white noise; all pixels decide on colour and
shape together). Its confidence comes from margins on the straight line between two pictures: 1 at the winner, 0 halfway
to a rival."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np

from benchmarks.geneval.rules import OFFICIAL, Detection
from data.errors import UserError
from data.microworld import BACKGROUNDS, COLORS, JITTER, RADII, STYLES, World, coverage, style_colors

# Margin LOWEST gives confidence 0, HIGHEST gives 1, linear between. Fitted once on renders of all styles, then frozen:
# clean pictures, and plain ones with noise of 8 levels, a blur of 0.6 px or a linear codec's error, stay above
# GenEval's 0.9; a thing mixed half and half with the background or its nearest rival (margin 0), or at 60 % of its
# contrast (margin 0.2), stays below 0.3.
LOWEST, HIGHEST = 0.1, 0.5
KEEP = 0.05  # detections with less confidence are not reported
FOREGROUND = 48.0  # RGB distance from the background that makes a pixel foreground
PALETTE = 80.0  # RGB distance from what the palette can draw at which a pixel is wholly foreign
BLURS = (0.0, 0.6)  # px, standard deviation: a soft picture of a thing is a picture of that thing
QUANTUM = 1.0  # RGB distance that rounding to 8 bits can cause


@dataclass(frozen=True)
class Detections:
    """What a picture shows. `cells[i]` is the grid cell of `things[i]`; things come most confident first.

    `unexplained` in [0, 1]: share of the foreground's pixels that no detected thing accounts for. `palette_distance` in
    [0, 1]: mean distance of pixels from the colours that the style can draw, over PALETTE; the worse of foreground and
    background."""

    background: str
    style: str
    things: tuple[Detection, ...]
    cells: tuple[int, ...]
    unexplained: float
    palette_distance: float

    def by_class(self) -> dict[str, list[Detection]]:
        """As `benchmarks.geneval.rules.verdict` takes them."""
        names = dict.fromkeys(thing.class_name for thing in self.things)
        return {name: [thing for thing in self.things if thing.class_name == name] for name in names}

    def layout(self, threshold: float = OFFICIAL.score) -> dict[int, tuple[str, str]]:
        """cell -> (shape, colour) of the things with confidence above `threshold`."""
        pairs = zip(self.cells, self.things, strict=True)
        return {cell: (thing.class_name, str(thing.color)) for cell, thing in pairs if thing.score > threshold}


@dataclass(frozen=True)
class _Templates:
    """All pictures of one thing that a style draws, T of them, sorted by the S shapes; a cell has P pixels."""

    alpha: np.ndarray  # (T, P) coverage
    shape: np.ndarray  # (T,) index into the world's shapes
    gram: np.ndarray  # (T, T) = alpha alpha'
    first: np.ndarray  # (S,) where each shape's templates begin
    core: np.ndarray  # (T, P) weights whose sum with the observed coverage is 1 where the thing is solid


def _blurred(mask: np.ndarray, sigma: float) -> np.ndarray:
    """A cell's coverage (side, side) after a Gaussian blur of `sigma` px, with nothing beyond the cell."""
    if sigma == 0.0:
        return mask
    axis = np.arange(mask.shape[0], dtype=np.float64)
    wide = np.arange(-mask.shape[0], 2 * mask.shape[0])
    kernel = np.exp(-0.5 * ((axis[:, None] - axis) / sigma) ** 2) / np.exp(-0.5 * (wide / sigma) ** 2).sum()
    return kernel @ mask @ kernel.T


@lru_cache(maxsize=16)
def _templates(shapes: tuple[str, ...], outline: bool, cell: int) -> _Templates:
    looks = list(product(shapes, BLURS, RADII, JITTER, JITTER))
    sharp = [coverage(shape, dx, dy, radius, outline, cell) for shape, _, radius, dx, dy in looks]
    soft = [_blurred(mask, blur).ravel() for mask, (_, blur, *_) in zip(sharp, looks, strict=True)]
    alpha = np.stack(soft).astype(np.float64)
    inside = np.stack([mask.ravel() >= 0.75 * mask.max() for mask in sharp]).astype(np.float64)
    # A filled thing is opaque inside, however soft its edge; an outline is as thin as a pixel, so a soft outline is
    # nowhere opaque.
    core = inside / (inside * (alpha if outline else 1.0)).sum(1, keepdims=True)
    kinds, count = np.arange(len(shapes)), len(looks) // len(shapes)
    return _Templates(alpha, np.repeat(kinds, count), alpha @ alpha.T, kinds * count, core)


@lru_cache(maxsize=16)
def _palettes(
    colors: tuple[str, ...], backgrounds: tuple[str, ...], style: str
) -> tuple[np.ndarray, np.ndarray, float]:
    """Colours (K, 3) and backgrounds (G, 3) as the style shows them, and how much it shrinks distances."""
    plain = np.array([COLORS[name] for name in colors], dtype=np.float64)
    grounds = np.array([BACKGROUNDS[name] for name in backgrounds], dtype=np.float64)
    shrink = float(np.abs(style_colors(style, np.full(3, 255.0)) - style_colors(style, np.zeros(3))).max() / 255.0)
    return style_colors(style, plain), style_colors(style, grounds), shrink


def _background(pixels: np.ndarray, grounds: np.ndarray, colors: np.ndarray) -> int:
    """The index of the background that most pixels of the picture's edge are nearest to."""
    edge = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    every = np.concatenate([grounds, colors])
    nearest = ((edge[:, None, :] - every) ** 2).sum(-1).argmin(1)
    return int(np.bincount(nearest, minlength=len(every))[: len(grounds)].argmax())


def _distance_to_segments(points: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """Distance (N,) of points (N, 3) from the nearest of the segments 0 .. ray, rays (K, 3): all that anti-aliasing can
    mix."""
    lengths = (rays**2).sum(1)
    along = np.clip(points @ rays.T / lengths, 0.0, 1.0)  # (N, K)
    squared = (points**2).sum(1)[:, None] - 2.0 * along * (points @ rays.T) + along**2 * lengths
    return np.sqrt(np.maximum(squared.min(1), 0.0))


def check_image(world: World, image: np.ndarray) -> None:
    """Raises UserError unless the image is (size, size, 3) uint8."""
    if image.shape != (world.size, world.size, 3) or image.dtype != np.uint8:
        needs = f"this micro world needs ({world.size}, {world.size}, 3) uint8"
        raise UserError(f"image of shape {image.shape} and type {image.dtype}: {needs}")


def _most_likely(
    offset: np.ndarray, rays: np.ndarray, templates: _Templates
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each cell's most likely template, colour and their confidence in [0, 1], all (cells,), from the pixels' offsets
    from the background (cells, P, 3) and the colours' (K, 3)."""
    cell = np.arange(len(offset))
    color_gram = rays @ rays.T  # (K, K)
    energy = (offset**2).sum((1, 2))  # (cells,)
    size = np.diag(templates.gram)[:, None] * np.diag(color_gram)  # (T, K)
    # (cells, T, K): a small product a cell, which no BLAS spreads over threads
    projection = templates.alpha @ (offset @ rays.T)
    error = energy[:, None, None] - 2.0 * projection + size  # (cells, T, K)

    winner, color = np.divmod(error.reshape(len(cell), -1).argmin(1), len(rays))
    least, drawn = error[cell, winner, color], size[winner, color]

    # the rivals: an empty cell, and the best picture of every other (shape, colour)
    solid = ((offset @ rays.T)[cell, :, color] * templates.core[winner]).sum(1) / np.diag(color_gram)[color]
    margin = np.minimum.reduce([(energy - least) / drawn, 1.0 - 2.0 * least / drawn, 2.0 * solid - 1.0])
    for shape, first in enumerate(templates.first):
        block = slice(first, first + len(templates.alpha) // len(templates.first))
        best = error[:, block].argmin(1) + first  # (cells, K)
        for rival in range(len(rays)):
            other = best[:, rival]
            apart = size[other, rival] + drawn - 2.0 * templates.gram[other, winner] * color_gram[rival, color]
            gap = (error[cell, other, rival] - least) / np.maximum(apart, 1e-9)
            margin = np.where((shape == templates.shape[winner]) & (rival == color), margin, np.minimum(margin, gap))
    return winner, color, np.clip((margin - LOWEST) / (HIGHEST - LOWEST), 0.0, 1.0)


def detect(world: World, image: np.ndarray, style: str = "plain") -> Detections:
    """Parses a picture, (size, size, 3) uint8, as the style would draw it. Deterministic; well under a millisecond or
    two.

    Raises UserError for an image of another size or type, or an unknown style."""
    check_image(world, image)
    if style not in STYLES:
        raise UserError(f"style {style!r}: choose one of {list(STYLES)}")
    pixels = image.astype(np.float64)
    colors, grounds, shrink = _palettes(world.colors, world.backgrounds, style)
    templates = _templates(world.shapes, style == "outline", world.cell)
    ground = _background(pixels, grounds, colors)
    rays = colors - grounds[ground]  # (K, 3)
    n, side = world.grid, world.cell
    squares = (pixels - grounds[ground]).reshape(n, side, n, side, 3).transpose(0, 2, 1, 3, 4)
    offset = squares.reshape(n * n, side * side, 3)
    winner, color, score = _most_likely(offset, rays, templates)

    things, cells = [], []
    residual = offset.copy()  # what is left when the reported things are taken away
    for index in np.lexsort((np.arange(n * n), -score)):
        if score[index] < KEEP:
            break
        ray, mask = rays[color[index]], templates.alpha[winner[index]]
        seen = offset[index] @ ray / (ray @ ray) > 0.4
        rows, columns = np.nonzero((seen if seen.any() else mask > 0.4).reshape(side, side))
        x, y = (index % n) * side, (index // n) * side
        box = (float(x + columns.min()), float(y + rows.min()), float(x + columns.max() + 1), float(y + rows.max() + 1))
        shape = world.shapes[templates.shape[winner[index]]]
        things.append(Detection(shape, world.colors[color[index]], float(score[index]), box))
        cells.append(int(index))
        residual[index] -= mask[:, None] * ray

    foreground = np.sqrt((offset**2).sum(-1)).ravel() > FOREGROUND * shrink
    foreign = np.sqrt((residual**2).sum(-1)).ravel() > PALETTE * shrink
    unexplained = float((foreign & foreground).sum() / foreground.sum()) if foreground.any() else 0.0
    distance = np.maximum(_distance_to_segments(offset.reshape(-1, 3), rays) - QUANTUM, 0.0)
    off_palette = distance / (PALETTE * shrink)
    means = [float(off_palette[part].mean()) for part in (foreground, ~foreground) if part.any()]
    return Detections(world.backgrounds[ground], style, tuple(things), tuple(cells), unexplained, min(1.0, max(means)))
