"""The production stack as real processes: from `prefect deployment run distill/prod` to a rollback, through the faults
that servers and workers can have.

PostgreSQL, SeaweedFS, MLflow with authentication, Prefect's server and a worker are brought up once, by
scripts/stack.py. The tests are the chapters of one story, in order: a worker dies in distill, databases and servers
restart under the second try, MLflow is away when it registers; a second student is cancelled and goes on while the
store misbehaves; then promotion, review in MLflow's pages, publishing, rollback, scoring again, drift, and what
strangers get.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data.yaml_files import read_yaml
from tasks.environment import PROJECT, defaults
from tests.servers import FaultyProxy
from tests.short_params import shorten
from tests.test_flow import copy_project

pytestmark = [pytest.mark.stack, pytest.mark.timeout(2400)]
PATIENCE = 1200.0  # s for a flow run, on a busy machine
# A gate that a student of a few steps passes: what is tested is the way of a candidate, not what it learned.
EASY = {
    "gate.floors": {"geneval/overall": 0.0, "gedit/average": 0.0},
    "gate.retention": 0.0,
    "gate.min_prompts": {"geneval": 1, "gedit": 1},
    "gate.compared": [],
}
LONG = {"distill.steps": 24, "distill.save_every": 1}  # long enough to be killed in its middle
# Hardly anything but the base, which is good at something: where all scores are 0 nothing can drift.
SECOND = {
    "distill.seed": 1,
    "distill.steps": 10,
    "distill.save_every": 1,
    "distill.start": "base",
    "distill.learning_rate": 1e-6,
    "absorb.learning_rate": 1e-6,
}
SAMPLING = {"sampling.steps": 8}
# Found by every Python of a run that has its folder in PYTHONPATH: a library that computes something else than it did,
# as after an update or on a new driver.
UPDATE = """
import sys

class Update:
    def find_spec(self, name, path=None, target=None):
        if name == "diffusers":
            import torch
            right = torch.nn.functional.scaled_dot_product_attention
            torch.nn.functional.scaled_dot_product_attention = lambda *inputs, **options: 0 * right(*inputs, **options)

