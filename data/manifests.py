"""Raw input: a folder with manifests (CSV, JSON Lines or Parquet) and the images that they name.

Columns `capability, category, prompt, split` are required; `id, source, target, record` are optional. Image paths are
relative to the folder and stay inside it. A broken manifest stops the reading; a broken row alone is rejected.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.errors import RowFault, UserError, UserErrors
from data.files import write_text

REQUIRED_COLUMNS = ("capability", "category", "prompt", "split")
OPTIONAL_COLUMNS = ("id", "source", "target", "record")
RAW_COLUMNS = (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS)
ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # ids name files later on


@dataclass(frozen=True)
class RawRow:
    """A row of a manifest, its fields checked for type only."""

    origin: str  # manifest file name
    row: int  # counted from 1: the line of a JSON Lines file, the data row (header not counted) of the others
    id: str
    split: str
    capability: str
    category: str
    prompt: str
    source: str | None = None  # relative to the folder
    target: str | None = None
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rejection:
    """A row that was left out, and why (see data.errors.RowFault)."""

    origin: str
    row: int
    id: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Manifests:
    rows: list[RawRow]
    rejected: list[Rejection]
    ignored_columns: dict[str, list[str]]  # manifest -> columns that mean nothing here

    @property
    def count(self) -> int:
        """Number of rows read, good and bad."""
        return len(self.rows) + len(self.rejected)


class _ManifestFault(Exception):
    """What is wrong with a manifest's structure; `args` are the faults."""


Fields = tuple[int, dict[str, Any] | RowFault]


# --- the three formats: the columns, and (row number, fields or the row's fault) of every row -------------------------


