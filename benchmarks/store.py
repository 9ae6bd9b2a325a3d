"""Results that survive a kill: a line a result, addressed by what it was made from, appended to a shard that has one
writer.

A folder of results holds `settings.json` (what every result in it was made with) and `shards/NAME.jsonl`, its lines
{"key", "value"}. A line counts once its newline is there; readers ignore what a killed writer left after the last
newline, and the next writer removes it. So the same command, run again, goes on where it stopped, and a report, a
function of the results alone, does not change."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.errors import UserError, UserErrors
from data.files import digest, explain, read_json, sync, write_json

SETTINGS_FILE = "settings.json"
SHARDS = "shards"
LOCKED = {errno.EAGAIN, errno.EACCES}


def result_key(kind: str, **parts: Any) -> str:
    """The address of a result: SHA-256 (hex) of its kind and of all that it depends on, as JSON values. Raises
    ValueError for NaN or infinity."""
    return digest({"kind": kind, **parts})


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, item in value.items():
        rows.update(_flat(item, f"{prefix}{name}.") if isinstance(item, Mapping) else {f"{prefix}{name}": item})
    return rows


def claim(folder: str | Path, settings: Mapping[str, Any]) -> None:
    """Declares what the results of a folder are made with: written the first time, compared from then on.

    Raises UserErrors with every setting that differs, for a folder of results made otherwise (another detector, judge,
    prompt set)."""
    path = Path(folder) / SETTINGS_FILE
    given = json.loads(json.dumps(dict(settings), allow_nan=False))  # tuples as lists, as they will be read back
    if not path.exists():
        write_json(path, given)
        return
    old, new = _flat(read_json(path)), _flat(given)
    pairs = {name: (old.get(name), new.get(name)) for name in {**old, **new}}
    faults = [f"{name}: the folder has {a!r}, this command {b!r}" for name, (a, b) in pairs.items() if a != b]
    if faults:
        advice = "choose another folder for these"
        raise UserErrors(f"{folder}: its results were made with other settings; {advice}:", faults)


def read_settings(folder: str | Path) -> dict[str, Any]:
    """Raises UserError when nothing was claimed for the folder."""
    path = Path(folder) / SETTINGS_FILE
    if not path.exists():
        raise UserError(f"{path}: no such file; {folder} holds no results yet: run the step that makes them first")
    settings: dict[str, Any] = read_json(path)
    return settings


def _rows(path: Path) -> Iterator[tuple[int, str, Any]]:
    """(line number, key, value) of every whole line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise explain(error, path) from error
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            row = json.loads(line)
            yield number, str(row["key"]), row["value"]
        except (ValueError, KeyError, TypeError) as error:
            advice = "the file is damaged: remove the line, and the step makes its result again"
            raise UserError(f"{path}, line {number}: not a result ({error!r}); {advice}") from error


def shard_files(folder: str | Path) -> list[Path]:
    return sorted((Path(folder) / SHARDS).glob("*.jsonl"))


def read_results(folder: str | Path) -> dict[str, Any]:
    """key -> value over all shards. Within a shard a later line replaces an earlier line of the same key: a retry that
    succeeded.

    Raises UserError for a damaged line, or for two shards that disagree about a key."""
    results: dict[str, Any] = {}
    shard_with: dict[str, Path] = {}
    for path in shard_files(folder):
        for key, value in {key: value for _, key, value in _rows(path)}.items():
            if key in results and results[key] != value:
                fault = f"hold different results for the key {key[:16]}..."
                raise UserError(f"{path} and {shard_with[key]} {fault}; remove one of the two shards")
            results[key], shard_with[key] = value, path
    return results


class Shard:
    """The only writer of a shard; made by `open_shard`. Threads may share it."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor, self._path = descriptor, path
        self._lock = threading.Lock()

    def append(self, key: str, value: Any) -> None:
        """Returns once the result is on the disk. Raises ValueError for NaN or infinity, UserError for a full disk."""
        self.append_all({key: value})

    def append_all(self, results: Mapping[str, Any]) -> None:
        """Several results with one wait for the disk. A kill may keep the first few of them."""
        encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode
        content = "".join(encode({"key": key, "value": value}) + "\n" for key, value in results.items()).encode()
        with self._lock:
            length = os.lseek(self._descriptor, 0, os.SEEK_END)
            try:
                written = 0
                while written < len(content):
                    written += os.write(self._descriptor, content[written:])
                os.fsync(self._descriptor)
            except OSError as error:
                os.ftruncate(self._descriptor, length)
                raise explain(error, self._path) from error


def _cut_torn_line(descriptor: int) -> None:
    """Removes what stands after the last newline."""
    if size := os.fstat(descriptor).st_size:  # an empty file cannot be mapped
        with mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) as content:
            end = content.rfind(b"\n") + 1
        if end < size:
            os.ftruncate(descriptor, end)
            os.fsync(descriptor)


@contextmanager
def open_shard(folder: str | Path, name: str = "0-of-1") -> Iterator[Shard]:
    """Opens `shards/NAME.jsonl` for appending, alone. Raises UserError while another process writes it, or where
    nothing can be written."""
    path = Path(folder) / SHARDS / f"{name}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise explain(error, path) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in LOCKED:
                raise explain(error, path) from error
            advice = "wait for it, or give this one a shard of its own (--shard 1/2)"
            raise UserError(f"{path}: another process is writing this shard; {advice}") from error
        _cut_torn_line(descriptor)
        sync(path.parent)
        yield Shard(descriptor, path)
    finally:
        os.close(descriptor)  # which releases the lock


def shard_of(text: str) -> tuple[int, int]:
    """`I/N` of the option --shard: this process takes every N-th item, beginning with the I-th (from 0). Raises
    UserError for anything else."""
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise UserError(f"--shard {text}: expected I/N with I from 0 to N - 1, e.g. 0/4")
    return int(first), int(count)


def shard_name(shard: tuple[int, int]) -> str:
    return f"{shard[0]}-of-{shard[1]}"
