"""Real servers for tests, on free loopback ports, each ended with its whole process group: an S3 store (SeaweedFS),
MLflow with authentication, and a proxy that puts faults between a client and one of them.

    s3_server (session)   the store; S3Server.environment are the settings that a child process needs
    s3 (function)         "s3://BUCKET/PREFIX" of the test's own, with the settings in force
    mlflow_database (session)  an MLflow database to copy
    mlflow_server (session)  MLflow with basic authentication; MlflowServer.environment, .new_user(name)
    FaultyProxy(url)      answers 500 or 503, cuts connections or waits, as `fault` says
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tasks.registry import tracking

START_SECONDS = 500  # MLflow takes 26 s on an idle machine, and minutes on one that is shared
BUCKET = "danceopd"


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on at this moment."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in sockets]


@contextmanager
def process_group(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a process group of its own, its output in `folder`/log; the group is killed at the end."""
    with open(folder / "log", "ab") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def wait_for(process: subprocess.Popen[bytes], ready: Callable[[], bool], folder: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while not ready():
        if process.poll() is not None or time.monotonic() > until:
            pytest.fail(f"{process.args!r} did not start: {(folder / 'log').read_text(errors='replace')[-2000:]}")
        time.sleep(0.2)


def answers(url: str) -> bool:
    """Whether an HTTP server answers there, with anything."""
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, http.client.HTTPException):
        return False
    return True


# S3


@dataclass(frozen=True)
class S3Server:
    url: str
    access_key: str
    secret_key: str

    @property
    def environment(self) -> dict[str, str]:
        """The standard settings that point a client at this store; few attempts, so that a test of a dead store
        ends.
        """
        return {
            "AWS_ENDPOINT_URL_S3": self.url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """`weed mini` with one bucket; up in about five seconds."""
    folder = tmp_path_factory.mktemp("seaweedfs")
    names = [
        f"{part}{kind}" for part in ("master", "filer", "volume", "s3", "admin") for kind in (".port", ".port.grpc")
    ]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    server = S3Server(
        f"http://127.0.0.1:{ports['s3.port']}", f"key-{secrets.token_hex(6)}", f"secret-{secrets.token_hex(16)}"
    )
    off = ["-admin.ui=false", "-webdav=false", "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    listen = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", *(f"-{name}={port}" for name, port in ports.items())]
    weed = str(Path(sys.executable).with_name("weed"))
    command = [weed, "mini", f"-dir={folder}", f"-bucket={BUCKET}", *off, *listen]
    with process_group(command, folder, {**os.environ, **server.environment}) as process:
        from tasks.s3 import objects

        def ready() -> bool:
            with suppress(Exception):
                objects.server_time(f"s3://{BUCKET}")
                return True
            return False

        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**server.environment, "AWS_MAX_ATTEMPTS": "1"}.items():
                patch.setenv(name, value)
            wait_for(process, ready, folder)
        yield server
    for port in ports.values():  # the server leaves its local sockets behind
        for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            left.unlink(missing_ok=True)


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An address of the test's own; the settings are in force, here and for child processes."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}"


# Faults between a client and a server


