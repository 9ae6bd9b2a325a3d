"""Prefect's server as an application for uvicorn: `uvicorn --factory flows.server:make_app`. The same as `prefect
server start`, less one fault.

Prefect 3.8 inserts scheduled runs with a value for `state`, which it stores as rows of their own afterwards. SQLAlchemy
2.1 asks every such attribute how it takes part in an insert of many rows and refuses the whole insert when nothing
answers, so that no schedule ever fires. The answer is given here: not at all. Not needed any more once Prefect's models
say it themselves; then `_left_out` finds nothing to do.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from tasks.environment import prepare

prepare()  # before Prefect reads its settings


def _left_out(cls: type, mapping: MutableMapping[str, Any], value: Any) -> None:
    mapping.pop("state", None)


def make_app() -> Any:
    """The ASGI application: API and pages, background services included. Settings come from PREFECT_* variables, as
    always.
    """
    from prefect.server.api.server import create_app
    from prefect.server.database import orm_models

    for model in (orm_models.FlowRun, orm_models.TaskRun):
        for cls in model.__mro__:
            attribute = vars(cls).get("state")
            if attribute is not None and getattr(attribute, "bulk_dml_setter", _left_out) is None:
                attribute.bulk_dml_setter = _left_out
    return create_app(final=True)
