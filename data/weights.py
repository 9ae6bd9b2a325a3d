"""Weight files without loading them: headers of safetensors, hashes of files and folders, and the refusal of every
format that can carry code.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import digest, read_json, sha256_file

SAFETENSORS = ".safetensors"
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
KEPT = (SAFETENSORS, ".json", ".jinja", ".model", ".txt")  # weights, configurations, vocabularies
PIPELINE = "model_index.json"
STUDENT = "student.json"  # marks a student's folder, all of which belongs to it
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> {"dtype", "shape"} of a safetensors file, from its header alone. Raises UserError when header or
    length are not whole.
    """
    try:
        with open(file, "rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            size = file.stat().st_size
            header = json.loads(opened.read(length)) if length + 8 <= size else None
        if not isinstance(header, dict):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header.pop("__metadata__", None)
        end = max((value["data_offsets"][1] for value in header.values()), default=0)
        if length + 8 + end != size:
            raise ValueError(f"{size} bytes, the header speaks of {length + 8 + end}")
    except (OSError, struct.error, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); fetch or make it again") from error
    return dict(header)


def precision_of(headers: Iterable[dict[str, dict[str, Any]]]) -> str:
    """The one type of all tensors ("float16", "bfloat16", "float32", ...), or "mixed"."""
    kinds = {DTYPES.get(entry["dtype"], str(entry["dtype"])) for header in headers for entry in header.values()}
    return kinds.pop() if len(kinds) == 1 else "mixed"


def pipeline_parts(index: dict[str, Any]) -> list[str]:
    """The folders that a pipeline's model_index.json names."""
    return [name for name, value in index.items() if isinstance(value, list) and value and value[0] is not None]


def is_kept(name: str) -> bool:
    """Whether a file of a checkpoint is one that is read: by its suffix, and not a second copy in another precision
    (`model.fp16.safetensors`).
    """
    return (
        Path(name).suffix in KEPT
        and ".fp16." not in name
        and not any(part.startswith(".") for part in Path(name).parts)
    )


def weight_folder(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of the files that are read of a checkpoint folder; of a pipeline only the parts that its
    index names.

    Raises UserError for a folder without safetensors, with a pickle file among its parts (which runs code when it is
    read), or with one that is damaged.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    parts = pipeline_parts(read_json(folder / PIPELINE)) if (folder / PIPELINE).is_file() else []
    if parts and not (folder / STUDENT).is_file():
        files = [
            path
            for path in files
            if path.relative_to(folder).as_posix() == PIPELINE or path.relative_to(folder).parts[0] in parts
        ]
    names = {path.relative_to(folder).as_posix(): path for path in files}
    pickled = [name for name in names if Path(name).suffix in PICKLES]
    if pickled:
        raise UserError(
            f"{folder / pickled[0]}: a pickle file runs code when it is read; only safetensors are taken: convert it, and remove it from the folder"
        )
    kept = {name: path for name, path in names.items() if is_kept(name)}
    if not any(Path(name).suffix == SAFETENSORS for name in kept):
        raise UserError(f"{folder}: no {SAFETENSORS} file in it")
    for name, path in kept.items():
        if Path(name).suffix == SAFETENSORS:
            read_header(path)
    return {name: sha256_file(path) for name, path in kept.items()}


def weight_file(file: Path) -> str:
    """SHA-256 of one safetensors file. Raises UserError for any other format, or a damaged one."""
    if file.suffix != SAFETENSORS:
        raise UserError(
            f"{file}: only {SAFETENSORS} files are taken{'; a pickle file runs code when it is read' if file.suffix in PICKLES else ''}: convert it"
        )
    read_header(file)
    return sha256_file(file)


def folder_sha256(files: dict[str, str]) -> str:
    """One hash of a folder: of the list of its files with theirs."""
    return digest(files)
