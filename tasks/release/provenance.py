"""Where a result comes from: the git revision, DVC's record of the data and weights, the params. Keys are the
registry's tag names.

Reads files and asks git; writes nothing and never calls DVC.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import sha256_file
from data.yaml_files import read_yaml
from tasks.environment import TEACHERS

# What a version stands on, beside its data: their digests are in its lineage, and the gate compares them with dvc.lock.
SCORECARD_FILE = "reports/scorecard.json"
VALIDATE_FILE = "reports/validate.json"
CHECKPOINT_FOLDER = "checkpoints/absorbed"
DVC_PATHS = {
    "curated": "data/curated",
    "encoded": "data/encoded",
    "teachers": str(TEACHERS),
    "student": "checkpoints/student",
    "absorbed": CHECKPOINT_FOLDER,
}
GENERATED = ("reports/", "dvc.lock")  # written by the run itself: a difference there says nothing about the code
LOCK_FILES = ("requirements.lock", "uv.lock")


def git_state(project: Path) -> dict[str, Any]:
    """{"git.known", "git.sha", "git.dirty", "git.changed", "git.reason"}.

    Only a revision that contains the project counts: a folder that merely lies inside somebody's repository (its
    params.yaml is not tracked) is unknown.
    """

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(project), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    unknown: dict[str, Any] = {"git.known": False, "git.sha": None, "git.dirty": None, "git.changed": []}
    try:
        head = git("rev-parse", "--verify", "HEAD")
        tracked = git("ls-files", "--error-unmatch", "params.yaml")
        prefix = git("rev-parse", "--show-prefix").stdout.strip()
        status = git("status", "--porcelain=v1", "-z", "--untracked-files=no", "--", ".")
    except (OSError, subprocess.TimeoutExpired) as error:
        return {**unknown, "git.reason": f"git cannot be run: {error}"}
    for answer in (head, tracked, status):
        if answer.returncode != 0:
            return {**unknown, "git.reason": (answer.stderr.strip().splitlines() or ["git failed"])[0]}
    names, fields = [], iter(status.stdout.split("\0"))
    for field in fields:
        if field:
            names.append(field[3:].removeprefix(prefix))
            if field[0] in "RC":
                next(fields, None)  # the name before the rename
    changed = sorted(name for name in names if not name.startswith(GENERATED))
    known = {"git.known": True, "git.sha": head.stdout.strip(), "git.dirty": bool(changed)}
    return {**known, "git.changed": changed, "git.reason": ""}


def md5_of(path: Path) -> str | None:
    """A file's or folder's MD5 in DVC's sense (a folder's ends in ".dir"); None when there is nothing.

    DVC hashes a folder as the JSON list of its files, {"md5", "relpath"}, sorted by relative path (dvc-data's hashfile
    tree).
    """
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest()
    if not path.is_dir():
        return None
    files = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
    listing = [{"md5": md5_of(file), "relpath": name} for name, file in files]
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode()).hexdigest() + ".dir"


def _recorded(lock: Mapping[str, Any]) -> dict[str, str]:
    """Path -> the digest that dvc.lock holds for it, over all stages' deps and outs; several are joined."""
    digests: dict[str, set[str]] = {}
    for stage in (lock.get("stages") or {}).values():
        for item in [*(stage.get("deps") or []), *(stage.get("outs") or [])]:
            if item.get("md5"):
                digests.setdefault(str(item["path"]).rstrip("/"), set()).add(item["md5"])
    return {path: " / ".join(sorted(several)) for path, several in digests.items()}


def provenance(project: Path) -> dict[str, Any]:
    """Git state, `dvc.lock.sha256`, `dvc.NAME.md5`, `params.sha256`, `env.lock.sha256`, and `files`: path -> {"now",
    "recorded"} for what the verdict is about.

    A value is None where there is nothing to read. Where stages disagree on a path (one is out of date) their digests
    are joined: equal to none of them. Raises UserError for a damaged dvc.lock.
    """
    lock, params = project / "dvc.lock", project / "params.yaml"
    try:
        recorded = _recorded(read_yaml(lock)) if lock.is_file() else {}
    except UserError as error:
        raise UserError(f"{error}; restore it with git checkout dvc.lock, or delete it and run dvc repro") from error
    environment = next((project / name for name in LOCK_FILES if (project / name).is_file()), None)
    files = (SCORECARD_FILE, VALIDATE_FILE, CHECKPOINT_FOLDER)
    return {
        **git_state(project),
        "dvc.lock.sha256": sha256_file(lock) if lock.is_file() else None,
        **{f"dvc.{name}.md5": recorded.get(path) for name, path in DVC_PATHS.items()},
        "params.sha256": sha256_file(params) if params.is_file() else None,
        "env.lock.sha256": sha256_file(environment) if environment else None,
        "files": {path: {"now": md5_of(project / path), "recorded": recorded.get(path)} for path in files},
    }
