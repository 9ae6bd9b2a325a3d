"""Where weights come from: an address is resolved once, verified, cached, recorded.

    PATH                                     a folder or a .safetensors file on this machine, read where it lies
    hf://owner/name[/file.safetensors][@revision]     the Hugging Face hub
    s3://bucket/prefix/  or  s3://bucket/file.safetensors
    models:/name@alias  or  models:/name/version      this project's MLflow registry

What is fetched lies in `.cache/weights/<SHA-256>`. The first fetch of an address pins it (trust on first use): revision
and hashes go into `weights.lock.json`, which is versioned with the code, and every later fetch must give the same bytes
or is refused. Only safetensors and the small files beside them are taken. A further kind of address is one function and
one entry in SCHEMES.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.errors import Outage, UserError, UserErrors
from data.files import digest, explain, read_json, sha256_file, write_json
from data.weights import PIPELINE, SAFETENSORS, folder_sha256, is_kept, pipeline_parts, weight_file, weight_folder

CACHE = Path(".cache/weights")
LOCK = Path("weights.lock.json")
PATH = "path"  # the kind of an address without a scheme
HUB = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+?)(?:/(?P<file>[\w./-]+\.safetensors))?(?:@(?P<revision>[\w./-]+))?")
HUB_PATIENCE = 10.0  # s for the answer to one question


@dataclass(frozen=True)
class Source:
    """Weights on this machine. `sha256`: of the file, or of the folder's list of files; `files`: relative path ->
    SHA-256, empty for a file; `revision`: the hub's commit, or the registered version; empty for a local path."""

    uri: str
    path: Path
    sha256: str
    revision: str
    files: dict[str, str]


@dataclass(frozen=True)
class Scheme:
    """A kind of address: its `pattern`, its `form` for people, and what fetches it: `fetch(uri, staged, project,
    revision)` fills the folder `staged`, from the revision that the lock names if any, and returns where in it the
    weights lie, and their revision.
    """

    pattern: re.Pattern[str]
    form: str
    fetch: Callable[[str, Path, Path, str], tuple[Path, str]]


def scheme_of(uri: str) -> str:
    """A key of SCHEMES, or PATH. Raises UserError for an address that is none of them."""
    for name, scheme in SCHEMES.items():
        if uri.startswith(f"{name}:"):
            if scheme.pattern.fullmatch(uri) is None:
                raise UserError(f"{uri}: not an address of this kind; expected {scheme.form}")
            return name
    if not uri or "://" in uri:
        raise UserError(f"{uri!r}: expected a path, hf://, s3:// or models:/")
    return PATH


def address_faults(uris: Mapping[str, str]) -> list[str]:
    """Label -> address; what is wrong with how they are written."""
    faults = []
    for label, uri in uris.items():
        try:
            scheme_of(uri)
        except UserError as error:
            faults.append(f"{label} = {error}")
    return faults


def read_lock(project: Path) -> dict[str, dict[str, Any]]:
    """Address -> its pin. Raises UserError for a file that is no such thing."""
    path = project / LOCK
    lock = read_json(path) if path.exists() else {}
    entries = list(lock.values()) if isinstance(lock, dict) else [None]
    if not all(isinstance(entry, dict) and "sha256" in entry for entry in entries):
        raise UserError(f"{path}: not a lock of weights (address -> revision, sha256, files); restore it from git")
    return dict(lock)


def cached(uri: str, project: Path) -> Path | None:
    """Where the weights lie if they need not be fetched; not verified."""
    if scheme_of(uri) == PATH:
        path = project / Path(uri).expanduser()
        return path if path.exists() else None
    entry = read_lock(project).get(uri)
    place = project / CACHE / entry["sha256"] if entry else None
    if entry is None or place is None or not place.is_dir():
        return None
    return place if entry.get("files") else next(place.glob(f"*{SAFETENSORS}"), place / f"missing{SAFETENSORS}")


