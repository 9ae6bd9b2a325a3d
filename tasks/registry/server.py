"""Where MLflow is, whether it answers, and as whom we speak to it."""

from __future__ import annotations

import fcntl
import getpass
import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from data.errors import Outage, UserError, causes
from data.files import explain
from tasks.environment import setting

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "danceopd"
FOLDER = "mlflow"  # inside the project
PROBE_SECONDS = 10.0


@dataclass(frozen=True)
class Store:
    """An open tracking store and registry."""

    client: MlflowClient
    uri: str
    project: Path

    @property
    def is_local(self) -> bool:
        return self.uri == local_uri(self.project)


def local_uri(project: Path) -> str:
    return f"sqlite:///{Path(project).resolve() / FOLDER / 'mlflow.db'}"


def tracking_uri(project: Path) -> str:
    """`MLFLOW_TRACKING_URI` if set, else the SQLite file inside the project."""
    return setting("MLFLOW_TRACKING_URI") or local_uri(project)


def probe(uri: str) -> None:
    """Raises Outage within seconds when no HTTP server answers at `uri`. Any answer counts, also a refusal."""
    where = urlsplit(without_credentials(uri))._replace(path="", fragment="").geturl()
    remedy = "start the server, or unset MLFLOW_TRACKING_URI to use the store inside the project"
    again = "no result is lost, run the same command again"
    try:
        with urllib.request.urlopen(f"{where}/health", timeout=PROBE_SECONDS):
            pass
    except urllib.error.HTTPError:
        return
    except (OSError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", None) or error
        text = f"MLFLOW_TRACKING_URI = {where}: no MLflow server answers ({cause}); {remedy}; {again}"
        raise Outage(text) from error


def account() -> str:
    """In whose name MLflow is spoken to: the account of the credentials in force, else the system's."""
    in_address = urlsplit(os.environ.get("MLFLOW_TRACKING_URI", "")).username
    try:
        return setting("MLFLOW_TRACKING_USERNAME") or in_address or getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def without_credentials(uri: str) -> str:
    """The address as it may be shown and kept: no user, no password, no query."""
    if uri.startswith("sqlite"):
        return uri
    address = urlsplit(uri)
    return address._replace(netloc=address.netloc.rpartition("@")[2], query="").geturl()


def for_browsers(uri: str) -> str | None:
    """The address of MLflow's pages: `DANCEOPD_MLFLOW_URL`, or the server's own; None where there is no server."""
    address = setting("DANCEOPD_MLFLOW_URL") or uri
    return without_credentials(address).rstrip("/") if address.startswith("http") else None


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without the credentials that an address in it may carry."""
    return next(iter(re.sub(r"//[^/@\s]+@", "//", str(error)).strip().splitlines()), type(error).__name__)


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turns MLflow's exceptions, and the disk's, into UserError; Outage when the server does not answer."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    try:
        yield
    except (MlflowException, RequestException) as error:
        first, where, status = first_line(error), f"MLflow ({without_credentials(uri)})", _http_status(error)
        if uri.startswith("http") and (status >= 500 or status == 429):
            again = "no result is lost, run the same command again when it is back"
            raise Outage(f"{where} stopped answering; {again} ({first[:300]})") from error
        if status == 401:
            remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to an account of this server"
            raise UserError(f"{where} does not know {account()!r} or its password; {remedy}") from error
        if status == 403:
            remedy = f"ask for the permission EDIT on {EXPERIMENT}"
            raise UserError(f"{where}: the account {account()!r} may not do this; {remedy}") from error
        raise UserError(f"{where}: {first}") from error
    except OSError as error:
        raise explain(error, Path(error.filename or FOLDER)) from error


@contextmanager
def locked(project: Path) -> Iterator[None]:
    """One process of this project at a time, to make the database or move aliases; freed when its holder dies."""
    path = Path(project).resolve() / FOLDER / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115 - held over the yield below
    except OSError as error:
        raise explain(error, path) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _http_status(error: BaseException) -> int:
    """What the server answered; 503 when there was no answer, 0 when it was no server's.

    MLflow's client wraps what requests raised in a type of its own; where it keeps nothing of it, as of a download that
    was cut off, its code says 500.
    """
    from mlflow.exceptions import MlflowException, RestException
    from requests.exceptions import RequestException

    for cause in causes(error):
        if isinstance(cause, RestException):
            return cause.get_http_status_code()
        if isinstance(cause, RequestException):
            return 503 if cause.response is None else cause.response.status_code
    return error.get_http_status_code() if isinstance(error, MlflowException) else 0
