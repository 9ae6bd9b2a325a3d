"""Weight files without loading them: safetensors headers, hashes, and the refusal of formats that can carry code."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from data.errors import UserError
from data.files import digest, read_json, sha256_file

SAFETENSORS = ".safetensors"
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
KEPT = (SAFETENSORS, ".json", ".jinja", ".model", ".txt")  # weights, configurations, vocabularies
PIPELINE = "model_index.json"
STUDENT = "student.json"  # marks a student's folder, all of which belongs to it
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> {"dtype", "shape"} of a safetensors file, from its header alone. Raises UserError if it is cut."""
    try:
        with safe_open(file, framework="numpy") as opened:
            tensors = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
            return {
                name: {"dtype": tensor.get_dtype(), "shape": tensor.get_shape()} for name, tensor in tensors.items()
            }
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); fetch or make it again") from error


def precision_of(headers: Iterable[dict[str, dict[str, Any]]]) -> str:
    """The type that all tensors share ("float16", "bfloat16", "float32", ...), or "mixed"."""
    kinds = {DTYPES.get(entry["dtype"], str(entry["dtype"])) for header in headers for entry in header.values()}
    return kinds.pop() if len(kinds) == 1 else "mixed"


def pipeline_parts(index: dict[str, Any]) -> list[str]:
    """The folders that a pipeline's model_index.json names."""
    return [name for name, value in index.items() if isinstance(value, list) and value and value[0] is not None]


def is_kept(name: str) -> bool:
    """Whether a checkpoint's file is read: by its suffix, and no second copy like `model.fp16.safetensors`."""
    hidden = any(part.startswith(".") for part in Path(name).parts)
    return Path(name).suffix in KEPT and ".fp16." not in name and not hidden


def weight_folder(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of a checkpoint folder's files; of a pipeline only the parts that its index names.

    Raises UserError for a folder without safetensors, with a damaged file, or with a pickle file among its parts.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    parts = pipeline_parts(read_json(folder / PIPELINE)) if PIPELINE in files else []
    if parts and STUDENT not in files:
        files = {name: path for name, path in files.items() if name == PIPELINE or name.split("/")[0] in parts}
    pickled = [path for path in files.values() if path.suffix in PICKLES]
    if pickled:
        remedy = "only safetensors are taken: convert it, and remove it from the folder"
        raise UserError(f"{pickled[0]}: a pickle file runs code when it is read; {remedy}")
    kept = {name: path for name, path in files.items() if is_kept(name)}
    weights = [path for path in kept.values() if path.suffix == SAFETENSORS]
    if not weights:
        raise UserError(f"{folder}: no {SAFETENSORS} file in it")
    for path in weights:
        read_header(path)
    return {name: sha256_file(path) for name, path in kept.items()}


def weight_file(file: Path) -> str:
    """SHA-256 of a safetensors file. Raises UserError for any other format, or a damaged file."""
    if file.suffix != SAFETENSORS:
        why = "; a pickle file runs code when it is read" if file.suffix in PICKLES else ""
        raise UserError(f"{file}: only {SAFETENSORS} files are taken{why}: convert it")
    read_header(file)
    return sha256_file(file)


def folder_sha256(files: dict[str, str]) -> str:
    """The hash of a folder, from the hashes of its files (`weight_folder`)."""
    return digest(files)
