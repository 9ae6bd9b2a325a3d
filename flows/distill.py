"""The flow `distill`: the whole job, from examples to a registered version. Run it here with `python -m flows.distill`,
or as the deployment `distill/prod`."""

from __future__ import annotations

import argparse
import sys
from typing import Any, Literal

from prefect import flow
from prefect.states import Completed, State

from tasks import prefect_tasks as run
from tasks.environment import PROJECT


@flow(name="distill")
def distill(
    preset: str | None = None,
    overrides: dict[str, Any] | None = None,
    promote: Literal["auto", "review"] = "review",
    revision: str | None = None,
) -> State[dict[str, Any]]:
    """`preset` puts presets/NAME.yaml in force, `overrides` single params by dotted key; `revision` is the branch, tag
    or commit that runs (default: the repository's main branch, or this folder); `promote` "auto" makes a passing
    candidate the champion, "review" leaves that to a person."""
    work = run.checkout(revision, preset, overrides or {})
    run.preflight(work)
    run.fetch_teachers(work)
    with run.slot():
        run.collect(work)
        run.curate(work)
        run.validate(work)
        run.encode(work)
        run.distill(work)
        run.absorb(work)
        run.score(work)
    run.push(work)
    run.benchmark_geneval(work)
    run.benchmark_gedit(work)
    judged = run.gate(work)
    registered = run.register(work, promote)
    run.close(work)
    return ending(judged, registered)


def ending(judged: dict[str, Any], registered: dict[str, Any]) -> State[dict[str, Any]]:
    """A refused candidate ends in the state "Refused": nothing broke, and nobody should take it for a success."""
    reasons = [rule["reason"] for rule in judged["verdict"]["rules"] if not rule["passed"]]
    name, message = ("Refused", "; ".join(reasons)) if reasons else ("Completed", "the candidate passed the gate")
    return Completed(name=name, message=message, data={**judged, "registered": registered})


def main() -> int:
    """Runs the flow in this process with no server to start, then shows how it ended. 1 if it failed."""
    parser = argparse.ArgumentParser("python -m flows.distill", description="Run the whole job in this process.")
    parser.add_argument("--preset", default=None, metavar="NAME", help="put presets/NAME.yaml in force first")
    promotes = "auto: a passing candidate becomes champion (default: %(default)s)"
    parser.add_argument("--promote", choices=["auto", "review"], default="review", help=promotes)
    arguments = parser.parse_args()
    from flows.outcome import print_outcome

    try:
        state = distill(preset=arguments.preset, promote=arguments.promote, return_state=True)
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on from the last finished stage", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if "ephemeral" not in str(error):  # Prefect's word where its own small server did not come up in time
            raise
        fault = "Prefect's temporary server did not start in three minutes: the machine is too busy"
        print(f"error: {fault}; run the same command again later", file=sys.stderr)
        return 1
    if not state.is_completed():
        fault = state.result(raise_on_failure=False)
        said = isinstance(fault, BaseException) and str(fault)
        print(f"error: {said or state.message or 'the flow failed; its log is above'}", file=sys.stderr)
        return 1
    print_outcome(PROJECT, **state.result())
    return 0


if __name__ == "__main__":
    sys.exit(main())
