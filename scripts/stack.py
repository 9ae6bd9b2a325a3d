"""The production servers without Docker: `python scripts/stack.py up|down|status`, the same topology as
docker-compose.yml from installed packages.

PostgreSQL (Debian's package) with a database for MLflow and for Prefect, SeaweedFS as the S3 store, MLflow with
authentication and proxied artifacts, a Prefect server, a worker, and a bare git repository that runs are checked out
from and pushed to. All of it lies in one folder and listens on 127.0.0.1.

    python scripts/stack.py up          # first start: makes folder, passwords, databases; later: goes on from there
    . .stack/client.sh                  # addresses and credentials for this shell
    prefect deployment run distill/prod --watch
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from data.errors import UserError  # noqa: E402
from data.files import read_json, write_json  # noqa: E402
from tasks import credentials  # noqa: E402
from tasks.environment import defaults  # noqa: E402

FOLDER = Path(".stack")
WEED = ("s3", "master", "volume", "filer")  # SeaweedFS's servers, with two ports each
PORTS = ("postgres", "mlflow", "prefect", *WEED, *(f"{name}_grpc" for name in WEED))
BUCKETS = ("danceopd", "mlflow")
START_SECONDS = 300.0  # a server's start, on a busy machine
STOP_SECONDS = {"postgres": 30.0, "seaweedfs": 15.0, "mlflow": 10.0, "prefect": 15.0, "worker": 15.0}
POSTGRES_FOLDERS = Path("/usr/lib/postgresql")  # Debian's: VERSION/bin
OWN_VARIABLES = ("PREFECT_", "MLFLOW_", "AWS_", "DANCEOPD_", "PG")  # not taken over from the caller's shell
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Service:
    """A server: up once `health`, if there is one, answers. `user`: another account, which only root can take."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    health: str | None = None
    user: str | None = None


# --- what is known of a stack -----------------------------------------------------------------------------------------


def postgres_bin() -> Path | None:
    """The folder of PostgreSQL's programs, or None: Debian keeps them out of PATH."""
    on_path = shutil.which("initdb")
    newest_first = sorted(POSTGRES_FOLDERS.glob("[0-9]*/bin"), key=lambda place: float(place.parent.name), reverse=True)
    places = [*([Path(on_path).parent] if on_path else []), *newest_first]
    return next((place for place in places if (place / "initdb").is_file() and (place / "postgres").is_file()), None)


def _require_postgres() -> Path:
    programs = postgres_bin()
    if programs is None:
        raise UserError("PostgreSQL's programs are not here; install them as root with: apt-get install postgresql")
    return programs


def _postgres_user() -> str | None:
    """The account of PostgreSQL, which refuses to run as root."""
    return "postgres" if os.geteuid() == 0 else None


def _secrets(folder: Path) -> dict[str, str]:
    return credentials.read_file(folder / "secrets.env")


def ports(folder: Path) -> dict[str, int]:
    """Service -> port, chosen at the first start and kept, so that addresses outlive a restart."""
    path = folder / "ports.json"
    if not path.exists():
        with contextlib.ExitStack() as held:  # all are held until the last is known, so that they differ
            servers = [held.enter_context(socket.create_server((HOST, 0))) for _ in PORTS]
            write_json(path, {name: server.getsockname()[1] for name, server in zip(PORTS, servers, strict=True)})
    return {str(name): int(port) for name, port in read_json(path).items()}


def addresses(folder: Path) -> dict[str, str]:
    """ "prefect", "mlflow" and "s3" -> http://127.0.0.1:PORT."""
    at = ports(folder.resolve())
    return {name: f"http://{HOST}:{at[name]}" for name in ("mlflow", "prefect", "s3")}


def client_environment(folder: Path) -> dict[str, str]:
    """What workers and people need to reach the servers, git, the ledger and the published versions."""
    return {
        **credentials.client_settings(_secrets(folder), **addresses(folder)),
        "PREFECT_HOME": str(folder / "prefect-client"),
        "DANCEOPD_REPOSITORY": str(folder / "repository.git"),
        "DANCEOPD_WORKSPACES": str(folder / "workspaces"),
    }


def base_environment() -> dict[str, str]:
    """The caller's environment without what chooses servers."""
    dropped = defaults()
    kept = {name: text for name, text in os.environ.items() if not (name.startswith(OWN_VARIABLES) or name in dropped)}
    return {**kept, "DO_NOT_TRACK": "true", "DVC_NO_ANALYTICS": "1", "PYTHONUNBUFFERED": "1"}


