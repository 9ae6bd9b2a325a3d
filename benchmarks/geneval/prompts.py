"""GenEval's prompt set, drawn anew from its recipe and pinned by digest: 553 records, equal byte for byte to the
published metadata file.

Recipe: djghosh13/geneval, prompts/create_prompts.py (PCG64 with seed 43, 100 draws a task, exact duplicates dropped).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.geneval.rules import RELATIONS, parse_record
from data.errors import UserError, UserErrors

SEED = 43
DRAWS = 100
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# COCO's 80 things in the order of their labels; three are renamed: mouse, remote and keyboard say what they belong to
CLASSES = (
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "airplane",
    "bus",
    "train",
    "truck",
    "boat",
    "traffic light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "bench",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "backpack",
    "umbrella",
    "handbag",
    "tie",
    "suitcase",
    "frisbee",
    "skis",
    "snowboard",
    "sports ball",
    "kite",
    "baseball bat",
    "baseball glove",
    "skateboard",
    "surfboard",
    "tennis racket",
    "bottle",
    "wine glass",
    "cup",
    "fork",
    "knife",
    "spoon",
    "bowl",
    "banana",
    "apple",
    "sandwich",
    "orange",
    "broccoli",
    "carrot",
    "hot dog",
    "pizza",
    "donut",
    "cake",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "laptop",
    "computer mouse",
    "tv remote",
    "computer keyboard",
    "cell phone",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
    "scissors",
    "teddy bear",
    "hair drier",
    "toothbrush",
)
NUMBERS = {2: "two", 3: "three", 4: "four"}
METADATA_MD5 = "9a0ed515640279a48ed3380d90aec0ed"
METADATA_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
Metadata = dict[str, Any]  # one record as its JSON object: tag, include, [exclude], prompt


def with_article(words: str) -> str:
    """By the first letter alone, as the set has it: "an orange", but also "a skis" and "a scissors"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(word: str) -> str:
    """ "es" behind an s, otherwise "s"; the set keeps what comes of it (benchs, knifes, sheeps)."""
    return word + ("es" if word.endswith("s") else "s")


def _draws() -> list[Metadata]:
    """Every record in the order of its draw, duplicates included."""
    rng, count = np.random.default_rng(SEED), len(CLASSES)
    records: list[Metadata] = []
    for index in rng.choice(count, size=count, replace=False):
        name = CLASSES[index]
        records.append(
            {
                "tag": "single_object",
                "include": [{"class": name, "count": 1}],
                "prompt": f"a photo of {with_article(name)}",
            }
        )
    for _ in range(DRAWS):
        a, b = (CLASSES[index] for index in rng.choice(count, size=2, replace=False))
        include = [{"class": a, "count": 1}, {"class": b, "count": 1}]
        records.append(
            {"tag": "two_object", "include": include, "prompt": f"a photo of {with_article(a)} and {with_article(b)}"}
        )
    for _ in range(DRAWS):
        name = CLASSES[rng.choice(count)]
        number = int(rng.integers(2, 4, endpoint=True))
        include, exclude = [{"class": name, "count": number}], [{"class": name, "count": number + 1}]
        records.append(
            {
                "tag": "counting",
                "include": include,
                "exclude": exclude,
                "prompt": f"a photo of {NUMBERS[number]} {plural(name)}",
            }
        )
    for _ in range(DRAWS):
        name = CLASSES[rng.choice(count - 1) + 1]  # a person has no colour
        color = COLORS[rng.choice(len(COLORS))]
        include = [{"class": name, "count": 1, "color": color}]
        records.append({"tag": "colors", "include": include, "prompt": f"a photo of {with_article(color)} {name}"})
    for _ in range(DRAWS):
        a, b = (CLASSES[index] for index in rng.choice(count, size=2, replace=False))
        relation = RELATIONS[rng.choice(len(RELATIONS))]
        # the object that is referred to comes first in the record and last in the caption
        include = [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}]
        records.append(
            {
                "tag": "position",
                "include": include,
                "prompt": f"a photo of {with_article(a)} {relation} {with_article(b)}",
            }
        )
    for _ in range(DRAWS):
        a, b = (CLASSES[index + 1] for index in rng.choice(count - 1, size=2, replace=False))
        c, d = (COLORS[index] for index in rng.choice(len(COLORS), size=2, replace=False))
        include = [{"class": a, "count": 1, "color": c}, {"class": b, "count": 1, "color": d}]
        records.append(
            {
                "tag": "color_attr",
                "include": include,
                "prompt": f"a photo of {with_article(c)} {a} and {with_article(d)} {b}",
            }
        )
    return records


def as_jsonl(records: Sequence[Mapping[str, Any]]) -> str:
    """The metadata file's text: one object a line, in Python's default JSON form."""
    return "".join(json.dumps(record) + "\n" for record in records)


def set_digest(records: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 (hex) of the metadata file."""
    return hashlib.sha256(as_jsonl(records).encode()).hexdigest()


@lru_cache(maxsize=1)
def _official() -> tuple[str, ...]:
    lines = tuple(dict.fromkeys(json.dumps(record) for record in _draws()))
    if hashlib.md5(("\n".join(lines) + "\n").encode(), usedforsecurity=False).hexdigest() != METADATA_MD5:
        raise RuntimeError(
            f"GenEval's records do not have the published digest {METADATA_MD5}: numpy {np.__version__} draws otherwise"
        )
    return lines


def official_records() -> list[Metadata]:
    """The 553 records in the order of the published file. Raises RuntimeError should numpy ever draw other numbers."""
    return [json.loads(line) for line in _official()]


def is_official(records: Sequence[Mapping[str, Any]]) -> bool:
    return set_digest(records) == METADATA_SHA256


def read_prompts(path: str | Path) -> list[Metadata]:
    """A metadata file of one's own (JSON Lines), e.g. with rewritten prompts. Raises UserErrors with every line at
    fault, or for two equal records.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); give a JSON Lines file as `python -m benchmarks geneval prompts` prints it"
        ) from error
    records: list[Metadata] = []
    faults: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            parse_record(record)
            records.append(record)
        except (ValueError, AttributeError) as error:
            faults.append(f"line {number}: not a JSON object ({error})")
        except UserError as error:
            faults.append(f"line {number}: {error}")
    seen: dict[str, int] = {}
    for index, record in enumerate(records):
        text = json.dumps(record, sort_keys=True)
        if text in seen:
            faults.append(f"record {index}: the same as record {seen[text]}; keep one")
        seen.setdefault(text, index)
    if not records and not faults:
        faults.append("no record")
    if faults:
        raise UserErrors(f"{path}: {len(faults)} fault(s) in the prompt set:", faults)
    return records
