"""`python -m tasks doctor`: whether this machine and the servers that its settings name can do the job. One line for
each check; the first thing to run.

Nothing is changed but for probes: an object of no meaning beside the ledger and the published versions, which is
removed again, and a tag on MLflow's experiment, which is made where there is none.
"""

from __future__ import annotations

import argparse
import base64
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from data.errors import UserError
from tasks import environment
from tasks.checks.lineage import stores
from tasks.registry import server, tracking, versions
from tasks.release.provenance import git_state
from tasks.s3 import objects

OK, WARNING, FAILED = "ok", "warning", "FAILED"
LEAST_SPACE, LITTLE_SPACE = 1.0, 5.0  # GiB
LITTLE_SKEW, MOST_SKEW = (
    10.0,
    120.0,
)  # s; S3 refuses requests that are 15 minutes off, and the ledger's times should be true
SECONDS = 10.0  # for one answer
WINDOW = 2  # minor versions that client and server may be apart


@dataclass(frozen=True)
class Finding:
    """One line. `status`: "ok", "warning" (it works, but look at it) or "FAILED" (with what to do)."""

    status: str
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.status:8} {self.what:18} {self.text}"


def examine(project: Path) -> Iterator[Finding]:
    """Every check in turn, each finding as soon as it is known. What is not configured is said to be so."""
    checks: list[Callable[[Path], Iterator[Finding]]] = [
        _packages,
        _gpus,
        _code,
        _space,
        _rights,
        _data,
        _mlflow,
        _ledger,
        _buckets,
        _prefect,
    ]
    for check in checks:
        try:
            yield from check(Path(project).resolve())
        except (UserError, OSError, ValueError) as error:
            yield Finding(FAILED, check.__name__.strip("_"), " ".join(str(error).split()))


def _packages(project: Path) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding(
        OK if sys.version_info >= (3, 11) else FAILED,
        "python",
        version if sys.version_info >= (3, 11) else f"{version}: 3.11 or newer is needed",
    )
    lock = project / "requirements.lock"
    if not lock.is_file():
        yield Finding(WARNING, "packages", f"{lock.name} is not here: what is installed cannot be compared")
        return
    wanted = dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", lock.read_text(encoding="utf-8"), re.MULTILINE))
    installed = {
        re.sub(r"[-_.]+", "-", one.metadata["Name"]).lower(): one.version.split("+")[0]
        for one in importlib.metadata.distributions()
    }
    other = [
        f"{name} {installed.get(name, 'missing')} (locked {version})"
        for name, version in wanted.items()
        if installed.get(name) != version
    ]
    if other:
        yield Finding(
            FAILED,
            "packages",
            f"{len(other)} differ from {lock.name}: {', '.join(other[:3])}{' ...' if len(other) > 3 else ''}; run make install",
        )
    else:
        yield Finding(OK, "packages", f"{len(wanted)} as locked")


def _gpus(project: Path) -> Iterator[Finding]:
    """As the driver's own tool tells them: it needs neither torch nor a GPU that is free."""
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
    told = "; ".join(f"{name}, {memory}" for name, memory, _ in rows) + f"; driver {rows[0][2]}"
    if "+cpu" in importlib.metadata.version("torch"):
        yield Finding(WARNING, "gpu", f"{told}; not used: torch is built for the CPU alone, install its CUDA build")
    else:
        yield Finding(OK, "gpu", told)


def _code(project: Path) -> Iterator[Finding]:
    state = git_state(project)
    if not state["git.known"]:
        yield Finding(
            WARNING,
            "code",
            f"no git revision ({state['git.reason']}): the gate refuses what is not versioned, unless gate.allow_unversioned",
        )
    elif state["git.dirty"]:
        yield Finding(
            WARNING,
            "code",
            f"{state['git.sha'][:12]} with {len(state['git.changed'])} changed files: a run on it is not promoted",
        )
    else:
        yield Finding(OK, "code", f"clean at {state['git.sha'][:12]}")


