"""Objects in an S3 store: the only place that speaks to one.

    download("s3://bucket/key", path, sha256=..., progress=...) -> sha256     # parts in parallel; goes on where a stopped one ended; appears whole
    download_folder("s3://bucket/prefix/", folder) -> {name: sha256}
    upload(path, "s3://bucket/key", progress=...) -> sha256                   # the same, through the store's list of parts
    list_objects("s3://bucket/prefix") -> [Object]
    read("s3://bucket/key") -> (bytes, etag), put_new(uri, bytes) -> etag, replace(uri, bytes, etag) -> etag   # compare-and-swap

Endpoint, region, addressing style, credentials and retries come from the standard AWS settings (AWS_ENDPOINT_URL_S3, AWS_REGION, AWS_PROFILE, AWS_MAX_ATTEMPTS,
`s3 = addressing_style = path` in ~/.aws/config, ...), never from names of our own. boto3's own transfers start from the first byte after a stop and do not
keep the parts of an upload, so parts are handled here.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import math
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from data.errors import UserError, UserErrors
from data.files import explain, sha256_bytes, sha256_file

SCHEME = "s3://"
PART = 16 * 1024 * 1024  # bytes; S3's least is 5 MiB for all parts but the last
MOST_PARTS = 10_000  # S3's limit for one upload
WORKERS = 8  # parts in flight
ATTEMPTS = 6  # of one request, with exponential back-off, unless AWS_MAX_ATTEMPTS or the config file says otherwise
CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0
CHUNK = 1024 * 1024
Progress = Callable[[int, int, str], None]  # (bytes done, bytes in all, the object's name), as tasks.progress.callback takes them


class Missing(UserError):
    """There is no such object."""


class Changed(UserError):
    """A conditional write met another state than the one it expected: somebody else was faster."""


class _Cut(Exception):
    """A body that did not arrive whole."""


@dataclass(frozen=True)
class Object:
    """One listed object. `size` in bytes."""

    uri: str
    size: int
    etag: str


def is_s3(uri: str | Path) -> bool:
    return str(uri).startswith(SCHEME)


def split(uri: str) -> tuple[str, str]:
    """(bucket, key) of `s3://bucket/key`; the key may be empty. Raises UserError for anything else, and for a key with `.` or `..` as a part."""
    found = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*))?", uri, re.DOTALL)
    if found is None:
        raise UserError(f"{uri}: not an S3 address; expected s3://BUCKET/KEY")
    key = found[2] or ""
    if any(part in (".", "..") for part in key.split("/")):
        raise UserError(f"{uri}: '.' and '..' are no names of objects")
    return found[1], key


def join(uri: str, *names: str) -> str:
    return "/".join([uri.rstrip("/"), *names])


def relative_name(key: str, prefix: str) -> str:
    """The key without its prefix, as a path that cannot leave the folder it is written into. Raises UserError for one that could."""
    name = key.removeprefix(prefix)
    if not name or "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise UserError(f"{key!r}: not a name that can be written below a folder; rename the object")
    return name


# The client


def client() -> Any:
    """boto3's S3 client for the settings in force now."""
    return _client(tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))))


@functools.lru_cache(maxsize=4)
def _client(settings: tuple[tuple[str, str], ...]) -> Any:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError
    from botocore.session import get_session

    try:
        session = get_session()
        scoped = session.get_scoped_config()
        retries: dict[str, Any] = {}
        if "AWS_RETRY_MODE" not in os.environ and "retry_mode" not in scoped:
            retries["mode"] = "standard"
        if "AWS_MAX_ATTEMPTS" not in os.environ and "max_attempts" not in scoped:
            retries["total_max_attempts"] = ATTEMPTS
        config = Config(
            connect_timeout=CONNECT_SECONDS, read_timeout=READ_SECONDS, max_pool_connections=WORKERS + 2, **({"retries": retries} if retries else {})
        )
        return boto3.session.Session(botocore_session=session).client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"the AWS settings cannot be used ({error}); look at AWS_ENDPOINT_URL_S3, AWS_REGION, AWS_PROFILE and ~/.aws/config") from error


