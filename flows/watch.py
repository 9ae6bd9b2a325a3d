"""The flow `watch`, deployed as `watch/prod` on a schedule: reviews made in MLflow's pages are carried out, and the
champion is scored again.
"""

from __future__ import annotations

from typing import Any

from tasks.environment import prepare

prepare()  # before Prefect reads its settings

from prefect import flow  # noqa: E402
from prefect.states import Completed, Failed, State  # noqa: E402

from tasks import prefect_tasks as run  # noqa: E402


@flow(name="watch")
def watch(rescore: bool = True) -> State[Any]:
    """Ends in the state Drifted, a failure with the metrics in its message and an event `danceopd.champion.drifted`,
    when a mean has left the interval it was registered with. `rescore` false only carries out reviews."""
    decided = run.carry_out_reviews()
    champion = run.find_champion()
    if champion is not None and (rescore or any(one["status"] == "promoted" for one in decided)):
        run.publish()  # after a promotion; every night also what an interrupted one has left
    if champion is None or not rescore:
        return Completed(
            message="no champion yet" if champion is None else "reviews only", data={"decided": decided, "drifted": []}
        )
    work = run.checkout_of(champion, None)
    with run.slot():
        scored = run.rescore(work, champion)
    drifted = run.report_drift(champion, scored)
    run.close(work)
    if drifted:
        message = "; ".join(
            f"{row['metric']}: now {row['now']}, registered {row['low']:.4g} to {row['high']:.4g}" for row in drifted
        )
        return Failed(name="Drifted", message=f"the champion (version {champion['version']}) has drifted: {message}")
    return Completed(
        message=f"version {champion['version']} scores as registered", data={"decided": decided, "drifted": []}
    )
