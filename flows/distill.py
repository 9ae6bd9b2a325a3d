"""The flow `distill`: the whole job, from examples to a registered version. Run it here with `python -m flows.distill`,
or as the deployment `distill/prod`.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, Literal

from tasks.environment import PROJECT, prepare

prepare()  # before Prefect reads its settings

from prefect import flow  # noqa: E402
from prefect.states import Completed, State  # noqa: E402

from tasks import prefect_tasks as run  # noqa: E402


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
    """A candidate that the gate refused is a finished run with a name of its own: nothing broke, and nobody should take
    it for a success.
    """
    reasons = [rule["reason"] for rule in judged["verdict"]["rules"] if not rule["passed"]]
    message = "; ".join(reasons) or "the candidate passed the gate"
    return Completed(
        name="Refused" if reasons else "Completed", message=message, data={**judged, "registered": registered}
    )


def main() -> int:
    """Runs the flow in this process with no server to start; ends with the table, the verdict and where to look.
    Returns 1 if the flow failed.
    """
    parser = argparse.ArgumentParser("python -m flows.distill", description="Run the whole job in this process.")
    parser.add_argument("--preset", default=None, metavar="NAME", help="put presets/NAME.yaml in force first")
    parser.add_argument(
        "--promote",
        choices=["auto", "review"],
        default="review",
        help="auto: a passing candidate becomes champion (default: %(default)s)",
    )
    arguments = parser.parse_args()
    from flows.outcome import failure_line, print_outcome

    try:
        state = distill(preset=arguments.preset, promote=arguments.promote, return_state=True)
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on from the last finished stage", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if "ephemeral" not in str(error):  # how Prefect says that its own small server did not come up in time
            raise
        print(
            "error: Prefect's temporary server did not start in three minutes: the machine is too busy; the same command later begins there",
            file=sys.stderr,
        )
        return 1
    if not state.is_completed():
        print(f"error: {failure_line(state.result(raise_on_failure=False), state.message)}", file=sys.stderr)
        return 1
    print_outcome(PROJECT, **state.result())
    return 0


if __name__ == "__main__":
    sys.exit(main())
