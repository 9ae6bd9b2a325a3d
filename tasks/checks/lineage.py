"""Where a registered version comes from, and whether all of it can still be had: `python -m tasks lineage
models:/danceopd@champion`.

From the version to its git revision, the digests of data, teachers and weights in DVC's cache and remotes, the params,
the environment's lock, the verdict and the decisions; and back: `python -m tasks lineage 6f1c0a94` lists the versions
that have a digest (or revision) in their lineage.

DVC's stores are read by their layout, `files/md5/AA/BBB...` with a folder as a JSON list named `....dir`, so that any
revision can be looked up, not only the one that is checked out. Object contents in the cache are hashed again; in an S3
remote their presence is what is verified.
"""

from __future__ import annotations

import argparse
import configparser
import hashlib
import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import Outage, UserError
from data.files import sha256_bytes
from tasks.registry import files, versions
from tasks.release.provenance import CHECKPOINT_FOLDER, DVC_PATHS, LOCK_FILES, md5_of
from tasks.running import workspace
from tasks.s3 import objects

SHORTEST = 7  # characters of a digest that are looked for
ALTERED = "altered"


@dataclass(frozen=True)
class Line:
    """One thing that a version comes from. `where`: where it was found; None when it is nowhere."""

    key: str
    value: str
    where: str | None

    def __str__(self) -> str:
        return f"{self.key:36} {self.value:64}  {self.where or 'MISSING'}"


def stores(project: Path) -> dict[str, str]:
    """The cache (as `cache`) and every remote in .dvc/config and .dvc/config.local by name -> folder or s3:// address;
    other kinds are left out.
    """
    found = {"cache": str(project / ".dvc" / "cache")}
    for name in ("config", "config.local"):
        parser = configparser.ConfigParser(interpolation=None)
        parser.read(project / ".dvc" / name, encoding="utf-8")
        for section in parser.sections():
            match = re.fullmatch(r"'?remote \"(.+)\"'?", section)
            url = parser.get(section, "url", fallback="").strip()
            if match and url:
                found[match[1]] = url if "://" in url else str((project / ".dvc" / url).resolve())
        cache = parser.get("cache", "dir", fallback="").strip()
        if cache:
            found["cache"] = str((project / ".dvc" / cache).resolve())
    return {name: url for name, url in found.items() if objects.is_s3(url) or "://" not in url}


class Contents:
    """What DVC's stores hold. Each S3 remote is listed once, by the first two characters of the digest."""

    def __init__(self, project: Path) -> None:
        self.stores = list(stores(project).values())
        self.listed: dict[str, set[str]] = {}

    def find(self, md5: str) -> str | None:
        """The store that holds the object; None when none does. A file in a folder is hashed again: `altered` says that
        it is not what its name says.
        """
        for store in self.stores:
            if objects.is_s3(store):
                prefix = objects.join(store, "files", "md5", md5[:2]) + "/"
                if prefix not in self.listed:
                    self.listed[prefix] = {one.uri for one in objects.list_objects(prefix)}
                if prefix + md5[2:] in self.listed[prefix]:
                    return store
            elif (path := Path(store) / "files" / "md5" / md5[:2] / md5[2:]).is_file():
                with open(path, "rb") as file:
                    same = hashlib.file_digest(file, "md5").hexdigest() == md5.removesuffix(".dir")
                return store if same else f"{store}: {ALTERED}"
        return None

    def read(self, md5: str) -> bytes | None:
        store = self.find(md5)
        if store is None or store.endswith(ALTERED):
            return None
        if objects.is_s3(store):
            return objects.read(objects.join(store, "files", "md5", md5[:2], md5[2:]))[0]
        return (Path(store) / "files" / "md5" / md5[:2] / md5[2:]).read_bytes()

    def whole(self, md5: str) -> str | None:
        """Where the object is, with every file of it if it is a folder; None as soon as one is missing or altered."""
        store = self.find(md5)
        if store is None or store.endswith(ALTERED):
            return None
        if not md5.endswith(".dir"):
            return store
        listing = self.listing(md5)
        places = {self.find(one) for one in listing.values()} | {store}
        if None in places or any(place.endswith(ALTERED) for place in places if place):
            return None
        return f"{', '.join(sorted(place for place in places if place))} ({len(listing)} files)"

    def listing(self, md5: str) -> dict[str, str]:
        """Relative path -> MD5 of a folder's files; empty when it cannot be read."""
        content = self.read(md5)
        try:
            return {str(one["relpath"]): str(one["md5"]) for one in json.loads(content)} if content is not None else {}
        except (ValueError, KeyError, TypeError):
            return {}


