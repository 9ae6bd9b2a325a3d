"""What a training writes while it runs: a row a step, named metrics."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import atomic_file, read_json, write_text

RUNS = Path("runs")
METRICS, SPEED = "metrics.jsonl", "speed.jsonl"
SHARES = "query/"  # of the queried noise levels over the whole run: written at its end
LOOKS = ("gradient_cosine/", "held_out_gap")  # measured after a step's state is saved


def state_folder(stage: str, fingerprint: str) -> Path:
    """Where a run keeps its states and its speed; `fingerprint`: the digest of its facts, as in student.json."""
    return RUNS / f"{stage}-{fingerprint[:12]}"


def speed_file(project: Path, out: Path) -> Path | None:
    """Seconds, samples a second and bytes of memory by step, of the run that wrote `out`; None if it ran elsewhere."""
    try:
        record = read_json(out / "student.json")
        path = project / state_folder(record["stage"], record["fingerprint"]) / SPEED
    except (UserError, KeyError, TypeError):
        return None
    return path if path.is_file() else None


class Metrics:
    """Named values by step, appended to a file as they come; a resumed run drops what was measured after its state."""

    def __init__(self, path: Path, start: int, writes: bool) -> None:
        self.path, self.writes = path, writes
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(f".{path.name}.*"):  # of a run killed while it was starting
                left.unlink()
            again = {start: (SHARES, *LOOKS)}  # prefixes of what is measured again, by step
            lines = [line for line in read_metrics(path) if line["step"] <= start]
            kept = [line for line in lines if not line["name"].startswith(again.get(line["step"], SHARES))]
            write_text(path, "".join(f"{json.dumps(line)}\n" for line in kept))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self.writes and values:
            lines = [json.dumps({"name": name, "step": step, "value": value}) for name, value in values.items()]
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV file with a header."""
    with atomic_file(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without a last one that was cut short; empty when there is none."""
    lines: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break  # of a run killed while it wrote
    return lines
