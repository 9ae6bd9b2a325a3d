"""Where weights come from: a local folder or file, `hf://owner/name`, `s3://bucket/key`, `models:/name@alias`; resolved
once, verified, cached, recorded.

    PATH                                     a folder or a .safetensors file on this machine, read where it lies
    hf://owner/name[/file.safetensors][@revision]     the Hugging Face hub
    s3://bucket/prefix/  or  s3://bucket/file.safetensors
    models:/name@alias  or  models:/name/version      this project's MLflow registry

What is fetched lies in `.cache/weights/<SHA-256>`. The first fetch of an address pins it (trust on first use): revision
and hashes go into `weights.lock.json`, which is versioned with the code, and every later fetch must give the same bytes
or is refused. Only safetensors and the small files beside them are taken.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import Outage, UserError, UserErrors
from data.files import digest, explain, read_json, sha256_file, write_json
from data.weights import PIPELINE, SAFETENSORS, folder_sha256, is_kept, pipeline_parts, weight_file, weight_folder

CACHE = Path(".cache/weights")
LOCK = Path("weights.lock.json")
HUB = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+?)(?:/(?P<file>[\w./-]+\.safetensors))?(?:@(?P<revision>[\w./-]+))?")
REGISTERED = re.compile(r"models:/(?P<name>[\w. -]+)(?:@(?P<alias>[\w-]+)|/(?P<version>\d+))")
BUCKET = re.compile(r"s3://[^/\s]+/\S+")
HUB_PATIENCE = 10.0  # s for the answer to one question


@dataclass(frozen=True)
class Source:
    """Weights on this machine. `sha256`: of the file, or of the folder's list of files; `files`: relative path ->
    SHA-256, empty for a file.

    `revision`: the hub's commit, or the registered version; empty for a local path.
    """

    uri: str
    path: Path
    sha256: str
    revision: str
    files: dict[str, str]


def kind_of(uri: str) -> str:
    """ "hub", "s3", "registry" or "path". Raises UserError for an address that is none of them."""
    for scheme, pattern, kind, form in (
        ("hf:", HUB, "hub", "hf://owner/name[/file.safetensors][@revision]"),
        ("s3:", BUCKET, "s3", "s3://bucket/prefix/ or s3://bucket/file.safetensors"),
        ("models:", REGISTERED, "registry", "models:/name@alias or models:/name/version"),
    ):
        if uri.startswith(scheme):
            if pattern.fullmatch(uri) is None:
                raise UserError(f"{uri}: not an address of this kind; expected {form}")
            return kind
    if not uri or "://" in uri:
        raise UserError(f"{uri!r}: expected a path, hf://, s3:// or models:/")
    return "path"


def address_faults(uris: Mapping[str, str]) -> list[str]:
    """Label -> address; what is wrong with how they are written."""
    faults = []
    for label, uri in uris.items():
        try:
            kind_of(uri)
        except UserError as error:
            faults.append(f"{label} = {error}")
    return faults


def read_lock(project: Path) -> dict[str, dict[str, Any]]:
    path = project / LOCK
    if not path.exists():
        return {}
    lock = read_json(path)
    if not isinstance(lock, dict) or any(
        not isinstance(entry, dict) or "sha256" not in entry for entry in lock.values()
    ):
        raise UserError(f"{path}: not a lock of weights (address -> revision, sha256, files); restore it from git")
    return lock


def cached(uri: str, project: Path) -> Path | None:
    """Where the weights lie if they need not be fetched; not verified."""
    if kind_of(uri) == "path":
        path = Path(uri).expanduser()
        path = path if path.is_absolute() else project / path
        return path if path.exists() else None
    entry = read_lock(project).get(uri)
    place = project / CACHE / entry["sha256"] if entry else None
    return _content(place, entry) if place is not None and entry and place.is_dir() else None


def _content(place: Path, entry: Mapping[str, Any]) -> Path:
    return (
        place
        if entry.get("files")
        else place / next((path.name for path in place.glob(f"*{SAFETENSORS}")), f"missing{SAFETENSORS}")
    )


def availability(uris: Mapping[str, str], project: Path) -> dict[str, str]:
    """Label -> "here", "to fetch" or "missing", without looking beyond this machine."""
    return {
        label: "here" if cached(uri, project) else "missing" if kind_of(uri) == "path" else "to fetch"
        for label, uri in uris.items()
    }


def missing_faults(uris: Mapping[str, str], project: Path) -> list[str]:
    """The local paths that are not there, each with how to supply it. `uris`: the params' key -> address."""
    return [
        f"{label} = {uris[label]!r}: no such file or folder; put the weights there, or set {label} to where they are "
        "(a path, hf://owner/name, s3://bucket/key, models:/name@alias)"
        for label, state in availability(uris, project).items()
        if state == "missing"
    ]