REMEDIES = {
    "NoSuchBucket": "the bucket does not exist; create it, or correct the address",
    "NoSuchKey": "no such object",
    "404": "no such object",
    "InvalidAccessKeyId": "the store does not know this access key; look at AWS_ACCESS_KEY_ID or AWS_PROFILE",
    "SignatureDoesNotMatch": "the secret key is not the one of this access key; look at AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the credentials have expired; renew them",
    "RequestTimeTooSkewed": "this machine's clock and the store's differ too much; set the clock",
    "AccessDenied": "these credentials may not do this here",
    "403": "these credentials may not do this here, or are wrong",
    "NotImplemented": "this store cannot do this; it must support conditional writes (python -m tasks doctor)",
}


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turns boto3's errors into UserError: what the store said and what to do. Missing for an absent object, Changed for a condition that does not hold."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, NoRegionError

    try:
        yield
    except ClientError as error:
        code, status = str(error.response["Error"].get("Code", "")), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code == "404" and error.operation_name == "HeadBucket":
            code = "NoSuchBucket"
        if code in ("NoSuchKey", "404") and error.operation_name != "HeadBucket":
            raise Missing(f"{uri}: {REMEDIES[code]}") from error
        if code in ("PreconditionFailed", "412", "ConditionalRequestConflict"):
            raise Changed(f"{uri}: somebody else wrote it first") from error
        again = f"the store answers {status} ({code}); nothing is lost, run the same command again when it has recovered"
        said = str(error.response["Error"].get("Message", "") or code)
        raise UserError(f"{uri}: {REMEDIES.get(code) or (again if status >= 500 else said)}") from error
    except NoCredentialsError as error:
        raise UserError(f"{uri}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE") from error
    except NoRegionError as error:
        raise UserError(f"{uri}: no region; set AWS_REGION") from error
    except (BotoCoreError, _Cut) as error:
        raise UserError(f"{uri}: the store does not answer ({error}); nothing is lost, run the same command again when it does") from error


# Small objects, and the conditions that make a compare-and-swap


def read(uri: str) -> tuple[bytes, str]:
    """(content, ETag). Raises Missing when there is none. For small objects: the whole of it is held in memory."""
    bucket, key = split(uri)
    with explained(uri):
        for attempt in _attempts():
            with attempt:
                answer = client().get_object(Bucket=bucket, Key=key)
                return b"".join(_chunks(answer)), str(answer["ETag"])
    raise AssertionError  # the last attempt returns or raises


def put_new(uri: str, content: bytes) -> str:
    """Writes an object that must not exist yet; returns its ETag. Raises Changed when there is one."""
    return _put(uri, content, IfNoneMatch="*")


def replace(uri: str, content: bytes, etag: str) -> str:
    """Writes over the state that `read` returned with this ETag; returns the new one. Raises Changed when it has another by now."""
    return _put(uri, content, IfMatch=etag)


def _put(uri: str, content: bytes, **condition: str) -> str:
    """A conditional put. When an answer is lost and the request repeated, the store refuses the repetition: the writer's mark tells that it was our own."""
    bucket, key = split(uri)
    writer = uuid.uuid4().hex
    try:
        with explained(uri):
            return str(client().put_object(Bucket=bucket, Key=key, Body=content, Metadata={"writer": writer}, **condition)["ETag"])
    except Changed:
        try:
            with explained(uri):
                found = client().head_object(Bucket=bucket, Key=key)
        except Missing:
            found = {}
        if found.get("Metadata", {}).get("writer") != writer:
            raise
        return str(found["ETag"])


def delete(uri: str) -> None:
    bucket, key = split(uri)
    with explained(uri):
        client().delete_object(Bucket=bucket, Key=key)


def list_objects(uri: str) -> list[Object]:
    """All objects whose keys start with the address's, sorted by key. Raises UserError for a bucket that does not exist."""
    bucket, key = split(uri)
    with explained(uri):
        pages = client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
        found = [Object(f"{SCHEME}{bucket}/{one['Key']}", int(one["Size"]), str(one["ETag"])) for page in pages for one in page.get("Contents", [])]
    return sorted(found, key=lambda one: one.uri)


def server_time(uri: str) -> datetime:
    """What the store's clock says, from its answer about the bucket; so it also proves that the bucket is there and may be read."""
    bucket, _ = split(uri)
    with explained(f"{SCHEME}{bucket}"):
        answer = client().head_bucket(Bucket=bucket)
    return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).astimezone(UTC)


# Large objects, in parts


def _attempts() -> Iterator[Any]:
    """Repeats what was cut off while a body was read, which boto3's own retries do not cover."""
    from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

    return iter(Retrying(retry=retry_if_exception_type(_Cut), stop=stop_after_attempt(ATTEMPTS), wait=wait_exponential_jitter(0.2, 10), reraise=True))


