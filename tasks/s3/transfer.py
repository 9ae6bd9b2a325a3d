"""Uploads and downloads in parts, resumed where they stopped, verified when they end."""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data.errors import UserError, UserErrors
from data.files import explain, sha256_bytes, sha256_file
from tasks.s3.objects import (
    SCHEME,
    WORKERS,
    Changed,
    Missing,
    _chunks,
    _read,
    _repeated,
    client,
    explained,
    list_objects,
    relative_name,
    split,
)

PART = 16 * 1024 * 1024  # bytes; S3's least is 5 MiB for all parts but the last
MOST_PARTS = 10_000  # S3's limit for one upload
Progress = Callable[
    [int, int, str], None
]  # (bytes done, bytes in all, the object's name), as data.progress.callback takes them


class _Counter:
    """Bytes done, over all threads; tells `progress`."""

    def __init__(self, progress: Progress | None, total: int, name: str) -> None:
        self.progress, self.total, self.name, self.done, self.lock = progress, total, name, 0, threading.Lock()

    def add(self, count: int) -> None:
        with self.lock:
            self.done += count
            if self.progress is not None:
                self.progress(self.done, self.total, self.name)


def _parts(size: int) -> list[tuple[int, int]]:
    """(offset, length) of every part; an empty object has one empty part."""
    length = max(PART, math.ceil(size / MOST_PARTS))
    return [(offset, min(length, size - offset)) for offset in range(0, size, length)] or [(0, 0)]


def _in_parallel(work: Callable[[int], None], indices: Sequence[int]) -> None:
    """Runs `work` for every index; the first failure stops those not begun yet and is raised."""
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(work, indices))


def download(uri: str, path: str | Path, *, sha256: str | None = None, progress: Progress | None = None) -> str:
    """Brings one object to `path`, whole or not at all, and returns its SHA-256.

    Parts come in parallel, all of one state of the object (its ETag). What was fetched stays in a hidden file beside
    `path` when the download is stopped, and the same call goes on from there. With `sha256` a file that is there
    already is kept, and other content is refused. Raises Missing, or UserError.
    """
    path = Path(path)
    if sha256 is not None and path.is_file() and sha256_file(path) == sha256:
        return sha256
    bucket, key = split(uri)
    with explained(uri):
        head = client().head_object(Bucket=bucket, Key=key)
    size, etag = int(head["ContentLength"]), str(head["ETag"])
    partial = path.with_name(f".{path.name}.{sha256_bytes(f'{uri} {etag} {size}'.encode())[:8]}.tmp")
    journal = partial.with_name(f"{partial.name}.parts")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(journal, "a+") as notes:
            fcntl.flock(notes, fcntl.LOCK_EX)  # a second download of the same object waits for this one
            resumed = _fetch(bucket, key, etag, size, partial, notes, _Counter(progress, size, path.name))
            actual = sha256_file(partial)
            if (
                sha256 is not None and actual != sha256 and resumed
            ):  # a part noted before a power cut may never have reached the disk
                notes.truncate(0)
                _fetch(bucket, key, etag, size, partial, notes, _Counter(progress, size, path.name))
                actual = sha256_file(partial)
            if sha256 is not None and actual != sha256:
                partial.unlink()
                journal.unlink()
                raise UserError(
                    f"{uri}: its SHA-256 is {actual}, expected {sha256}; the object is not the one that was asked for"
                )
            os.replace(partial, path)
            journal.unlink()
    except Changed as error:
        partial.unlink(missing_ok=True)
        journal.unlink(missing_ok=True)
        raise UserError(f"{uri}: it was replaced while it was downloaded; run the same command again") from error
    except OSError as error:
        raise explain(error, path) from error
    return actual


def _fetch(bucket: str, key: str, etag: str, size: int, partial: Path, notes: Any, counter: _Counter) -> bool:
    """Fetches what `notes` does not list yet into `partial`; True when something was there already."""
    parts = _parts(size)
    notes.seek(0)
    whole = {int(line) for line in notes.read().split("\n")[:-1] if line.isdigit()} if partial.is_file() else set()
    if not whole:
        notes.truncate(0)
    lock = threading.Lock()
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.ftruncate(descriptor, size)
        counter.add(sum(parts[index][1] for index in whole))

        def fetch(index: int) -> None:
            _repeated(_fetch_part, bucket, key, etag, descriptor, parts[index], len(parts) == 1)
            with lock:
                notes.write(f"{index}\n")
                notes.flush()
            counter.add(parts[index][1])

        with explained(f"{SCHEME}{bucket}/{key}"):
            _in_parallel(fetch, [index for index in range(len(parts)) if index not in whole])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return bool(whole)


def _fetch_part(bucket: str, key: str, etag: str, descriptor: int, part: tuple[int, int], whole_object: bool) -> None:
    offset, length = part
    asked = (
        {} if whole_object else {"Range": f"bytes={offset}-{offset + length - 1}"}
    )  # without a range boto3 verifies the stored checksum
    answer = client().get_object(Bucket=bucket, Key=key, IfMatch=etag, **asked)
    if int(answer["ContentLength"]) != length:
        raise UserError(
            f"{SCHEME}{bucket}/{key}: the store sent {answer['ContentLength']} bytes where {length} were asked for; it must support ranges"
        )
    done = 0
    for chunk in _chunks(answer):
        os.pwrite(descriptor, chunk, offset + done)
        done += len(chunk)


