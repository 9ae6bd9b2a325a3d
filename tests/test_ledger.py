"""The ledger on S3 keeps the promises of the one in a folder: a number is given once, whatever happens to the answers,
and no entry is changed, removed or cut off unnoticed."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError
from data.files import digest
from tasks.registry import ledger
from tasks.s3 import objects as store
from tests.servers import FaultyProxy, S3Server, first

DECISION: dict[str, Any] = {
    "time": "t",
    "action": "promote",
    "actor": "ann",
    "reason": "r",
    "version": "1",
    "to_version": "1",
}
DECISION |= dict.fromkeys(("from_version", "previous", "verdict", "weights"))


def test_of_eight_writers_one_gets_the_number(s3: str) -> None:
    for number in (1, 2):
        seen = ledger.read(s3)
        taken: list[str] = []

        def write(actor: str, seen: list[ledger.Entry] = seen, taken: list[str] = taken) -> None:
            try:
                ledger.append(s3, seen, **{**DECISION, "actor": actor})
            except ledger.Taken:
                taken.append(actor)

        threads = [threading.Thread(target=write, args=(f"writer {index}",)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(taken) == 7 and len(ledger.read(s3)) == number
    assert [one.uri.rpartition("/")[2] for one in store.list_objects(s3)] == ["000001.json", "000002.json"]


@pytest.mark.parametrize("fault", ["lost", "503", "cut", "half"])
def test_an_answer_that_is_lost_neither_loses_nor_doubles_an_entry(
    s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    with FaultyProxy(s3_server.url, first(1, fault, method="PUT")) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        entry = ledger.append(s3, [], **DECISION)
        proxy.fault = first(1, fault, method="GET")
        assert ledger.read(s3) == [entry]
        with pytest.raises(ledger.Taken, match="somebody else decided"):
            ledger.append(s3, [], **DECISION)


@pytest.mark.parametrize("fault", ["edited", "removed", "not an entry", "not JSON"])
def test_tampering_is_found(s3: str, fault: str) -> None:
    entries: list[ledger.Entry] = []
    for _ in range(2):
        entries.append(ledger.append(s3, entries, **DECISION))
    one = store.join(s3, "000001.json")
    content, etag = store.read(one)
    if fault == "edited":
        store.replace(one, content.replace(b'"ann"', b'"bob"'), etag)
    elif fault == "removed":
        store.delete(one)
    else:
        store.replace(one, b"{}" if fault == "not an entry" else b"{", etag)
    with pytest.raises(UserError, match=r"000001\.json.*tampered"):
        ledger.read(s3)


def test_entries_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """They have no account; their hashes were made without it."""
    content = {"number": 1, "before": ledger.START, **DECISION}
    (tmp_path / "000001.json").write_text(json.dumps({**content, "hash": digest(content)}))
    (entry,) = ledger.read(tmp_path)
    assert entry.account is None and entry.actor == "ann"
    ledger.append(tmp_path, [entry], **DECISION, account="pipeline")
    assert [one.account for one in ledger.read(tmp_path)] == [None, "pipeline"]
    second = tmp_path / "000002.json"
    second.write_text(second.read_text().replace("pipeline", "nobody"))
    with pytest.raises(UserError, match="tampered"):
        ledger.read(tmp_path)
