"""The production servers without Docker: `python scripts/stack.py up|down|status`, the same topology as
docker-compose.yml from installed packages.

PostgreSQL (Debian's package) with one database each for MLflow and Prefect, SeaweedFS as the S3 store, MLflow with
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
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from data.errors import UserError  # noqa: E402
from data.files import read_json, write_json  # noqa: E402
from tasks import credentials  # noqa: E402
from tasks.environment import defaults  # noqa: E402

FOLDER = Path(".stack")
SERVICES = ("postgres", "seaweedfs", "mlflow", "prefect", "worker")  # in the order of their start
PORTS = (
    "postgres",
    "mlflow",
    "prefect",
    "s3",
    "s3_grpc",
    "master",
    "master_grpc",
    "volume",
    "volume_grpc",
    "filer",
    "filer_grpc",
)
BUCKETS = ("danceopd", "mlflow")
START_SECONDS = 300.0  # a server's start, on a busy machine
STOP_SECONDS = {"postgres": 30.0, "seaweedfs": 15.0, "mlflow": 10.0, "prefect": 15.0, "worker": 15.0}
POSTGRES_FOLDERS = Path("/usr/lib/postgresql")  # Debian's: VERSION/bin
OWN_VARIABLES = ("PREFECT_", "MLFLOW_", "AWS_", "DANCEOPD_", "PG")  # not taken over from the caller's shell


@dataclass(frozen=True)
class Service:
    """How one server is started and when it counts as up: `health` is an address that answers 200, or None for a port
    that accepts connections.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]
    health: str | None
    user: str | None  # another account to run as; only root can


# --- what is known of a stack -----------------------------------------------------------------------------------------


def postgres_bin() -> Path | None:
    """The folder of PostgreSQL's programs, or None: Debian keeps them out of PATH."""
    found = shutil.which("initdb")
    places = [Path(found).parent] if found else []
    newest_first = sorted(POSTGRES_FOLDERS.glob("[0-9]*/bin"), key=lambda place: float(place.parent.name), reverse=True)
    return next(
        (
            place
            for place in [*places, *newest_first]
            if (place / "initdb").is_file() and (place / "postgres").is_file()
        ),
        None,
    )


def _free_ports(count: int) -> list[int]:
    """Distinct ports that are free now; all are held open until the last is known."""
    opened = [socket.socket() for _ in range(count)]
    try:
        for one in opened:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in opened]
    finally:
        for one in opened:
            one.close()


def ports(folder: Path) -> dict[str, int]:
    """Service -> port, chosen at the first start and kept, so that addresses outlive a restart."""
    path = folder / "ports.json"
    if not path.exists():
        write_json(path, dict(zip(PORTS, _free_ports(len(PORTS)), strict=True)))
    return {str(name): int(port) for name, port in read_json(path).items()}


def client_environment(folder: Path) -> dict[str, str]:
    """What workers and people need to reach the servers; the standard variables of each tool, and the project's own for
    git, ledger and publishing.
    """
    at, secret = ports(folder), credentials.read_file(folder / "secrets.env")
    where = {name: f"http://127.0.0.1:{at[name]}" for name in ("prefect", "mlflow", "s3")}
    return {
        **credentials.client_settings(secret, **where),
        "PREFECT_HOME": str(folder / "prefect-client"),
        "DANCEOPD_REPOSITORY": str(folder / "repository.git"),
        "DANCEOPD_WORKSPACES": str(folder / "workspaces"),
    }


def _base_environment() -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(OWN_VARIABLES) and name not in defaults()
    }
    return {**kept, "DO_NOT_TRACK": "true", "DVC_NO_ANALYTICS": "1", "PYTHONUNBUFFERED": "1"}


def _s3_identities(secret: Mapping[str, str]) -> dict[str, object]:
    """One key a user of the store, each for its own bucket: MLflow cannot touch the ledger, a worker cannot touch
    MLflow's artifacts.
    """
    users = (("pipeline", "S3_PIPELINE", "danceopd"), ("mlflow", "S3_MLFLOW", "mlflow"))
    return {
        "identities": [
            {
                "name": name,
                "credentials": [{"accessKey": secret[f"{prefix}_KEY"], "secretKey": secret[f"{prefix}_SECRET"]}],
                "actions": [f"{action}:{bucket}" for action in ("Read", "Write", "List", "Tagging")],
            }
            for name, prefix, bucket in users
        ]
    }