class FaultyProxy:
    """Passes requests on to `upstream`, unless `fault(method, path)` names a fault:

    "500", "503": answered at once. "cut": the connection is closed before the request is passed on. "lost": passed on,
    and closed without an answer. "half": half of the answer's body, then closed. "slow": passed on after `delay`
    seconds. None: passed on.
    """

    def __init__(self, upstream: str, fault: Callable[[str, str], str | None] = lambda method, path: None) -> None:
        self.upstream, self.fault, self.delay = urllib.parse.urlsplit(upstream), fault, 3.0
        self.seen: list[tuple[str, str, str | None]] = []  # (method, path, fault)
        self.lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

            def answer(self) -> None:
                proxy.pass_on(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = do_OPTIONS = answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def pass_on(self, handler: BaseHTTPRequestHandler) -> None:
        body = _body(handler)
        with self.lock:
            fault = self.fault(handler.command, handler.path)
            self.seen.append((handler.command, handler.path, fault))
        if fault in ("500", "503"):
            handler.send_response(int(fault))
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        if fault == "slow":
            time.sleep(self.delay)
        if fault == "cut":
            _close(handler)
            return
        connection = http.client.HTTPConnection(str(self.upstream.hostname), self.upstream.port, timeout=60)
        try:
            connection.putrequest(handler.command, handler.path, skip_host=True, skip_accept_encoding=True)
            for name, value in handler.headers.items():
                if name.lower() not in ("expect", "connection"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException):
            _close(handler)  # nobody there: as if the connection had been refused
            return
        finally:
            connection.close()
        if fault == "lost":
            _close(handler)
            return
        handler.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                handler.send_header(name, value)
        length = answer.getheader("Content-Length") if handler.command == "HEAD" else str(len(content))
        handler.send_header("Content-Length", length or "0")
        handler.end_headers()
        with suppress(OSError):  # the client may have gone
            handler.wfile.write(content[: len(content) // 2] if fault == "half" else content)
        if fault == "half":
            _close(handler)


def _body(handler: BaseHTTPRequestHandler) -> bytes:
    """The request's body as it came, chunks with their frames."""
    if "chunked" not in handler.headers.get("Transfer-Encoding", ""):
        return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
    raw = b""
    while True:
        line = handler.rfile.readline()
        raw += line
        size = int(line.split(b";")[0], 16)
        if size == 0:
            while line not in (b"\r\n", b""):
                line = handler.rfile.readline()
                raw += line
            return raw
        raw += handler.rfile.read(size + 2)


def _close(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    with suppress(OSError):
        handler.connection.shutdown(socket.SHUT_RDWR)


def first(
    count: int, fault: str, *, method: str | None = None, containing: str = ""
) -> Callable[[str, str], str | None]:
    """The fault for the first `count` requests of that method whose path contains the text."""
    left = [count]

    def plan(requested: str, path: str) -> str | None:
        if left[0] > 0 and method in (None, requested) and containing in path:
            left[0] -= 1
            return fault
        return None

    return plan


# MLflow


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh SQLite database of MLflow's to copy: making one takes seconds."""
    import candidates

    return candidates.fresh_database(tmp_path_factory.mktemp("database"))


@dataclass(frozen=True)
class MlflowServer:
    """`mlflow server --app-name basic-auth`. Its database and artifacts are in `folder`."""

    url: str
    folder: Path
    process: subprocess.Popen[bytes]
    admin: str
    password: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "MLFLOW_TRACKING_URI": self.url,
            "MLFLOW_TRACKING_USERNAME": self.admin,
            "MLFLOW_TRACKING_PASSWORD": self.password,
        }

    def request(
        self, method: str, path: str, body: dict[str, Any] | None = None, account: tuple[str, str] | None = None
    ) -> tuple[int, bytes]:
        """(status, content) of one request, anonymous unless an account (name, password) is given."""
        headers = {"Content-Type": "application/json"}
        if account is not None:
            headers["Authorization"] = "Basic " + base64.b64encode(":".join(account).encode()).decode()
        data = json.dumps(body or {}).encode() if method != "GET" else None
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def new_user(self, name: str) -> str:
        """A new account with the default rights (it may read); returns its password."""
        password = secrets.token_urlsafe(18)
        account, admin = {"username": name, "password": password}, (self.admin, self.password)
        status, content = self.request("POST", "/api/2.0/mlflow/users/create", account, admin)
        assert status == 200, content
        return password


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Path) -> Iterator[MlflowServer]:
    """Half a minute on an idle machine; shared by the session, so a test keeps to models and runs of its own."""
    folder = tmp_path_factory.mktemp("mlflow")
    shutil.copyfile(mlflow_database, folder / "server.db")
    (port,) = free_ports(1)
    admin, password = "admin", secrets.token_urlsafe(18)
    accounts = f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder / 'accounts.db'}\n"
    accounts += "auth_cache_ttl_seconds = 60\n"  # a password costs tens of milliseconds to verify, at every request
    (folder / "auth.ini").write_text(
        accounts + "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    environment = {
        **os.environ,
        **tracking.SWITCHES,
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight more processes, each of which loads MLflow
    }
    environment |= {"MLFLOW_AUTH_ADMIN_USERNAME": admin, "MLFLOW_AUTH_ADMIN_PASSWORD": password}
    environment.pop("MLFLOW_TRACKING_URI", None)
    database, artifacts = f"sqlite:///{folder / 'server.db'}", str(folder / "artifacts")
    options = ["--app-name", "basic-auth", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--serve-artifacts", "--backend-store-uri", database, "--artifacts-destination", artifacts]
    with process_group([sys.executable, "-m", "mlflow", "server", *options, *stores], folder, environment) as process:
        wait_for(process, lambda: answers(f"http://127.0.0.1:{port}/health"), folder)
        yield MlflowServer(f"http://127.0.0.1:{port}", folder, process, admin, password)