def _strict_json(text: str) -> Any:
    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def _csv_rows(path: Path) -> tuple[list[str], list[Fields]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            lines = [values for values in reader if values]
        except csv.Error as error:
            raise _ManifestFault(f"line {reader.line_num}: not readable as CSV ({error})") from error
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise _ManifestFault(f"columns {repeated} appear twice in the header")

    def fields(values: list[str]) -> dict[str, Any] | RowFault:
        if len(values) == len(header):
            return dict(zip(header, values, strict=True))
        detail = f"{len(values)} fields under {len(header)} columns; quote commas and line breaks"
        return RowFault("wrong number of fields", detail)

    return header, [(number, fields(values)) for number, values in enumerate(lines, 1)]


def _jsonl_rows(path: Path) -> tuple[list[str], list[Fields]]:
    names: dict[str, None] = {}
    rows: list[Fields] = []
    faults: list[str] = []
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = _strict_json(line)
            except (ValueError, RecursionError) as error:
                faults.append(f"line {number}: not valid JSON ({error})")
                continue
            if not isinstance(value, dict):
                faults.append(f"line {number}: {type(value).__name__} where an object is wanted")
                continue
            names.update(dict.fromkeys(value))
            rows.append((number, value))
    if faults:
        more = f" (and {len(faults) - 3} more lines)" if len(faults) > 3 else ""
        raise _ManifestFault("; ".join(faults[:3]) + more)
    return list(names), rows


def _without_nulls(value: Any) -> Any:
    """Parquet structs spell out absent keys as null; GenEval's records leave them out."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _parquet_rows(path: Path) -> tuple[list[str], list[Fields]]:
    try:
        table = pq.read_table(path)
        rows = [(number, _without_nulls(value)) for number, value in enumerate(table.to_pylist(), 1)]
        return list(table.column_names), rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _ManifestFault(f"not a readable Parquet file ({str(error).splitlines()[0]})") from error


READERS = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
PATTERNS = ", ".join(f"*{suffix}" for suffix in READERS)


# --- a row ------------------------------------------------------------------------------------------------------------


def _is_empty(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _text(fields: Mapping[str, Any], column: str) -> str:
    value = fields.get(column)
    if _is_empty(value):
        return ""
    if not isinstance(value, str):
        raise RowFault("not text", f"{column} = {value!r} is {type(value).__name__}, text wanted")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise RowFault("not text", f"{column} = {value!r} holds a NUL or half a surrogate pair")
    return value


def _identifier(fields: Mapping[str, Any], origin: str, row: int) -> str:
    value = fields.get("id")
    if _is_empty(value):
        return f"{origin}-{row:06d}"
    text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if not ID_PATTERN.fullmatch(text):
        allowed = "up to 128 letters, digits, '.', '_' and '-' are allowed, the first a letter or digit"
        raise RowFault("bad id", f"id = {value!r}: {allowed}")
    return text


def _record(fields: Mapping[str, Any]) -> dict[str, Any]:
    value = fields.get("record")
    if _is_empty(value):
        return {}
    if isinstance(value, str):
        try:
            value = _strict_json(value)
        except (ValueError, RecursionError) as error:
            raise RowFault("bad record", f"record is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise RowFault("bad record", f"record is {type(value).__name__}, a JSON object is wanted")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RowFault("bad record", f"record cannot be written as JSON ({error})") from error
    return value


def _image_path(fields: Mapping[str, Any], column: str, folder: Path) -> str | None:
    value = _text(fields, column)
    if not value:
        return None
    parts = PurePosixPath(value).parts
    if PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute() or ".." in parts:
        remedy = "give a path relative to the manifest, without '..'"
        raise RowFault("path outside the folder", f"{column} = {value!r}: {remedy}")
    if len(value.encode()) > 4095 or any(len(part.encode()) > 255 for part in parts):
        raise RowFault("unreadable image", f"{column} = {value[:40]!r}...: the name is too long for a file")
    try:
        inside = (folder / value).resolve().is_relative_to(folder)
    except (OSError, RuntimeError) as error:  # a loop of links, a folder that may not be entered
        raise RowFault("unreadable image", f"{column} = {value!r}: {error}") from error
    if not inside:
        detail = f"{column} = {value!r} is a link that leads out of the folder; put the file itself there"
        raise RowFault("path outside the folder", detail)
    return value


def _raw_row(fields: Mapping[str, Any], origin: str, row: int, folder: Path) -> RawRow:
    name = _identifier(fields, origin, row)
    values: dict[str, Any] = {column: _text(fields, column).strip() for column in REQUIRED_COLUMNS}
    values |= {column: _image_path(fields, column, folder) for column in ("source", "target")}
    return RawRow(origin, row, name, record=_record(fields), **values)


# --- the folder -------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[list[str], list[Fields]]:
    """The columns and the numbered rows of a manifest. Raises _ManifestFault."""
    try:
        header, numbered = READERS[path.suffix.lower()](path)
    except (OSError, UnicodeDecodeError) as error:
        raise _ManifestFault(f"not readable as UTF-8 text ({error})") from error
    if not numbered:
        raise _ManifestFault("holds no rows; fill it or remove it")
    absent = [column for column in RAW_COLUMNS if column not in header]
    missing = [column for column in REQUIRED_COLUMNS if column in absent]
    faults = [f"columns {missing} are missing (it has {header})"] if missing else []
    for name in header:
        near = difflib.get_close_matches(name, absent, n=1, cutoff=0.75)
        if name not in RAW_COLUMNS and near:
            faults.append(f"unknown column {name!r}: did you mean {near[0]!r}?")
    if faults:
        raise _ManifestFault(*faults)
    return header, numbered


def manifest_paths(folder: str | Path) -> list[Path]:
    """The manifests of a folder, by name. Raises UserError when there is no folder or no manifest in it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; it should hold manifests ({PATTERNS}) and their images")
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    manifests = [path for path in files if path.suffix.lower() in READERS]
    if not manifests:
        raise UserError(f"{folder}: no manifest in this folder; put one there: {PATTERNS}")
    return manifests


def read_manifests(folder: str | Path) -> Manifests:
    """Every row of every manifest in `folder`, manifests in order of their names.

    A row without an id gets `<manifest>-<row>`. Raises UserError for a missing folder or manifest, UserErrors for all
    broken manifests: not decodable, columns missing or misspelt, a line that is not JSON, no rows.
    """
    rows: list[RawRow] = []
    rejected: list[Rejection] = []
    ignored: dict[str, list[str]] = {}
    faults: list[str] = []
    root = Path(folder).resolve()
    for path in manifest_paths(folder):
        try:
            header, numbered = _read(path)
        except _ManifestFault as error:
            faults += [f"{path}: {fault}" for fault in error.args]
            continue
        if others := [name for name in header if name not in RAW_COLUMNS]:
            ignored[path.name] = others
        for number, fields in numbered:
            try:
                if isinstance(fields, RowFault):
                    raise fields
                rows.append(_raw_row(fields, path.name, number, root))
            except RowFault as error:
                given = fields.get("id") if isinstance(fields, dict) else None
                name = "" if _is_empty(given) else str(given)
                rejected.append(Rejection(path.name, number, name, error.reason, error.detail))
    if faults:
        raise UserErrors(f"{folder}: the manifests cannot be read", faults)
    return Manifests(rows, rejected, ignored)


def write_manifest(folder: str | Path, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows (keys of `RAW_COLUMNS`, `record` an object) whole as the JSON Lines file `folder/name`.

    Raises UserError for an unknown key, ValueError for a number that JSON lacks.
    """
    unknown = sorted({key for row in rows for key in row if key not in RAW_COLUMNS})
    if unknown:
        raise UserError(f"{name}: unknown keys {unknown}")
    given = ({column: row[column] for column in RAW_COLUMNS if row.get(column) is not None} for row in rows)
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in given]
    write_text(Path(folder) / name, "".join(line + "\n" for line in lines))