def services(folder: Path) -> dict[str, Service]:
    """Every server of the stack in `folder`, as it is started."""
    at, secret, base = ports(folder), credentials.read_file(folder / "secrets.env"), _base_environment()
    python = sys.executable
    programs = postgres_bin()
    if programs is None:
        raise UserError("PostgreSQL's programs are not here; install them as root with: apt-get install postgresql")
    postgres = (
        "-D",
        str(folder / "postgres"),
        "-p",
        str(at["postgres"]),
        "-c",
        "listen_addresses=127.0.0.1",
        "-c",
        "unix_socket_directories=",
    )
    weed = [
        f"-{name}={value}"
        for name, value in {
            "dir": folder / "seaweedfs",
            "bucket": ",".join(BUCKETS),
            "s3.config": folder / "s3.json",
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "s3.port": at["s3"],
            "s3.port.grpc": at["s3_grpc"],
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "master.port": at["master"],
            "master.port.grpc": at["master_grpc"],
            "volume.port": at["volume"],
            "volume.port.grpc": at["volume_grpc"],
            "filer.port": at["filer"],
            "filer.port.grpc": at["filer_grpc"],
            "webdav": "false",
            "admin.ui": "false",
            "master.telemetry": "false",
        }.items()
    ]
    mlflow = {
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
        "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{at['s3']}",
        "AWS_ACCESS_KEY_ID": secret["S3_MLFLOW_KEY"],
        "AWS_SECRET_ACCESS_KEY": secret["S3_MLFLOW_SECRET"],
        "AWS_DEFAULT_REGION": "us-east-1",
        "HOME": str(folder),
    }
    prefect = {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://prefect:{secret['PREFECT_DATABASE_PASSWORD']}@127.0.0.1:{at['postgres']}/prefect",
        "PREFECT_SERVER_API_AUTH_STRING": secret["PREFECT_AUTH_STRING"],
        "PREFECT_UI_API_URL": f"http://127.0.0.1:{at['prefect']}/api",
        "PREFECT_UI_STATIC_DIRECTORY": str(folder / "prefect" / "ui"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # in memory, a restart would forget who holds what
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    }
    worker = {
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # what the automation for dead runs listens to
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_CLIENT_MAX_RETRIES": "8",  # with doubling pauses, some minutes: a server that restarts stops no run
        "DANCEOPD_SLOT": "cpu",
    }
    where = ("--host", "127.0.0.1", "--port")
    return {
        "postgres": Service(
            (str(programs / "postgres"), *postgres),
            {**base, "LC_ALL": "C.UTF-8"},
            None,
            "postgres" if os.geteuid() == 0 else None,
        ),
        "seaweedfs": Service(
            (str(Path(python).with_name("weed")), "mini", *weed),
            {**base, "HOME": str(folder)},
            f"http://127.0.0.1:{at['s3']}/healthz",
            None,
        ),
        "mlflow": Service(
            (
                python,
                "-m",
                "mlflow",
                "server",
                *where,
                str(at["mlflow"]),
                "--workers",
                "1",
                "--app-name",
                "basic-auth",
                "--allowed-hosts",
                "localhost:*,127.0.0.1:*",
                "--backend-store-uri",
                f"postgresql+psycopg2://mlflow@127.0.0.1:{at['postgres']}/mlflow",
                "--serve-artifacts",
                "--artifacts-destination",
                "s3://mlflow/artifacts",
            ),
            {**base, **mlflow},
            f"http://127.0.0.1:{at['mlflow']}/health",
            None,
        ),
        "prefect": Service(
            (
                python,
                "-m",
                "uvicorn",
                "--factory",
                "flows.server:make_app",
                "--app-dir",
                str(PROJECT),
                *where,
                str(at["prefect"]),
                "--log-level",
                "warning",
            ),
            {**base, **prefect},
            f"http://127.0.0.1:{at['prefect']}/api/health",
            None,
        ),
        "worker": Service(
            (
                python,
                "-m",
                "prefect",
                "worker",
                "start",
                "--pool",
                "local",
                "--name",
                "cpu",
                "--type",
                "process",
                "--install-policy",
                "never",
            ),
            {**base, **defaults(PROJECT), **client_environment(folder), **worker},
            None,
            None,
        ),
    }


# --- processes: only those that this program started ------------------------------------------------------------------


def _started_at(number: int) -> str | None:
    """The kernel's start time of a process, so that a number which was given out again is not taken for ours; None if
    it is gone (a zombie is).
    """
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
    noted = read_json(path)
    return int(noted["pid"]) if _started_at(int(noted["pid"])) == noted["started"] else None


def start(folder: Path, name: str) -> None:
    """Starts one service, unless it runs, and waits until it answers. Raises UserError with the end of its log."""
    if running(folder, name) is not None:
        return
    service, log = services(folder)[name], folder / "logs" / f"{name}.log"
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
            user=service.user,
            group=service.user,
            extra_groups=[] if service.user else None,
        )
    write_json(folder / "processes" / f"{name}.json", {"pid": child.pid, "started": _started_at(child.pid)})


