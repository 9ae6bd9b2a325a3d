"""Where a registered version comes from, and whether all of it still exists.

`python -m tasks lineage models:/danceopd@champion` looks up its git revision, the digests of data, teachers and weights
in DVC's cache and remotes, the params, the environment's lock, the verdict and the decisions. The way back, `python -m
tasks lineage 6f1c0a94`, lists the versions that have a digest (or revision) in their lineage.

DVC's stores are read by their layout, `files/md5/AA/BBB...` with a folder as a JSON list named `....dir`, so that any
revision can be looked up, not only the one that is checked out. Object contents in the cache are hashed again; in an S3
remote their presence is what is verified.
"""

from __future__ import annotations

import argparse
import configparser
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.errors import Outage, UserError, UserErrors
from data.files import sha256_bytes, sha256_file
from tasks.registry import files, tracking, versions
from tasks.registry.ledger import Entry
from tasks.registry.server import Store
from tasks.release.provenance import CHECKPOINT_FOLDER, DVC_PATHS, LOCK_FILES, md5_of
from tasks.running import workspace
from tasks.s3 import objects

SHORTEST = 7  # characters of a digest that are looked for
DIGEST = re.compile(rf"[0-9a-f]{{{SHORTEST},}}(\.dir)?")
ALTERED = "altered"
ARTIFACTS = {  # tag -> file of the version's run
    "params.sha256": "params.yaml",
    "dvc.lock.sha256": "dvc.lock",
    "scorecard.json.sha256": "scorecard.json",
    "gate.verdict.sha256": "verdict.json",
}


@dataclass(frozen=True)
class Line:
    """One thing that a version comes from. `where`: the place that has it; None when it is nowhere."""

    key: str
    value: str
    where: str | None

    def __str__(self) -> str:
        return f"{self.key:36} {self.value:64}  {self.where or 'MISSING'}"


def stores(project: Path) -> dict[str, str]:
    """`cache`, and each remote in .dvc/config and .dvc/config.local by name -> folder or s3:// address; no others."""
    urls = {"cache": str(project / ".dvc" / "cache")}
    for name in ("config", "config.local"):
        parser = configparser.ConfigParser(interpolation=None)
        parser.read(project / ".dvc" / name, encoding="utf-8")
        for section in parser.sections():
            remote = re.fullmatch(r"'?remote \"(.+)\"'?", section)
            url = parser.get(section, "url" if remote else "dir", fallback="").strip()
            if url and (remote or section == "cache"):
                place = url if "://" in url else str((project / ".dvc" / url).resolve())
                urls[remote[1] if remote else "cache"] = place
    return {name: url for name, url in urls.items() if objects.is_s3(url) or "://" not in url}


class Contents:
    """What DVC's stores hold. Each S3 remote is listed once, by the first two characters of the digest."""

    def __init__(self, project: Path) -> None:
        self.stores = list(stores(project).values())
        self.listed: dict[str, set[str]] = {}

    def find(self, md5: str) -> str | None:
        """The store that has the object, or None; with `altered` when a file's content is not what its name says."""
        for store in self.stores:
            if objects.is_s3(store):
                prefix = objects.join(store, "files", "md5", md5[:2]) + "/"
                if prefix not in self.listed:
                    self.listed[prefix] = {item.uri for item in objects.list_objects(prefix)}
                if prefix + md5[2:] in self.listed[prefix]:
                    return store
            elif (path := _object(store, md5)).is_file():
                return store if md5_of(path) == md5.removesuffix(".dir") else f"{store}: {ALTERED}"
        return None

    def read(self, md5: str) -> bytes | None:
        store = self.find(md5)
        if store is None or store.endswith(ALTERED):
            return None
        if objects.is_s3(store):
            return objects.read(objects.join(store, "files", "md5", md5[:2], md5[2:]))[0]
        return _object(store, md5).read_bytes()

    def whole(self, md5: str) -> str | None:
        """Where the object is, with every file of it if it is a folder; None as soon as one is missing or altered."""
        listing = self.listing(md5) if md5.endswith(".dir") else {}
        places = {self.find(part) for part in (md5, *listing.values())}
        known = sorted(place for place in places if place and not place.endswith(ALTERED))
        if len(known) < len(places):
            return None
        return f"{', '.join(known)} ({len(listing)} files)" if md5.endswith(".dir") else known[0]

    def listing(self, md5: str) -> dict[str, str]:
        """Relative path -> MD5 of a folder's files; empty when it cannot be read."""
        try:
            return {str(file["relpath"]): str(file["md5"]) for file in json.loads(self.read(md5) or b"[]")}
        except (ValueError, KeyError, TypeError):
            return {}


def _object(store: str, md5: str) -> Path:
    return Path(store) / "files" / "md5" / md5[:2] / md5[2:]


def _git(folder: Path, *arguments: str) -> bytes | None:
    ended = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=False, timeout=60)
    return ended.stdout if ended.returncode == 0 else None


