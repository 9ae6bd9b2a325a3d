"""GEdit-Bench's rows and images, from the hub's files or from a folder of the user.

The hub's schema (stepfun-ai/GEdit-Bench, split `train`): task_type, key, instruction, instruction_language,
input_image, input_image_raw, Intersection_exist; images are {"bytes", "path"} as the datasets library writes them.
Nothing is downloaded: get the files with `huggingface-cli download --repo-type dataset`."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from benchmarks.gedit.rules import LANGUAGES
from data.errors import UserError, UserErrors
from data.files import atomic_file, digest, sha256_bytes, sha256_file
from data.records import GEDIT_CATEGORIES, OFFICIAL_COUNTS

TEXTS = ("key", "instruction_language", "task_type", "instruction")
NEEDED = (*TEXTS, "input_image")
# column names are compared in lower case: the data write it with a capital I, the result files do not
INTERSECTION = "intersection_exist"
MANIFESTS = ("manifest.csv", "manifest.jsonl")
BATCH = 32  # rows
SHOWN = 10  # faults that are listed before the rest is counted
SUFFIX = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp"}


@dataclass(frozen=True)
class EditTask:
    """One row: an instruction and its source image. (language, key) is unique; the same key in both languages is the
    same edit."""

    key: str
    language: str  # "en" or "cn"
    category: str
    instruction: str
    intersection: bool
    source: Path
    source_sha256: str

    @property
    def id(self) -> str:
        return f"{self.language}-{self.key}"


def _arrow_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet or Arrow file, a few at a time: a row holds two images."""
    try:
        if file.suffix == ".parquet":
            batches: Any = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=BATCH)
        else:
            source = pyarrow.memory_map(str(file))  # the table is read from the disk as its rows are taken
            try:
                table = pyarrow.ipc.open_stream(source).read_all()
            except pyarrow.ArrowInvalid:
                table = pyarrow.ipc.open_file(source).read_all()
            batches = table.to_batches(max_chunksize=BATCH)
        for batch in batches:
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        kind, fault = file.suffix.lstrip("."), str(error).splitlines()[0]
        raise UserError(f"{file}: not a readable {kind} file ({fault}); download it again") from error


def _text_rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            if file.suffix == ".csv":
                yield from csv.DictReader(lines)
                return
            for number, line in enumerate(lines, start=1):
                row = json.loads(line) if line.strip() else {}
                if not isinstance(row, dict):
                    raise UserError(f"{file}, line {number}: not a JSON object")
                if row:
                    yield row
    except (UnicodeDecodeError, ValueError, csv.Error) as error:
        raise UserError(f"{file}: not readable as {file.suffix.lstrip('.')} ({error})") from error