def _space(project: Path) -> Iterator[Finding]:
    for what, folder in (("space, project", project), ("space, temporary", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free / 2**30
        status = FAILED if free < LEAST_SPACE else WARNING if free < LITTLE_SPACE else OK
        yield Finding(
            status,
            what,
            f"{free:.1f} GiB free in {folder}" + ("" if status == OK else f"; {LITTLE_SPACE:g} are wanted"),
        )


def _rights(project: Path) -> Iterator[Finding]:
    refused = []
    for name in (".", "mlflow", "runs", "checkpoints", "reports", "data", ".dvc"):
        folder = project / name
        if folder.is_dir():
            try:
                with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-", suffix=".tmp"):
                    pass
            except OSError as error:
                refused.append(f"{folder} ({error.strerror})")
    yield (
        Finding(FAILED, "rights", f"cannot write to {', '.join(refused)}")
        if refused
        else Finding(OK, "rights", "the project's folders can be written to")
    )


def _data(project: Path) -> Iterator[Finding]:
    teachers = project / "data" / "teachers"
    if any(teachers.glob("*/teacher.json")):
        yield Finding(
            OK, "teachers", f"{len(list(teachers.glob('*/teacher.json')))} in {teachers.relative_to(project)}"
        )
    else:
        yield Finding(WARNING, "teachers", "none fetched yet: dvc pull data/teachers")
    for name, store in stores(project).items():
        if not objects.is_s3(store) and not Path(store).is_dir():
            yield Finding(WARNING, f"dvc {name}", f"{store}: no such folder; nothing is kept there yet")


def _get(url: str, authorization: str | None = None, body: dict[str, Any] | None = None) -> tuple[int, bytes, str]:
    """(status, content, Date header) of an answer. Raises OSError when there is none."""
    headers = {"Authorization": authorization} if authorization else {}
    content = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(
        url, data=content, headers={**headers, **({"Content-Type": "application/json"} if content else {})}
    )
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return answer.status, answer.read(), answer.headers.get("Date", "")
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers.get("Date", "")


def _basic(credentials: str) -> str:
    return "Basic " + base64.b64encode(credentials.encode()).decode()


def _clock(what: str, theirs: datetime) -> Finding:
    skew = abs((datetime.now(UTC) - theirs).total_seconds())
    status = FAILED if skew > MOST_SKEW else WARNING if skew > LITTLE_SKEW else OK
    return Finding(
        status,
        f"clock, {what}",
        f"{skew:.0f} s apart" + ("" if status == OK else "; let both machines follow a time server (NTP)"),
    )


def _apart(ours: str, theirs: str) -> bool:
    numbers = [[int(part) for part in re.findall(r"\d+", version)[:2]] for version in (ours, theirs)]
    return (
        len(numbers[0]) < 2
        or len(numbers[1]) < 2
        or numbers[0][0] != numbers[1][0]
        or abs(numbers[0][1] - numbers[1][1]) > WINDOW
    )


def _mlflow_login(uri: str) -> str | None:
    """What MLflow's own client sends: the credentials of the settings, else those in the address."""
    parts = urllib.parse.urlsplit(uri)
    name = os.environ.get("MLFLOW_TRACKING_USERNAME") or urllib.parse.unquote(parts.username or "")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD") or urllib.parse.unquote(parts.password or "")
    return _basic(f"{name}:{password}") if name and password else None


def _mlflow(project: Path) -> Iterator[Finding]:
    uri = server.tracking_uri(project)
    if not uri.startswith("http"):
        store = tracking.open_store(project)
        yield Finding(
            OK,
            "mlflow",
            f"{store.uri} (inside the project; MLFLOW_TRACKING_URI is not set)" if store.is_local else store.uri,
        )
        return
    where = server.without_credentials(uri).rstrip("/")
    store = tracking.open_store(project)  # also proves the credentials
    status, content, date = _get(f"{where}/version", _mlflow_login(uri))  # with accounts, it answers to those it knows
    theirs, ours = (
        content.decode(errors="replace").strip() if status == 200 else f"unknown ({status})",
        importlib.metadata.version("mlflow"),
    )
    yield Finding(
        WARNING if _apart(ours, theirs) else OK,
        "mlflow",
        f"{where}, server {theirs}, client {ours}, account {server.account()}",
    )
    if date:
        yield _clock("mlflow", parsedate_to_datetime(date).astimezone(UTC))
    anonymous, _, _ = _get(f"{where}/api/2.0/mlflow/experiments/search", body={"max_results": 1})
    if anonymous in (401, 403):
        yield Finding(OK, "mlflow, strangers", f"a request without an account is refused ({anonymous})")
    else:
        loopback = urllib.parse.urlsplit(where).hostname in ("127.0.0.1", "localhost", "::1")
        wide = "anybody who reaches it may change everything: start it with --app-name basic-auth"
        yield Finding(
            WARNING if loopback else FAILED,
            "mlflow, strangers",
            f"a request without an account is answered ({anonymous}); {wide}",
        )
    versions.try_to_write(project)
    yield Finding(
        OK,
        "mlflow, rights",
        f"the account {server.account()} may write runs, and change {versions.MODEL} if it is there",
    )


def _ledger(project: Path) -> Iterator[Finding]:
    place, entries, differs = versions.ledger_state(project)
    head = f"{len(entries)} entries, champion {entries[-1].to_version or 'none'}" if entries else "no entries yet"
    yield Finding(OK, "ledger", f"{place}: {head}, chain verified")
    if differs:
        yield Finding(WARNING, "aliases", "they differ from the ledger; mend with python -m tasks reconcile")
    elif entries:
        yield Finding(OK, "aliases", "as the ledger says")
    if isinstance(place, Path) and server.tracking_uri(project).startswith("http"):
        yield Finding(
            WARNING, "ledger", f"{environment.LEDGER} is not set: decisions on other machines are not seen here"
        )


def _buckets(project: Path) -> Iterator[Finding]:
    places = {
        "ledger": environment.setting(environment.LEDGER),
        "published": environment.setting(environment.PUBLISH),
        **{f"dvc {name}": store for name, store in stores(project).items() if objects.is_s3(store)},
    }
    ours = (environment.LEDGER, environment.PUBLISH, "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
    wanted = any(map(environment.setting, ours))  # without them this machine works alone, and needs no store elsewhere
    told: set[str] = set()
    for what, uri in places.items():
        if uri is None:
            variable = {"ledger": environment.LEDGER, "published": environment.PUBLISH}[what]
            yield Finding(OK, what, f"not on S3 ({variable} is not set)")
            continue
        try:
            bucket, _ = objects.split(uri)
            theirs = objects.server_time(uri)
            if bucket not in told:
                told.add(bucket)
                yield _clock(f"bucket {bucket}", theirs)
            yield _writes(what, uri, conditional=not what.startswith("dvc"))
        except objects.NotConfigured as error:
            alone = f"{uri}: not looked at, no S3 store is configured here; a run on this machine alone needs none"
            yield Finding(FAILED, what, str(error)) if wanted else Finding(OK, what, alone)
        except UserError as error:
            yield Finding(FAILED, what, " ".join(str(error).split()))


def _writes(what: str, uri: str, conditional: bool) -> Finding:
    """Writes, reads and removes a probe; the store must refuse to write over it, and to write on a state that has
    passed.
    """
    probe = objects.join(uri, f".doctor-{uuid.uuid4().hex[:12]}")
    first = objects.put_new(probe, b"1")
    faults = []
    try:
        if conditional:
            for condition, write in (
                ("If-None-Match", lambda: objects.put_new(probe, b"2")),
                ("If-Match", lambda: objects.replace(probe, b"2", '"' + "0" * 32 + '"')),
            ):
                try:
                    write()
                    faults.append(condition)
                except objects.Changed:
                    pass
            if not faults:
                objects.replace(probe, b"3", first)
        if not faults and objects.read(probe)[0] != (b"3" if conditional else b"1"):
            faults.append("reading what was written")
        objects.list_objects(probe)
    finally:
        removed = _removed(probe)
    if faults:
        return Finding(
            FAILED,
            what,
            f"{uri}: the store does not keep to {' and '.join(faults)}; two decisions at once would both be taken: use another store",
        )
    kept = (
        ""
        if removed
        else f"; it may not remove (the probe {probe.rpartition('/')[2]} stays), which suits an append-only ledger"
    )
    return Finding(OK, what, f"{uri}: reads, writes{', conditional writes' if conditional else ''}{kept}")


def _removed(uri: str) -> bool:
    try:
        objects.delete(uri)
    except UserError:
        return False
    return True


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
        reason = getattr(error, "reason", None) or error
        yield Finding(
            FAILED,
            "prefect",
            f"{where}: no server answers ({reason}); start it (prefect server start), or unset PREFECT_API_URL",
        )
        return
    if status in (401, 403):
        yield Finding(FAILED, "prefect", f"{where}: refused ({status}); set PREFECT_API_AUTH_STRING")
        return
    theirs, ours = content.decode(errors="replace").strip().strip('"'), importlib.metadata.version("prefect")
    yield Finding(WARNING if _apart(ours, theirs) else OK, "prefect", f"{where}, server {theirs}, client {ours}")
    status, content, _ = _get(f"{where}/work_pools/filter", authorization, {"limit": 50})
    pools = {one["name"]: one.get("status") or "?" for one in json.loads(content)} if status == 200 else {}
    shown = ", ".join(f"{name} {state}" for name, state in sorted(pools.items()))
    ready = any(state == "READY" for state in pools.values())
    yield Finding(
        OK if ready else WARNING,
        "prefect, pools",
        shown + ("" if ready else "; no worker is ready: prefect worker start --pool local") if shown else "none yet",
    )


def cli(argv: Sequence[str]) -> int:
    """Prints the findings; returns 1 when one of them failed."""
    argparse.ArgumentParser(
        prog="python -m tasks doctor", description="Check this machine, the stores and the servers."
    ).parse_args(list(argv))
    failed = 0
    for finding in examine(Path.cwd()):
        print(finding, flush=True)
        failed += finding.status == FAILED
    print(f"{failed} failed" if failed else "nothing failed")
    return int(failed > 0)
