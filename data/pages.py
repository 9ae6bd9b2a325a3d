"""HTML pages from the Jinja2 templates of a room (`ROOM/templates/`), which build on the base page of this room."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined


@cache
def _environment(room: str) -> Environment:
    loader = ChoiceLoader([PackageLoader(room), PackageLoader("data")])
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def render(template: str, /, **values: Any) -> str:
    """The text of the template "ROOM/NAME.html.j2" with every value escaped.

    A template may include others of its room and of `data`. Raises jinja2.UndefinedError for a value that is missing.
    """
    room, name = template.split("/")
    return _environment(room).get_template(name).render(values)