def _s3_identities(secret: Mapping[str, str]) -> dict[str, object]:
    """A key for each user, for one bucket: MLflow cannot touch the ledger, nor a worker MLflow's artifacts."""
    users = []
    for name, prefix, bucket in (("pipeline", "S3_PIPELINE", "danceopd"), ("mlflow", "S3_MLFLOW", "mlflow")):
        key = {"accessKey": secret[f"{prefix}_KEY"], "secretKey": secret[f"{prefix}_SECRET"]}
        actions = [f"{action}:{bucket}" for action in ("Read", "Write", "List", "Tagging")]
        users.append({"name": name, "credentials": [key], "actions": actions})
    return {"identities": users}


def _postgres(folder: Path) -> Service:
    at = str(ports(folder)["postgres"])
    only = ("-c", f"listen_addresses={HOST}", "-c", "unix_socket_directories=")
    command = (str(_require_postgres() / "postgres"), "-D", str(folder / "postgres"), "-p", at, *only)
    return Service(command, {**base_environment(), "LC_ALL": "C.UTF-8"}, user=_postgres_user())


def _seaweedfs(folder: Path) -> Service:
    at = ports(folder)
    listening = [f"-{name}.port={at[name]}" for name in WEED] + [
        f"-{name}.port.grpc={at[f'{name}_grpc']}" for name in WEED
    ]
    off = ("-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false", "-master.telemetry=false")
    files = (f"-dir={folder / 'seaweedfs'}", f"-bucket={','.join(BUCKETS)}", f"-s3.config={folder / 's3.json'}")
    weed = str(Path(sys.executable).with_name("weed"))
    command = (weed, "mini", *files, f"-ip={HOST}", f"-ip.bind={HOST}", *listening, *off)
    return Service(command, {**base_environment(), "HOME": str(folder)}, f"{addresses(folder)['s3']}/healthz")


def _mlflow(folder: Path) -> Service:
    at, secret, address = ports(folder), _secrets(folder), addresses(folder)
    environment = {
        "PGPASSWORD": secret["MLFLOW_DATABASE_PASSWORD"],  # read by libpq: no password in the process list
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "mlflow.ini"),
        "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
        "MLFLOW_AUTH_ADMIN_PASSWORD": secret["MLFLOW_ADMIN_PASSWORD"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secret["MLFLOW_SECRET_KEY"],
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_MODEL_CATALOG_URI": "",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # else any bucket would do
        "MLFLOW_CREATE_MODEL_VERSION_SOURCE_VALIDATION_REGEX": "^(mlflow-artifacts:|models:/m-|runs:/)",
        "MLFLOW_S3_ENDPOINT_URL": address["s3"],
        "AWS_ACCESS_KEY_ID": secret["S3_MLFLOW_KEY"],
        "AWS_SECRET_ACCESS_KEY": secret["S3_MLFLOW_SECRET"],
        "AWS_DEFAULT_REGION": "us-east-1",
        "HOME": str(folder),
    }
    listening = ("--host", HOST, "--port", str(at["mlflow"]), "--allowed-hosts", f"localhost:*,{HOST}:*")
    database = f"postgresql+psycopg2://mlflow@{HOST}:{at['postgres']}/mlflow"
    artifacts = ("--serve-artifacts", "--artifacts-destination", "s3://mlflow/artifacts")
    options = ("--workers", "1", "--app-name", "basic-auth", "--backend-store-uri", database, *artifacts)
    command = (sys.executable, "-m", "mlflow", "server", *listening, *options)
    return Service(command, {**base_environment(), **environment}, f"{address['mlflow']}/health")


