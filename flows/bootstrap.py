"""`python -m flows.bootstrap`: what the servers must know before the first run; done again, it changes nothing that is
right already.

In Prefect the process pool with its queues, one concurrency limit for each device, the automation that ends runs whose
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

from tasks.environment import PROJECT, for_children, prepare

prepare()  # before Prefect reads its settings


import requests  # noqa: E402
from prefect.client.orchestration import SyncPrefectClient, get_client  # noqa: E402
from prefect.client.schemas.actions import WorkPoolCreate  # noqa: E402
from prefect.client.schemas.objects import StateType  # noqa: E402
from prefect.events.actions import ChangeFlowRunState  # noqa: E402
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture  # noqa: E402
from prefect.exceptions import ObjectAlreadyExists  # noqa: E402

from data.errors import UserError  # noqa: E402

POOL = "local"
QUEUES = ("cpu", "gpu")
MODEL = "danceopd"
SILENCE = timedelta(seconds=90)  # three heartbeats of 30 s that did not come
ZOMBIES = "runs without a heartbeat have crashed"


def make_pool(client: SyncPrefectClient) -> None:
    """The process pool and its queues: `cpu` and `gpu` by what a run needs."""
    with contextlib.suppress(ObjectAlreadyExists):
        client.create_work_pool(
            WorkPoolCreate(name=POOL, type="process", description="Runs as processes of the worker that takes them")
        )
    for name in QUEUES:
        with contextlib.suppress(ObjectAlreadyExists):
            client.create_work_queue(name=name, work_pool_name=POOL)


def make_limits(client: SyncPrefectClient, slots: Sequence[str]) -> None:
    """One limit of one for each device: a second run waits for the first."""
    for name in slots:
        client.upsert_global_concurrency_limit_by_name(name, 1)


def make_automation(client: SyncPrefectClient) -> None:
    """A run whose worker and engine were killed together sends nothing any more: without this it would stay Running for
    ever.
    """
    ended = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    automation = AutomationCore(
        name=ZOMBIES,
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *ended},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=SILENCE,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message="no heartbeat for 90 s: the process or its machine is gone; run it again, it goes on",
            )
        ],
    )
    if not client.read_automations_by_name(ZOMBIES):
        client.create_automation(automation)


def deploy() -> None:
    """Every deployment of prefect.yaml. Raises UserError with Prefect's own words."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    ended = subprocess.run(
        command, cwd=PROJECT, env=for_children(sys.executable), capture_output=True, text=True, check=False
    )
    if ended.returncode:
        raise UserError(f"prefect deploy failed: {(ended.stderr or ended.stdout).strip()[-2000:]}")


# --- MLflow -----------------------------------------------------------------------------------------------------------


class Mlflow:
    """The few requests to MLflow's server that need an administrator, over HTTP: the flows' room does not load
    MLflow.
    """

    def __init__(self, address: str, user: str, password: str) -> None:
        self.address, self.login = address.rstrip("/"), (user, password)

    def post(self, path: str, body: dict[str, Any], *, exists_is_fine: bool = False) -> None:
        """Raises UserError for any refusal but, if so asked, that it exists already."""
        try:
            answer = requests.post(f"{self.address}/api/{path}", json=body, auth=self.login, timeout=60)
        except requests.RequestException as error:
            raise UserError(f"MLflow at {self.address} does not answer: {type(error).__name__}") from error
        if answer.ok or (exists_is_fine and answer.status_code in (400, 409) and "ALREADY_EXISTS" in answer.text):
            return
        raise UserError(f"MLflow refused {path}: HTTP {answer.status_code} {answer.text[:300]}")


def make_accounts(address: str, admin: str, pipeline: str) -> None:
    """The workers' account, and the registered model, which whoever creates it may change: the workers, and those an
    administrator adds.
    """
    Mlflow(address, "admin", admin).post(
        "2.0/mlflow/users/create", {"username": "pipeline", "password": pipeline}, exists_is_fine=True
    )
    described = {
        "name": MODEL,
        "description": "Students distilled from several flow-matching teachers; alias champion is in service.",
    }
    Mlflow(address, "pipeline", pipeline).post("2.0/mlflow/registered-models/create", described, exists_is_fine=True)


def make_reviewer(address: str, admin: str, name: str) -> str:
    """An account that may read everything and edit the registered model: descriptions, tags, aliases. Returns its
    password, shown once.
    """
    password = secrets.token_urlsafe(18)
    server = Mlflow(address, "admin", admin)
    server.post("2.0/mlflow/users/create", {"username": name, "password": password})
    grant = {"username": name, "resource_type": "registered_model", "resource_id": MODEL, "permission": "EDIT"}
    server.post("3.0/mlflow/users/permissions/grant", grant)
    return password


def _secret(name: str) -> str:
    value = os.environ.get(name, "").strip()
    if not value:
        raise UserError(
            f"{name} is not set; docker-compose.yml and scripts/stack.py take it from the file that python -m tasks secrets makes"
        )
    return value


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m flows.bootstrap",
        description="Make pool, queues, limits, automation, deployments, accounts and the model.",
    )
    parser.add_argument("--reviewer", metavar="NAME", help="only make an MLflow account for this person")
    chosen = parser.parse_args(argv)
    begun = time.monotonic()
    try:
        address, admin = _secret("MLFLOW_TRACKING_URI"), _secret("MLFLOW_ADMIN_PASSWORD")
        if chosen.reviewer:
            print(f"{chosen.reviewer}: password {make_reviewer(address, admin, chosen.reviewer)} (shown once)")
            return 0
        make_accounts(address, admin, _secret("MLFLOW_TRACKING_PASSWORD"))
        with get_client(sync_client=True) as client:
            make_pool(client)
            make_limits(client, [name for name in os.environ.get("DANCEOPD_SLOTS", "cpu").split(",") if name])
            make_automation(client)
        deploy()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"accounts, pool, queues, limits, automation and deployments are in place ({time.monotonic() - begun:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
