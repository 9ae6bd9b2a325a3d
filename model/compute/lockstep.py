"""Processes that share one base must ask it equally often: a process with less to do fills up with idle questions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from model.compute.execution import Execution
from model.compute.parallel import most

T = TypeVar("T")


def missing(count: int, execution: Execution) -> int:
    """How many more the busiest process has than this one, which has `count`; 0 where processes need not agree."""
    return most([count])[0] - count if execution.lockstep else 0


def filled_up(items: Iterable[T], idle: Callable[[], T], execution: Execution) -> Iterator[T]:
    """The items, then idle ones until this process has as many as the busiest."""
    count = 0
    for item in items:
        count += 1
        yield item
    for _ in range(missing(count, execution)):
        yield idle()