def unfetchable_faults(uris: Mapping[str, str], project: Path) -> list[str]:
    """The addresses on the hub that are not on this machine and that the hub would not give now: one question each,
    nothing is fetched.
    """
    wanted = {label: uri for label, uri in uris.items() if kind_of(uri) == "hub" and cached(uri, project) is None}
    if not wanted:
        return []
    from huggingface_hub import HfApi

    faults = []
    for label, uri in wanted.items():
        match = HUB.fullmatch(uri)
        assert match is not None
        try:
            with _hub_answers(uri, match["repo"]):
                HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None).model_info(
                    match["repo"], revision=match["revision"], timeout=HUB_PATIENCE
                )
        except (UserError, OSError) as error:
            faults.append(f"{label} is not on this machine: {error}")
    return faults


def resolve(uri: str, project: Path, sha256: str = "", *, pin: bool = True) -> Source:
    """The weights behind an address, fetched if need be and verified. `sha256`: what they must be, "" where nothing is
    known yet.

    `pin` False follows an alias of the registry to where it points now, with the registry's own hashes instead of the
    lock's; it changes nothing for others. Raises UserError when they are missing, cannot be fetched, are no
    safetensors, or are not the bytes that `sha256`, the lock or the registry names.
    """
    kind = kind_of(uri)
    if kind == "registry" and not pin:
        return _registered(uri, project)
    if kind == "path":
        path = cached(uri, project)
        if path is None:
            raise UserError(f"{uri}: no such file or folder")
        found = _verified(uri, path, "")
        _expect(found, sha256, "the params")
        return found
    entry = read_lock(project).get(uri)
    if entry:
        place = project / CACHE / entry["sha256"]
        if place.is_dir():
            try:
                found = _verified(uri, _content(place, entry), entry.get("revision", ""))
                if found.sha256 == entry["sha256"]:
                    _expect(found, sha256, "the params")
                    return found
            except UserError:
                pass
            shutil.rmtree(place)  # damaged since; it is fetched again below, and must be what the lock says
    staged = (
        project / CACHE / f"incoming-{digest(uri)[:16]}"
    )  # kept when a fetch is stopped, so that it goes on from there
    staged.mkdir(parents=True, exist_ok=True)
    with _disk(staged):
        content, revision = FETCHERS[kind](uri, staged, project, (entry or {}).get("revision", ""))
        found = _verified(uri, content, revision)
        try:
            _expect(found, sha256, "the params")
            _expect(found, (entry or {}).get("sha256", ""), str(LOCK))
        except UserError:
            shutil.rmtree(staged)
            raise
        place = project / CACHE / found.sha256
        if not place.exists():
            if content == staged:
                staged.replace(place)
            else:
                place.mkdir()
                content.replace(place / content.name)
        shutil.rmtree(staged, ignore_errors=True)
    pinned = {"revision": found.revision, "sha256": found.sha256, "files": found.files}
    if entry is None:
        write_json(project / LOCK, dict(sorted({**read_lock(project), uri: pinned}.items())))
        print(
            f"{uri}: pinned in {LOCK} as {found.sha256[:12]}{f' (revision {found.revision})' if found.revision else ''}",
            flush=True,
        )
    return Source(uri, place if found.files else place / content.name, found.sha256, found.revision, found.files)


def _registered(uri: str, project: Path) -> Source:
    """A registered version as it is now; its hashes are the tags that it was judged under."""
    from tasks.registry import versions

    registered = versions.require(project, uri)
    version, hashes = registered.number, registered.weights
    sha256 = folder_sha256(hashes)
    place = project / CACHE / sha256
    with _disk(place):
        if (
            not place.is_dir()
            or {name: sha256_file(place / name) for name in hashes if (place / name).is_file()} != hashes
        ):
            staged = project / CACHE / f"incoming-{sha256[:16]}"
            shutil.rmtree(staged, ignore_errors=True)
            versions.download(project, version, staged)
            shutil.rmtree(place, ignore_errors=True)
            staged.replace(place)
    return Source(uri, place, sha256, version, hashes)


def resolve_all(wanted: Mapping[str, tuple[str, str]], project: Path) -> dict[str, Source]:
    """Label -> (address, SHA-256 or ""), resolved. Local paths are looked at before any fetch.

    Raises UserErrors with everything that is missing or wrong; Outage where a store's silence is all that is wrong.
    """
    faults = missing_faults({label: uri for label, (uri, _) in wanted.items()}, project)
    if faults:
        raise UserErrors("these weights are not here:", faults)
    found, outages = {}, []
    for label, (uri, sha256) in wanted.items():
        try:
            found[label] = resolve(uri, project, sha256)
        except Outage as error:
            outages.append(f"{label}: {error}")
        except UserErrors as errors:
            faults += [f"{label}: {fault}" for fault in errors.faults]
        except UserError as error:
            faults.append(f"{label}: {error}")
    if faults:
        raise UserErrors("these weights cannot be used:", [*faults, *outages])
    if outages:
        raise Outage("\n  ".join(outages))
    return found


