"""Results that survive a kill: one line a result, addressed by what it was made from, appended to a shard that has one
writer.

A folder of results holds `settings.json` (what every result in it was made with) and `shards/NAME.jsonl`, each line
{"key", "value"}. A line counts from its newline on; what a killed writer left behind the last newline is ignored by
readers and cut off by the next writer. So the same command, run again, goes on where it stopped, and a report, being a
function of the results alone, does not change.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.errors import UserError, UserErrors
from data.files import digest, explain, read_json, write_json

SETTINGS_FILE = "settings.json"
SHARDS = "shards"
LOCKED = {errno.EAGAIN, errno.EACCES}


def result_key(kind: str, **parts: Any) -> str:
    """The address of a result: SHA-256 (hex) of its kind and of all that it depends on, as JSON values. Raises
    ValueError for NaN or infinity.
    """
    return digest({"kind": kind, **parts})


# --- settings ---------------------------------------------------------------------------------------------------------


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, item in value.items():
        rows.update(_flat(item, f"{prefix}{name}.") if isinstance(item, Mapping) else {f"{prefix}{name}": item})
    return rows


def claim(folder: str | Path, settings: Mapping[str, Any]) -> None:
    """Declares what the results of a folder are made with: written the first time, compared ever after.

    Raises UserErrors, naming every setting that differs, for a folder of results made otherwise (another detector,
    judge, prompt set).
    """
    path = Path(folder) / SETTINGS_FILE
    given = json.loads(json.dumps(dict(settings), allow_nan=False))  # tuples as lists, as they will be read back
    if not path.exists():
        write_json(path, given)
        return
    old, new = _flat(read_json(path)), _flat(given)
    faults = [
        f"{name}: the folder has {old.get(name)!r}, this command {new.get(name)!r}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
    if faults:
        raise UserErrors(
            f"{folder}: its results were made with other settings; choose another folder for these:", faults
        )


def read_settings(folder: str | Path) -> dict[str, Any]:
    """Raises UserError when nothing was claimed for the folder."""
    path = Path(folder) / SETTINGS_FILE
    if not path.exists():
        raise UserError(f"{path}: no such file; {folder} holds no results yet: run the step that makes them first")
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: expected a mapping, found {type(value).__name__}; restore the file or choose another folder"
        )
    return value


# --- reading ----------------------------------------------------------------------------------------------------------


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
    """key -> value over all shards. Within a shard a later line replaces an earlier one of the same key: a retry that
    succeeded.

    Raises UserError for a damaged line, or for two shards that disagree about a key.
    """
    results: dict[str, Any] = {}
    home: dict[str, Path] = {}
    for path in shard_files(folder):
        own = {key: value for _, key, value in _rows(path)}
        for key, value in own.items():
            if key in results and results[key] != value:
                raise UserError(
                    f"{path} and {home[key]} hold different results for the key {key[:16]}...; remove one of the two shards"
                )
            results[key], home[key] = value, path
    return results


# --- writing ----------------------------------------------------------------------------------------------------------


class Shard:
    """The one writer of a shard; made by `open_shard`. Threads may share it."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor, self._path = descriptor, path
        self._lock = threading.Lock()

    def append(self, key: str, value: Any) -> None:
        """Returns once the result is on the disk. Raises ValueError for NaN or infinity, UserError for a full disk."""
        self.append_all({key: value})

    def append_all(self, results: Mapping[str, Any]) -> None:
        """Several results with one wait for the disk. A kill may keep the first few of them."""
        lines = [
            json.dumps({"key": key, "value": value}, separators=(",", ":"), allow_nan=False, ensure_ascii=False) + "\n"
            for key, value in results.items()
        ]
        content = "".join(lines).encode()
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
    """Removes what stands behind the last newline. It is at most one result, but that may be long."""
    end = os.lseek(descriptor, 0, os.SEEK_END)
    position, block = end, 1 << 16
    while position > 0:
        start = max(0, position - block)
        found = os.pread(descriptor, position - start, start).rfind(b"\n")
        if found >= 0:
            position = start + found + 1
            break
        position = start
    if position < end:
        os.ftruncate(descriptor, position)
        os.fsync(descriptor)


@contextmanager
def open_shard(folder: str | Path, name: str = "0-of-1") -> Iterator[Shard]:
    """Opens `shards/NAME.jsonl` for appending, alone. Raises UserError while another process writes it, or where
    nothing can be written.
    """
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
            raise UserError(
                f"{path}: another process is writing this shard; wait for it, or give this one a shard of its own (--shard 1/2)"
            ) from error
        _cut_torn_line(descriptor)
        parent = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
        yield Shard(descriptor, path)
    finally:
        os.close(descriptor)  # which releases the lock


def shard_of(text: str) -> tuple[int, int]:
    """`I/N` of the option --shard: this process takes every N-th item, beginning with the I-th (from 0). Raises
    UserError for anything else.
    """
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise UserError(f"--shard {text}: expected I/N with I from 0 to N - 1, e.g. 0/4")
    return int(first), int(count)


def shard_name(shard: tuple[int, int]) -> str:
    return f"{shard[0]}-of-{shard[1]}"