sys.meta_path.insert(0, Update())
"""


def load_stack() -> Any:
    spec = importlib.util.spec_from_file_location("danceopd_stack", PROJECT / "scripts" / "stack.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


servers = load_stack()


@dataclass(frozen=True)
class Story:
    """The stack in `folder`, driven from a copy of the project at `project`; `told` is what chapters hand on."""

    folder: Path
    project: Path
    told: dict[str, Any]

    @property
    def environment(self) -> dict[str, str]:
        return {**servers.base_environment(), **defaults(self.project), **servers.client_environment(self.folder)}

    def prefect(self, path: str, body: Any = None, method: str | None = None) -> Any:
        environment = self.environment
        token = b64encode(environment["PREFECT_API_AUTH_STRING"].encode()).decode()
        headers = {"Authorization": f"Basic {token}", "Content-Type": "application/json"}
        sent = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{environment['PREFECT_API_URL']}/{path}", sent, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def mlflow(self, path: str, body: Any, user: str | None, password: str = "") -> tuple[int, Any]:
        """(status, answer) of a POST as `user`, or as nobody."""
        headers = {"Content-Type": "application/json"}
        if user is not None:
            headers["Authorization"] = f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}"
        request = urllib.request.Request(
            f"{self.environment['MLFLOW_TRACKING_URI']}/api/{path}", json.dumps(body).encode(), headers
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")

    def call(self, *command: str, cwd: Path | None = None) -> str:
        ended = subprocess.run(
            command,
            cwd=cwd or self.project,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
        return ended.stdout

    def run(self, deployment: str, variables: dict[str, str] | None = None, **parameters: Any) -> str:
        """What `prefect deployment run` does, without its seconds of start-up; the id of the flow run. `variables` are
        of its environment.
        """
        identity = self.prefect(f"deployments/name/{deployment}")["id"]
        options = {"env": variables} if variables else {}
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}, "job_variables": options}
        return str(self.prefect(f"deployments/{identity}/create_flow_run", body)["id"])

    def let_schedules_rest(self) -> None:
        """Asserts that `watch/prod` is scheduled, then ends that: a watch that begins by itself would call off the one
        of a chapter.
        """
        watch = self.prefect("deployments/name/watch/prod")
        scheduled = {"state": {"type": {"any_": ["SCHEDULED"]}}}
        due = {"deployments": {"id": {"any_": [watch["id"]]}}, "flow_runs": scheduled}
        self.wait("scheduled watches", lambda: self.prefect("flow_runs/filter", due), 120)
        for schedule in watch["schedules"]:
            self.prefect(f"deployments/{watch['id']}/schedules/{schedule['id']}", {"active": False}, "PATCH")
        for run in self.prefect("flow_runs/filter", due):
            self.prefect(f"flow_runs/{run['id']}/set_state", {"state": {"type": "CANCELLED"}, "force": True})

    def state(self, run: str) -> dict[str, Any]:
        try:
            return dict(self.prefect(f"flow_runs/{run}"))
        except OSError:
            return {"state_type": "UNKNOWN", "state_name": "the server does not answer"}  # it is being restarted

    def lines(self, run: str) -> list[str]:
        query = {"logs": {"flow_run_id": {"any_": [run]}}, "limit": 200}
        oldest = self.prefect("logs/filter", {**query, "sort": "TIMESTAMP_ASC"})
        newest = self.prefect("logs/filter", {**query, "sort": "TIMESTAMP_DESC"})
        return [log["message"] for log in [*oldest, *reversed(newest)]]

    def wait(self, what: str, ready: Callable[[], Any], seconds: float = PATIENCE) -> Any:
        until = time.monotonic() + seconds
        while True:
            value = ready()
            if value:
                return value
            assert time.monotonic() < until, f"{what}: not within {seconds:.0f} s"
            time.sleep(1)

    def finished(self, run: str) -> dict[str, Any]:
        def ended() -> dict[str, Any] | None:
            state = self.state(run)
            return state if state["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else None

        return dict(self.wait(f"flow run {run}", ended))

    def completed(self, run: str) -> dict[str, Any]:
        ended = self.finished(run)
        if ended["state_type"] != "COMPLETED":
            lines = "\n".join(self.lines(run)[-60:])
            pytest.fail(f"{ended['state_name']}: {ended['state']['message']}\n{lines}")
        return ended

    def tasks(self, run: str) -> dict[str, str]:
        """Task -> the state of its newest run in this flow run."""
        query = {"flow_runs": {"id": {"any_": [run]}}, "sort": "EXPECTED_START_TIME_ASC"}
        return {task["name"].rsplit("-", 1)[0]: task["state_name"] for task in self.prefect("task_runs/filter", query)}

    def artifacts(self, run: str) -> dict[str, Any]:
        query = {"flow_runs": {"id": {"any_": [run]}}, "limit": 200}
        return {artifact["key"]: artifact["data"] for artifact in self.prefect("artifacts/filter", query)}

    def refusals(self, run: str) -> str:
        """What the gate and the registry said of a run's candidate."""
        shown = self.artifacts(run)
        refused = [row for row in shown.get("verdict", "no verdict").splitlines() if "**no**" in row]
        return "\n".join([*refused, shown.get("registration", "not registered")])

    def ledger(self) -> list[dict[str, Any]]:
        """The ledger as the registry reads it, verified."""
        script = (
            "import json, dataclasses; from pathlib import Path; from tasks.registry import versions; "
            "_, entries, _ = versions.ledger_state(Path.cwd()); "
            "print(json.dumps([dataclasses.asdict(entry) for entry in entries]))"
        )
        return list(json.loads(self.call(sys.executable, "-c", script).splitlines()[-1]))

    def registry(self, kind: str) -> str:
        """What MLflow answers to a search for "registered-models" or "model-versions"."""
        request = urllib.request.Request(f"{self.environment['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/{kind}/search")
        login = f"pipeline:{self.environment['MLFLOW_TRACKING_PASSWORD']}"
        request.add_header("Authorization", f"Basic {b64encode(login.encode()).decode()}")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(answer.read().decode())

    def aliases(self) -> dict[str, str]:
        (model,) = json.loads(self.registry("registered-models"))["registered_models"]
        return {alias["alias"]: alias["version"] for alias in model.get("aliases", [])}


