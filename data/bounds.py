"""The range or the choices of a parameter, as its type: the reader checks it, the JSON Schema for editors shows it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt

OPTIONAL = {"optional": True}  # metadata of a dataclass's field: the key may be left out, and its default counts


class OneOf:
    """Text out of `names` (a mapping's keys, too), which a Literal would repeat: `Annotated[str, OneOf(NAMES)]`."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = names

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        return {**handler(core), "enum": list(self.names)}


Positive = Annotated[int, Ge(1)]
Count = Annotated[int, Ge(0)]
Above = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Gt(0), Lt(1)]
Decay = Annotated[float, Ge(0), Lt(1)]  # of a moving average


def expected(rule: object) -> str | None:
    """The rule in words. Text beside a type stands for its rules; None for anything else."""
    match rule:
        case str(words):
            return words
        case Ge(ge=least):
            return f"{least} or more"
        case Gt(gt=bound):
            return f"more than {bound}"
        case Lt(lt=bound):
            return f"less than {bound}"
        case Le(le=most):
            return f"{most} or less"
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
        case Le(le=most):
            return bool(value <= most)
        case OneOf(names=names):
            return value in names
    return True
