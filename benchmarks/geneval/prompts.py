"""GenEval's prompt set, drawn anew from its recipe and pinned by digest: 553 records, equal byte for byte to the
published metadata file.

Recipe: djghosh13/geneval, prompts/create_prompts.py (PCG64 with seed 43, 100 draws a task, exact duplicates dropped).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.geneval.rules import parse_record
from data.errors import UserError, UserErrors
from data.files import sha256_bytes
from data.microworld import NUMBERS, RELATIONS, plural

T = TypeVar("T")
SEED = 43
DRAWS = 100
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# COCO's 80 things in the order of their labels; three are renamed: mouse, remote and keyboard say what they belong to
_CLASSES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, "
    "skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, "
    "sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, "
    "dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, "
    "toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
)
CLASSES = tuple(_CLASSES.split(", "))
# of the published file, whose MD5 is 9a0ed515640279a48ed3380d90aec0ed
METADATA_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
Metadata = dict[str, Any]  # a record as its JSON object: tag, include, [exclude], prompt


def _article(words: str) -> str:
    """By the first letter alone, as the set has it: "an orange", but also "a skis" and "a scissors"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _clause(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


def _draws() -> list[Metadata]:
    """Every record in the order of its draw, duplicates included."""
    rng, count = np.random.default_rng(SEED), len(CLASSES)
    records: list[Metadata] = []

    def add(tag: str, caption: str, *include: dict[str, Any], **exclude: list[dict[str, Any]]) -> None:
        records.append({"tag": tag, "include": list(include), **exclude, "prompt": f"a photo of {caption}"})

    for index in rng.choice(count, size=count, replace=False):
        add("single_object", _article(CLASSES[index]), _clause(CLASSES[index]))
    for _ in range(DRAWS):
        a, b = (CLASSES[index] for index in rng.choice(count, size=2, replace=False))
        add("two_object", f"{_article(a)} and {_article(b)}", _clause(a), _clause(b))
    for _ in range(DRAWS):
        name = CLASSES[rng.choice(count)]
        number = int(rng.integers(2, 4, endpoint=True))
        exclude = [_clause(name, number + 1)]
        # the set keeps what comes of this plural: benchs, knifes, sheeps
        add("counting", f"{NUMBERS[number]} {plural(name)}", _clause(name, number), exclude=exclude)
    for _ in range(DRAWS):
        name = CLASSES[rng.choice(count - 1) + 1]  # a person has no colour
        color = COLORS[rng.choice(len(COLORS))]
        add("colors", f"{_article(color)} {name}", _clause(name, color=color))
    for _ in range(DRAWS):
        a, b = (CLASSES[index] for index in rng.choice(count, size=2, replace=False))
        relation = RELATIONS[rng.choice(len(RELATIONS))]
        # the object that is referred to comes first in the record and last in the caption
        add("position", f"{_article(a)} {relation} {_article(b)}", _clause(b), _clause(a, position=[relation, 0]))
    for _ in range(DRAWS):
        a, b = (CLASSES[index + 1] for index in rng.choice(count - 1, size=2, replace=False))
        c, d = (COLORS[index] for index in rng.choice(len(COLORS), size=2, replace=False))
        add("color_attr", f"{_article(c)} {a} and {_article(d)} {b}", _clause(a, color=c), _clause(b, color=d))
    return records


def as_jsonl(records: Sequence[Mapping[str, Any]]) -> str:
    """The metadata file's text: an object a line, in Python's default JSON form."""
    return "".join(json.dumps(record) + "\n" for record in records)


def set_digest(records: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 (hex) of the metadata file."""
    return sha256_bytes(as_jsonl(records).encode())


@lru_cache(maxsize=1)
def _official() -> str:
    text = "".join(dict.fromkeys(as_jsonl([record]) for record in _draws()))
    if sha256_bytes(text.encode()) != METADATA_SHA256:
        raise RuntimeError(f"GenEval's records differ from the published ones: numpy {np.__version__} draws otherwise")
    return text


def official_records() -> list[Metadata]:
    """The 553 records in the order of the published file. Raises RuntimeError should numpy ever draw other numbers."""
    return [json.loads(line) for line in _official().splitlines()]


def set_name(records: Sequence[Mapping[str, Any]]) -> str:
    """ "official" or "custom"."""
    return "official" if set_digest(records) == METADATA_SHA256 else "custom"


def read_jsonl(path: str | Path, parse: Callable[[Any], T], advice: str) -> tuple[list[T], list[str]]:
    """What `parse` makes of the JSON value in each line that is not blank, and the faults of the other lines.

    `parse` raises UserError, or what reading a JSON value of another shape raises. Raises UserError for a file that
    cannot be read."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {advice}") from error
    values: list[T] = []
    faults: list[str] = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                values.append(parse(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            faults.append(f"line {number}: not such a JSON object ({error!r})")
        except UserError as error:
            faults.append(f"line {number}: {error}")
    return values, faults


def _checked(value: Any) -> Metadata:
    parse_record(value)
    return dict(value)


def read_prompts(path: str | Path) -> list[Metadata]:
    """A metadata file of one's own (JSON Lines), e.g. with rewritten prompts. Raises UserErrors with every line at
    fault, or for two equal records."""
    advice = "give a JSON Lines file as `python -m benchmarks geneval prompts` prints it"
    records, faults = read_jsonl(path, _checked, advice)
    first: dict[str, int] = {}
    for index, record in enumerate(records):
        before = first.setdefault(json.dumps(record, sort_keys=True), index)
        faults += [f"record {index}: the same as record {before}; keep one"] if before != index else []
    if faults or not records:
        raise UserErrors(f"{path}: {len(faults)} fault(s) in the prompt set:", faults or ["no record"])
    return records