def wait(folder: Path, name: str) -> None:
    """Until the service answers. Raises UserError with the end of its log when it ended or took too long."""
    service, log, until = services(folder)[name], folder / "logs" / f"{name}.log", time.monotonic() + START_SECONDS
    while not _answers(folder, name, service):
        gone = running(folder, name) is None
        if gone or time.monotonic() > until:
            end = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise UserError(
                f"{name} {'ended' if gone else f'did not answer within {START_SECONDS:.0f} s'}; the end of {log}:\n{end}"
            )
        time.sleep(0.25)


def _answers(folder: Path, name: str, service: Service) -> bool:
    if name == "worker":
        return True
    if service.health is None:
        try:
            socket.create_connection(("127.0.0.1", ports(folder)["postgres"]), timeout=2).close()
        except OSError:
            return False
        return True
    try:
        with urllib.request.urlopen(service.health, timeout=5):
            return True
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)  # it is up, and it asks who we are
    except (OSError, urllib.error.URLError):
        return False


def stop(folder: Path, name: str, *, kill: bool = False) -> None:
    """Ends a service with its whole process group: asked first (PostgreSQL with a fast shutdown), killed after a while;
    with `kill` at once.
    """
    number = running(folder, name)
    if number is None:
        return
    asked = signal.SIGKILL if kill else signal.SIGINT if name == "postgres" else signal.SIGTERM
    for one, seconds in ((asked, STOP_SECONDS[name]), (signal.SIGKILL, 10.0)):
        _signal(
            number, one, whole=name != "postgres" or one == signal.SIGKILL
        )  # PostgreSQL's own children end with it, in its order
        until = time.monotonic() + seconds
        while running(folder, name) is not None and time.monotonic() < until:
            _reap(number)
            time.sleep(0.1)
        if running(folder, name) is None:
            break
    _signal(number, signal.SIGKILL, whole=True)  # what is left of its group
    _reap(number)
    if name == "seaweedfs":  # it leaves its local sockets behind
        for left in Path("/tmp").glob(f"seaweedfs-*-{ports(folder)['s3']}.sock"):
            left.unlink(missing_ok=True)


def _signal(number: int, which: signal.Signals, *, whole: bool) -> None:
    try:
        if whole:
            os.killpg(number, which)
        else:
            os.kill(number, which)
    except ProcessLookupError:
        pass


def _reap(number: int) -> None:
    with contextlib.suppress(ChildProcessError):  # started by an earlier call of this program
        os.waitpid(number, os.WNOHANG)


# --- the first start --------------------------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Folders, passwords and configuration files. What is there already stays."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "secrets.env").exists():
        credentials.make_file(folder / "secrets.env")
    secret = credentials.read_file(folder / "secrets.env")
    at = ports(folder)
    _write_private(folder / "s3.json", json.dumps(_s3_identities(secret), indent=2))
    accounts = Path(__file__).with_name("mlflow.ini").read_text(encoding="utf-8")  # as docker-compose.yml has it
    _write_private(folder / "mlflow.ini", accounts.replace("@postgres/", f"@127.0.0.1:{at['postgres']}/"))
    exports = "".join(f"export {name}='{value}'\n" for name, value in client_environment(folder).items())
    _write_private(folder / "client.sh", exports)
    for name in ("seaweedfs", "workspaces"):
        (folder / name).mkdir(exist_ok=True)
    if not (folder / "repository.git").exists():
        _run(["git", "clone", "--quiet", "--bare", "--no-hardlinks", str(PROJECT), str(folder / "repository.git")])


def _write_private(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)


def _run(command: Sequence[str], **options: object) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if ended.returncode:
        raise UserError(f"{Path(command[0]).name} failed: {(ended.stderr or ended.stdout).strip()[-1000:]}")


