"""The flow `score`, deployed as `score/prod`: any registered version, or a checkpoint by address, is scored again on
held-out examples.
"""

from __future__ import annotations

from typing import Any

from tasks.environment import prepare

prepare()  # before Prefect reads its settings

from prefect import flow  # noqa: E402

from tasks import prefect_tasks as run  # noqa: E402


@flow(name="score")
def score(model: str = "models:/danceopd@champion", revision: str | None = None) -> dict[str, Any]:
    """`model` is models:/danceopd/3, models:/danceopd@champion, a number, s3://bucket/folder or a folder; `revision`
    says whose examples, params and code are used (default: the version's own). Returns {"model", "metrics": path ->
    mean, interval, n}."""
    found = run.find_model(model)
    work = run.checkout_of(found, revision)
    with run.slot():
        scored = run.rescore(work, found)
    run.close(work)
    return scored
