"""A promoted version for those who run it: files below a prefix of its own in an S3 store, their hashes in a manifest,
and one pointer to what is current.

    publish(project) -> {"version", "prefix", "manifest", "ledger", "changed"}    # the champion, to DANCEOPD_PUBLISH
    fetch(uri, folder) -> manifest                                                # for a machine that serves the model

    PREFIX/versions/3-6f1c0a94b2/transformer/...   never written twice
    PREFIX/versions/3-6f1c0a94b2/manifest.json     written last: without it the version does not exist
    PREFIX/latest.json                             moved by a conditional write, and only to a later entry of the ledger

Nobody reads a version in part: the pointer names a manifest by its hash, the manifest every file by its hash.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data.errors import UserError, UserErrors
from data.files import digest, sha256_bytes
from data.progress import callback
from tasks import environment
from tasks.registry import files, versions
from tasks.s3 import objects, transfer

LATEST, MANIFEST = "latest.json", "manifest.json"
RACES = 5  # times another publisher may move the pointer between our reading and writing it
FORMAT = 1


def destination() -> str | None:
    """DANCEOPD_PUBLISH; None when nothing is to be published. Raises UserError when it is not an S3 address."""
    uri = environment.setting(environment.PUBLISH)
    if uri is not None:
        objects.split(uri)
    return uri


def publish(project: Path, to: str | None = None) -> dict[str, Any]:
    """Publishes the ledger's champion to `to` (default: DANCEOPD_PUBLISH) and moves the pointer. Repeating it sends
    only what is missing.

    Returns {"version", "prefix", "manifest" (SHA-256), "ledger" (number of the entry), "changed" (whether the pointer
    moved), "uri"}. Raises UserError when there is no champion, when its files are not the ones of the ledger, or when a
    later decision has been published already.
    """
    uri = to or destination()
    if uri is None:
        remedy = "set it to s3://BUCKET/PREFIX, where promoted versions are to be published"
        raise UserError(f"{environment.PUBLISH} is not set; {remedy}")
    with tempfile.TemporaryDirectory() as temporary:
        promoted = versions.champion_files(project, Path(temporary))
        prefix = f"versions/{promoted['version']}-{digest(promoted['hashes'])[:10]}"
        report = callback("publish")
        sent = []
        for name, sha256 in promoted["hashes"].items():
            path = promoted["folder"] / name
            if transfer.upload(path, objects.join(uri, prefix, name), progress=report) != sha256:
                raise UserError(f"{name}: it changed while it was published; run the same command again")
            sent.append({"path": name, "sha256": sha256, "size": path.stat().st_size})
    what = {"format": FORMAT, "version": promoted["version"]}
    manifest = _json({**what, "model": versions.MODEL, "files": sent, "lineage": promoted["lineage"]})
    _write_once(objects.join(uri, prefix, MANIFEST), manifest)
    pointer = {**what, "prefix": prefix, "manifest": sha256_bytes(manifest), "ledger": promoted["ledger"]}
    changed = _move(objects.join(uri, LATEST), pointer)
    del pointer["format"]
    return {**pointer, "changed": changed, "uri": uri}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _write_once(uri: str, content: bytes) -> None:
    """The manifest of a version never changes: what stands there already must be the same."""
    try:
        objects.put_new(uri, content)
    except objects.Changed as error:
        if objects.read(uri)[0] != content:
            remedy = "look at both, then remove the wrong version's folder"
            raise UserError(f"{uri}: another manifest was published for this version; {remedy}") from error


def _move(uri: str, pointer: dict[str, Any]) -> bool:
    """Moves the pointer to a later entry of the ledger, of several the last; False when it stands there already."""
    for _ in range(RACES):
        try:
            content, etag = objects.read(uri)
            current = _pointer(uri, content)
            if {**current, "time": None} == {**pointer, "time": None}:
                return False
            if current["ledger"] >= pointer["ledger"]:
                later = f"version {current['version']} (ledger entry {current['ledger']}) is published already"
                remedy = "look at python -m tasks registry"
                raise UserError(f"{uri}: {later}, a later decision than entry {pointer['ledger']}; {remedy}")
        except objects.Missing:
            etag = None
        moved = _json({**pointer, "time": datetime.now(UTC).isoformat(timespec="seconds")})
        try:
            if etag is None:
                objects.put_new(uri, moved)
            else:
                objects.replace(uri, moved, etag)
            return True
        except objects.Changed:
            continue
    raise UserError(f"{uri}: it was moved {RACES} times while this was published; run the same command again")


def _pointer(uri: str, content: bytes) -> dict[str, Any]:
    fault = f"{uri}: not a pointer to a published version"
    try:
        value = json.loads(content)
        prefix = re.fullmatch(r"versions/[A-Za-z0-9-]+", value["prefix"])
        manifest = re.fullmatch(r"[0-9a-f]{64}", value["manifest"])
        fits = prefix and manifest and isinstance(value["ledger"], int)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{fault} ({error!r}); publish the champion again") from error
    if not fits:
        raise UserError(f"{fault}; publish the champion again")
    return dict(value)


def fetch(uri: str, folder: str | Path) -> dict[str, Any]:
    """Brings what is published now into a folder of its version below `folder` and returns its manifest with "folder"
    added; a file that is there already is kept.

    Raises UserError(s) when the manifest is not the one that the pointer names, names a file outside the folder, or a
    file is not the one it names.
    """
    pointer = _pointer(uri, objects.read(objects.join(uri, LATEST))[0])
    where = objects.join(uri, pointer["prefix"])
    content, _ = objects.read(objects.join(where, MANIFEST))
    if sha256_bytes(content) != pointer["manifest"]:
        cause = "it was changed after it was published: publish the champion again"
        raise UserError(f"{where}/{MANIFEST}: not the one that {LATEST} names; {cause}")
    try:
        manifest = json.loads(content)
        hashes = {str(file["path"]): str(file["sha256"]) for file in manifest["files"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}/{MANIFEST}: not a manifest ({error!r})") from error
    allowed = ", ".join(files.CHECKPOINT_SUFFIXES)
    if faults := [f"{name}: only {allowed} files are loaded" for name in hashes if not files.is_allowed(name)]:
        raise UserErrors(f"{where}: cannot be fetched", faults)
    target = Path(folder) / pointer["prefix"].removeprefix("versions/")
    transfer.download_folder(where, target, hashes=hashes, progress=callback("fetch"))
    return {**manifest, "folder": str(target)}


def cli(argv: Sequence[str]) -> int:
    """`publish` the project's champion, or `fetch` what is published. UserError is left to the caller to print."""
    name, *arguments = argv
    bucket: dict[str, Any] = {"metavar": "s3://BUCKET/PREFIX"}
    if name == "publish":
        parser = argparse.ArgumentParser("python -m tasks publish", description="Publish the champion and point at it.")
        parser.add_argument("--to", **bucket, help=f"where to (default: {environment.PUBLISH})")
        done = publish(Path.cwd(), parser.parse_args(arguments).to)
        words = "is published now" if done["changed"] else "was published already"
        where = f"{done['uri']}/{done['prefix']} (manifest {done['manifest'][:12]}, ledger entry {done['ledger']:06d})"
        print(f"version {done['version']} {words}: {where}")
        return 0
    text = "Fetch what is published now, every file verified."
    parser = argparse.ArgumentParser("python -m tasks fetch", description=text)
    parser.add_argument("--from", dest="source", **bucket, help=f"where from (default: {environment.PUBLISH})")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    options = parser.parse_args(arguments)
    source = options.source or destination()
    if source is None:
        remedy = "name where the versions are published"
        raise UserError(f"--from is missing and {environment.PUBLISH} is not set; {remedy}")
    manifest = fetch(source, options.out)
    print(f"version {manifest['version']}: {len(manifest['files'])} files in {manifest['folder']}")
    return 0