def _chunks(answer: Mapping[str, Any]) -> Iterator[bytes]:
    """The body of an answer. Raises _Cut when it ends early, stalls or does not have the checksum that the store keeps."""
    from botocore.exceptions import FlexibleChecksumError, HTTPClientError, IncompleteReadError

    done = 0
    try:
        for chunk in answer["Body"].iter_chunks(CHUNK):
            done += len(chunk)
            yield chunk
    except (HTTPClientError, IncompleteReadError, FlexibleChecksumError, ConnectionError, TimeoutError) as error:
        raise _Cut(str(error)) from error
    if done != int(answer["ContentLength"]):
        raise _Cut(f"{done} of {answer['ContentLength']} bytes arrived")


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
        running = [pool.submit(work, index) for index in indices]
        try:
            for future in running:
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def download(uri: str, path: str | Path, *, sha256: str | None = None, progress: Progress | None = None) -> str:
    """Brings one object to `path`, whole or not at all, and returns its SHA-256.

    Parts come in parallel, all of one state of the object (its ETag). What was fetched stays in a hidden file beside `path` when the download is stopped, and
    the same call goes on from there. With `sha256` a file that is there already is kept, and other content is refused. Raises Missing, or UserError.
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
            if sha256 is not None and actual != sha256 and resumed:  # a part noted before a power cut may never have reached the disk
                notes.truncate(0)
                _fetch(bucket, key, etag, size, partial, notes, _Counter(progress, size, path.name))
                actual = sha256_file(partial)
            if sha256 is not None and actual != sha256:
                partial.unlink()
                journal.unlink()
                raise UserError(f"{uri}: its SHA-256 is {actual}, expected {sha256}; the object is not the one that was asked for")
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
            offset, length = parts[index]
            for attempt in _attempts():
                with attempt:
                    _fetch_part(bucket, key, etag, descriptor, offset, length, whole_object=len(parts) == 1)
            with lock:
                notes.write(f"{index}\n")
                notes.flush()
            counter.add(length)

        with explained(f"{SCHEME}{bucket}/{key}"):
            _in_parallel(fetch, [index for index in range(len(parts)) if index not in whole])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return bool(whole)


def _fetch_part(bucket: str, key: str, etag: str, descriptor: int, offset: int, length: int, whole_object: bool) -> None:
    asked = {} if whole_object else {"Range": f"bytes={offset}-{offset + length - 1}"}  # without a range boto3 verifies the stored checksum
    answer = client().get_object(Bucket=bucket, Key=key, IfMatch=etag, **asked)
    if int(answer["ContentLength"]) != length:
        raise UserError(f"{SCHEME}{bucket}/{key}: the store sent {answer['ContentLength']} bytes where {length} were asked for; it must support ranges")
    done = 0
    for chunk in _chunks(answer):
        os.pwrite(descriptor, chunk, offset + done)
        done += len(chunk)


def download_folder(uri: str, folder: str | Path, *, hashes: Mapping[str, str] | None = None, progress: Progress | None = None) -> dict[str, str]:
    """Every object below the address into `folder`; name (relative, with /) -> SHA-256. `hashes`: the same, expected; nothing else is fetched then.

    Files appear one by one, each whole. Raises UserErrors for names that would leave the folder, before anything is fetched, and UserError for an empty prefix.
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
    return {name: download(source, Path(folder) / name, sha256=hashes[name] if hashes else None, progress=progress) for name, source in names.items()}


def upload(path: str | Path, uri: str, *, progress: Progress | None = None) -> str:
    """Puts a file at `uri` and returns its SHA-256. The object appears whole; an upload in parts that was stopped goes on with the parts the store has.

    An object with the same content is left as it is (told by its ETag, the MD5 of the content or of its parts). Raises UserError.
    """
    path = Path(path)
    bucket, key = split(uri)
    try:
        size = path.stat().st_size
        parts, sha256 = _parts(size), sha256_file(path)
        counter = _Counter(progress, size, path.name)
        with open(path, "rb") as file:
            sums = [_md5(file.fileno(), *part) for part in parts]
            with explained(uri):
                if _etag(bucket, key) == _expected_etag(sums):
                    counter.add(size)
                elif len(parts) == 1:
                    content = os.pread(file.fileno(), size, 0)
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


def _md5(descriptor: int, offset: int, length: int) -> str:
    found, done = hashlib.md5(usedforsecurity=False), 0
    while done < length:
        chunk = os.pread(descriptor, min(CHUNK, length - done), offset + done)
        if not chunk:
            raise UserError("the file became shorter while it was read; run the same command again")
        found.update(chunk)
        done += len(chunk)
    return found.hexdigest()


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


def _upload_parts(bucket: str, key: str, descriptor: int, parts: Sequence[tuple[int, int]], sums: Sequence[str], counter: _Counter) -> None:
    from botocore.exceptions import ClientError

    identity, present = _unfinished(bucket, key, parts, sums)
    if identity is None:
        identity = client().create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    tags: dict[int, str] = {index: f'"{sums[index]}"' for index in present}
    counter.add(sum(parts[index][1] for index in present))  # what a stopped upload left
    arguments = {"Bucket": bucket, "Key": key, "UploadId": identity}

    def send(index: int) -> None:
        offset, length = parts[index]
        content = os.pread(descriptor, length, offset)
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


def _unfinished(bucket: str, key: str, parts: Sequence[tuple[int, int]], sums: Sequence[str]) -> tuple[str | None, set[int]]:
    """The unfinished upload of this key that has the most of our parts, and which; (None, nothing) when there is none."""
    best: tuple[str | None, set[int]] = (None, set())
    for page in client().get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=key):
        for one in page.get("Uploads", []):
            if one["Key"] != key:
                continue
            present = set()
            for listed in client().get_paginator("list_parts").paginate(Bucket=bucket, Key=key, UploadId=one["UploadId"]):
                for part in listed.get("Parts", []):
                    index = int(part["PartNumber"]) - 1
                    if index < len(parts) and int(part["Size"]) == parts[index][1] and str(part["ETag"]).strip('"') == sums[index]:
                        present.add(index)
            if best[0] is None or len(present) > len(best[1]):
                best = (str(one["UploadId"]), present)
    return best
