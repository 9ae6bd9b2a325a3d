"""Stage curate: raw manifests become the curated set, or the stage fails and says which expectation does not hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.curation import filters, pipeline
from data.curation.expectations import validate_curated
from data.microworld import World
from data.progress import callback
from data.records import Example


@dataclass(frozen=True)
class Params(filters.Options):
    """What is kept (`data.curation.filters.Options`); `vocabulary`: a prompt's words are the micro world's, or any."""

    vocabulary: Literal["world", "any"]
    world: World


def curate(params: Params, *, raw: Path, out: Path, docs: Path) -> dict[str, Any]:
    """Curated examples and images, `rejected.csv` with a reason for each rejected row, and Data Docs of their suite.

    `out` appears whole, and only when the suite holds; `docs` is written either way. Raises UserErrors that names what
    is wrong in the manifests, which capability is short of rows, or which expectations fail on which rows.
    """

    def accept(folder: Path, examples: list[Example]) -> dict[str, Any]:
        return validate_curated(examples, params, docs, folder=folder)

    words = params.world.vocabulary if params.vocabulary == "world" else None
    return pipeline.curate(raw, out, params, vocabulary=words, accept=accept, progress=callback())
