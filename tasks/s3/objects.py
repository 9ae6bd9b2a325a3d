"""Objects in an S3 store: the only place that speaks to it. tasks/s3/transfer.py moves files in parts.

    list_objects("s3://bucket/prefix") -> [Object]
    read("s3://bucket/key") -> (bytes, etag)
    put_new(uri, bytes) -> etag, replace(uri, bytes, etag) -> etag    # compare-and-swap

Endpoint, region, addressing style, credentials and retries come from the standard AWS settings (AWS_ENDPOINT_URL_S3,
AWS_REGION, AWS_PROFILE, AWS_MAX_ATTEMPTS, `s3 = addressing_style = path` in ~/.aws/config, ...).
"""

from __future__ import annotations

import functools
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from data.errors import Outage, UserError, causes

SCHEME = "s3://"
WORKERS = 8  # parts in flight
ATTEMPTS = 6  # of one request, with exponential back-off, unless AWS_MAX_ATTEMPTS or the config file says otherwise
CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0
CHUNK = 1024 * 1024
T = TypeVar("T")


class Missing(UserError):
    """There is no such object."""


class NotConfigured(UserError):
    """The AWS settings name no credentials, or no region."""


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
    """(bucket, key) of `s3://bucket/key`; the key may be empty. Raises UserError, also for `.` and `..` in it."""
    match = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*))?", uri, re.DOTALL)
    if match is None:
        raise UserError(f"{uri}: not an S3 address; expected s3://BUCKET/KEY")
    key = match[2] or ""
    if any(part in (".", "..") for part in key.split("/")):
        raise UserError(f"{uri}: '.' and '..' are no names of objects")
    return match[1], key


def join(uri: str, *names: str) -> str:
    return "/".join([uri.rstrip("/"), *names])


def relative_name(key: str, prefix: str) -> str:
    """The key without its prefix. Raises UserError if it would lead out of the folder it is written to."""
    name = key.removeprefix(prefix)
    if not name or "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise UserError(f"{key!r}: not a name that can be written below a folder; rename the object")
    return name


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
        chosen = session.get_scoped_config()
        retries: dict[str, Any] = {}
        if "AWS_RETRY_MODE" not in os.environ and "retry_mode" not in chosen:
            retries["mode"] = "standard"
        if "AWS_MAX_ATTEMPTS" not in os.environ and "max_attempts" not in chosen:
            retries["total_max_attempts"] = ATTEMPTS
        limits = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS, "max_pool_connections": WORKERS + 2}
        config = Config(**limits, retries=retries or None)
        return boto3.session.Session(botocore_session=session).client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        remedy = "look at AWS_ENDPOINT_URL_S3, AWS_REGION, AWS_PROFILE and ~/.aws/config"
        raise UserError(f"the AWS settings cannot be used ({error}); {remedy}") from error


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


def is_outage(error: BaseException) -> bool:
    """Whether the store did not answer, or answered that it cannot now: by botocore's types and the HTTP status.

    s3fs, which DVC uses, raises the same, or its own errors from them.
    """
    from botocore import exceptions as boto

    silent = (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, _Cut, ConnectionError, TimeoutError)
    for cause in causes(error):
        status = _status(cause) if isinstance(cause, boto.ClientError) else 0
        if isinstance(cause, silent) or (status >= 500 and status != 501) or status == 429:
            return True
    return False


def _status(error: Any) -> int:
    """The HTTP status of a botocore ClientError, 0 where it has none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turns boto3's errors into UserError: what the store said and what to do.

    Outage when it does not answer, Missing for an absent object, Changed for a condition that does not hold.
    """
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, NoRegionError

    again = "nothing is lost, run the same command again when it has recovered"
    try:
        yield
    except ClientError as error:
        detail = error.response["Error"]
        code, of_bucket = str(detail.get("Code", "")), error.operation_name == "HeadBucket"
        if code == "404" and of_bucket:
            code = "NoSuchBucket"
        if code in ("NoSuchKey", "404") and not of_bucket:
            raise Missing(f"{uri}: {REMEDIES[code]}") from error
        if code in ("PreconditionFailed", "412", "ConditionalRequestConflict"):
            raise Changed(f"{uri}: somebody else wrote it first") from error
        if is_outage(error):
            raise Outage(f"{uri}: the store answers {_status(error)} ({code}); {again}") from error
        raise UserError(f"{uri}: {REMEDIES.get(code) or detail.get('Message') or code}") from error
    except NoCredentialsError as error:
        remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        raise NotConfigured(f"{uri}: no credentials; {remedy}") from error
    except NoRegionError as error:
        raise NotConfigured(f"{uri}: no region; set AWS_REGION") from error
    except (BotoCoreError, _Cut) as error:
        if is_outage(error):
            raise Outage(f"{uri}: the store does not answer ({error}); {again}") from error
        raise UserError(f"{uri}: {error}; look at the AWS settings") from error


