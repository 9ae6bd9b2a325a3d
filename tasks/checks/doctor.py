"""`python -m tasks doctor`: whether this machine and the servers that its settings name can do the job. A line for each
check; the first thing to run.

Nothing is changed but for probes: an object of no meaning beside the ledger and the published versions, which is
removed again, and a tag on MLflow's experiment, which is made where there is none.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from data.errors import UserError
from tasks import environment
from tasks.checks.lineage import stores
from tasks.environment import TEACHERS
from tasks.registry import server, tracking, versions
from tasks.release.provenance import git_state
from tasks.s3 import objects

OK, WARNING, FAILED = "ok", "warning", "FAILED"
LEAST_SPACE, LITTLE_SPACE = 1.0, 5.0  # GiB
# s; S3 refuses requests that are 15 minutes off, and the ledger's times should be true
LITTLE_SKEW, MOST_SKEW = 10.0, 120.0
SECONDS = 10.0  # for an answer
WINDOW = 2  # minor versions that client and server may be apart


@dataclass(frozen=True)
class Finding:
    """A line. `status`: "ok", "warning" (it works, but look at it) or "FAILED" (with what to do)."""

    status: str
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.status:8} {self.what:18} {self.text}"


def examine(project: Path) -> Iterator[Finding]:
    """Every check in turn, each finding as soon as it is known; also of what is not configured."""
    for check in CHECKS:
        try:
            yield from check(Path(project).resolve())
        except (UserError, OSError, ValueError) as error:
            yield Finding(FAILED, check.__name__.strip("_"), " ".join(str(error).split()))


def _packages(project: Path) -> Iterator[Finding]:
    status, remedy = (OK, "") if sys.version_info >= (3, 11) else (FAILED, ": 3.11 or newer is needed")
    yield Finding(status, "python", ".".join(map(str, sys.version_info[:3])) + remedy)
    lock = project / "requirements.lock"
    if not lock.is_file():
        yield Finding(WARNING, "packages", f"{lock.name} is not here: what is installed cannot be compared")
        return
    locked = dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", lock.read_text(encoding="utf-8"), re.MULTILINE))
    installed = {
        re.sub(r"[-_.]+", "-", package.metadata["Name"]).lower(): package.version.split("+")[0]
        for package in importlib.metadata.distributions()
    }
    others = [
        f"{name} {installed.get(name, 'missing')} (locked {version})"
        for name, version in locked.items()
        if installed.get(name) != version
    ]
    if others:
        shown = ", ".join(others[:3]) + (" ..." if len(others) > 3 else "")
        yield Finding(FAILED, "packages", f"{len(others)} differ from {lock.name}: {shown}; run make install")
    else:
        yield Finding(OK, "packages", f"{len(locked)} as locked")


def _gpus(project: Path) -> Iterator[Finding]:
    """As the driver's tool tells them: it needs neither torch nor a GPU that is free."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=SECONDS, check=False)
    except FileNotFoundError:
        yield Finding(OK, "gpu", "no GPU: the CPU is used")
        return
    except subprocess.TimeoutExpired:
        yield Finding(WARNING, "gpu", f"nvidia-smi does not answer within {SECONDS:.0f} s: look at the driver")
        return
    rows = [[part.strip() for part in line.split(",")] for line in answer.stdout.splitlines() if line.count(",") == 2]
    if answer.returncode or not rows:
        said = " ".join((answer.stderr or answer.stdout).split())
        yield Finding(WARNING, "gpu", f"no GPU: the CPU is used; nvidia-smi is here but lists none ({said[:200]})")
        return
    gpus = "; ".join(f"{name}, {memory}" for name, memory, _ in rows) + f"; driver {rows[0][2]}"
    if "+cpu" in importlib.metadata.version("torch"):
        yield Finding(WARNING, "gpu", f"{gpus}; not used: torch is built for the CPU alone, install its CUDA build")
    else:
        yield Finding(OK, "gpu", gpus)


def _code(project: Path) -> Iterator[Finding]:
    state = git_state(project)
    if not state["git.known"]:
        effect = "the gate refuses what is not versioned, unless gate.allow_unversioned"
        yield Finding(WARNING, "code", f"no git revision ({state['git.reason']}): {effect}")
        return
    sha, changed = state["git.sha"][:12], len(state["git.changed"])
    if state["git.dirty"]:
        yield Finding(WARNING, "code", f"{sha} with {changed} changed files: a run on it is not promoted")
    else:
        yield Finding(OK, "code", f"clean at {sha}")


