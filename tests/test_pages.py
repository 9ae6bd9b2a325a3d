"""Defends: markup stands in templates alone, every value on a page is escaped, and a value that is missing is an
error.
"""

from __future__ import annotations

import re

import pytest
from jinja2 import UndefinedError

from data.pages import render
from tasks.environment import PROJECT
from tests.imports import ROOMS, modules, templates_of

VALUES = {
    "title": "a <b> & c",
    "headline": "1 of 2",
    "columns": ["name"],
    "rows": [(True, ["<i>x</i>"]), (False, ["y"])],
}


def test_values_are_escaped() -> None:
    page = render("data/expectations.html.j2", **VALUES)
    assert "<title>a &lt;b&gt; &amp; c</title>" in page and "<td>&lt;i&gt;x&lt;/i&gt;</td>" in page
    assert page.count('<tr class="bad">') == 1 and "body{font" in page


def test_a_missing_value_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="headline"):
        render("data/expectations.html.j2", **{name: value for name, value in VALUES.items() if name != "headline"})


def test_python_holds_no_markup() -> None:
    """But for the tags that are looked for in Great Expectations' pages."""
    tags = re.compile(r"</?(?:html|body|div|table|tr|td|th|h[1-6]|svg|details)\b[^>\n]*>")
    marked = {str(path): tags.findall((PROJECT / path).read_text(encoding="utf-8")) for path in modules()}
    assert {path: tags for path, tags in marked.items() if tags} == {"data/curation/expectations.py": ["<tr>", "</tr>"]}


def test_every_template_is_used() -> None:
    """A style or a template that nothing names is dead."""
    used = set().union(*map(templates_of, modules()))
    there = {path.relative_to(PROJECT) for room in ROOMS for path in (PROJECT / room / "templates").glob("*")}
    assert used == there
