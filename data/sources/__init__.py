"""Where examples come from: a file a source, an entry a source in `SOURCES`."""

from __future__ import annotations

from data.sources import folder, micro
from data.sources.base import Source

SOURCES: dict[str, Source] = {"microworld": micro.SOURCE, "folder": folder.SOURCE}  # name in `collect.source` -> source