def _prefect(folder: Path) -> Service:
    at, secret, address = ports(folder), _secrets(folder), addresses(folder)["prefect"]
    database = f"prefect:{secret['PREFECT_DATABASE_PASSWORD']}@{HOST}:{at['postgres']}/prefect"
    environment = {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://{database}",
        "PREFECT_SERVER_API_AUTH_STRING": secret["PREFECT_AUTH_STRING"],
        "PREFECT_UI_API_URL": f"{address}/api",
        "PREFECT_UI_STATIC_DIRECTORY": str(folder / "prefect" / "ui"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # in memory, a restart would forget who holds what
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    }
    application = ("--factory", "flows.server:make_app", "--app-dir", str(PROJECT), "--log-level", "warning")
    command = (sys.executable, "-m", "uvicorn", *application, "--host", HOST, "--port", str(at["prefect"]))
    return Service(command, {**base_environment(), **environment}, f"{address}/api/health")


def _worker(folder: Path) -> Service:
    environment = {
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # what the automation for dead runs listens to
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_CLIENT_MAX_RETRIES": "8",  # with doubling pauses, some minutes: a server that restarts stops no run
        "DANCEOPD_SLOT": "cpu",
    }
    options = ("--pool", "local", "--name", "cpu", "--type", "process", "--install-policy", "never")
    command = (sys.executable, "-m", "prefect", "worker", "start", *options)
    return Service(command, {**base_environment(), **defaults(PROJECT), **client_environment(folder), **environment})


MAKERS = {"postgres": _postgres, "seaweedfs": _seaweedfs, "mlflow": _mlflow, "prefect": _prefect, "worker": _worker}
SERVICES = tuple(MAKERS)  # in the order of their start


# --- processes: only those that this program started ------------------------------------------------------------------


def _started_at(number: int) -> str | None:
    """The kernel's start time of a process: its number may be given out again. None if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def running(folder: Path, name: str) -> int | None:
    """The process of a service, or None."""
    path = folder / "processes" / f"{name}.json"
    if not path.exists():
        return None
    process = read_json(path)
    return int(process["pid"]) if _started_at(int(process["pid"])) == process["started"] else None


def start(folder: Path, name: str) -> None:
    """Starts a service, unless it runs."""
    if running(folder, name) is not None:
        return
    service, log = MAKERS[name](folder), folder / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        child = subprocess.Popen(
            service.command,
            cwd=PROJECT if name == "worker" else folder,
            env=dict(service.environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **_account(service.user),
        )
    write_json(folder / "processes" / f"{name}.json", {"pid": child.pid, "started": _started_at(child.pid)})


def _account(user: str | None) -> dict[str, Any]:
    """subprocess's options to run as that user; None: as the caller."""
    return {"user": user, "group": user, "extra_groups": [] if user else None}


def wait(folder: Path, name: str) -> None:
    """Until the service answers. Raises UserError with the end of its log when it ended or took too long."""
    log, until = folder / "logs" / f"{name}.log", time.monotonic() + START_SECONDS
    while not answers(folder, name):
        gone = running(folder, name) is None
        if gone or time.monotonic() > until:
            end = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            fault = "ended" if gone else f"did not answer within {START_SECONDS:.0f} s"
            raise UserError(f"{name} {fault}; the end of {log}:\n{end}")
        time.sleep(0.25)


def answers(folder: Path, name: str) -> bool:
    """Whether a service does its work; a worker, which listens to nobody, always."""
    if name == "worker":
        return True
    address = MAKERS[name](folder).health
    try:
        if address is None:
            socket.create_connection((HOST, ports(folder)[name]), timeout=2).close()
            return True
        return requests.get(address, timeout=5).status_code in (200, 401, 403)  # it may ask who we are
    except OSError:  # requests' errors too
        return False


def stop(folder: Path, name: str, *, kill: bool = False) -> None:
    """Ends a service with its process group: by request (PostgreSQL: fast shutdown), later or with `kill` by force."""
    number = running(folder, name)
    if number is None:
        return
    request = signal.SIGKILL if kill else signal.SIGINT if name == "postgres" else signal.SIGTERM
    for sent, seconds in ((request, STOP_SECONDS[name]), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError):
            if name == "postgres" and sent != signal.SIGKILL:
                os.kill(number, sent)  # PostgreSQL's own children end with it, in its order
            else:
                os.killpg(number, sent)
        until = time.monotonic() + seconds
        while running(folder, name) is not None and time.monotonic() < until:
            _reap(number)
            time.sleep(0.1)
        if running(folder, name) is None:
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(number, signal.SIGKILL)  # what is left of its group
    _reap(number)
    if name == "seaweedfs":  # it leaves its local sockets behind
        for left in Path("/tmp").glob(f"seaweedfs-*-{ports(folder)['s3']}.sock"):
            left.unlink(missing_ok=True)


def _reap(number: int) -> None:
    with contextlib.suppress(ChildProcessError):  # started by an earlier call of this program
        os.waitpid(number, os.WNOHANG)


# --- the first start --------------------------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Folders, passwords and configuration files. What is there already stays."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "secrets.env").exists():
        credentials.make_file(folder / "secrets.env")
    accounts = Path(__file__).with_name("mlflow.ini").read_text(encoding="utf-8")  # as docker-compose.yml has it
    private = {
        "s3.json": json.dumps(_s3_identities(_secrets(folder)), indent=2),
        "mlflow.ini": accounts.replace("@postgres/", f"@{HOST}:{ports(folder)['postgres']}/"),
        "client.sh": credentials.exports(client_environment(folder)),
    }
    for name, text in private.items():
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    for name in ("seaweedfs", "workspaces"):
        (folder / name).mkdir(exist_ok=True)
    if not (folder / "repository.git").exists():
        _run(["git", "clone", "--quiet", "--bare", "--no-hardlinks", str(PROJECT), str(folder / "repository.git")])


def _run(command: Sequence[str], **options: Any) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if ended.returncode:
        raise UserError(f"{Path(command[0]).name} failed: {(ended.stderr or ended.stdout).strip()[-1000:]}")


def _make_cluster(folder: Path) -> None:
    """An empty database cluster with password authentication; as root it belongs to the account `postgres`."""
    place, programs, user = folder / "postgres", _require_postgres(), _postgres_user()
    if (place / "PG_VERSION").exists():
        return
    place.mkdir(exist_ok=True)
    reader, writer = os.pipe()
    os.write(writer, f"{_secrets(folder)['POSTGRES_PASSWORD']}\n".encode())
    os.close(writer)
    options = ("--auth=scram-sha-256", "--username=postgres", "--encoding=UTF8", "--locale=C.UTF-8")
    command = [str(programs / "initdb"), *options, "--pwfile=/dev/stdin", "-D", str(place)]
    with os.fdopen(reader) as password:
        if user:
            owner = pwd.getpwnam(user)
            os.chown(place, owner.pw_uid, owner.pw_gid)
            os.fchown(password.fileno(), owner.pw_uid, -1)  # /dev/stdin is opened anew, as that account
        _run(command, stdin=password, cwd="/", **_account(user))


def _connect(folder: Path) -> Any:
    """A connection as the superuser. PostgreSQL accepts connections a little before it serves them."""
    import psycopg2  # type: ignore[import-untyped]

    login = {"user": "postgres", "dbname": "postgres", "password": _secrets(folder)["POSTGRES_PASSWORD"]}
    until = time.monotonic() + START_SECONDS
    while True:
        try:
            return psycopg2.connect(host=HOST, port=ports(folder)["postgres"], **login)
        except psycopg2.OperationalError as error:
            if time.monotonic() > until or running(folder, "postgres") is None:
                raise UserError(f"PostgreSQL cannot be used: {str(error).strip()}") from error
            time.sleep(0.25)


def _make_databases(folder: Path) -> None:
    """A user and a database for MLflow and for Prefect: neither can reach the other's. A repetition changes nothing."""
    from psycopg2 import sql  # type: ignore[import-untyped]

    secret = _secrets(folder)
    with contextlib.closing(_connect(folder)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            for name in ("mlflow", "prefect"):
                role, password = sql.Identifier(name), sql.Literal(secret[f"{name.upper()}_DATABASE_PASSWORD"])
                cursor.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (name,))
                verb = "ALTER" if cursor.fetchone() else "CREATE"
                cursor.execute(sql.SQL(verb + " ROLE {} LOGIN PASSWORD {}").format(role, password))
                cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,))
                if not cursor.fetchone():
                    cursor.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(role, role))
                cursor.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(role))