def files_of_set(path: Path) -> list[Path]:
    """The files that hold the rows: the file itself; in a folder its manifest, or else every Parquet or Arrow file
    below it, by name."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        needs = f"give GEdit-Bench's Parquet or Arrow files, or a folder with {' or '.join(MANIFESTS)}"
        raise UserError(f"{path}: no such file or folder; {needs}")
    manifests = [path / name for name in MANIFESTS if (path / name).is_file()]
    if manifests:
        return manifests[:1]
    files = sorted(file for suffix in ("*.parquet", "*.arrow") for file in path.rglob(suffix))
    if not files:
        raise UserError(f"{path}: holds neither {' nor '.join(MANIFESTS)} nor a Parquet or Arrow file")
    return files


def _image(value: Any, file: Path, unpacked: Path) -> tuple[Path, str]:
    """(file of the source image, its SHA-256). Bytes are unpacked under the name of their digest, once. Raises
    UserError with what is wrong."""
    image = value if isinstance(value, Mapping) else {"bytes": value} if isinstance(value, bytes) else {"path": value}
    content, given = image.get("bytes"), image.get("path")
    if content:
        name = sha256_bytes(content)
        suffix = next((suffix for magic, suffix in SUFFIX.items() if content.startswith(magic)), ".img")
        target = unpacked / f"{name}{suffix}"
        if not target.exists():
            with atomic_file(target) as temporary:
                temporary.write_bytes(content)
        return target, name
    if not isinstance(given, str) or not given:
        raise UserError("input_image is empty")
    path = file.parent / given
    if not path.is_file():
        raise UserError(f"input_image = {given}: no such file below {file.parent}")
    return path, sha256_file(path)


def _task(row: Mapping[str, Any], file: Path, unpacked: Path) -> EditTask:
    values = {str(name).lower(): value for name, value in row.items()}
    missing = [name for name in NEEDED if name not in values]
    if missing:
        raise UserError(f"columns {missing} are missing")
    key, language, category, instruction = (str(values[name] or "").strip() for name in TEXTS)
    if not key or "/" in key or key.startswith("."):
        raise UserError(f"key = {key!r}: a file name is needed")
    if language not in LANGUAGES:
        raise UserError(f"instruction_language = {language!r}: choose one of {list(LANGUAGES)}")
    if category not in GEDIT_CATEGORIES:
        raise UserError(f"task_type = {category!r}: choose one of {list(GEDIT_CATEGORIES)}")
    if not instruction:
        raise UserError("instruction is empty")
    source, sha256 = _image(values["input_image"], file, unpacked)
    flag = values.get(INTERSECTION, False)
    intersection = flag.strip().lower() in ("1", "true", "yes") if isinstance(flag, str) else bool(flag)
    return EditTask(key, language, category, instruction, intersection, source, sha256)


def load_tasks(path: Path, unpacked: Path) -> list[EditTask]:
    """Every row of a set, by language and key; images that come as bytes are written below `unpacked`, named by their
    SHA-256.

    `path`: a Parquet or Arrow file, a folder of them (as downloaded from the hub or saved by the datasets library), or
    a manifest (CSV or JSON Lines, or the folder that holds `manifest.csv` or `manifest.jsonl`) with the hub's columns,
    `input_image` a path relative to it. Raises UserErrors with all faulty rows."""
    tasks: list[EditTask] = []
    faults: list[str] = []
    for file in files_of_set(path):
        rows = _arrow_rows(file) if file.suffix in (".parquet", ".arrow") else _text_rows(file)
        for number, row in enumerate(rows, start=1):
            try:
                tasks.append(_task(row, file, unpacked))
            except UserError as error:
                faults.append(f"{file.name}, row {number}: {error}")
    counts = sorted(Counter((task.language, task.key) for task in tasks).items())
    faults += [f"{language} {key}: {n} rows of one key; keep one" for (language, key), n in counts if n > 1]
    if faults:
        more = [f"and {len(faults) - SHOWN} more such faults"] if len(faults) > SHOWN else []
        raise UserErrors(f"{path}: not a usable set of edits:", faults[:SHOWN] + more)
    if not tasks:
        raise UserError(f"{path}: no row at all")
    return sorted(tasks, key=lambda task: (LANGUAGES.index(task.language), task.key))


def check_official(tasks: Sequence[EditTask]) -> None:
    """Raises UserErrors unless every language present has the official set's eleven categories, and English its 606
    rows. The number of Chinese rows is not published: where both languages are present, they must hold the same keys.
    """
    faults = []
    keys = {
        language: {(task.key, task.category) for task in tasks if task.language == language} for language in LANGUAGES
    }
    for language, members in keys.items():
        counts = Counter(category for _, category in members)
        missing = [name for name in GEDIT_CATEGORIES if members and not counts[name]]
        faults += [f"{language}: no row of {missing}"] if missing else []
        wrong = [(name, n) for name, n in OFFICIAL_COUNTS.items() if language == "en" and members and counts[name] != n]
        faults += [f"en {name}: {counts[name]} rows, the official set has {n}" for name, n in wrong]
    if all(keys.values()) and keys["en"] != keys["cn"]:
        unlike = sorted(key for key, _ in keys["en"] ^ keys["cn"])
        faults.append(f"{len(unlike)} keys stand in one language only, or in two categories: {unlike[:3]}")
    if faults:
        advice = "download it again, or say that the set is your own (--custom-set)"
        raise UserErrors(f"this is not the official GEdit-Bench; {advice}:", faults)


def set_name(tasks: Sequence[EditTask]) -> str:
    """ "official" where `check_official` finds no fault, else "custom"."""
    try:
        check_official(tasks)
    except UserError:
        return "custom"
    return "official"


def set_digest(tasks: Sequence[EditTask]) -> str:
    """SHA-256 of all that the rows say, images by their digests."""
    names = ("language", "key", "category", "instruction", "intersection", "source_sha256")
    return digest([[getattr(task, name) for name in names] for task in tasks])


# --- folders of edited images -----------------------------------------------------------------------------------------


def edited_path(root: Path, task: EditTask) -> Path:
    """Where the official layout has a model's image, `root` being the model's folder."""
    return root / "fullset" / task.category / task.language / f"{task.key}.png"


def source_path(root: Path, task: EditTask) -> Path:
    """Where the official layout keeps a copy of the source beside the edited image."""
    return edited_path(root, task).with_name(f"{task.key}_SRCIMG.png")


def check_folder(root: Path, tasks: Sequence[EditTask]) -> None:
    """Raises UserError for a folder without any image of the set; single missing images are statuses, not faults."""
    if any(edited_path(root, task).is_file() for task in tasks):
        return
    inner = [folder for folder in sorted(root.iterdir()) if (folder / "fullset").is_dir()] if root.is_dir() else []
    hint = f"; did you mean {inner[0]}?" if inner else ""
    raise UserError(f"{root}: no image at fullset/TASK_TYPE/LANGUAGE/KEY.png of any of {len(tasks)} edits{hint}")
