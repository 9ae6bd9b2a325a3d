"""The project's params.yaml cut down until every stage takes seconds: the wiring is what is tested with it, not what is
learned.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.records import GENEVAL_TAGS, GLOBAL_EDITS, LOCAL_EDITS
from data.yaml_files import set_values

# Dotted key -> value; a key that the file does not have is a mistake here. The teachers' section is left alone: their
# weights are fetched, not trained.
OVERRIDES: dict[str, Any] = {
    "sampling.steps": 2,
    "collect.train": {"t2i": 48, "local_edit": 32, "global_edit": 24},
    "collect.evaluation": dict.fromkeys([*GENEVAL_TAGS, *LOCAL_EDITS, *GLOBAL_EDITS], 3),
    "curate.minimum_train": {"t2i": 8, "local_edit": 8, "global_edit": 8},
    "curate.minimum_eval": {"t2i": 6, "local_edit": 4, "global_edit": 2},
    "validate.resamples": 50,
    "validate.floors": {"base": 0.0, "local": 0.0, "global": 0.0, "edit": 0.0},
    "distill.steps": 2,
    "distill.batch": 4,
    "distill.warmup": 1,
    "distill.rollout_steps": 2,
    "absorb.steps": 2,
    "absorb.batch": 4,
    "absorb.warmup": 1,
    "absorb.rollout_steps": 2,
    "score.resamples": 50,
    "score.shown": 1,
    "score.curve": {"steps": [1, 2], "examples": 2},
    "gate.resamples": 50,
}


def shorten(path: Path, overrides: dict[str, Any] | None = None) -> None:
    """Rewrites the params.yaml at `path` with `OVERRIDES` and, over them, `overrides`."""
    set_values(path, {**OVERRIDES, **(overrides or {})})
