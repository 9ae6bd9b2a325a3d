"""What a source of examples is asked for, and what it has to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from data.bounds import Count, OneOf
from data.microworld import World
from data.records import BUCKETS, CATEGORIES


@dataclass(frozen=True)
class Request:
    """Which examples. The counts are for a source that makes examples; a folder is taken as it is."""

    folder: str  # with manifests and images
    seed: int
    train: dict[Annotated[str, OneOf(BUCKETS)], Count]  # capability -> rows, spread evenly over its categories
    evaluation: dict[Annotated[str, OneOf(CATEGORIES)], Count]  # category -> rows of dev and as many of eval
    world: World


@dataclass(frozen=True)
class Source:
    """A source of examples.

    `collect(request, out)` writes manifests and images (see data/manifests.py) as the folder `out`, whole or not at
    all, and returns a summary. `faults(request)` names what is wrong with the request, `key = value: what to do`.
    `made_to_order`: the rows are as many as the request says. `reads_folder`: it needs the folder that is named there.
    """

    collect: Callable[[Request, Path], dict[str, Any]]
    faults: Callable[[Request], list[str]]
    made_to_order: bool = False
    reads_folder: bool = False
