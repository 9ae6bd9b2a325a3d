"""What the prompts asked for against what the images show, counted over the images: numbers of things, and colours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.scores.scorecard import ExampleScore

NOTHING = "nothing"
FOUND = re.compile(r", found (\d+)")
SEEN = re.compile(r"\(seen: ([^,)]*)")  # the most confident detection's colour
Confusion = dict[str, dict[str, list[int]]]  # wanted -> seen -> places of the rows in the given sequence
Records = Mapping[str, Mapping[str, Any]]  # example id -> GenEval's record


def _matches(pattern: re.Pattern[str], reasons: Sequence[str]) -> list[str]:
    return [match.group(1) for reason in reasons if (match := pattern.search(reason))]


def _put(table: Confusion, wanted: str, seen: str, place: int) -> None:
    table.setdefault(wanted, {}).setdefault(seen, []).append(place)


def count_confusion(scores: Sequence[ExampleScore], records: Records) -> Confusion:
    """How many things a counting prompt wants and how many were detected."""
    table: Confusion = {}
    for place, score in enumerate(scores):
        clauses = records.get(score.example_id, {}).get("include")
        if score.category == "counting" and score.status == "ok" and clauses:
            wanted, start = str(clauses[0]["count"]), f"expected {clauses[0]['class']} "
            numbers = _matches(FOUND, [reason for reason in score.reasons if reason.startswith(start)])
            if numbers or not score.reasons:
                _put(table, wanted, numbers[-1] if numbers else wanted, place)
    return dict(sorted(table.items(), key=lambda item: int(item[0])))


def color_confusion(scores: Sequence[ExampleScore], records: Records) -> Confusion:
    """Which colour a clause wants and which its thing had, "nothing" where no such thing was detected. A clause of a
    prompt counts once."""
    table: Confusion = {}
    for place, score in enumerate(scores):
        if score.category in ("colors", "color_attr") and score.status == "ok":
            for clause in records.get(score.example_id, {}).get("include", ()):
                if color := clause.get("color"):
                    starts = (f"expected {clause['class']} ", f"expected {color} {clause['class']} ")
                    reasons = [reason for reason in score.reasons if reason.startswith(starts)]
                    seen = _matches(SEEN, reasons)
                    _put(table, color, seen[0] if seen else NOTHING if reasons else color, place)
    return dict(sorted(table.items()))


def confusions(scores: Sequence[ExampleScore], records: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tables that the report shows, where they have rows: {"title", "columns": detected, "rows": Confusion}."""
    counts, colors = count_confusion(scores, records), color_confusion(scores, records)
    numbers = sorted({name for row in counts.values() for name in row}, key=int)
    names = [*colors, *sorted({name for row in colors.values() for name in row} - colors.keys())]
    tables = (("How many things", numbers, counts), ("Which colour", names, colors))
    return [{"title": title, "columns": columns, "rows": rows} for title, columns, rows in tables if rows]