def _with_revision(project: Path, sha: str) -> Path | None:
    """The git folder that has the commit: the project's, else the mirror of the workers' repository, brought up to
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
    places = ("refs/heads", "refs/tags", "refs/remotes")
    names = (_git(folder, "for-each-ref", "--contains", sha, "--format=%(refname:short)", *places) or b"").decode()
    return f"git, in {', '.join(names.split()[:3])}" if names.split() else "git, on no branch: it will be pruned"


def lineage(project: Path, reference: str) -> tuple[str, list[Line]]:
    """(version, lines); champion and previous are the ledger's. Raises UserError when there is no such version or a
    store cannot be read."""
    with versions.opened(project) as store, tempfile.TemporaryDirectory() as temporary:
        entries = versions.read_ledger(store)
        version = versions.resolve(store, reference, entries)
        decisions = [entry for entry in entries if entry.version == version.number]
        return version.number, list(_lines(store, version, decisions, Path(temporary)))


def _lines(store: Store, version: versions.Version, decisions: list[Entry], folder: Path) -> Iterator[Line]:
    project, tags, run = store.project, version.tags, f"run {version.run_id}"
    contents = Contents(project)
    sha = tags.get("git.sha", "")
    repository = _with_revision(project, sha) if sha else None
    yield Line("git.sha", sha or "unversioned", _revision(repository, sha) if repository else None)
    if tags.get("git.dirty") == "true":
        yield Line("git.dirty", "true", None)
    for name, path in DVC_PATHS.items():
        md5, where = tags.get(f"dvc.{name}.md5", ""), None
        if re.fullmatch(r"[0-9a-f]{32}(\.dir)?", md5):
            # or not pushed and not cached, but lying where its stage left it
            where = contents.whole(md5) or (f"{path} (not cached)" if md5_of(project / path) == md5 else None)
        yield Line(f"dvc.{name}.md5", md5 or "not recorded", where)
    yield from _teachers(tags, contents)
    for key, name in ARTIFACTS.items():
        value = tags.get(key, "")
        try:
            kept = sha256_file(tracking.artifact(store, version.run_id, name, folder))
        except UserError:  # the run has none
            kept = None
        yield Line(key, value or "not recorded", run if value and kept == value else None)
    value = tags.get("env.lock.sha256", "")
    place = _environment(repository, sha, value, "./" if repository == project else "")
    yield Line("env.lock.sha256", value or "not recorded", place)
    yield from _weights(store, version, folder)
    for entry in decisions:
        what = f"{entry.action} by {entry.actor}: {entry.reason}"
        yield Line(f"ledger {entry.number:06d}", what, f"{entry.time} {entry.hash[:12]}")


def _teachers(tags: Mapping[str, str], contents: Contents) -> Iterator[Line]:
    """Weights by their hash: the tag says which file, dvc.teachers.md5's listing that it is there."""
    listing = contents.listing(tags["dvc.teachers.md5"]) if tags.get("dvc.teachers.md5") else {}
    for name, value in sorted(files.hashes_of("teacher", tags).items()):
        place = None
        for path, md5 in listing.items():
            if path.startswith(f"{name}/") and path.endswith(files.WEIGHTS):
                content = contents.read(md5)
                if content is not None and sha256_bytes(content) == value:
                    place = f"{DVC_PATHS['teachers']}/{path}"
        yield Line(f"teacher.{name}.sha256", value, place)


def _weights(store: Store, version: versions.Version, folder: Path) -> Iterator[Line]:
    """The registered files; then what else is wrong with the version's files."""
    faults: list[str] = []
    try:
        files.fetch_weights(store, version, folder)
    except UserErrors as error:
        faults = error.faults
    hashes = version.weights
    for name, value in sorted(hashes.items()):
        wrong = any(fault.startswith(f"{name}:") for fault in faults)
        yield Line(f"weights.{name}.sha256", value, None if wrong else f"run {version.run_id}")
    if not hashes:
        yield Line("weights", "not recorded", None)
    for fault in faults:
        if not fault.startswith(tuple(f"{name}:" for name in hashes)):
            yield Line("weights", fault, None)


def _environment(folder: Path | None, sha: str, value: str, prefix: str) -> str | None:
    """The environment's lock at that revision. `prefix`: "./" for the project's paths, nothing in a bare folder."""
    if folder is None or not value:
        return None
    for name in LOCK_FILES:
        content = _git(folder, "show", f"{sha}:{prefix}{name}")
        if content is not None and sha256_bytes(content) == value:
            return f"{name} at {sha[:12]}"
    return None


def versions_with(project: Path, part: str) -> list[tuple[str, str, str]]:
    """(version, key, value) of every tag of a digest or revision that starts with `part`."""
    with versions.opened(project) as store:
        known = versions.versions_of(store)
    rows = [(version.number, key, value) for version in known for key, value in sorted(version.tags.items())]
    return [row for row in rows if row[2].startswith(part)]


def cli(argv: Sequence[str]) -> int:
    """Prints a lineage, or the versions that have a digest in theirs. Returns 1 when anything is missing."""
    text = "Where a version comes from, verified; or which versions come from a digest."
    parser = argparse.ArgumentParser("python -m tasks lineage", description=text)
    model = f"models:/{versions.MODEL}"
    forms = f"{model}@{versions.CHAMPION}, {model}/3, 3, or {SHORTEST} or more characters of a digest or git revision"
    parser.add_argument("reference", help=forms)
    reference, project = parser.parse_args(list(argv)).reference, Path.cwd()
    if DIGEST.fullmatch(reference):
        rows = versions_with(project, reference)
        lines = [f"{model}/{version}  {key} = {value}" for version, key, value in rows]
        print("\n".join(lines) or f"no version has {reference} in its lineage")
        return int(not rows)
    version, known = lineage(project, reference)
    missing = [line.key for line in known if line.where is None]
    complete = f"all {len(known)} are there; the checkpoint is DVC's {CHECKPOINT_FOLDER} at that revision"
    print(f"{model}/{version}", *known, f"missing: {', '.join(missing)}" if missing else complete, sep="\n")
    return int(bool(missing))
