"""The flow `rollback`, deployed as `rollback/prod`: back to the previous champion, in the registry and in what is
published.
"""

from __future__ import annotations

from typing import Any

from tasks.environment import prepare

prepare()  # before Prefect reads its settings

from prefect import flow  # noqa: E402

from tasks import prefect_tasks as run  # noqa: E402


@flow(name="rollback")
def rollback(reviewer: str, reason: str) -> dict[str, Any]:
    """Returns the ledger's entry and what is published now."""
    decided = run.rollback(reviewer, reason)
    return {**decided, "published": run.publish()}
