"""Stage collect: raw manifests with their images, drawn from the micro world or brought from a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from data.bounds import OneOf
from data.sources import SOURCES
from data.sources.base import Request


@dataclass(frozen=True)
class Params(Request):
    """Section `collect`: a `source` of `data.sources`, and what it is asked for. A folder is taken as it is."""

    source: Annotated[str, OneOf(SOURCES)]

    def faults(self) -> list[str]:
        return SOURCES[self.source].faults(self)


def collect(params: Params, *, out: Path) -> dict[str, Any]:
    """Raw rows and images for curation: `*.csv`, `*.jsonl` or `*.parquet` with the images beside them.

    `out` is replaced as a whole. Raises UserError(s) when the source cannot be read or has too few examples.
    """
    return SOURCES[params.source].collect(params, out)