def _make_cluster(folder: Path) -> None:
    """An empty database cluster with password authentication and its superuser's password; as root it belongs to the
    account `postgres`.
    """
    place, programs = folder / "postgres", postgres_bin()
    if (place / "PG_VERSION").exists():
        return
    if programs is None:
        raise UserError("PostgreSQL's programs are not here; install them as root with: apt-get install postgresql")
    place.mkdir(exist_ok=True)
    options = [
        "--auth=scram-sha-256",
        "--username=postgres",
        "--encoding=UTF8",
        "--locale=C.UTF-8",
        "--pwfile=/dev/stdin",
    ]
    account = None
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        account = "postgres"
        owner = pwd.getpwnam(account)
        os.chown(place, owner.pw_uid, owner.pw_gid)
    password = credentials.read_file(folder / "secrets.env")["POSTGRES_PASSWORD"]
    reader, writer = os.pipe()
    os.write(writer, f"{password}\n".encode())
    os.close(writer)
    with os.fdopen(reader) as given:
        command = [str(programs / "initdb"), *options, "-D", str(place)]
        if account:
            os.fchown(given.fileno(), pwd.getpwnam(account).pw_uid, -1)  # /dev/stdin is opened anew, as that account
        _run(command, stdin=given, cwd="/", user=account, group=account, extra_groups=[] if account else None)


def _make_databases(folder: Path) -> None:
    """One user and one database each for MLflow and Prefect; neither can reach the other's. Done again, it changes
    nothing.
    """
    import psycopg2  # type: ignore[import-untyped]
    from psycopg2 import sql  # type: ignore[import-untyped]

    secret = credentials.read_file(folder / "secrets.env")
    address = {
        "host": "127.0.0.1",
        "port": ports(folder)["postgres"],
        "user": "postgres",
        "dbname": "postgres",
        "password": secret["POSTGRES_PASSWORD"],
    }
    until = time.monotonic() + START_SECONDS
    while True:
        try:
            connection = psycopg2.connect(**address)
            break
        except psycopg2.OperationalError as error:  # it accepts connections a little before it serves them
            if time.monotonic() > until or running(folder, "postgres") is None:
                raise UserError(f"PostgreSQL cannot be used: {str(error).strip()}") from error
            time.sleep(0.25)
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            for name in ("mlflow", "prefect"):
                password = secret[f"{name.upper()}_DATABASE_PASSWORD"]
                cursor.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (name,))
                verb = "ALTER" if cursor.fetchone() else "CREATE"
                cursor.execute(
                    sql.SQL(verb + " ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(name), sql.Literal(password))
                )
                cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,))
                if not cursor.fetchone():
                    cursor.execute(
                        sql.SQL("CREATE DATABASE {} OWNER {}").format(sql.Identifier(name), sql.Identifier(name))
                    )
                cursor.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(sql.Identifier(name)))
    finally:
        connection.close()


def bootstrap(folder: Path) -> None:
    """Accounts, pool, queues, limits, automation, deployments: `python -m flows.bootstrap`, which can be repeated."""
    admin = {
        "MLFLOW_ADMIN_PASSWORD": credentials.read_file(folder / "secrets.env")["MLFLOW_ADMIN_PASSWORD"],
        "DANCEOPD_SLOTS": "cpu",
    }
    environment = {**_base_environment(), **defaults(PROJECT), **client_environment(folder), **admin}
    _run([sys.executable, "-m", "flows.bootstrap"], cwd=PROJECT, env=environment)


# --- commands ---------------------------------------------------------------------------------------------------------


def up(folder: Path, names: Sequence[str] = SERVICES) -> None:
    """Starts what is not running, in order; the two slow servers start beside each other. A failed first start leaves
    what it made, for another try.
    """
    folder = folder.resolve()
    prepare(folder)
    _make_cluster(folder)
    start(folder, "postgres")
    start(folder, "seaweedfs")
    wait(folder, "postgres")
    _make_databases(folder)
    for name in ("mlflow", "prefect"):
        start(folder, name)
    for name in ("seaweedfs", "mlflow", "prefect"):
        wait(folder, name)
    bootstrap(folder)
    if "worker" in names:
        start(folder, "worker")


def down(folder: Path) -> None:
    for name in reversed(SERVICES):
        stop(folder.resolve(), name)


def status(folder: Path) -> dict[str, str]:
    """Service -> "up", "starting" or "down"."""
    folder = folder.resolve()
    if not (folder / "ports.json").exists():
        return dict.fromkeys(SERVICES, "down")
    known = services(folder)
    return {
        name: "down" if running(folder, name) is None else "up" if _answers(folder, name, known[name]) else "starting"
        for name in SERVICES
    }


def addresses(folder: Path) -> dict[str, str]:
    """Where a browser goes."""
    at = ports(folder.resolve())
    return {
        "MLflow": f"http://127.0.0.1:{at['mlflow']}",
        "Prefect": f"http://127.0.0.1:{at['prefect']}",
        "S3": f"http://127.0.0.1:{at['s3']}",
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python scripts/stack.py", description="The production servers on this machine, without Docker."
    )
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
