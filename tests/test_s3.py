"""S3: an object arrives whole or not at all, a transfer that was stopped goes on where it ended, a conditional write
has one winner, and every fault of the store is either survived or told in one line. Against a real store, with a proxy
that puts the faults in."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest

from data.errors import Outage, UserError, UserErrors
from data.files import sha256_bytes, sha256_file
from tasks.s3 import objects as store
from tasks.s3 import transfer
from tests.servers import FaultyProxy, S3Server, first

PART = 256 * 1024


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four parts of a file that a test can afford. What is downloaded may be cut as one likes."""
    monkeypatch.setattr(transfer, "PART", PART)


@pytest.fixture
def upload_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """For uploads: S3 refuses parts under five mebibytes, but for the last."""
    monkeypatch.setattr(transfer, "PART", 5 * 1024 * 1024)


@pytest.fixture
def proxy(s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3_server.url) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", between.url)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
        yield between


def content(size: int, seed: int = 0) -> bytes:
    return np.random.Generator(np.random.PCG64(seed)).bytes(size)


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """Three parts of an upload."""
    path = tmp_path / "big.bin"
    path.write_bytes(content(2 * 5 * 1024 * 1024 + 123))
    return path


@pytest.fixture
def stored(s3: str) -> tuple[str, str]:
    """(address, SHA-256) of four parts of a download."""
    body = content(3 * PART + 123)
    store.put_new(f"{s3}/stored", body)
    return f"{s3}/stored", sha256_bytes(body)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("size", [0, 1, PART])
