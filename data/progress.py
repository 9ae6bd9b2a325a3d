"""How far a long loop is: a bar in a terminal, one plain line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

INTERVAL = 5.0  # s between plain lines: a log of minutes stays readable


class Advance(Protocol):
    """Counts `n` more items as done; `fields` (loss=0.12, route="t2i") are shown beside the count."""

    def __call__(self, n: int = 1, **fields: object) -> None: ...


@contextmanager
def progress(label: str, total: int) -> Iterator[Advance]:
    """Yields `advance(n=1, **fields)`. `total` is the number of items, 0 if nothing is to be done."""
    if sys.stdout.isatty():
        with _bar(label, total) as advance:
            yield advance
    else:
        yield _lines(label, total)


def callback(label: str | None = None) -> Callable[[int, int, str], None]:
    """Plain lines for functions that report `(done, total, part)`, `done` counted from the start of the part.

    Two parts in sequence may share a name: fewer done than before, or another total, begins a new part.
    """
    started: dict[str, tuple[Advance, int, list[int]]] = {}

    def report(done: int, total: int, part: str) -> None:
        name = ": ".join(filter(None, (label, part))) or "progress"
        if name not in started or started[name][1] != total or done < started[name][2][0]:
            started[name] = _lines(name, total), total, [0]
        advance, _, seen = started[name]
        advance(done - seen[0])
        seen[0] = done

    return report


@contextmanager
def _bar(label: str, total: int) -> Iterator[Advance]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    label_column, rate, shown = map(TextColumn, ("{task.description}", "{task.fields[rate]}", "{task.fields[shown]}"))
    with Progress(label_column, BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn(), shown) as bar:
        task = bar.add_task(label, total=total, rate="", shown="")
        begun = time.monotonic()
        done = 0

        def advance(n: int = 1, **fields: object) -> None:
            nonlocal done
            done += n
            bar.update(task, advance=n, rate=_rate(done, time.monotonic() - begun), shown=_fields(fields))

        yield advance


def _lines(label: str, total: int) -> Advance:
    begun = last = time.monotonic()
    done = 0

    def advance(n: int = 1, **fields: object) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if done < total and now - last < INTERVAL:
            return
        last, seconds = now, now - begun
        going = 0 < done < total
        left = f"{_duration(seconds * (total - done) / done)} left" if going else f"took {_duration(seconds)}"
        print(
            ", ".join(filter(None, (f"{label}: {done}/{total}", _rate(done, seconds), left, _fields(fields)))),
            flush=True,
        )

    return advance


def _rate(done: int, seconds: float) -> str:
    if seconds <= 0 or not done:
        return ""
    rate = done / max(seconds, 1e-9)
    return f"{rate:.3g}/s" if rate >= 1 else f"{1 / rate:.3g} s each"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _fields(fields: dict[str, object]) -> str:
    return " ".join(f"{name} {v:.4g}" if isinstance(v, float) else f"{name} {v}" for name, v in fields.items())
