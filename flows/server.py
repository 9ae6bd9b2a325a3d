"""Prefect's server as an application for uvicorn: `uvicorn --factory flows.server:make_app`. The same as `prefect
server start`, with a fault mended.

Prefect 3.8 inserts scheduled runs with a value for `state`, which it stores itself in rows of another table afterwards.
SQLAlchemy 2.1 asks every such attribute how it takes part in an insert of many rows and refuses the insert if there is
no answer, so that no schedule ever fires. The answer here: it is left out. Once Prefect's models say this themselves,
nothing is changed.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any


def _left_out(cls: type, mapping: MutableMapping[str, Any], value: Any) -> None:
    mapping.pop("state", None)


def make_app() -> Any:
    """The ASGI application: API, pages and background services. Settings come from PREFECT_* variables, as always."""
    from prefect.server.api.server import create_app
    from prefect.server.database import orm_models

    for model in (orm_models.FlowRun, orm_models.TaskRun):
        for cls in model.__mro__:
            attribute = vars(cls).get("state")
            if attribute is not None and getattr(attribute, "bulk_dml_setter", _left_out) is None:
                attribute.bulk_dml_setter = _left_out
    return create_app(final=True)
