"""The flow `promote`, deployed as `promote/prod`: a reviewer makes a candidate the champion and publishes it."""

from __future__ import annotations

from typing import Any

from prefect import flow

from tasks import prefect_tasks as run


@flow(name="promote")
def promote(version: str, reviewer: str, reason: str) -> dict[str, Any]:
    """Returns the ledger's entry and what was published. Refused: a version of changed or unknown code, a stale
    verdict, other weights than were judged."""
    run.require_clean(version)
    decided = run.promote(version, reviewer, reason)
    return {**decided, "published": run.publish()}
