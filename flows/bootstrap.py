"""`python -m flows.bootstrap`: what the servers must know before the first run. A repetition changes nothing that is
right already.

In Prefect the process pool with its queues, a concurrency limit for each device, the automation that ends runs whose
process is gone, and the deployments of prefect.yaml. In MLflow the account of the workers and the registered model,
which belongs to that account. `--reviewer NAME` makes an account for a person.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import requests
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectAlreadyExists

from data.errors import UserError
from tasks.environment import PROJECT, for_children, setting

POOL = "local"
QUEUES = ("cpu", "gpu")  # by what a run needs
MODEL = "danceopd"
PURPOSE = "Students distilled from several flow-matching teachers; alias champion is in service."
SILENCE = timedelta(seconds=90)  # three heartbeats of 30 s that did not come
ZOMBIES = "runs without a heartbeat have crashed"
CRASHED = "no heartbeat for 90 s: the process or its machine is gone; run it again, it goes on"


def make_pool(client: SyncPrefectClient) -> None:
    """The process pool and its queues."""
    pool = WorkPoolCreate(name=POOL, type="process", description="Runs as processes of the worker that takes them")
    with contextlib.suppress(ObjectAlreadyExists):
        client.create_work_pool(pool)
    for name in QUEUES:
        with contextlib.suppress(ObjectAlreadyExists):
            client.create_work_queue(name=name, work_pool_name=POOL)


def make_automation(client: SyncPrefectClient) -> None:
    """Ends a run whose worker and engine were killed together: it sends nothing any more and would stay Running."""
    if client.read_automations_by_name(ZOMBIES):
        return
    ends = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    trigger = EventTrigger(
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.heartbeat", *ends},
        match={"prefect.resource.id": ["prefect.flow-run.*"]},
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=SILENCE,
    )
    actions = [ChangeFlowRunState(state=StateType.CRASHED, message=CRASHED)]
    client.create_automation(AutomationCore(name=ZOMBIES, trigger=trigger, actions=actions))


def deploy() -> None:
    """Every deployment of prefect.yaml. Raises UserError with Prefect's own words."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    environment = for_children(sys.executable)
    ended = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise UserError(f"prefect deploy failed: {(ended.stderr or ended.stdout).strip()[-2000:]}")


# --- MLflow: over HTTP, as flows do not load MLflow -------------------------------------------------------------------


def post(login: tuple[str, str], path: str, body: dict[str, Any], *, may_exist: bool = False) -> None:
    """A request to MLflow's server as `login` (user, password).

    Raises UserError for a refusal; with `may_exist` not for the one that the thing exists already.
    """
    address = _required("MLFLOW_TRACKING_URI").rstrip("/")
    try:
        answer = requests.post(f"{address}/api/{path}", json=body, auth=login, timeout=60)
    except requests.RequestException as error:
        raise UserError(f"MLflow at {address} does not answer: {type(error).__name__}") from error
    exists = answer.status_code in (400, 409) and "ALREADY_EXISTS" in answer.text
    if not answer.ok and not (may_exist and exists):
        raise UserError(f"MLflow refused {path}: HTTP {answer.status_code} {answer.text[:300]}")


def make_accounts(admin: str, pipeline: str) -> None:
    """The workers' account, and the registered model as theirs: they, and whom an administrator adds, may change it."""
    account = {"username": "pipeline", "password": pipeline}
    post(("admin", admin), "2.0/mlflow/users/create", account, may_exist=True)
    model = {"name": MODEL, "description": PURPOSE}
    post(("pipeline", pipeline), "2.0/mlflow/registered-models/create", model, may_exist=True)


def make_reviewer(admin: str, name: str) -> str:
    """An account that may read all and edit the registered model. Returns its password, kept nowhere else."""
    password = secrets.token_urlsafe(18)
    post(("admin", admin), "2.0/mlflow/users/create", {"username": name, "password": password})
    grant = {"username": name, "resource_type": "registered_model", "resource_id": MODEL, "permission": "EDIT"}
    post(("admin", admin), "3.0/mlflow/users/permissions/grant", grant)
    return password


def _required(name: str) -> str:
    value = setting(name)
    if value is None:
        takers = "docker-compose.yml and scripts/stack.py take it"
        raise UserError(f"{name} is not set; {takers} from the file that python -m tasks secrets makes")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    about = "Make pool, queues, limits, automation, deployments, accounts and the model."
    parser = argparse.ArgumentParser("python -m flows.bootstrap", description=about)
    parser.add_argument("--reviewer", metavar="NAME", help="only make an MLflow account for this person")
    reviewer, begun = parser.parse_args(argv).reviewer, time.monotonic()
    try:
        admin = _required("MLFLOW_ADMIN_PASSWORD")
        if reviewer:
            print(f"{reviewer}: password {make_reviewer(admin, reviewer)} (shown once)")
            return 0
        make_accounts(admin, _required("MLFLOW_TRACKING_PASSWORD"))
        with get_client(sync_client=True) as client:
            make_pool(client)
            for device in filter(None, os.environ.get("DANCEOPD_SLOTS", "cpu").split(",")):
                client.upsert_global_concurrency_limit_by_name(device, 1)  # a second run waits for the first
            make_automation(client)
        deploy()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"accounts, pool, queues, limits, automation and deployments are in place ({time.monotonic() - begun:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
