"""Who became champion, when and why: an append-only chain of files, `000001.json`, `000002.json`, ...

Taking the next number is the compare-and-swap that the registry's aliases lack: of two writers that saw the same head, one gets the name and the other is
told. Each entry holds the hash of the one before, so an entry changed or removed later is found on the next read. The ledger is the truth about champions;
aliases are a copy of its last entry.
"""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import digest, explain, read_json

START = "0" * 64


class Taken(UserError):
    """Somebody else wrote the next entry first."""


@dataclass(frozen=True)
class Entry:
    """One decision. Versions are the registry's, as text; None is none."""

    number: int  # from 1, without gaps
    before: str  # hash of the entry before (64 zeros for the first)
    time: str  # ISO 8601, UTC
    action: str  # "promote", "rollback" or "reject"
    actor: str
    reason: str
    version: str  # the version decided on
    from_version: str | None  # champion before
    to_version: str | None  # champion after
    previous: str | None  # where a rollback after this entry leads
    verdict: str | None  # SHA-256 of the verdict that allowed it
    weights: str | None  # digest of the weight files' hashes
    hash: str  # of everything above


def _hash(content: dict[str, Any]) -> str:
    return digest({key: value for key, value in content.items() if key != "hash"})


def read(folder: Path) -> list[Entry]:
    """All entries in order, verified; an absent folder is an empty ledger.

    Raises UserError naming the first entry that is missing, damaged or not what was written.
    """
    names = sorted(path.name for path in folder.glob("*.json") if not path.name.startswith(".")) if folder.is_dir() else []
    entries: list[Entry] = []
    before = START
    for number, name in enumerate(names, 1):
        path = folder / name
        if name != f"{number:06d}.json":
            raise UserError(f"{folder}: entry {number:06d}.json is missing (next is {name}); the ledger was tampered with: restore it from a backup")
        content = read_json(path)
        if not isinstance(content, dict) or set(content) != {field.name for field in fields(Entry)}:
            raise UserError(f"{path}: not a ledger entry (its keys differ); the ledger was tampered with: restore it from a backup")
        if content["number"] != number or content["before"] != before or content["hash"] != _hash(content):
            raise UserError(f"{path}: its hash does not fit its content and the entries before it; the ledger was tampered with: restore it from a backup")
        entries.append(Entry(**content))
        before = content["hash"]
    return entries


def append(folder: Path, entries: list[Entry], **decision: Any) -> Entry:
    """Writes the entry that follows `entries` (the ledger as the caller saw it when deciding). `decision` gives the fields but number, before and hash.

    The file is written whole under another name, then linked to its own: linking fails if the name exists. Raises Taken when somebody was faster.
    """
    content: dict[str, Any] = {"number": len(entries) + 1, "before": entries[-1].hash if entries else START, **decision}
    entry = Entry(**content, hash=_hash(content))
    path = folder / f"{entry.number:06d}.json"
    temporary = folder / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(entry), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except FileExistsError as error:
        raise Taken(f"{path}: somebody else decided at the same moment; look at `python -m tasks registry` and decide again") from error
    except OSError as error:
        raise explain(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)
    return entry
