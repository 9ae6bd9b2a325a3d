"""Where a run works: this folder on a laptop; on a worker a fresh git checkout of a revision, with DVC's cache and
remote behind it.

A worker's run changes nothing but its own branch `runs/NAME`: the params it ran with are committed before anything
runs, dvc.lock and the reports afterwards, and both are pushed. So the registered version names a commit that everybody
can check out, where `dvc pull` restores every file of the run.

    DANCEOPD_REPOSITORY   the git repository (address or path) that workers clone; unset: runs work in this folder
    DANCEOPD_WORKSPACES   where checkouts and the DVC cache they share lie (default: runs/workspaces)
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data.errors import Outage, UserError
from data.files import atomic_folder, digest, sha256_file, write_text
from data.yaml_files import set_values
from tasks.environment import PROJECT, setting
from tasks.params.presets import preset_text
from tasks.params.reading import PARAMS_FILE
from tasks.release.provenance import LOCK_FILES, git_state
from tasks.running.repro import Listener, dvc, require_success

REPOSITORY, WORKSPACES = "DANCEOPD_REPOSITORY", "DANCEOPD_WORKSPACES"
DEFAULT_REVISION = "HEAD"  # of the repository: its main branch
REMOTE = "s3"  # in .dvc/config
BRANCHES = "runs/"
FATAL = 128  # git's exit status when it gives up: of a fetch or push, because the repository does not answer
# what a run leaves for git; everything else is DVC's or MLflow's
RECORDS = ("dvc.lock", "reports/scorecard.json", "reports/validate.json", "reports/metrics")
IDENTITY = ("-c", "user.name=danceopd", "-c", "user.email=danceopd@localhost")


@dataclass(frozen=True)
class Workspace:
    """A folder to run in. `branch` and `sha` (the commit with the run's params) are None for this folder itself."""

    path: Path
    branch: str | None
    sha: str | None

    @property
    def is_checkout(self) -> bool:
        return self.branch is not None


def repository() -> str | None:
    return setting(REPOSITORY)


def root() -> Path:
    return Path(setting(WORKSPACES) or PROJECT / "runs" / "workspaces").resolve()


def mirror() -> Path:
    """The bare copy of the repository that revisions are looked up in and checked out from."""
    return root() / "mirror.git"


def open_workspace(
    revision: str | None, preset: str | None, overrides: Mapping[str, Any], name: str, line: Listener
) -> Workspace:
    """Makes the folder ready and puts preset and overrides (dotted key -> value) in force.

    The same revision, preset and overrides lead to the same folder until the run is finished there, so that a run which
    was cut off is taken up where it stopped. Raises UserError for an unknown revision, preset or key, or a revision
    made for another environment; Outage when git or S3 do not answer.
    """
    source = repository()
    if source is None:
        if revision is not None:
            remedy = f"set {REPOSITORY} to run revisions of a repository"
            raise UserError(f"revision = {revision!r}: this worker runs in its own folder; {remedy}")
        put_params(PROJECT, preset, overrides)
        return Workspace(PROJECT, None, None)
    branch = BRANCHES + re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")
    sha = resolve(source, revision or DEFAULT_REVISION)
    folder = root() / f"{sha[:12]}-{digest({'preset': preset, 'overrides': dict(overrides)})[:8]}"
    _hold(folder)
    if not (folder / ".git").exists():
        with atomic_folder(folder) as fresh:
            _git(fresh, "init", "--quiet")
            _git(fresh, "fetch", "--quiet", str(mirror()), sha)
            _git(fresh, "checkout", "--quiet", "-B", branch, sha)
            _git(fresh, "remote", "add", "origin", source)
            put_params(fresh, preset, overrides)
            _commit(fresh, f"Params of {branch}", (PARAMS_FILE,))
    elif changed := git_state(folder)["git.changed"]:  # half of a run that was killed; never somebody's work
        _git(folder, "checkout", "--quiet", "HEAD", "--", *changed)
    _git(folder, "branch", "--force", "--move", branch)
    _require_environment(folder)
    # The cache is shared by all checkouts of this machine: what a run made, the next does not fetch.
    config = f"[core]\n    remote = {REMOTE}\n[cache]\n    dir = {root() / 'cache'}\n"
    write_text(folder / ".dvc" / "config.local", config)
    # What the remote has of dvc.lock's files, with its record of earlier runs; the run makes what it has not.
    require_success("dvc pull", dvc(folder, line, "fetch"))
    return Workspace(folder, branch, _git(folder, "rev-parse", "HEAD"))


_held: dict[Path, IO[str]] = {}  # folder -> its open lock file, which the kernel frees however this process ends


def _hold(folder: Path) -> None:
    """Lets a folder have a single run. Raises Outage while another process has it."""
    if folder in _held:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = open(folder.with_name(f".{folder.name}.lock"), "w")  # noqa: SIM115 - held until the run's process ends
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise Outage(f"{folder}: a run of the same revision and params is at work there; wait until it ends") from error
    _held[folder] = file


def resolve(source: str, revision: str) -> str:
    """The full commit of a branch, tag or commit, from an updated mirror. Raises UserError for unknown ones."""
    copy = mirror()
    copy.parent.mkdir(parents=True, exist_ok=True)
    with open(root() / ".mirror.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not copy.exists():
            with atomic_folder(copy) as fresh:
                _git(fresh, "init", "--quiet", "--bare")
        _git(copy, "fetch", "--quiet", "--prune", "--tags", source, "+HEAD:refs/run/HEAD", "+refs/heads/*:refs/heads/*")
    wanted = "refs/run/HEAD" if revision == DEFAULT_REVISION else revision
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", wanted) or ".." in wanted:
        raise UserError(f"revision = {revision!r}: expected a branch, a tag or a commit")
    try:
        sha = _git(copy, "rev-parse", "--verify", "--quiet", f"{wanted}^{{commit}}")
    except UserError:
        sha = ""
    if not sha or not _git(copy, "for-each-ref", "--contains", sha, "--count=1", "--format=%(refname)"):
        raise UserError(f"revision = {revision!r}: not in the repository; push it first, unknown code is not run")
    return sha


def put_params(project: Path, preset: str | None, overrides: Mapping[str, Any]) -> None:
    """Puts a preset's file, then values by dotted key, into params.yaml. Raises UserErrors for unknown ones."""
    path = project / PARAMS_FILE
    if preset is not None:
        write_text(path, preset_text(preset, project))
    if overrides:
        set_values(path, overrides)


def _require_environment(folder: Path) -> None:
    """A revision is run with the packages that it names, or not at all."""
    for name in LOCK_FILES:
        here, there = PROJECT / name, folder / name
        if here.is_file() and not (there.is_file() and sha256_file(here) == sha256_file(there)):
            remedy = "build the worker's image from that revision"
            raise UserError(f"{name} of the revision is not the one that this worker was built from; {remedy}")


def push(work: Workspace, line: Listener) -> dict[str, str]:
    """Data and checkpoints to the DVC remote, then dvc.lock and the reports to the branch: a commit is never pushed
    before the data it names.

    Returns {"branch", "git.sha", "repository"}; empty where the run works in this folder. Raises Outage when S3 or
    git do not answer.
    """
    if not work.is_checkout:
        return {}
    require_success("dvc push", dvc(work.path, line, "push"))
    _commit(work.path, f"Results of {work.branch}", tuple(name for name in RECORDS if (work.path / name).exists()))
    _git(work.path, "push", "--quiet", "--force", "origin", f"HEAD:refs/heads/{work.branch}")
    return {
        "branch": str(work.branch),
        "git.sha": _git(work.path, "rev-parse", "HEAD"),
        "repository": _without_credentials(str(repository())),
    }


def close(work: Workspace) -> None:
    """Removes a finished checkout: all of it is in git, S3 and MLflow. The shared cache stays."""
    if work.is_checkout:
        shutil.rmtree(work.path)
        work.path.with_name(f".{work.path.name}.lock").unlink(missing_ok=True)
        _held.pop(work.path).close()


def _commit(folder: Path, message: str, names: tuple[str, ...]) -> None:
    """Commits these files if they changed."""
    _git(folder, "add", "--force", "--", *names)
    if _git(folder, "status", "--porcelain", "--untracked-files=no"):
        _git(folder, *IDENTITY, "commit", "--quiet", "--no-verify", "-m", message)


def _git(folder: Path, *arguments: str) -> str:
    """git's output. Raises Outage when the other side does not answer, UserError otherwise; without credentials."""
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    command = ["git", "-C", str(folder), *arguments]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800, env=environment)
    except subprocess.TimeoutExpired as error:
        raise Outage(f"git {arguments[0]}: no answer in half an hour") from error
    if ended.returncode == 0:
        return ended.stdout.strip()
    said = _without_credentials((ended.stderr or ended.stdout).strip()[-500:])
    if ended.returncode == FATAL and arguments[0] in ("fetch", "push"):
        raise Outage(f"git {arguments[0]}: the repository does not answer ({said})")
    if (lock := folder / ".git" / "index.lock").exists():
        raise Outage(f"git {arguments[0]}: another run is at work in {folder}; if none is, remove {lock}")
    raise UserError(f"git {arguments[0]} failed in {folder}: {said}")


def _without_credentials(text: str) -> str:
    return re.sub(r"(https?://)[^/@\s]+@", r"\1", text)