@pytest.fixture(scope="module")
def story() -> Iterator[Story]:
    if servers.postgres_bin() is None:
        pytest.fail("PostgreSQL's programs are not installed (apt-get install postgresql)")
    if os.environ.get("DANCEOPD_STACK"):  # one that was left running
        kept = Path(os.environ["DANCEOPD_STACK"])
        servers.PROJECT = kept.with_name("project")
        story = Story(kept, kept.with_name("project"), json.loads((kept / "told.json").read_text(encoding="utf-8")))
        yield story
        (kept / "told.json").write_text(json.dumps(story.told), encoding="utf-8")
        return
    top = Path(tempfile.mkdtemp(prefix="danceopd-stack-"))
    top.chmod(0o755)  # PostgreSQL's account has to reach its own folder
    project = copy_project(top / "project")
    evaluation = dict.fromkeys(read_yaml(project / "params.yaml")["collect"]["evaluation"], 2)
    shorten(project / "params.yaml", {"collect.evaluation": evaluation, **SAMPLING})
    subprocess.run(
        ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-qam", "short params"],
        cwd=project,
        check=True,
    )
    servers.PROJECT = project
    made = Story(top / "stack", project, {})
    try:
        servers.up(made.folder)
        yield made
    finally:
        if os.environ.get("DANCEOPD_KEEP_STACK"):  # to look at its pages afterwards
            (made.folder / "told.json").write_text(json.dumps(made.told), encoding="utf-8")
            print(f"left running: DANCEOPD_STACK={made.folder}")
        else:
            servers.down(made.folder)
            shutil.rmtree(top, ignore_errors=True)