def _space(project: Path) -> Iterator[Finding]:
    for what, folder in (("space, project", project), ("space, temporary", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free / 2**30
        status = FAILED if free < LEAST_SPACE else WARNING if free < LITTLE_SPACE else OK
        wanted = "" if status == OK else f"; {LITTLE_SPACE:g} are wanted"
        yield Finding(status, what, f"{free:.1f} GiB free in {folder}{wanted}")


def _rights(project: Path) -> Iterator[Finding]:
    refused = []
    for folder in (project / name for name in (".", "mlflow", "runs", "checkpoints", "reports", "data", ".dvc")):
        try:
            if folder.is_dir():
                tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-", suffix=".tmp").close()
        except OSError as error:
            refused.append(f"{folder} ({error.strerror})")
    if refused:
        yield Finding(FAILED, "rights", f"cannot write to {', '.join(refused)}")
    else:
        yield Finding(OK, "rights", "the project's folders can be written to")


def _data(project: Path) -> Iterator[Finding]:
    count = len(list((project / TEACHERS).glob("*/teacher.json")))
    if count:
        yield Finding(OK, "teachers", f"{count} in {TEACHERS}")
    else:
        yield Finding(WARNING, "teachers", f"none fetched yet: dvc pull {TEACHERS}")
    for name, store in stores(project).items():
        if not objects.is_s3(store) and not Path(store).is_dir():
            yield Finding(WARNING, f"dvc {name}", f"{store}: no such folder; nothing is kept there yet")


def _get(url: str, authorization: str | None = None, body: dict[str, Any] | None = None) -> tuple[int, bytes, str]:
    """(status, content, Date header) of an answer. Raises OSError when there is none."""
    headers = {"Authorization": authorization} if authorization else {}
    content = None
    if body is not None:
        headers["Content-Type"], content = "application/json", json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, content, headers), timeout=SECONDS) as answer:
            return answer.status, answer.read(), answer.headers.get("Date", "")
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers.get("Date", "")


def _basic(credentials: str) -> str:
    return "Basic " + base64.b64encode(credentials.encode()).decode()


def _clock(what: str, theirs: datetime) -> Finding:
    skew = abs((datetime.now(UTC) - theirs).total_seconds())
    status = FAILED if skew > MOST_SKEW else WARNING if skew > LITTLE_SKEW else OK
    remedy = "" if status == OK else "; let both machines follow a time server (NTP)"
    return Finding(status, f"clock, {what}", f"{skew:.0f} s apart{remedy}")


def _versions_of(package: str, where: str, theirs: str, more: str = "") -> Finding:
    """The version of the server beside that of its package here: a warning where they are too far apart."""
    ours = importlib.metadata.version(package)
    numbers = [[int(number) for number in re.findall(r"\d+", version)[:2]] for version in (ours, theirs)]
    (major, minor), other = numbers
    near = len(other) == 2 and other[0] == major and abs(other[1] - minor) <= WINDOW
    return Finding(OK if near else WARNING, package, f"{where}, server {theirs}, client {ours}{more}")


def _mlflow_login(uri: str) -> str | None:
    """What MLflow's client sends: the credentials of the settings, else those in the address."""
    address = urllib.parse.urlsplit(uri)
    name = os.environ.get("MLFLOW_TRACKING_USERNAME") or urllib.parse.unquote(address.username or "")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD") or urllib.parse.unquote(address.password or "")
    return _basic(f"{name}:{password}") if name and password else None


def _mlflow(project: Path) -> Iterator[Finding]:
    uri, store = server.tracking_uri(project), tracking.open_store(project)  # which also proves the credentials
    if not uri.startswith("http"):
        inside = " (inside the project; MLFLOW_TRACKING_URI is not set)" if store.is_local else ""
        yield Finding(OK, "mlflow", f"{store.uri}{inside}")
        return
    where, account = server.without_credentials(uri).rstrip("/"), server.account()
    status, content, date = _get(f"{where}/version", _mlflow_login(uri))  # with accounts, it answers to those it knows
    theirs = content.decode(errors="replace").strip() if status == 200 else f"unknown ({status})"
    yield _versions_of("mlflow", where, theirs, f", account {account}")
    if date:
        yield _clock("mlflow", parsedate_to_datetime(date).astimezone(UTC))
    status, _, _ = _get(f"{where}/api/2.0/mlflow/experiments/search", body={"max_results": 1})
    if status in (401, 403):
        yield Finding(OK, "mlflow, strangers", f"a request without an account is refused ({status})")
    else:
        loopback = urllib.parse.urlsplit(where).hostname in ("127.0.0.1", "localhost", "::1")
        wide = "anybody who reaches it may change everything: start it with --app-name basic-auth"
        text = f"a request without an account is answered ({status}); {wide}"
        yield Finding(WARNING if loopback else FAILED, "mlflow, strangers", text)
    versions.try_to_write(project)
    rights = f"the account {account} may write runs, and change {versions.MODEL} if it is there"
    yield Finding(OK, "mlflow, rights", rights)


def _ledger(project: Path) -> Iterator[Finding]:
    place, entries, differs = versions.ledger_state(project)
    head = f"{len(entries)} entries, champion {entries[-1].to_version or 'none'}" if entries else "no entries yet"
    yield Finding(OK, "ledger", f"{place}: {head}, chain verified")
    if differs:
        yield Finding(WARNING, "aliases", "they differ from the ledger; mend with python -m tasks reconcile")
    elif entries:
        yield Finding(OK, "aliases", "as the ledger says")
    if isinstance(place, Path) and server.tracking_uri(project).startswith("http"):
        effect = "decisions on other machines are not seen here"
        yield Finding(WARNING, "ledger", f"{environment.LEDGER} is not set: {effect}")


