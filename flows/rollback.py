"""The flow `rollback`, deployed as `rollback/prod`: back to the previous champion, in the registry and in what is
published."""

from __future__ import annotations

from typing import Any

from prefect import flow

from tasks import prefect_tasks as run


@flow(name="rollback")
def rollback(reviewer: str, reason: str) -> dict[str, Any]:
    """Returns the ledger's entry and what is published now."""
    decided = run.rollback(reviewer, reason)
    return {**decided, "published": run.publish()}
