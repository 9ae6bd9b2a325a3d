"""What a parameter may be, written as its type: tasks/params/reading.py checks it, and the JSON Schema for editors says
it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt


class OneOf:
    """Text out of `known`, where a Literal would repeat names that are kept elsewhere, and an entry may be added later.
    Used as `Annotated[str, OneOf(NAMES)]`.
    """

    def __init__(self, known: Collection[str]) -> None:
        self.known = known

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.known)

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        return {**handler(core), "enum": list(self.names)}


Positive = Annotated[int, Ge(1)]
Count = Annotated[int, Ge(0)]
Above = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Gt(0), Lt(1)]
Decay = Annotated[float, Ge(0), Lt(1)]  # of a moving average


def expected(rule: object) -> str | None:
    """The rule in words; None for what is no rule. Text among a type's rules is taken as its words."""
    match rule:
        case str(words):
            return words
        case Ge(ge=least):
            return f"{least} or more"
        case Gt(gt=bound):
            return f"more than {bound}"
        case Lt(lt=bound):
            return f"less than {bound}"
        case OneOf(names=names):
            return f"one of {', '.join(names)}"
    return None


def holds(value: Any, rule: object) -> bool:
    match rule:
        case Ge(ge=least):
            return bool(value >= least)
        case Gt(gt=bound):
            return bool(value > bound)
        case Lt(lt=bound):
            return bool(value < bound)
        case OneOf(names=names):
            return value in names
    return True
