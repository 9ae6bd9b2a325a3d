"""The flow `score`, deployed as `score/prod`: any registered version, or a checkpoint by address, is scored again on
held-out examples."""

from __future__ import annotations

from typing import Any

from prefect import flow

from tasks import prefect_tasks as run


@flow(name="score")
def score(model: str = "models:/danceopd@champion", revision: str | None = None) -> dict[str, Any]:
    """`model` is models:/danceopd/3, models:/danceopd@champion, a number, s3://bucket/folder or a folder; `revision`
    says whose examples, params and code are used (default: the version's own). Returns {"model", "version", "metrics":
    path -> mean, interval, n}."""
    judged = run.find_model(model)
    work = run.checkout_of(judged, revision)
    with run.slot():
        scored = run.rescore(work, judged)
    run.close(work)
    return scored
