"""What an example is, and the folder that holds many: `examples.parquet` with the images beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from data.bounds import OneOf
from data.errors import UserError
from data.files import atomic_file


@dataclass(frozen=True)
class Capability:
    """An ability of the student: which benchmark proves it, on which categories, and whether it edits an image."""

    name: str
    benchmark: str  # "geneval" or "gedit"
    categories: tuple[str, ...]
    is_edit: bool


GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
LOCAL_EDITS = ("subject-add", "subject-remove", "subject-replace", "color_alter")
GLOBAL_EDITS = ("background_change", "style_change")
EDITS = LOCAL_EDITS + GLOBAL_EDITS
CATEGORIES = GENEVAL_TAGS + EDITS
BUCKETS = ("t2i", "local_edit", "global_edit")  # the capabilities of an example; "edit" is a union, for routes alone
CAPABILITIES: dict[str, Capability] = {
    "t2i": Capability("t2i", "geneval", GENEVAL_TAGS, is_edit=False),
    "local_edit": Capability("local_edit", "gedit", LOCAL_EDITS, is_edit=True),
    "global_edit": Capability("global_edit", "gedit", GLOBAL_EDITS, is_edit=True),
    "edit": Capability("edit", "gedit", EDITS, is_edit=True),
}
CapabilityName = Annotated[str, OneOf(CAPABILITIES)]
SPLITS = ("train", "dev", "eval")  # to learn from, to choose numbers on, to report
HELD_OUT = ("dev", "eval")


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark's rows are summarised: the path of its macro average, the value that is averaged, its highest."""

    headline: str
    value: str
    highest: float


BENCHMARKS = {"geneval": Benchmark("geneval/overall", "correct", 1.0), "gedit": Benchmark("gedit/average", "O", 10.0)}
HEADLINES = {name: benchmark.headline for name, benchmark in BENCHMARKS.items()}
RETENTION = "retention/"  # before a capability: the path of the student's mean over its teacher's


@dataclass(frozen=True)
class Example:
    """One curated row. Image paths are relative to the curated folder."""

    id: str
    split: str  # one of SPLITS
    capability: str  # "t2i", "local_edit" or "global_edit"
    category: str  # GenEval tag or GEdit task type
    prompt: str
    source: str | None = None  # the image to edit; None for T2I
    target: str | None = None  # what the result should look like, where known
    record: dict[str, Any] = field(default_factory=dict)  # evaluation tags: GenEval metadata, or the edit's scene
    origin: str = ""  # manifest the row came from
    row: int = 0  # its row there, counted from 1
    sha256: str = ""  # of the prompt and the images' bytes

    @property
    def is_edit(self) -> bool:
        return CAPABILITIES[self.capability].is_edit


COLUMNS = tuple(column.name for column in fields(Example))
EXAMPLES_FILE = "examples.parquet"


def write_examples(folder: str | Path, examples: Sequence[Example]) -> None:
    """Writes `examples.parquet` into `folder`, whole or not at all; `record` is kept as JSON text."""
    import pandas as pd  # here, as flows import this module for its names

    rows = [{**asdict(example), "record": json.dumps(example.record, sort_keys=True)} for example in examples]
    with atomic_file(Path(folder) / EXAMPLES_FILE) as temporary:
        pd.DataFrame(rows, columns=list(COLUMNS)).to_parquet(temporary, index=False)


def read_examples(folder: str | Path) -> list[Example]:
    """Raises UserError when the folder holds no readable `examples.parquet`."""
    import pandas as pd  # here, as flows import this module for its names

    path = Path(folder) / EXAMPLES_FILE
    try:
        frame = pd.read_parquet(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; run the curate stage first") from error
    except Exception as error:  # pyarrow raises many kinds for a damaged file
        raise UserError(f"{path}: not a readable Parquet file ({error}); run the curate stage again") from error
    missing = [column for column in COLUMNS if column not in frame.columns]
    if missing:
        raise UserError(f"{path}: columns {missing} are missing; run the curate stage again")
    frame = frame.astype(object).where(frame.notna(), None)
    rows: list[dict[str, Any]] = frame[list(COLUMNS)].to_dict("records")  # type: ignore[assignment]
    return [Example(**{**row, "record": json.loads(row["record"] or "{}"), "row": int(row["row"])}) for row in rows]


# Task type -> rows of the official set in English (modelscope/evalscope, benchmarks/_meta/gedit.json); the six of the
# paper's tables come first, in its order.
OFFICIAL_COUNTS = {
    "subject-add": 60,
    "subject-replace": 60,
    "background_change": 40,
    "style_change": 60,
    "color_alter": 40,
    "subject-remove": 57,
    "material_alter": 40,
    "motion_change": 40,
    "ps_human": 70,
    "text_change": 99,
    "tone_transfer": 40,
}
GEDIT_CATEGORIES = tuple(OFFICIAL_COUNTS)