def _buckets(project: Path) -> Iterator[Finding]:
    variables = {"ledger": environment.LEDGER, "published": environment.PUBLISH}
    places = {what: environment.setting(variable) for what, variable in variables.items()}
    places |= {f"dvc {name}": store for name, store in stores(project).items() if objects.is_s3(store)}
    # Without these settings the machine works alone, and needs no store elsewhere.
    wanted = any(map(environment.setting, (*variables.values(), "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")))
    timed: set[str] = set()
    for what, uri in places.items():
        if uri is None:
            yield Finding(OK, what, f"not on S3 ({variables[what]} is not set)")
            continue
        try:
            bucket, _ = objects.split(uri)
            theirs = objects.server_time(uri)
            if bucket not in timed:
                timed.add(bucket)
                yield _clock(f"bucket {bucket}", theirs)
            yield _writes(what, uri, conditional=not what.startswith("dvc"))
        except objects.NotConfigured as error:
            alone = f"{uri}: not looked at, no S3 store is configured here; a run on this machine alone needs none"
            yield Finding(FAILED, what, str(error)) if wanted else Finding(OK, what, alone)
        except UserError as error:
            yield Finding(FAILED, what, " ".join(str(error).split()))


def _writes(what: str, uri: str, conditional: bool) -> Finding:
    """Writes, reads and removes a probe; the store must refuse to overwrite it where a condition fails."""
    probe = objects.join(uri, f".doctor-{uuid.uuid4().hex[:12]}")
    etag = objects.put_new(probe, b"1")
    try:
        faults = _taken(probe) if conditional else []
        if conditional and not faults:
            objects.replace(probe, b"3", etag)
        if not faults and objects.read(probe)[0] != (b"3" if conditional else b"1"):
            faults = ["reading what was written"]
        objects.list_objects(probe)
    finally:
        removed = True
        try:
            objects.delete(probe)
        except UserError:
            removed = False
    if faults:
        effect = "two decisions at once would both be taken: use another store"
        return Finding(FAILED, what, f"{uri}: the store does not keep to {' and '.join(faults)}; {effect}")
    stays = f"; it may not remove (the probe {probe.rpartition('/')[2]} stays), which suits an append-only ledger"
    kinds = "reads, writes, conditional writes" if conditional else "reads, writes"
    return Finding(OK, what, f"{uri}: {kinds}{'' if removed else stays}")


def _taken(probe: str) -> list[str]:
    """The conditions that the store ignored: that there is no object yet, and that it has a given ETag."""
    ignored = []
    writes = {
        "If-None-Match": lambda: objects.put_new(probe, b"2"),
        "If-Match": lambda: objects.replace(probe, b"2", '"' + "0" * 32 + '"'),
    }
    for condition, write in writes.items():
        with contextlib.suppress(objects.Changed):
            write()
            ignored.append(condition)
    return ignored


def _prefect(project: Path) -> Iterator[Finding]:
    uri = environment.setting("PREFECT_API_URL")
    if uri is None:
        yield Finding(OK, "prefect", "no server (PREFECT_API_URL is not set): flows run in their own process")
        return
    where = server.without_credentials(uri).rstrip("/")
    credentials = os.environ.get("PREFECT_API_AUTH_STRING", "")
    authorization = _basic(credentials) if credentials else None
    try:
        status, content, _ = _get(f"{where}/admin/version", authorization)
    except OSError as error:
        fault = f"no server answers ({getattr(error, 'reason', None) or error})"
        remedy = "start it (prefect server start), or unset PREFECT_API_URL"
        yield Finding(FAILED, "prefect", f"{where}: {fault}; {remedy}")
        return
    if status in (401, 403):
        yield Finding(FAILED, "prefect", f"{where}: refused ({status}); set PREFECT_API_AUTH_STRING")
        return
    yield _versions_of("prefect", where, content.decode(errors="replace").strip().strip('"'))
    status, content, _ = _get(f"{where}/work_pools/filter", authorization, {"limit": 50})
    pools = {pool["name"]: pool.get("status") or "?" for pool in json.loads(content)} if status == 200 else {}
    ready = "READY" in pools.values()
    remedy = "" if ready or not pools else "; no worker is ready: prefect worker start --pool local"
    shown = ", ".join(f"{name} {state}" for name, state in sorted(pools.items())) or "none yet"
    yield Finding(OK if ready else WARNING, "prefect, pools", f"{shown}{remedy}")


CHECKS = (_packages, _gpus, _code, _space, _rights, _data, _mlflow, _ledger, _buckets, _prefect)


def cli(argv: Sequence[str]) -> int:
    """Prints the findings; returns 1 when a check failed."""
    about = "Check this machine, the stores and the servers."
    argparse.ArgumentParser("python -m tasks doctor", description=about).parse_args(list(argv))
    failed = 0
    for finding in examine(Path.cwd()):
        print(finding, flush=True)
        failed += finding.status == FAILED
    print(f"{failed} failed" if failed else "nothing failed")
    return int(failed > 0)
