"""The flow `watch`, deployed as `watch/prod` on a schedule: reviews made in MLflow's pages are carried out, and the
champion is scored again."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.states import Completed, Failed, State

from tasks import prefect_tasks as run


@flow(name="watch")
def watch(rescore: bool = True) -> State[Any]:
    """Ends in the state Drifted, a failure with the metrics in its message and an event `danceopd.champion.drifted`,
    when a mean has left the interval it was registered with. `rescore` false only carries out reviews."""
    decided = run.carry_out_reviews()
    data = {"decided": decided, "drifted": []}
    champion = run.find_champion()
    if champion is None:
        return Completed(message="no champion yet", data=data)
    if rescore or any(review["status"] == "promoted" for review in decided):
        run.publish()  # after a promotion; every night also what an interrupted one has left
    if not rescore:
        return Completed(message="reviews only", data=data)
    work = run.checkout_of(champion, None)
    with run.slot():
        scored = run.rescore(work, champion)
    drifted = run.report_drift(champion, scored)
    run.close(work)
    if not drifted:
        return Completed(message=f"version {champion['version']} scores as registered", data=data)
    rows = [f"{row['metric']}: now {row['now']}, registered {row['low']:.4g} to {row['high']:.4g}" for row in drifted]
    message = f"the champion (version {champion['version']}) has drifted: {'; '.join(rows)}"
    return Failed(name="Drifted", message=message)