def _git(project: Path, *arguments: str) -> bytes | None:
    ended = subprocess.run(["git", "-C", str(project), *arguments], capture_output=True, check=False, timeout=60)
    return ended.stdout if ended.returncode == 0 else None


def _with_revision(project: Path, sha: str) -> Path | None:
    """The git folder that has the commit: the project's own, else the mirror of the workers' repository, brought up to
    date; None when neither has it.

    Raises Outage when that repository does not answer.
    """
    if _git(project, "cat-file", "-e", f"{sha}^{{commit}}") is not None:
        return project
    source = workspace.repository()
    try:
        return workspace.mirror() if source and workspace.resolve(source, sha) else None
    except Outage:
        raise
    except UserError:  # not there, or no longer on any branch
        return None


def _revision(folder: Path, sha: str) -> str:
    names = (
        (
            _git(
                folder,
                "for-each-ref",
                "--contains",
                sha,
                "--format=%(refname:short)",
                "refs/heads",
                "refs/tags",
                "refs/remotes",
            )
            or b""
        )
        .decode()
        .split()
    )
    return f"git, in {', '.join(names[:3])}" if names else "git, on no branch: it will be pruned"


def lineage(project: Path, reference: str) -> tuple[str, list[Line]]:
    """(version, lines) of a registered version. Raises UserError when there is no such version or a store cannot be
    read.
    """
    project = Path(project).resolve()
    known = versions.facts(project, reference)
    return str(known["version"]), list(_lines(project, known))


def _lines(project: Path, known: dict[str, Any]) -> Iterator[Line]:
    tags, contents = known["tags"], Contents(project)
    run = f"run {known['run_id']}"
    sha = tags.get("git.sha", "")
    folder = _with_revision(project, sha) if sha else None
    yield Line("git.sha", sha or "unversioned", _revision(folder, sha) if folder else None)
    if tags.get("git.dirty") == "true":
        yield Line("git.dirty", "true", None)
    for name in DVC_PATHS:
        md5 = tags.get(f"dvc.{name}.md5", "")
        at_hand = md5 if re.fullmatch(r"[0-9a-f]{32}(\.dir)?", md5) else ""
        yield Line(
            f"dvc.{name}.md5",
            md5 or "not recorded",
            contents.whole(at_hand) or _in_workspace(project, name, at_hand) if at_hand else None,
        )
    yield from _teachers(tags, contents)
    for key, name in (
        ("params.sha256", "params.yaml"),
        ("dvc.lock.sha256", "dvc.lock"),
        ("scorecard.json.sha256", "scorecard.json"),
        ("gate.verdict.sha256", "verdict.json"),
    ):
        value = tags.get(key, "")
        yield Line(key, value or "not recorded", run if value and known["artifacts"][name] == value else None)
    value = tags.get("env.lock.sha256", "")
    yield Line(
        "env.lock.sha256", value or "not recorded", _environment(folder, sha, value, "./" if folder == project else "")
    )
    weights = {key: value for key, value in tags.items() if key.startswith("weights.")}
    for key, value in sorted(weights.items()):
        name = key.removeprefix("weights.").removesuffix(".sha256")
        yield Line(key, value, None if any(fault.startswith(f"{name}:") for fault in known["weights"]) else run)
    if known["weights"] and not weights:
        yield Line("weights", "not recorded", None)
    for fault in known["weights"]:
        if not any(fault.startswith(f"{key.removeprefix('weights.').removesuffix('.sha256')}:") for key in weights):
            yield Line("weights", fault, None)
    for entry in known["entries"]:
        yield Line(
            f"ledger {entry['number']:06d}",
            f"{entry['action']} by {entry['actor']}: {entry['reason']}",
            f"{entry['time']} {entry['hash'][:12]}",
        )