def availability(uris: Mapping[str, str], project: Path) -> dict[str, str]:
    """Label -> "here", "to fetch" or "missing", without looking beyond this machine."""
    return {
        label: "here" if cached(uri, project) else "missing" if scheme_of(uri) == PATH else "to fetch"
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
    nothing is fetched."""
    wanted = {label: HUB.fullmatch(uri) for label, uri in uris.items() if cached(uri, project) is None}
    faults = []
    for label, match in wanted.items():
        if match is not None:
            try:
                _ask_hub(match, match["revision"], timeout=HUB_PATIENCE)
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
    scheme = scheme_of(uri)
    if scheme == "models" and not pin:
        return _registered(uri, project)
    place = cached(uri, project)
    if scheme == PATH:
        if place is None:
            raise UserError(f"{uri}: no such file or folder")
        source = _verified(uri, place, "")
        _expect(source, sha256, "the params say")
        return source
    entry = read_lock(project).get(uri, {})
    if place is not None:
        intact = _intact(uri, place, entry)
        if intact is not None:
            _expect(intact, sha256, "the params say")
            return intact
        shutil.rmtree(project / CACHE / entry["sha256"])  # fetched again, it must be what the lock says
    source = _fetched(uri, project, sha256, entry)
    if not entry:
        pinned = {"revision": source.revision, "sha256": source.sha256, "files": source.files}
        write_json(project / LOCK, dict(sorted({**read_lock(project), uri: pinned}.items())))
        revision = f" (revision {source.revision})" if source.revision else ""
        print(f"{uri}: pinned in {LOCK} as {source.sha256[:12]}{revision}", flush=True)
    return source


def _fetched(uri: str, project: Path, sha256: str, entry: Mapping[str, Any]) -> Source:
    """Fetched into the cache, where only the bytes that the params (`sha256`) and the lock (`entry`) name arrive."""
    staged = project / CACHE / f"incoming-{digest(uri)[:16]}"  # a fetch that is stopped goes on from there
    staged.mkdir(parents=True, exist_ok=True)
    with _disk(staged):
        content, revision = SCHEMES[scheme_of(uri)].fetch(uri, staged, project, entry.get("revision", ""))
        source = _verified(uri, content, revision)
        try:
            _expect(source, sha256, "the params say")
            _expect(source, entry.get("sha256", ""), f"{LOCK} says")
        except UserError:
            shutil.rmtree(staged)
            raise
        place = project / CACHE / source.sha256
        if not place.exists() and content == staged:
            staged.replace(place)
        elif not place.exists():
            place.mkdir()
            content.replace(place / content.name)
        shutil.rmtree(staged, ignore_errors=True)
    return replace(source, path=place if source.files else place / content.name)


def _registered(uri: str, project: Path) -> Source:
    """A registered version as it is now; its hashes are the tags that it was judged under."""
    from tasks.registry import versions

    registered = versions.require(project, uri)
    version, hashes = registered.number, registered.weights
    sha256 = folder_sha256(hashes)
    place, staged = project / CACHE / sha256, project / CACHE / f"incoming-{sha256[:16]}"
    with _disk(place):
        if {name: sha256_file(place / name) for name in hashes if (place / name).is_file()} != hashes:
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
    resolved, outages = {}, []
    for label, (uri, sha256) in wanted.items():
        try:
            resolved[label] = resolve(uri, project, sha256)
        except Outage as error:
            outages.append(f"{label}: {error}")
        except UserError as error:
            faults += [f"{label}: {fault}" for fault in getattr(error, "faults", [error])]
    if faults:
        raise UserErrors("these weights cannot be used:", [*faults, *outages])
    if outages:
        raise Outage("\n  ".join(outages))
    return resolved


def _verified(uri: str, path: Path, revision: str) -> Source:
    if path.is_dir():
        files = weight_folder(path)
        return Source(uri, path, folder_sha256(files), revision, files)
    return Source(uri, path, weight_file(path), revision, {})


def _intact(uri: str, path: Path, entry: Mapping[str, Any]) -> Source | None:
    """Cached weights, None where they are no longer what the lock names."""
    try:
        source = _verified(uri, path, entry.get("revision", ""))
    except UserError:
        return None
    return source if source.sha256 == entry["sha256"] else None


def _expect(source: Source, sha256: str, who: str) -> None:
    if sha256 and source.sha256 != sha256:
        remedy = "restore the old bytes, or name the new ones there knowingly"
        raise UserError(f"{source.uri}: SHA-256 is {source.sha256}, {who} {sha256}; {remedy}")


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
    from huggingface_hub import errors

    log_in = "log in (`hf auth login`, or HF_TOKEN)"
    try:
        yield
    except errors.GatedRepoError as error:
        consent = f"accept the licence on https://huggingface.co/{repo} and {log_in}"
        raise UserError(f"{uri}: its owner asks for consent: {consent}") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{uri}: no such revision") from error
    except errors.RepositoryNotFoundError as error:
        words = "no such model on the hub, or it is private: check the name, or"
        raise UserError(f"{uri}: {words} {log_in}") from error
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        if isinstance(error, OSError) and error.errno is not None:
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        status = getattr(getattr(error, "response", None), "status_code", 503)  # none: no answer
        passes = (status >= 500 or status == 429) and not isinstance(error, errors.OfflineModeIsEnabled)
        remedy = "try again later, or fetch it elsewhere and name the folder's path instead"
        raise (Outage if passes else UserError)(f"{uri}: the hub cannot be reached ({first}); {remedy}") from error


def _ask_hub(match: re.Match[str], revision: str | None, **options: Any) -> Any:
    """The hub's description of a model."""
    from huggingface_hub import HfApi

    with _hub_answers(match[0], match["repo"]):
        return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None).model_info(
            match["repo"], revision=revision, **options
        )