def _verified(uri: str, path: Path, revision: str) -> Source:
    if path.is_dir():
        files = weight_folder(path)
        return Source(uri, path, folder_sha256(files), revision, files)
    return Source(uri, path, weight_file(path), revision, {})


def _expect(found: Source, sha256: str, where: str) -> None:
    if sha256 and found.sha256 != sha256:
        remedy = "restore the old bytes, or name the new ones there knowingly"
        raise UserError(
            f"{found.uri}: SHA-256 is {found.sha256}, {where} say{'s' if where == str(LOCK) else ''} {sha256}; {remedy}"
        )


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise explain(error, path) from error


# --- fetching ---------------------------------------------------------------------------------------------------------


@contextmanager
def _hub_answers(uri: str, repo: str) -> Iterator[None]:
    """What the hub refuses as a UserError with what to do; Outage when it does not answer."""
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]  # of the client it speaks through, whichever that is

    try:
        yield
    except GatedRepoError as error:
        raise UserError(
            f"{uri}: its owner asks for consent: accept the licence on https://huggingface.co/{repo} and log in (`hf auth login`, or HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{uri}: no such revision") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{uri}: no such model on the hub, or it is private: check the name, or log in (`hf auth login`, or HF_TOKEN)"
        ) from error
    except (TransportError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        status = getattr(getattr(error, "response", None), "status_code", 503)  # none: no answer
        passes = (status >= 500 or status == 429) and not isinstance(error, OfflineModeIsEnabled)
        remedy = "try again later, or fetch it elsewhere and name the folder's path instead"
        raise (Outage if passes else UserError)(f"{uri}: the hub cannot be reached ({first}); {remedy}") from error


def _fetch_hub(uri: str, staged: Path, project: Path, pinned: str) -> tuple[Path, str]:
    """Through huggingface_hub, which goes on where a stopped download ended. Of a pipeline only the parts that its
    index names, in one precision.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    match = HUB.fullmatch(uri)
    assert match is not None
    repo, file, endpoint = match["repo"], match["file"], os.environ.get("HF_ENDPOINT") or None
    if not os.isatty(1):
        disable_progress_bars()
    with _hub_answers(uri, repo):
        info = HfApi(endpoint=endpoint).model_info(repo, revision=pinned or match["revision"], files_metadata=True)
        commit, sizes = str(info.sha), {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
        index = (
            read_json(hf_hub_download(repo, PIPELINE, revision=commit, local_dir=staged, endpoint=endpoint))
            if PIPELINE in sizes and not file
            else {}
        )
        chosen = _chosen(uri, file, sizes, pipeline_parts(index))
        needed, free = sum(sizes[name] for name in chosen), shutil.disk_usage(staged).free
        if needed > free:
            raise UserError(
                f"{uri}: {needed / 1e9:.1f} GB to fetch, {free / 1e9:.1f} GB free in {staged.parent}; make room, or link that folder to a larger disk"
            )
        print(f"{uri}: fetching {len(chosen)} files, {needed / 1e9:.2f} GB, revision {commit[:12]}", flush=True)
        snapshot_download(repo, revision=commit, local_dir=staged, allow_patterns=chosen, endpoint=endpoint)
    shutil.rmtree(staged / ".cache", ignore_errors=True)
    return (staged / file if file else staged), commit


def _chosen(uri: str, file: str | None, sizes: Mapping[str, int], parts: list[str]) -> list[str]:
    """The names of a repository's files that are fetched; `parts` are a pipeline's. Raises UserError when there are no
    safetensors among them.
    """
    if file:
        chosen = [file] if file in sizes else []
    elif parts:
        chosen = [name for name in sizes if is_kept(name) and (name == PIPELINE or name.partition("/")[0] in parts)]
    else:
        chosen = [name for name in sizes if is_kept(name)]
    if not any(name.endswith(SAFETENSORS) for name in chosen):
        raise UserError(
            f"{uri}: no {SAFETENSORS} file{f' of that name, have {sorted(sizes)[:5]}' if file else ' in it; pickle files are not taken'}"
        )
    return sorted(chosen)


def _fetch_s3(uri: str, staged: Path, project: Path, pinned: str) -> tuple[Path, str]:
    from tasks.s3 import transfer

    if uri.endswith(SAFETENSORS):
        file = staged / uri.rpartition("/")[2]
        transfer.download(uri, file)
        return file, ""
    transfer.download_folder(uri.rstrip("/") + "/", staged)
    return staged, ""


def _fetch_registered(uri: str, staged: Path, project: Path, pinned: str) -> tuple[Path, str]:
    from tasks.registry import versions

    shutil.rmtree(staged)
    version = pinned or versions.require(project, uri).number
    versions.download(project, version, staged)
    return staged, version


FETCHERS = {"hub": _fetch_hub, "s3": _fetch_s3, "registry": _fetch_registered}