def _in_workspace(project: Path, name: str, md5: str) -> str | None:
    """Not pushed and not cached, but lying where its stage left it."""
    return f"{DVC_PATHS[name]} (not cached)" if md5_of(project / DVC_PATHS[name]) == md5 else None


def _teachers(tags: dict[str, str], contents: Contents) -> Iterator[Line]:
    """Each teacher's weights, by their hash, in the folder that DVC keeps under dvc.teachers.md5: the record says which
    file, the listing that it is there.
    """
    listing = contents.listing(tags.get("dvc.teachers.md5", "")) if tags.get("dvc.teachers.md5") else {}
    for key, value in sorted(tags.items()):
        match = re.fullmatch(r"teacher\.(.+)\.sha256", key)
        if not match:
            continue
        place = None
        for path, md5 in listing.items():
            if path.startswith(f"{match[1]}/") and path.endswith(files.WEIGHTS):
                content = contents.read(md5)
                if content is not None and sha256_bytes(content) == value:
                    place = f"data/teachers/{path}"
        yield Line(key, value, place)


def _environment(folder: Path | None, sha: str, value: str, prefix: str) -> str | None:
    """The lock of the environment, as it was at that revision. `prefix`: of the project's paths in that git folder; in
    a bare one "./" means nothing.
    """
    if folder is None or not value:
        return None
    for name in LOCK_FILES:
        content = _git(folder, "show", f"{sha}:{prefix}{name}")
        if content is not None and sha256_bytes(content) == value:
            return f"{name} at {sha[:12]}"
    return None


def versions_with(project: Path, part: str) -> list[tuple[str, str, str]]:
    """(version, key, value) of every tag of a digest or revision that starts with `part`. Raises UserError when it is
    too short to mean anything.
    """
    if not re.fullmatch(rf"[0-9a-f]{{{SHORTEST},}}(\.dir)?", part):
        raise UserError(
            f"{part!r}: neither a version (models:/{versions.MODEL}@champion, 3) nor {SHORTEST} or more characters of a digest"
        )
    tags = versions.all_tags(project)
    return [
        (version, key, value)
        for version, known in tags.items()
        for key, value in sorted(known.items())
        if value.startswith(part)
    ]


def cli(argv: Sequence[str]) -> int:
    """Prints a version's lineage, or the versions that have a digest in theirs. Returns 1 when something is missing, or
    nothing was found.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tasks lineage",
        description="Where a version comes from, verified; or which versions come from a digest.",
    )
    parser.add_argument(
        "reference",
        help=f"models:/{versions.MODEL}@{versions.CHAMPION}, models:/{versions.MODEL}/3, 3, or a digest or git revision",
    )
    reference, project = parser.parse_args(list(argv)).reference, Path.cwd()
    if re.fullmatch(rf"[0-9a-f]{{{SHORTEST},}}(\.dir)?", reference):
        found = versions_with(project, reference)
        for version, key, value in found:
            print(f"models:/{versions.MODEL}/{version}  {key} = {value}")
        if not found:
            print(f"no version has {reference} in its lineage")
        return int(not found)
    version, lines = lineage(project, reference)
    print(f"models:/{versions.MODEL}/{version}")
    for line in lines:
        print(line)
    missing = [line.key for line in lines if line.where is None]
    print(
        f"missing: {', '.join(missing)}"
        if missing
        else f"all {len(lines)} are there; the checkpoint is DVC's {CHECKPOINT_FOLDER} at that revision"
    )
    return int(bool(missing))