def download_folder(
    uri: str, folder: str | Path, *, hashes: Mapping[str, str] | None = None, progress: Progress | None = None
) -> dict[str, str]:
    """Every object below the address into `folder`; name (relative, with /) -> SHA-256. `hashes`: the same, expected;
    nothing else is fetched then.

    Files appear one by one, each whole. Raises UserErrors for names that would leave the folder, before anything is
    fetched, and UserError for an empty prefix.
    """
    prefix = uri.rstrip("/") + "/"
    base = split(prefix)[1]
    if hashes is None:
        names, faults = {}, []
        for one in list_objects(prefix):
            key = one.uri.removeprefix(SCHEME).partition("/")[2]
            if key.endswith("/") and one.size == 0:
                continue  # a folder's marker, as web consoles make them
            try:
                names[relative_name(key, base)] = one.uri
            except UserError as error:
                faults.append(str(error))
        if faults:
            raise UserErrors(f"{prefix}: cannot be downloaded", faults)
        if not names:
            raise Missing(f"{prefix}: nothing below this address")
    else:
        names = {relative_name(name, ""): prefix + name for name in hashes}
    return {
        name: download(source, Path(folder) / name, sha256=hashes[name] if hashes else None, progress=progress)
        for name, source in names.items()
    }


def upload(path: str | Path, uri: str, *, progress: Progress | None = None) -> str:
    """Puts a file at `uri` and returns its SHA-256. The object appears whole; an upload in parts that was stopped goes
    on with the parts the store has.

    An object with the same content is left as it is (told by its ETag, the MD5 of the content or of its parts). Raises
    UserError.
    """
    path = Path(path)
    bucket, key = split(uri)
    try:
        size = path.stat().st_size
        parts, sha256 = _parts(size), sha256_file(path)
        counter = _Counter(progress, size, path.name)
        with open(path, "rb") as file:
            sums = [hashlib.md5(_read(file.fileno(), *part), usedforsecurity=False).hexdigest() for part in parts]
            with explained(uri):
                if _etag(bucket, key) == _expected_etag(sums):
                    counter.add(size)
                elif len(parts) == 1:
                    content = _read(file.fileno(), 0, size)
                    client().put_object(Bucket=bucket, Key=key, Body=content, ContentMD5=_base64(sums[0]))
                    counter.add(size)
                else:
                    _upload_parts(bucket, key, file.fileno(), parts, sums, counter)
    except OSError as error:
        raise explain(error, path) from error
    return sha256


def _base64(hexadecimal: str) -> str:
    import base64

    return base64.b64encode(bytes.fromhex(hexadecimal)).decode()


def _expected_etag(sums: Sequence[str]) -> str:
    if len(sums) == 1:
        return sums[0]
    return f"{hashlib.md5(b''.join(map(bytes.fromhex, sums)), usedforsecurity=False).hexdigest()}-{len(sums)}"


def _etag(bucket: str, key: str) -> str | None:
    try:
        with explained(key):
            return str(client().head_object(Bucket=bucket, Key=key)["ETag"]).strip('"')
    except Missing:
        return None


def _upload_parts(
    bucket: str, key: str, descriptor: int, parts: Sequence[tuple[int, int]], sums: Sequence[str], counter: _Counter
) -> None:
    from botocore.exceptions import ClientError

    identity, present = _unfinished(bucket, key, parts, sums)
    if identity is None:
        identity = client().create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    tags: dict[int, str] = {index: f'"{sums[index]}"' for index in present}
    counter.add(sum(parts[index][1] for index in present))  # what a stopped upload left
    arguments = {"Bucket": bucket, "Key": key, "UploadId": identity}

    def send(index: int) -> None:
        offset, length = parts[index]
        content = _read(descriptor, offset, length)
        answer = client().upload_part(**arguments, PartNumber=index + 1, Body=content, ContentMD5=_base64(sums[index]))
        tags[index] = str(answer["ETag"])
        counter.add(length)

    try:
        _in_parallel(send, [index for index in range(len(parts)) if index not in present])
        listed = [{"PartNumber": index + 1, "ETag": tags[index]} for index in range(len(parts))]
        client().complete_multipart_upload(**arguments, MultipartUpload={"Parts": listed})
    except ClientError as error:
        # Our own completion repeated after its answer was lost, or a second upload of the same file: done is done.
        if error.response["Error"].get("Code") != "NoSuchUpload" or _etag(bucket, key) != _expected_etag(sums):
            raise


def _unfinished(
    bucket: str, key: str, parts: Sequence[tuple[int, int]], sums: Sequence[str]
) -> tuple[str | None, set[int]]:
    """The unfinished upload of this key that has the most of our parts, and which; (None, nothing) when there is
    none.
    """
    best: tuple[str | None, set[int]] = (None, set())
    for page in client().get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=key):
        for one in page.get("Uploads", []):
            if one["Key"] != key:
                continue
            present = set()
            for listed in (
                client().get_paginator("list_parts").paginate(Bucket=bucket, Key=key, UploadId=one["UploadId"])
            ):
                for part in listed.get("Parts", []):
                    index = int(part["PartNumber"]) - 1
                    if (
                        index < len(parts)
                        and int(part["Size"]) == parts[index][1]
                        and str(part["ETag"]).strip('"') == sums[index]
                    ):
                        present.add(index)
            if best[0] is None or len(present) > len(best[1]):
                best = (str(one["UploadId"]), present)
    return best
