"""Small sets of edits for tests: rows, images, and a folder of edited images in the official layout."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from benchmarks.gedit.rows import EditTask, edited_path
from benchmarks.judge.protocol import JudgeSettings
from benchmarks.judge.wording import load_wording
from data.randomness import numpy_generator


def png(name: str, size: tuple[int, int] = (32, 32)) -> bytes:
    """A small picture that depends on its name alone."""
    buffer = io.BytesIO()
    pixels = numpy_generator(0, 0, 0, name).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def row(
    key: str, instruction: str, category: str = "subject-add", language: str = "en", intersection: bool = True
) -> dict[str, Any]:
    """A row in the hub's schema."""
    image = {"bytes": png(f"source {key}"), "path": None}
    return {
        "task_type": category,
        "key": key,
        "instruction": instruction,
        "instruction_language": language,
        "input_image": image,
        "input_image_raw": image,
        "Intersection_exist": intersection,
    }


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def write_edited(root: Path, tasks: Sequence[EditTask]) -> Path:
    """An edited image for every task, in the official layout."""
    for task in tasks:
        path = edited_path(root, task)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(f"edited {task.id}"))
    return root


def write_manifest(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """The rows as JSON Lines with their images beside."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for entry in rows:
        (folder / f"{entry['key']}.png").write_bytes(entry["input_image"]["bytes"])
        lines.append(
            {
                **{name: value for name, value in entry.items() if name != "input_image_raw"},
                "input_image": f"{entry['key']}.png",
            }
        )
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def settings(**changes: Any) -> JudgeSettings:
    values: dict[str, Any] = {
        "kind": "endpoint",
        "model": "judge",
        "provider": "test",
        "temperature": 0.0,
        "seed": 0,
        "max_tokens": 64,
        "text_first": True,
        "image_format": "png",
        "resize": "match-source",
        "json_schema": False,
        "repeats": 1,
        "extra": {},
        "wording": load_wording(None),
    }
    return JudgeSettings(**{**values, **changes})