def bootstrap(folder: Path) -> None:
    """Accounts, pool, queues, limits, automation, deployments: `python -m flows.bootstrap`, which can be repeated."""
    admin = {"MLFLOW_ADMIN_PASSWORD": _secrets(folder)["MLFLOW_ADMIN_PASSWORD"], "DANCEOPD_SLOTS": "cpu"}
    environment = {**base_environment(), **defaults(PROJECT), **client_environment(folder), **admin}
    _run([sys.executable, "-m", "flows.bootstrap"], cwd=PROJECT, env=environment)


# --- commands ---------------------------------------------------------------------------------------------------------


def up(folder: Path) -> None:
    """Starts what is not running; the two slow servers side by side. A failed start leaves what it made, to go on."""
    folder = folder.resolve()
    prepare(folder)
    _make_cluster(folder)
    start(folder, "postgres")
    start(folder, "seaweedfs")
    wait(folder, "postgres")
    _make_databases(folder)
    start(folder, "mlflow")
    start(folder, "prefect")
    for name in ("seaweedfs", "mlflow", "prefect"):
        wait(folder, name)
    bootstrap(folder)
    start(folder, "worker")


def down(folder: Path) -> None:
    for name in reversed(SERVICES):
        stop(folder.resolve(), name)


def status(folder: Path) -> dict[str, str]:
    """Service -> "up", "starting" or "down"."""
    folder = folder.resolve()
    runs = {name: running(folder, name) is not None for name in SERVICES}
    return {name: "down" if not runs[name] else "up" if answers(folder, name) else "starting" for name in SERVICES}


def main(argv: Sequence[str] | None = None) -> int:
    about = "The production servers on this machine, without Docker."
    parser = argparse.ArgumentParser("python scripts/stack.py", description=about)
    parser.add_argument("command", choices=["up", "down", "status"])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where everything lies (default: %(default)s)")
    chosen = parser.parse_args(argv)
    try:
        if chosen.command == "up":
            up(chosen.folder)
            print("\n".join(f"{name:8} {address}" for name, address in addresses(chosen.folder).items()))
            print(f"this shell: . {chosen.folder / 'client.sh'}    MLflow's user for people: see docs/operations.md")
        elif chosen.command == "down":
            down(chosen.folder)
        else:
            states = status(chosen.folder)
            print("\n".join(f"{name:10} {state}" for name, state in states.items()))
            return 0 if set(states.values()) == {"up"} else 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
