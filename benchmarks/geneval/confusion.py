"""What was asked for against what was found, counted over the images: numbers of things, and colours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.scores.scorecard import ExampleScore

NOTHING = "nothing"
FOUND = re.compile(r", found (\d+)")
SEEN = re.compile(r"\(seen: ([^)]*)\)")
Confusion = dict[str, dict[str, list[int]]]  # asked -> found -> places of the rows in the sequence given


def _reasons_of(score: ExampleScore, class_name: str, color: str | None) -> list[str]:
    """The verdict's reasons (`benchmarks.geneval.rules.verdict`) that speak of one clause."""
    starts = [f"expected {class_name} "] + ([f"expected {color} {class_name} "] if color else [])
    return [reason for reason in score.reasons if reason.startswith(tuple(starts))]


def _put(table: Confusion, asked: str, found: str, place: int) -> None:
    table.setdefault(asked, {}).setdefault(found, []).append(place)


def count_confusion(scores: Sequence[ExampleScore], records: Mapping[str, Mapping[str, Any]]) -> Confusion:
    """How many things a counting prompt asked for and how many were found. `records` holds GenEval's record of every
    example id.
    """
    table: Confusion = {}
    for place, score in enumerate(scores):
        record = records.get(score.example_id, {})
        if score.category != "counting" or score.status != "ok" or not record.get("include"):
            continue
        clause = record["include"][0]
        asked = str(clause["count"])
        numbers = [
            match.group(1) for reason in _reasons_of(score, clause["class"], None) if (match := FOUND.search(reason))
        ]
        if numbers or not score.reasons:
            _put(table, asked, numbers[-1] if numbers else asked, place)
    return dict(sorted(table.items(), key=lambda item: int(item[0])))


def color_confusion(scores: Sequence[ExampleScore], records: Mapping[str, Mapping[str, Any]]) -> Confusion:
    """Which colour a clause asked for and which its thing had, "nothing" where no such thing was found. One clause of a
    prompt counts once.
    """
    table: Confusion = {}
    for place, score in enumerate(scores):
        record = records.get(score.example_id, {})
        if score.category not in ("colors", "color_attr") or score.status != "ok":
            continue
        for clause in record.get("include", ()):
            color = clause.get("color")
            if color is None:
                continue
            reasons = _reasons_of(score, clause["class"], color)
            seen = [match.group(1).split(", ")[0] for reason in reasons if (match := SEEN.search(reason))]
            _put(table, color, seen[0] if seen else NOTHING if reasons else color, place)
    return dict(sorted(table.items()))


def confusions(scores: Sequence[ExampleScore], records: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tables that the report shows, where they have rows: {"title", "columns": detected, "rows": Confusion}."""
    counts, colors = count_confusion(scores, records), color_confusion(scores, records)
    numbers = sorted({name for row in counts.values() for name in row}, key=int)
    names = [*colors, *sorted({name for row in colors.values() for name in row} - colors.keys())]
    tables = (("How many things", numbers, counts), ("Which colour", names, colors))
    return [{"title": title, "columns": columns, "rows": rows} for title, columns, rows in tables if rows]