def read(uri: str) -> tuple[bytes, str]:
    """(content, ETag). Raises Missing when there is none. For small objects: the whole of it is held in memory."""
    bucket, key = split(uri)

    def get() -> tuple[bytes, str]:
        answer = client().get_object(Bucket=bucket, Key=key)
        return b"".join(chunks(answer)), str(answer["ETag"])

    with explained(uri):
        return repeated(get)


def put_new(uri: str, content: bytes) -> str:
    """Writes an object that must not exist yet; returns its ETag. Raises Changed when there is one."""
    return _put(uri, content, IfNoneMatch="*")


def replace(uri: str, content: bytes, etag: str) -> str:
    """Overwrites the state that has this ETag; returns the new ETag. Raises Changed if it has another by now."""
    return _put(uri, content, IfMatch=etag)


def _put(uri: str, content: bytes, **condition: str) -> str:
    """A conditional put. When an answer is lost and the request repeated, the store refuses the repetition: the
    writer's mark on the object tells that it was written here."""
    bucket, key = split(uri)
    mark = {"writer": uuid.uuid4().hex}
    try:
        with explained(uri):
            answer = client().put_object(Bucket=bucket, Key=key, Body=content, Metadata=mark, **condition)
            return str(answer["ETag"])
    except Changed:
        head = head_object(uri)
        if head is None or head.get("Metadata", {}).get("writer") != mark["writer"]:
            raise
        return str(head["ETag"])


def head_object(uri: str) -> dict[str, Any] | None:
    """The store's record of an object: ContentLength, ETag, Metadata, ...; None when there is none."""
    bucket, key = split(uri)
    try:
        with explained(uri):
            return dict(client().head_object(Bucket=bucket, Key=key))
    except Missing:
        return None


def delete(uri: str) -> None:
    bucket, key = split(uri)
    with explained(uri):
        client().delete_object(Bucket=bucket, Key=key)


def list_objects(uri: str) -> list[Object]:
    """Objects whose keys start with the address's, by key. Raises UserError where there is no bucket."""
    bucket, key = split(uri)
    with explained(uri):
        pages = client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
        entries = [entry for page in pages for entry in page.get("Contents", [])]
    listed = [Object(f"{SCHEME}{bucket}/{entry['Key']}", int(entry["Size"]), str(entry["ETag"])) for entry in entries]
    return sorted(listed, key=lambda item: item.uri)


def server_time(uri: str) -> datetime:
    """What the store's clock says, from its answer about the bucket, which must exist and be readable."""
    bucket, _ = split(uri)
    with explained(f"{SCHEME}{bucket}"):
        answer = client().head_bucket(Bucket=bucket)
    return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).astimezone(UTC)


def repeated(work: Callable[..., T], *arguments: Any) -> T:
    """Repeats what was cut off while a body was read, which boto3's own retries do not cover."""
    from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

    stop, wait = stop_after_attempt(ATTEMPTS), wait_exponential_jitter(0.2, 10)
    return Retrying(retry=retry_if_exception_type(_Cut), stop=stop, wait=wait, reraise=True)(work, *arguments)


def chunks(answer: Mapping[str, Any]) -> Iterator[bytes]:
    """The body of an answer. `repeated` takes another try where it ends early, stalls or has another checksum."""
    from botocore.exceptions import FlexibleChecksumError, HTTPClientError, IncompleteReadError

    try:
        yield from answer["Body"].iter_chunks(CHUNK)
    except (HTTPClientError, IncompleteReadError, FlexibleChecksumError, ConnectionError, TimeoutError) as error:
        raise _Cut(str(error)) from error