def _fetch_hub(uri: str, staged: Path, project: Path, revision: str) -> tuple[Path, str]:
    """Through huggingface_hub, which goes on where a stopped download ended. Of a pipeline only the parts that its
    index names, in one precision."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    match = HUB.fullmatch(uri)
    assert match is not None
    repo, file = match["repo"], match["file"]
    if not os.isatty(1):
        disable_progress_bars()
    info = _ask_hub(match, revision or match["revision"], files_metadata=True)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    options: dict[str, Any] = {
        "revision": str(info.sha),
        "local_dir": staged,
        "endpoint": os.environ.get("HF_ENDPOINT") or None,
    }
    with _hub_answers(uri, repo):
        is_pipeline = PIPELINE in sizes and not file
        parts = pipeline_parts(read_json(hf_hub_download(repo, PIPELINE, **options))) if is_pipeline else []
        chosen = _chosen(uri, file, sizes, parts)
        needed, free = sum(sizes[name] for name in chosen), shutil.disk_usage(staged).free
        if needed > free:
            room = f"{free / 1e9:.1f} GB free in {staged.parent}; make room, or link that folder to a larger disk"
            raise UserError(f"{uri}: {needed / 1e9:.1f} GB to fetch, {room}")
        print(f"{uri}: fetching {len(chosen)} files, {needed / 1e9:.2f} GB, revision {info.sha[:12]}", flush=True)
        snapshot_download(repo, allow_patterns=chosen, **options)
    shutil.rmtree(staged / ".cache", ignore_errors=True)
    return (staged / file if file else staged), str(info.sha)


def _chosen(uri: str, file: str | None, sizes: Mapping[str, int], parts: list[str]) -> list[str]:
    """The names of a repository's files that are fetched: `file` alone, else all, of a pipeline those of its `parts`.
    Raises UserError when there are no safetensors among them."""
    names = [name for name in sizes if (name == file if file else is_kept(name))]
    if parts:
        names = [name for name in names if name == PIPELINE or name.partition("/")[0] in parts]
    if not any(name.endswith(SAFETENSORS) for name in names):
        which = f"of that name, have {sorted(sizes)[:5]}" if file else "in it; pickle files are not taken"
        raise UserError(f"{uri}: no {SAFETENSORS} file {which}")
    return sorted(names)


def _fetch_s3(uri: str, staged: Path, project: Path, revision: str) -> tuple[Path, str]:
    from tasks.s3 import transfer

    if uri.endswith(SAFETENSORS):
        file = staged / uri.rpartition("/")[2]
        transfer.download(uri, file)
        return file, ""
    transfer.download_folder(uri.rstrip("/") + "/", staged)
    return staged, ""


def _fetch_registered(uri: str, staged: Path, project: Path, revision: str) -> tuple[Path, str]:
    from tasks.registry import versions

    shutil.rmtree(staged)
    version = revision or versions.require(project, uri).number
    versions.download(project, version, staged)
    return staged, version


REGISTERED = re.compile(r"models:/[\w. -]+(?:@[\w-]+|/\d+)")
SCHEMES = {
    "hf": Scheme(HUB, "hf://owner/name[/file.safetensors][@revision]", _fetch_hub),
    "s3": Scheme(re.compile(r"s3://[^/\s]+/\S+"), "s3://bucket/prefix/ or s3://bucket/file.safetensors", _fetch_s3),
    "models": Scheme(REGISTERED, "models:/name@alias or models:/name/version", _fetch_registered),
}
