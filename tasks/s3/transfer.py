"""Uploads and downloads in parts, resumed where they stopped, verified when they end.

    download("s3://bucket/key", path, sha256=..., progress=...) -> sha256
    download_folder("s3://bucket/prefix/", folder) -> {name: sha256}
    upload(path, "s3://bucket/key", progress=...) -> sha256

boto3's transfers start from the first byte after a stop and do not keep the parts of an upload, so parts are handled
here.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from data.errors import UserError, UserErrors
from data.files import explain, sha256_bytes, sha256_file
from tasks.s3 import objects
from tasks.s3.objects import SCHEME, client, explained

PART = 16 * 1024 * 1024  # bytes; S3's least is 5 MiB for all parts but the last
MOST_PARTS = 10_000  # S3's limit for an upload
Part = tuple[int, int]  # (offset, length) in bytes
# (bytes done, bytes in all, the object's name), as data.progress.callback takes them
Progress = Callable[[int, int, str], None]


class _Counter:
    """Bytes done, over all threads; tells `progress`."""

    def __init__(self, progress: Progress | None, total: int, name: str) -> None:
        self.progress, self.total, self.name, self.done, self.lock = progress, total, name, 0, threading.Lock()

    def add(self, count: int) -> None:
        with self.lock:
            self.done += count
            if self.progress is not None:
                self.progress(self.done, self.total, self.name)


def _parts(size: int) -> list[Part]:
    """Every part of a file; an empty file has one empty part."""
    length = max(PART, math.ceil(size / MOST_PARTS))
    return [(offset, min(length, size - offset)) for offset in range(0, size, length)] or [(0, 0)]


def _in_parallel(work: Callable[[int], None], indices: Sequence[int]) -> None:
    """Runs `work` for every index; the first failure stops those not begun yet and is raised."""
    with ThreadPoolExecutor(objects.WORKERS) as pool:
        list(pool.map(work, indices))


def download(uri: str, path: str | Path, *, sha256: str | None = None, progress: Progress | None = None) -> str:
    """Brings an object to `path`, whole or not at all, and returns its SHA-256.

    Parts come in parallel, all of the same state of the object (its ETag). What was fetched stays in a hidden file
    beside `path` when the download is stopped, and the same call goes on from there. With `sha256` a file that is there
    already is kept, and other content is refused. Raises Missing, or UserError.
    """
    path = Path(path)
    if sha256 is not None and path.is_file() and sha256_file(path) == sha256:
        return sha256
    bucket, key = objects.split(uri)
    with explained(uri):
        head = client().head_object(Bucket=bucket, Key=key)
    size, etag = int(head["ContentLength"]), str(head["ETag"])
    partial = path.with_name(f".{path.name}.{sha256_bytes(f'{uri} {etag} {size}'.encode())[:8]}.tmp")
    journal = partial.with_name(f"{partial.name}.parts")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(journal, "a+") as notes:
            fcntl.flock(notes, fcntl.LOCK_EX)  # a second download of the same object waits for this one
            resumed = _fetch(uri, etag, partial, notes, _Counter(progress, size, path.name))
            actual = sha256_file(partial)
            if resumed and sha256 not in (None, actual):  # a part noted before a power cut may not be on the disk
                notes.truncate(0)
                _fetch(uri, etag, partial, notes, _Counter(progress, size, path.name))
                actual = sha256_file(partial)
            if sha256 not in (None, actual):
                partial.unlink()
                journal.unlink()
                fault = "the object is not the one that was asked for"
                raise UserError(f"{uri}: its SHA-256 is {actual}, expected {sha256}; {fault}")
            os.replace(partial, path)
            journal.unlink()
    except objects.Changed as error:
        partial.unlink(missing_ok=True)
        journal.unlink(missing_ok=True)
        raise UserError(f"{uri}: it was replaced while it was downloaded; run the same command again") from error
    except OSError as error:
        raise explain(error, path) from error
    return actual


def _fetch(uri: str, etag: str, partial: Path, notes: IO[str], counter: _Counter) -> bool:
    """Fetches the parts that `notes` does not list yet into `partial`; True when some were there already."""
    parts = _parts(counter.total)
    notes.seek(0)
    present = {int(line) for line in notes.read().split("\n")[:-1] if line.isdigit()} if partial.is_file() else set()
    if not present:
        notes.truncate(0)
    lock = threading.Lock()
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.ftruncate(descriptor, counter.total)
        counter.add(sum(parts[index][1] for index in present))

        def fetch(index: int) -> None:
            part = None if len(parts) == 1 else parts[index]
            objects.repeated(_fetch_part, uri, etag, descriptor, counter.total, part)
            with lock:
                notes.write(f"{index}\n")
                notes.flush()
            counter.add(parts[index][1])

        with explained(uri):
            _in_parallel(fetch, [index for index in range(len(parts)) if index not in present])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return bool(present)


def _fetch_part(uri: str, etag: str, descriptor: int, size: int, part: Part | None) -> None:
    """Writes a part to its place; None means the whole object, whose stored checksum boto3 verifies."""
    bucket, key = objects.split(uri)
    offset, length = part or (0, size)
    only = {"Range": f"bytes={offset}-{offset + length - 1}"} if part else {}
    answer = client().get_object(Bucket=bucket, Key=key, IfMatch=etag, **only)
    sent = int(answer["ContentLength"])
    if sent != length:
        raise UserError(f"{uri}: the store sent {sent} bytes instead of the range's {length}; it must support ranges")
    for chunk in objects.chunks(answer):
        offset += os.pwrite(descriptor, chunk, offset)


def download_folder(
    uri: str, folder: str | Path, *, hashes: Mapping[str, str] | None = None, progress: Progress | None = None
) -> dict[str, str]:
    """Every object below the address into `folder`; name (relative, with /) -> SHA-256. `hashes`: the same, expected;
    nothing else is fetched then.

    Files appear one after the other, each of them whole. Raises UserErrors for names that would leave the folder,
    before anything is fetched, and UserError for an empty prefix.
    """
    prefix = uri.rstrip("/") + "/"
    if hashes is None:
        sources = _objects_below(prefix)
    else:
        sources = {objects.relative_name(name, ""): prefix + name for name in hashes}
    expected = hashes or {}
    return {
        name: download(source, Path(folder) / name, sha256=expected.get(name), progress=progress)
        for name, source in sources.items()
    }


def _objects_below(prefix: str) -> dict[str, str]:
    """Relative name -> address."""
    _, base = objects.split(prefix)
    sources, faults = {}, []
    for item in objects.list_objects(prefix):
        key = item.uri.removeprefix(SCHEME).partition("/")[2]
        if key.endswith("/") and item.size == 0:
            continue  # a folder's marker, as web consoles make them
        try:
            sources[objects.relative_name(key, base)] = item.uri
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserErrors(f"{prefix}: cannot be downloaded", faults)
    if not sources:
        raise objects.Missing(f"{prefix}: nothing below this address")
    return sources


def upload(path: str | Path, uri: str, *, progress: Progress | None = None) -> str:
    """Puts a file at `uri` and returns its SHA-256. The object appears whole; an upload in parts that was stopped goes
    on with the parts the store has.

    An object with the same content is left as it is (told by its ETag, the MD5 of the content or of its parts). Raises
    UserError.
    """
    path = Path(path)
    bucket, key = objects.split(uri)
    try:
        size = path.stat().st_size
        parts, sha256 = _parts(size), sha256_file(path)
        counter = _Counter(progress, size, path.name)
        with open(path, "rb") as file, explained(uri):
            descriptor = file.fileno()
            sums = [hashlib.md5(_read(descriptor, part), usedforsecurity=False).digest() for part in parts]
            if _etag(uri) == _expected_etag(sums):
                counter.add(size)
            elif len(parts) == 1:
                content = _read(descriptor, parts[0])
                client().put_object(Bucket=bucket, Key=key, Body=content, ContentMD5=_base64(sums[0]))
                counter.add(size)
            else:
                _upload_parts(uri, descriptor, parts, sums, counter)
    except OSError as error:
        raise explain(error, path) from error
    return sha256


def _read(descriptor: int, part: Part) -> bytes:
    offset, length = part
    content = os.pread(descriptor, length, offset)
    if len(content) < length:
        raise UserError("the file became shorter while it was read; run the same command again")
    return content


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _expected_etag(sums: Sequence[bytes]) -> str:
    if len(sums) == 1:
        return sums[0].hex()
    return f"{hashlib.md5(b''.join(sums), usedforsecurity=False).hexdigest()}-{len(sums)}"


def _etag(uri: str) -> str | None:
    head = objects.head_object(uri)
    return None if head is None else str(head["ETag"]).strip('"')


def _upload_parts(uri: str, descriptor: int, parts: Sequence[Part], sums: Sequence[bytes], counter: _Counter) -> None:
    from botocore.exceptions import ClientError

    target = dict(zip(("Bucket", "Key"), objects.split(uri), strict=True))
    identity, present = _unfinished(target, parts, sums)
    if identity is None:
        identity = client().create_multipart_upload(**target)["UploadId"]
    target["UploadId"] = identity
    counter.add(sum(parts[index][1] for index in present))  # what a stopped upload left
    tags: dict[int, str] = {index: f'"{sums[index].hex()}"' for index in present}

    def send(index: int) -> None:
        content, check = _read(descriptor, parts[index]), _base64(sums[index])
        answer = client().upload_part(**target, PartNumber=index + 1, Body=content, ContentMD5=check)
        tags[index] = str(answer["ETag"])
        counter.add(len(content))

    try:
        _in_parallel(send, [index for index in range(len(parts)) if index not in present])
        listed = [{"PartNumber": index + 1, "ETag": tags[index]} for index in range(len(parts))]
        client().complete_multipart_upload(**target, MultipartUpload={"Parts": listed})
    except ClientError as error:
        # The completion was repeated after its answer was lost, or the same file was uploaded twice: done is done.
        if error.response["Error"].get("Code") != "NoSuchUpload" or _etag(uri) != _expected_etag(sums):
            raise


def _unfinished(target: Mapping[str, str], parts: Sequence[Part], sums: Sequence[bytes]) -> tuple[str | None, set[int]]:
    """The unfinished upload with the most parts of this file, and their indices; (None, empty) without any."""
    bucket, key = target["Bucket"], target["Key"]
    pages = client().get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=key)
    uploads = [upload["UploadId"] for page in pages for upload in page.get("Uploads", []) if upload["Key"] == key]
    wanted = {(index + 1, part[1], sums[index].hex()): index for index, part in enumerate(parts)}
    present: dict[str, set[int]] = {}
    for identity in uploads:
        pages = client().get_paginator("list_parts").paginate(**target, UploadId=identity)
        listed = [part for page in pages for part in page.get("Parts", [])]
        facts = [(int(part["PartNumber"]), int(part["Size"]), str(part["ETag"]).strip('"')) for part in listed]
        present[identity] = {wanted[fact] for fact in facts if fact in wanted}
    best = max(present, key=lambda identity: len(present[identity]), default=None)
    return best, present[best] if best else set()