def test_what_goes_up_comes_down(s3: str, tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_bytes(content(size))
    done: list[tuple[int, int, str]] = []
    sent = transfer.upload(tmp_path / "file", f"{s3}/file")
    got = transfer.download(f"{s3}/file", tmp_path / "down" / "file", progress=lambda *told: done.append(told))
    assert sent == got == sha256_bytes(content(size)) == sha256_file(tmp_path / "down" / "file")
    assert done[-1] == (size, size, "file") and names(tmp_path / "down") == ["file"]
    assert [(item.uri, item.size) for item in store.list_objects(s3)] == [(f"{s3}/file", size)]


def test_a_file_that_is_there_already_is_neither_sent_nor_fetched_again(
    proxy: FaultyProxy, upload_parts: None, s3: str, big: Path, tmp_path: Path
) -> None:
    done: list[tuple[int, int, str]] = []
    hashed = transfer.upload(big, f"{s3}/big", progress=lambda *told: done.append(told))
    size = big.stat().st_size
    assert len(done) == 4 and done[-1] == (size, size, "big.bin")
    assert transfer.download(f"{s3}/big", tmp_path / "down") == hashed == sha256_file(big)
    proxy.seen.clear()
    assert transfer.upload(big, f"{s3}/big") == hashed
    assert transfer.download(f"{s3}/big", tmp_path / "down", sha256=hashed) == hashed
    assert [method for method, *_ in proxy.seen] == ["HEAD"]


def test_other_content_than_expected_is_refused_and_leaves_nothing(s3: str, tmp_path: Path) -> None:
    store.put_new(f"{s3}/file", b"poisoned")
    with pytest.raises(UserError, match="not the one that was asked for"):
        transfer.download(f"{s3}/file", tmp_path / "down" / "file", sha256="0" * 64)
    assert names(tmp_path / "down") == []


@pytest.mark.parametrize("fault", ["500", "503", "cut", "lost", "half"])
def test_faults_that_pass_are_survived(proxy: FaultyProxy, stored: tuple[str, str], tmp_path: Path, fault: str) -> None:
    (tmp_path / "file").write_bytes(b"small")
    proxy.fault = first(2, fault)
    transfer.upload(tmp_path / "file", stored[0] + ".small")
    proxy.fault = first(2, fault, method="GET")
    assert transfer.download(stored[0], tmp_path / "down") == stored[1] == sha256_file(tmp_path / "down")
    assert [name for *_, name in proxy.seen].count(fault) == 4


def test_faults_during_the_parts_of_an_upload_are_survived(
    proxy: FaultyProxy, upload_parts: None, s3: str, big: Path
) -> None:
    """Also when the answer to the completion is lost: its repetition finds no upload any more."""
    faults = iter(["500", "lost", "cut", "503"])
    proxy.fault = lambda method, path: next(faults, None) if "partNumber=" in path else ended(method, path)
    ended = first(1, "lost", method="POST", containing="uploadId=")
    transfer.upload(big, f"{s3}/big")
    assert store.list_objects(s3)[0].size == big.stat().st_size
    assert [name for *_, name in proxy.seen].count("lost") == 2


@pytest.mark.parametrize("fault", ["500", "cut", "half"])
def test_a_download_that_was_given_up_goes_on_where_it_ended(
    proxy: FaultyProxy, stored: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(store, "ATTEMPTS", 2)
    monkeypatch.setattr(store, "WORKERS", 1)  # one part after the other, so that the test knows which are there
    gets = iter(range(100))
    proxy.fault = lambda method, path: fault if method == "GET" and next(gets) >= 2 else None
    with pytest.raises(Outage, match=r"stored: .*run the same command again"):
        transfer.download(stored[0], tmp_path / "down" / "file")
    assert not (tmp_path / "down" / "file").exists()
    proxy.fault = lambda method, path: None
    proxy.seen.clear()
    assert transfer.download(stored[0], tmp_path / "down" / "file") == stored[1]
    assert [method for method, *_ in proxy.seen].count("GET") == 2  # of four
    assert names(tmp_path / "down") == ["file"]


def test_parts_that_were_noted_but_lost_are_fetched_anew(
    proxy: FaultyProxy, stored: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a power cut may leave it: the note reached the disk, the bytes did not."""
    monkeypatch.setattr(store, "WORKERS", 1)
    gets = iter(range(100))
    proxy.fault = lambda method, path: "500" if method == "GET" and next(gets) >= 2 else None
    with pytest.raises(UserError):
        transfer.download(stored[0], tmp_path / "down" / "file", sha256=stored[1])
    proxy.fault = lambda method, path: None
    (partial,) = (path for path in (tmp_path / "down").iterdir() if path.suffix == ".tmp")
    partial.write_bytes(bytes(partial.stat().st_size))
    assert transfer.download(stored[0], tmp_path / "down" / "file", sha256=stored[1]) == stored[1]
    assert names(tmp_path / "down") == ["file"]


def test_an_upload_that_was_given_up_goes_on_with_the_parts_that_the_store_has(
    proxy: FaultyProxy, upload_parts: None, s3: str, big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "WORKERS", 1)
    proxy.fault = lambda method, path: "503" if "partNumber=2" in path else None
    with pytest.raises(Outage, match="run the same command again"):
        transfer.upload(big, f"{s3}/big")
    assert store.list_objects(s3) == []  # nothing is readable in part
    proxy.fault = lambda method, path: None
    proxy.seen.clear()
    transfer.upload(big, f"{s3}/big")
    sent = {path.split("partNumber=")[1][0] for method, path, _ in proxy.seen if method == "PUT"}
    assert {"2"} <= sent <= {"2", "3"}  # the third may have been under way when the second failed
    assert transfer.download(f"{s3}/big", tmp_path / "down") == sha256_file(big)


def test_parts_of_an_earlier_state_of_the_file_are_not_mixed_in(
    proxy: FaultyProxy, upload_parts: None, s3: str, big: Path, tmp_path: Path
) -> None:
    proxy.fault = lambda method, path: "503" if "partNumber=3" in path else None
    with pytest.raises(UserError):
        transfer.upload(big, f"{s3}/big")
    proxy.fault = lambda method, path: None
    changed = bytearray(big.read_bytes())
    changed[0] ^= 1
    big.write_bytes(changed)
    expected = sha256_bytes(bytes(changed))
    assert transfer.upload(big, f"{s3}/big") == transfer.download(f"{s3}/big", tmp_path / "down") == expected


def test_an_object_replaced_during_its_download_is_told(
    proxy: FaultyProxy, stored: tuple[str, str], s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "WORKERS", 1)
    bucket, key = store.split(stored[0])
    other, direct = content(3 * PART + 123, seed=1), boto3.client("s3", endpoint_url=s3_server.url)
    replaced = threading.Event()

    def replace(method: str, path: str) -> None:
        if method == "GET" and not replaced.is_set():
            replaced.set()
            direct.put_object(Bucket=bucket, Key=key, Body=other)

    proxy.fault = replace  # type: ignore[assignment]
    with pytest.raises(UserError, match="replaced while it was downloaded"):
        transfer.download(stored[0], tmp_path / "down" / "file")
    assert names(tmp_path / "down") == []
    assert transfer.download(stored[0], tmp_path / "down" / "file") == sha256_bytes(other)


def test_a_slow_answer_is_waited_for_and_a_stalled_one_is_not(
    proxy: FaultyProxy, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_new(f"{s3}/file", b"x")
    monkeypatch.setattr(store, "READ_SECONDS", 0.5)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    proxy.delay, proxy.fault = 0.2, first(1, "slow")
    assert store.read(f"{s3}/file")[0] == b"x"
    proxy.delay, proxy.fault = 5.0, first(9, "slow")
    with pytest.raises(Outage, match="the store does not answer"):
        store.read(f"{s3}/file")


def test_of_many_conditional_writes_one_wins(s3: str) -> None:
    def race(write: Callable[[bytes], object]) -> list[str]:
        won: list[str] = []

        def attempt(name: str) -> None:
            try:
                write(name.encode())
                won.append(name)
            except store.Changed:
                pass

        threads = [threading.Thread(target=attempt, args=(f"writer {index}",)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return won

    (winner,) = race(lambda body: store.put_new(f"{s3}/new", body))
    body, etag = store.read(f"{s3}/new")
    assert body.decode() == winner
    # SeaweedFS 4.48 has been seen to let two If-Match writers of one moment win, and to keep what neither of them wrote
    # (docs/log.md): so the ledger rests on new objects alone, and of a replaced one no more is asked than that it is
    # whole, and that a late writer is told.
    assert race(lambda body: store.replace(f"{s3}/new", body, etag))
    assert store.read(f"{s3}/new")[0].decode() in {f"writer {index}" for index in range(8)}
    with pytest.raises(store.Changed):
        store.replace(f"{s3}/new", b"late", etag)


@pytest.mark.parametrize("fault", ["lost", "half"])
def test_a_conditional_write_whose_answer_is_lost_knows_its_own_hand(proxy: FaultyProxy, s3: str, fault: str) -> None:
    """The repetition meets the object that the first request wrote: that is a success, not a lost race."""
    proxy.fault = first(1, fault, method="PUT")
    etag = store.put_new(f"{s3}/entry", b"mine")
    proxy.fault = first(1, fault, method="PUT")
    store.replace(f"{s3}/entry", b"mine too", etag)
    assert store.read(f"{s3}/entry")[0] == b"mine too"
    with pytest.raises(store.Changed):
        store.put_new(f"{s3}/entry", b"theirs")
    with pytest.raises(store.Changed):
        store.replace(f"{s3}/entry", b"theirs", etag)


def test_names_that_would_leave_the_folder_are_refused(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This store refuses to keep such names; another one might not."""
    hostile = ["/etc/passwd", "a/../../up", "/etc/passwd/..", "a//b", "a/./b", "a\0b", "a\\..\\b", ".."]
    listed = [store.Object(f"{s3}/set/{name}", 1, "e") for name in ["good", *hostile]]
    monkeypatch.setattr(store, "list_objects", lambda uri: listed)
    with pytest.raises(UserErrors, match="cannot be downloaded") as error:
        transfer.download_folder(f"{s3}/set", tmp_path / "down")
    assert len(error.value.faults) == len(hostile) and not (tmp_path / "down").exists()
    with pytest.raises(UserError, match="not a name"):
        transfer.download_folder(f"{s3}/set", tmp_path / "down", hashes={"../up": "0" * 64})
    for uri in ("s3://bucket/../other", "s3://bucket/a/..", "http://bucket/key", "s3:///key", "s3://Bad_Bucket/key"):
        with pytest.raises(UserError):
            store.split(uri)


def test_a_folder_comes_whole_and_with_its_hashes(s3: str, tmp_path: Path) -> None:
    for name in ("a.txt", "b/c.txt"):
        store.put_new(f"{s3}/set/{name}", name.encode())
    store.put_new(f"{s3}/settings", b"not below")
    hashes = transfer.download_folder(f"{s3}/set", tmp_path / "down")
    assert hashes == {name: sha256_bytes(name.encode()) for name in ("a.txt", "b/c.txt")}
    assert (tmp_path / "down/b/c.txt").read_text() == "b/c.txt"
    part = {"b/c.txt": hashes["b/c.txt"]}
    assert transfer.download_folder(f"{s3}/set", tmp_path / "again", hashes=part) == part
    with pytest.raises(store.Missing, match="nothing below"):
        transfer.download_folder(f"{s3}/none", tmp_path / "none")


def test_every_refusal_is_one_line_that_says_what_to_do(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    with pytest.raises(store.Missing, match="no such object"):
        store.read(f"{s3}/none")
    with pytest.raises(UserError, match="create it, or correct the address"):
        store.list_objects("s3://no-such-bucket/x")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    cases = [
        ("AWS_SECRET_ACCESS_KEY", "wrong", "not the one of this access key"),
        ("AWS_ACCESS_KEY_ID", "unknown", "does not know this access key"),
        ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1", "does not answer"),
        ("AWS_ENDPOINT_URL_S3", "nonsense", "AWS_ENDPOINT_URL_S3"),
    ]
    for name, value, words in cases:
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(UserError, match=words) as error:
                store.read(f"{s3}/none")
            assert secret not in str(error.value) and "\n" not in str(error.value)
            assert isinstance(error.value, Outage) is (words == "does not answer")  # only silence passes by itself
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match="no credentials"):
        store.read(f"{s3}/none")