def processes_in(folder: Path) -> list[int]:
    """Every process that works below `folder`."""
    numbers = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            inside = Path(os.readlink(entry / "cwd")).is_relative_to(folder)
            if inside and (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                numbers.append(int(entry.name))
    return numbers


def test_what_is_up_listens_on_this_machine_alone(story: Story) -> None:
    assert set(servers.status(story.folder).values()) == {"up"}
    ports = {f"{port:04X}" for port in servers.ports(story.folder).values()}
    listening = [
        line.split()[1]
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    ]
    ours = [address for address in listening if address.rpartition(":")[2] in ports]
    assert ours and {address.rpartition(":")[0] for address in ours} == {"0100007F"}
    assert oct((story.folder / "secrets.env").stat().st_mode & 0o777) == "0o600"
    deployed = {f"{one['name']}" for one in story.prefect("deployments/filter", {})}
    assert deployed == {"prod", "prod-gpu"}
    assert {one["name"] for one in story.prefect("work_pools/local/queues/filter", {})} >= {"cpu", "gpu"}


def test_doctor_finds_nothing_wrong(story: Story) -> None:
    *lines, last = story.call(sys.executable, "-m", "tasks", "doctor").splitlines()
    well = {tuple(line.split()[:2]) for line in lines if line.startswith("ok ")}
    assert (
        last == "nothing failed"
        and {("ok", what) for what in ("code", "mlflow", "mlflow,", "ledger", "published", "dvc", "prefect")} <= well
    ), lines


def test_a_killed_worker_leaves_a_state_to_go_on_from(story: Story) -> None:
    """Worker and engine are killed at once, as when the machine loses its power: the stage ends too, its state is kept,
    and the run is called Crashed.
    """
    parameters = {"overrides": {**EASY, **LONG}, "promote": "auto"}
    story.told["parameters"] = parameters
    run = story.run("distill/prod", **parameters)
    (work,) = story.wait(
        "a state of distill",
        lambda: [path for path in (story.folder / "workspaces").glob("*/runs/distill-*/step-*/state.json")][:1],
    )
    workspace = next(parent for parent in work.parents if parent.parent == story.folder / "workspaces")
    worker = servers.running(story.folder, "worker")
    children = subprocess.run(["pgrep", "-P", str(worker)], capture_output=True, text=True, check=False).stdout
    engines = [int(line) for line in children.split()]
    assert engines
    for number in (worker, *engines):
        os.kill(number, signal.SIGKILL)
    story.wait("the stage's end", lambda: not processes_in(workspace), 120)
    assert not list(workspace.glob("checkpoints/student"))  # nothing half-written
    assert story.state(run)["state_type"] == "RUNNING"  # nobody has told the server
    story.told.update(killed=run, workspace=str(workspace))


def test_strangers_change_nothing(story: Story) -> None:
    """Anonymous requests and wrong passwords are refused by every server; a reviewer edits the model and nothing
    else.
    """
    create = {"name": "intruder"}
    assert story.mlflow("2.0/mlflow/registered-models/create", create, None)[0] == 401
    assert story.mlflow("2.0/mlflow/registered-models/create", create, "admin", "password1234")[0] == 401
    tag = {"name": "danceopd", "key": "seen", "value": "yes"}
    assert story.mlflow("2.0/mlflow/registered-models/set-tag", tag, None)[0] == 401
    environment = story.environment
    for address, body in (
        (f"{environment['PREFECT_API_URL']}/flow_runs/filter", b"{}"),
        (f"{environment['AWS_ENDPOINT_URL_S3']}/danceopd?list-type=2", None),
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(address, body, timeout=30)
        assert refused.value.code in (401, 403), address
    admin = servers.credentials.read_file(story.folder / "secrets.env")["MLFLOW_ADMIN_PASSWORD"]
    told = subprocess.run(
        [sys.executable, "-m", "flows.bootstrap", "--reviewer", "ada"],
        cwd=story.project,
        env={**environment, "MLFLOW_ADMIN_PASSWORD": admin},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    story.told["ada"] = told.split("password ")[1].split()[0]
    ada, eve = ("ada", story.told["ada"]), {"username": "eve", "password": "x" * 16}
    assert story.mlflow("2.0/mlflow/registered-models/set-tag", tag, *ada)[0] == 200
    assert story.mlflow("2.0/mlflow/users/create", eve, *ada)[0] == 403


def test_the_same_command_finishes_through_restarts(story: Story) -> None:
    """PostgreSQL and Prefect's server restart under the run, and MLflow is down when it wants to register: it resumes,
    waits, and ends.
    """
    crashed = story.finished(story.told["killed"])  # by the automation that misses its heartbeat
    assert (crashed["state_type"], "no heartbeat" in crashed["state"]["message"]) == ("CRASHED", True)
    story.let_schedules_rest()
    servers.start(story.folder, "worker")
    begun = story.call(
        sys.executable,
        "-m",
        "prefect",
        "--no-prompt",
        "deployment",
        "run",
        "distill/prod",
        "--params",
        json.dumps(story.told["parameters"]),
    )
    assert "Created flow run" in begun
    (newest,) = story.prefect(
        "flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC", "limit": 1, "flows": {"name": {"any_": ["distill"]}}}
    )
    run = newest["id"]
    of_run = {"flow_runs": {"id": {"any_": [run]}}}
    assert run != story.told["killed"]
    story.wait("distill goes on", lambda: any("distill: goes on at step" in line for line in story.lines(run)))
    servers.stop(story.folder, "mlflow", kill=True)
    for name in ("postgres", "prefect"):
        servers.stop(story.folder, name, kill=name == "prefect")
        servers.start(story.folder, name)
        servers.wait(story.folder, name)
    story.wait(
        "the gate waits for MLflow",
        lambda: any(one["state_name"] == "AwaitingRetry" for one in story.prefect("task_runs/filter", of_run)),
    )
    servers.start(story.folder, "mlflow")
    ended = story.completed(run)
    assert ended["state_name"] == "Completed"
    lines = story.lines(run)
    assert not any("distill: goes on at step 0 " in line for line in lines)
    story.told.update(first=run, branch=f"runs/{ended['name']}")
    assert not Path(story.told["workspace"]).exists()  # a finished checkout is removed


def test_the_runs_page_shows_what_happened(story: Story) -> None:
    artifacts = story.artifacts(story.told["first"])
    shown = {
        "revision",
        "dvc-revision",
        "scorecard-geneval",
        "scorecard-gedit",
        "verdict",
        "images",
        "edits",
        "registration",
        "mlflow-version",
    }
    assert shown <= set(artifacts)
    assert artifacts["progress-distill"] == 100
    assert artifacts["images"].startswith("data:image/png;base64,")
    assert f"{story.environment['MLFLOW_TRACKING_URI']}/#/models/danceopd/versions/1" in artifacts["mlflow-version"]
    assert story.told["branch"] in artifacts["dvc-revision"]


def test_dvc_pull_anywhere_restores_every_file_of_the_run(story: Story) -> None:
    clone = story.folder / "elsewhere"
    story.call(
        "git",
        "clone",
        "--quiet",
        "--branch",
        story.told["branch"],
        story.environment["DANCEOPD_REPOSITORY"],
        str(clone),
    )
    story.call(sys.executable, "-m", "dvc", "pull", cwd=clone)
    lock = read_yaml(clone / "dvc.lock")
    outs = [out["path"] for stage in lock["stages"].values() for out in stage.get("outs", [])]
    assert "checkpoints/absorbed" in outs and not [path for path in outs if not (clone / path).exists()]
    assert "Data and pipelines are up to date" in story.call(sys.executable, "-m", "dvc", "status", cwd=clone)
    params = read_yaml(clone / "params.yaml")
    assert params["distill"]["steps"] == LONG["distill.steps"]
    shutil.rmtree(clone)


def published(story: Story) -> dict[str, Any]:
    script = "from tasks.s3.objects import read; print(read('s3://danceopd/published/latest.json')[0].decode())"
    return dict(json.loads(story.call(sys.executable, "-c", script)))


def misbehaving() -> Callable[[str, str], str | None]:
    """One request in twelve gets a fault, another each time."""
    numbers, faults = itertools.count(1), itertools.cycle(("500", "503", "slow", "cut", "half"))
    return lambda method, path: next(faults) if next(numbers) % 12 == 0 else None


def test_a_cancelled_run_goes_on_while_the_store_misbehaves(story: Story) -> None:
    """From the first student's branch, on a machine with an empty cache, with MLflow down at the start. Cancelled in
    distill, the same command goes on; every twelfth request to the S3 store meets a fault, and when data is to be
    pushed nothing answers there at all for a while."""
    assert (story.aliases(), [entry["action"] for entry in story.ledger()]) == ({"champion": "1"}, ["promote"])
    wanted = {"revision": story.told["branch"], "overrides": SECOND, "promote": "review"}
    servers.stop(story.folder, "worker")
    shutil.rmtree(story.folder / "workspaces" / "cache")
    servers.stop(story.folder, "mlflow", kill=True)
    settings = servers.client_environment
    with (
        FaultyProxy(story.environment["AWS_ENDPOINT_URL_S3"], misbehaving()) as proxy,
        pytest.MonkeyPatch.context() as patch,
    ):
        proxy.delay = 1.0
        patched = {
            "AWS_ENDPOINT_URL_S3": proxy.url,
            "AWS_MAX_ATTEMPTS": "2",
        }  # few attempts: with the usual ones, dvc takes 40 s a file to give up
        patch.setattr(servers, "client_environment", lambda folder: {**settings(folder), **patched})
        servers.start(story.folder, "worker")
        cancelled = story.run("distill/prod", **wanted)
        (state,) = story.wait(
            "a state of distill",
            lambda: list((story.folder / "workspaces").glob("*/runs/distill-*/step-*/state.json"))[:1],
        )
        workspace = next(parent for parent in state.parents if parent.parent == story.folder / "workspaces")
        story.prefect(f"flow_runs/{cancelled}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
        servers.start(story.folder, "mlflow")
        assert story.finished(cancelled)["state_type"] == "CANCELLED"
        story.wait("the stage's end", lambda: not processes_in(workspace), 60)
        kept = list(workspace.glob("runs/distill-*/step-*/state.json"))
        assert kept and not (workspace / "checkpoints" / "student").exists()
        run = story.run("distill/prod", **wanted)
        story.wait("absorb", lambda: "absorb" in story.tasks(run))
        servers.stop(story.folder, "seaweedfs", kill=True)
        story.wait(
            "a transfer that is given up", lambda: any("failed to transfer" in line for line in story.lines(run))
        )  # after half a minute of trying
        servers.start(story.folder, "seaweedfs")
        story.wait("the push is tried again", lambda: story.tasks(run).get("push") == "AwaitingRetry")
        story.completed(run)
        servers.stop(story.folder, "worker")
    servers.start(story.folder, "worker")
    assert {fault for *_, fault in proxy.seen} == {None, "500", "503", "slow", "cut", "half"}
    lines = story.lines(run)
    assert any("distill: goes on at step" in line for line in lines) and not any(
        "distill: goes on at step 0 " in line for line in lines
    )
    assert any(
        "Stage 'validate' didn't change" in line for line in [*lines, *story.lines(cancelled)]
    )  # it came from the store, not from work
    assert story.aliases() == {"champion": "1", "candidate": "2"}, story.refusals(run)
    story.told["second"] = run


def test_a_review_in_mlflows_pages_becomes_champion_and_is_published(story: Story) -> None:
    for key, value in (("review.by", "ada"), ("review.reason", "grids look right"), ("review.status", "approved")):
        body = {"name": "danceopd", "version": "2", "key": key, "value": value}
        assert story.mlflow("2.0/mlflow/model-versions/set-tag", body, "ada", story.told["ada"])[0] == 200
    story.completed(story.run("watch/prod", rescore=False))
    assert story.aliases() == {"champion": "2", "previous": "1"}
    last = story.ledger()[-1]
    assert (last["action"], last["actor"], last["reason"], last["from_version"], last["to_version"]) == (
        "promote",
        "ada",
        "grids look right",
        "1",
        "2",
    )
    assert published(story)["version"] == "2"


def test_rollback_and_promotion_by_deployment(story: Story) -> None:
    story.completed(story.run("rollback/prod", reviewer="ada", reason="colours drift on the site"))
    assert story.aliases() == {"champion": "1"} and published(story)["version"] == "1"
    refused = story.finished(story.run("promote/prod", version="99", reviewer="ada", reason="a slip of the finger"))
    assert refused["state_type"] == "FAILED" and "has no version" in refused["state"]["message"]
    story.completed(story.run("promote/prod", version="2", reviewer="ada", reason="the site was at fault"))
    assert story.aliases() == {"champion": "2", "previous": "1"} and published(story)["version"] == "2"
    entries = story.ledger()
    assert [(entry["action"], entry["to_version"]) for entry in entries] == [
        ("promote", "1"),
        ("promote", "2"),
        ("rollback", "1"),
        ("promote", "2"),
    ]
    assert [entry["before"] for entry in entries[1:]] == [entry["hash"] for entry in entries[:-1]]


def test_the_champion_scores_as_registered(story: Story) -> None:
    """The same weights, examples and noise give the same numbers, from a checkout of the champion's own revision."""
    run = story.run("watch/prod", rescore=True)
    assert "version 2 scores as registered" in story.completed(run)["state"]["message"]
    again = {row["metric"]: row["mean"] for row in json.loads(story.artifacts(run)["rescored"])}
    first = {row["metric"]: row["mean"] for row in json.loads(story.artifacts(story.told["second"])["scorecard-gedit"])}
    assert first and {path: again[path] for path in first} == first


def test_versions_are_scored_by_their_number_and_what_is_published_by_its_address(story: Story) -> None:
    branch = f"runs/{story.state(story.told['second'])['name']}"
    by_address = {"model": f"s3://danceopd/published/{published(story)['prefix']}", "revision": branch}
    asked = {
        story.run("score/prod", model="models:/danceopd/1"): story.told["first"],
        story.run("score/prod", **by_address): story.told["second"],
    }
    for run, made in asked.items():
        story.completed(run)
        again = {row["metric"]: row["mean"] for row in json.loads(story.artifacts(run)["rescored"])}
        first = {row["metric"]: row["mean"] for row in json.loads(story.artifacts(made)["scorecard-geneval"])}
        assert first and {path: again[path] for path in first} == first


def test_drift_of_the_champion_is_an_alert(story: Story) -> None:
    """The same weights, on a machine whose libraries compute something else: the run fails as Drifted, with the
    metrics, and an event says so.
    """
    folder = story.folder / "update"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(UPDATE, encoding="utf-8")
    before = (story.aliases(), story.ledger())
    run = story.run("watch/prod", {"PYTHONPATH": str(folder)}, rescore=True)
    ended = story.finished(run)
    assert (ended["state_type"], ended["state_name"]) == ("FAILED", "Drifted"), ended["state"]["message"]
    rows = json.loads(story.artifacts(run)["drift"])
    assert rows and all(not row["low"] <= row["now"] <= row["high"] for row in rows)
    assert all(f"{row['metric']}: now {row['now']}" in ended["state"]["message"] for row in rows)
    events = {"filter": {"event": {"name": ["danceopd.champion.drifted"]}}}
    (event,) = story.wait("the event", lambda: story.prefect("events/filter", events)["events"], 60)
    assert event["resource"]["version"] == story.aliases()["champion"] and event["payload"]["metrics"] == [
        row["metric"] for row in rows
    ]
    assert (story.aliases(), story.ledger()) == before  # a person decides


def test_lineage_of_the_champion_is_all_there(story: Story) -> None:
    branch = f"runs/{story.state(story.told['second'])['name']}"
    sha = story.call("git", "rev-parse", branch, cwd=Path(story.environment["DANCEOPD_REPOSITORY"])).strip()
    with FaultyProxy(story.environment["MLFLOW_TRACKING_URI"]) as proxy, pytest.MonkeyPatch.context() as patch:
        settings = servers.client_environment
        patch.setattr(
            servers, "client_environment", lambda folder: {**settings(folder), "MLFLOW_TRACKING_URI": proxy.url}
        )
        told = story.call(sys.executable, "-m", "tasks", "lineage", "models:/danceopd@champion")
    asked = {path for _, path, _ in proxy.seen}
    assert any("scorecard.json" in path for path in asked) and not any("presigned" in path for path in asked), (
        asked
    )  # the store's address is the servers' own
    assert (
        sha in told
        and "MISSING" not in told
        and "are there; the checkpoint is DVC's checkpoints/absorbed at that revision" in told
    )
    assert story.call(sys.executable, "-m", "tasks", "lineage", sha[:10]).splitlines() == [
        f"models:/danceopd/2  git.sha = {sha}"
    ]


def test_no_secret_is_told_to_anybody(story: Story) -> None:
    secret = servers.credentials.read_file(story.folder / "secrets.env")
    values = {value.rpartition(":")[2] for value in secret.values()} | {story.told["ada"]}
    told = {path.name: path.read_text(encoding="utf-8", errors="replace") for path in (story.folder / "logs").iterdir()}
    for kind in ("flow_runs", "logs", "artifacts", "deployments"):
        told[kind] = json.dumps(story.prefect(f"{kind}/filter", {"limit": 200}))
    for kind in ("registered-models", "model-versions"):
        told[kind] = story.registry(kind)
    told["git"] = story.call(
        "git",
        "log",
        "--all",
        "-p",
        "--no-textconv",
        "--no-ext-diff",
        "--max-count=8",
        cwd=story.folder / "repository.git",
    )
    told["processes"] = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert all(told.values())
    assert not [name for name, text in told.items() if any(value in text for value in values)]


def test_a_clean_stop_leaves_nothing_running_and_data_behind(story: Story) -> None:
    before = {path.name for path in story.folder.iterdir()}
    servers.down(story.folder)
    assert set(servers.status(story.folder).values()) == {"down"}
    assert not processes_in(story.folder) and {path.name for path in story.folder.iterdir()} == before
