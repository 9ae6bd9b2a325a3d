"""Who became champion, when and why: an append-only chain of entries, `000001.json`, `000002.json`, ..., in a folder or
below an S3 address.

MLflow's aliases have no compare-and-swap and no history; taking the ledger's next number is both: of two writers that
saw the same head, the first gets the name and the second is refused. In a folder the name is taken by an exclusive
link, in an S3 store by a put that must not find an object there (`If-None-Match: *`). Each entry holds the hash of the
entry before, so that an entry changed or removed later is noticed by the next read. The ledger is the truth about
champions; the aliases copy its last entry.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import digest, explain, read_json, sync
from tasks.s3 import objects

START = "0" * 64
Place = Path | str  # a folder, or "s3://BUCKET/PREFIX"
LATER_FIELDS = {"account"}  # that entries written by earlier versions lack
TAMPERED = "the ledger was tampered with: restore it from a backup"


class Taken(UserError):
    """Somebody else wrote the next entry first."""


@dataclass(frozen=True)
class Entry:
    """One decision. Versions are the registry's, as text; None is none."""

    number: int  # from 1, without gaps
    before: str  # hash of the entry before (64 zeros for the first)
    time: str  # ISO 8601, UTC
    action: str  # "promote", "rollback" or "reject"
    actor: str  # who decided, as they said
    reason: str
    version: str  # the version decided on
    from_version: str | None  # champion before
    to_version: str | None  # champion after
    previous: str | None  # where a rollback after this entry leads
    verdict: str | None  # SHA-256 of the verdict that allowed it
    weights: str | None  # digest of the weight files' hashes
    hash: str  # of everything above, and of `account` where there is one
    account: str | None = None  # whose credentials or system account wrote it; None in entries of earlier versions


def read(place: Place) -> list[Entry]:
    """All entries in order, verified; an absent folder or prefix is an empty ledger.

    Raises UserError naming the first entry that is missing, damaged or not what was written.
    """
    entries: list[Entry] = []
    before = START
    keys = {field.name for field in fields(Entry)}
    for number, (name, content) in enumerate(_contents(place), 1):
        if name != f"{number:06d}.json":
            raise UserError(f"{place}: entry {number:06d}.json is missing (next is {name}); {TAMPERED}")
        if not isinstance(content, dict) or not keys - LATER_FIELDS <= set(content) <= keys:
            raise UserError(f"{place}/{name}: not a ledger entry (its keys differ); {TAMPERED}")
        if content["number"] != number or content["before"] != before or content["hash"] != _sha256(content):
            fault = "its hash does not fit its content and the entries before it"
            raise UserError(f"{place}/{name}: {fault}; {TAMPERED}")
        entries.append(Entry(**content))
        before = content["hash"]
    return entries


def append(place: Place, entries: Sequence[Entry], **decision: Any) -> Entry:
    """Writes the entry that follows `entries` (the ledger as the caller saw it when deciding). `decision` gives the
    fields but number, before and hash.

    It appears whole under the next number or not at all. Raises Taken when somebody was faster.
    """
    before = entries[-1].hash if entries else START
    content = {"number": len(entries) + 1, "before": before, "account": None, **decision}
    entry = Entry(**content, hash=_sha256(content))
    name = f"{entry.number:06d}.json"
    text = json.dumps(asdict(entry), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        if isinstance(place, Path):
            _link_new(place / name, text)
        else:
            objects.put_new(objects.join(place, name), text.encode())
    except (FileExistsError, objects.Changed) as error:
        remedy = "look at `python -m tasks registry` and decide again"
        raise Taken(f"{place}/{name}: somebody else decided at the same moment; {remedy}") from error
    return entry


def _sha256(content: dict[str, Any]) -> str:
    """What an entry's `hash` must be: SHA-256 of all else in it, as canonical JSON."""
    return digest({key: value for key, value in content.items() if key != "hash"})


def _contents(place: Place) -> list[tuple[str, Any]]:
    """(name, content) of every entry, by name."""
    if isinstance(place, Path):
        return [(path.name, read_json(path)) for path in sorted(place.glob("[!.]*.json"))]
    prefix = place.rstrip("/") + "/"
    contents = []
    for uri in [item.uri for item in objects.list_objects(prefix)]:
        name = uri.removeprefix(prefix)
        if re.fullmatch(r"[^/]+\.json", name):
            try:
                contents.append((name, json.loads(objects.read(uri)[0])))
            except ValueError as error:
                raise UserError(f"{uri}: not valid JSON ({error}); {TAMPERED}") from error
    return contents


def _link_new(path: Path, text: str) -> None:
    """Writes the file whole under another name, then links it to its own: that fails if the name exists."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.link(temporary, path)
        sync(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise explain(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)
