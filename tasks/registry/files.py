"""Files of registered versions: fetched, verified against their hashes, refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import UserError, UserErrors
from data.files import sha256_file
from tasks.registry import server

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


WEIGHTS = ".safetensors"
CHECKPOINT_SUFFIXES = (WEIGHTS, ".json", ".jsonl", ".csv", ".txt", ".md", ".png")
# Its description of a logged model, and what loading one writes beside it.
MLFLOWS_OWN = ("MLmodel", "registered_model_meta", "conda.yaml", "python_env.yaml", "requirements.txt")


def weight_hashes(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file of a checkpoint folder.

    Raises UserErrors when it is missing, holds no readable safetensors, or holds a file of a kind that could carry code
    (pickle).
    """
    from safetensors import SafetensorError, safe_open

    if not folder.is_dir():
        raise UserError(f"{folder}: no such checkpoint folder; run the absorb stage first")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    allowed = ", ".join(CHECKPOINT_SUFFIXES)
    faults = [
        f"{name}: only {allowed} files belong in a checkpoint"
        for name, path in files.items()
        if path.suffix not in CHECKPOINT_SUFFIXES
    ]
    if not any(path.suffix == WEIGHTS for path in files.values()):
        faults.append(f"no {WEIGHTS} file")
    for name, path in files.items():
        if path.suffix == WEIGHTS:
            try:
                with safe_open(path, framework="numpy"):
                    pass
            except (SafetensorError, OSError) as error:
                faults.append(f"{name}: not readable as safetensors ({error}); it may be truncated")
    if faults:
        raise UserErrors(f"{folder}: cannot be registered; run the absorb stage again", faults)
    return {name: sha256_file(path) for name, path in files.items()}


def weight_tags(hashes: Mapping[str, str]) -> dict[str, str]:
    return {f"weights.{name}.sha256": value for name, value in hashes.items()}


def tagged_weights(tags: Mapping[str, str]) -> dict[str, str]:
    return {match[1]: value for key, value in tags.items() if (match := re.fullmatch(r"weights\.(.+)\.sha256", key))}


class Refusal(UserError):
    """A decision that may not be taken, however often it is tried."""


class OtherFiles(UserErrors, Refusal):
    """The files of a version are not the ones that were judged."""


def fetch_weights(store: server.Store, found: ModelVersion, folder: Path) -> tuple[Path, dict[str, str]]:
    """(folder below `folder`, name -> SHA-256) of the version's files, each of them the one it was registered under.
    Nothing is opened but for its hash.

    Raises UserErrors naming every file that is missing, was changed or was added (a pickle, say).
    """
    from mlflow.artifacts import download_artifacts

    expected = tagged_weights(found.tags)
    fetched = Path(download_artifacts(artifact_uri=found.source, dst_path=str(folder), tracking_uri=store.uri))
    for name in MLFLOWS_OWN:
        (fetched / name).unlink(missing_ok=True)
    actual = {
        path.relative_to(fetched).as_posix(): sha256_file(path) for path in sorted(fetched.rglob("*")) if path.is_file()
    }
    faults = [f"{name}: missing" for name in expected if name not in actual]
    faults += [f"{name}: not among the files registered" for name in actual if name not in expected]
    faults += [
        f"{name}: SHA-256 is {actual[name]}, registered as {value}"
        for name, value in expected.items()
        if name in actual and actual[name] != value
    ]
    if faults or not expected:
        title = f"version {found.version}: its files are not the ones that were judged; submit the candidate again"
        raise OtherFiles(title, faults or ["no weights.*.sha256 tag: not registered by this pipeline"])
    return fetched, actual
