"""Files of registered versions: fetched, verified against their hashes, refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import UserError, UserErrors
from data.files import sha256_file
from tasks.registry.server import Store

if TYPE_CHECKING:
    from tasks.registry.versions import Version

WEIGHTS = ".safetensors"
CHECKPOINT_SUFFIXES = (WEIGHTS, ".json", ".jsonl", ".csv", ".txt", ".md", ".png")
# MLflow's description of a logged model, and what loading one writes beside it
DESCRIPTIONS = ("MLmodel", "registered_model_meta", "conda.yaml", "python_env.yaml", "requirements.txt")


class Refusal(UserError):
    """A decision that may not be taken, however often it is tried."""


class OtherFiles(UserErrors, Refusal):
    """The files of a version are not the ones that were judged."""


def weight_hashes(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file of a checkpoint folder.

    Raises UserErrors when it holds no readable safetensors, or a file of another kind (a pickle could carry code).
    """
    from safetensors import SafetensorError, safe_open

    files = _files(folder)  # none of a folder that is not there
    allowed = ", ".join(CHECKPOINT_SUFFIXES)
    faults = [f"{name}: only {allowed} files belong in a checkpoint" for name in files if not is_allowed(name)]
    weights = {name: path for name, path in files.items() if name.endswith(WEIGHTS)}
    faults += [] if weights else [f"no {WEIGHTS} file"]
    for name, path in weights.items():
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            faults.append(f"{name}: not readable as safetensors ({error}); it may be truncated")
    if faults:
        raise UserErrors(f"{folder}: cannot be registered; run the absorb stage again", faults)
    return {name: sha256_file(path) for name, path in files.items()}


def is_allowed(name: str) -> bool:
    return Path(name).suffix in CHECKPOINT_SUFFIXES


def weight_tags(hashes: Mapping[str, str]) -> dict[str, str]:
    return {f"weights.{name}.sha256": value for name, value in hashes.items()}


def hashes_of(kind: str, tags: Mapping[str, str]) -> dict[str, str]:
    """Name -> SHA-256 of the tags `KIND.NAME.sha256`; kind: "weights" or "teacher"."""
    matches = ((re.fullmatch(rf"{kind}\.(.+)\.sha256", key), value) for key, value in tags.items())
    return {match[1]: value for match, value in matches if match}


def differences(expected: Mapping[str, str], actual: Mapping[str, str]) -> list[str]:
    """What distinguishes a version's files from those registered (name -> SHA-256), a sentence a file."""
    faults = [f"{name}: missing" for name in expected if name not in actual]
    faults += [f"{name}: not among the files registered" for name in actual if name not in expected]
    changed = [name for name, sha256 in expected.items() if actual.get(name, sha256) != sha256]
    faults += [f"{name}: SHA-256 is {actual[name]}, registered as {expected[name]}" for name in changed]
    return faults if expected else [*faults, "no weights.*.sha256 tag: not registered by this pipeline"]


def fetch_weights(store: Store, version: Version, folder: Path) -> tuple[Path, dict[str, str]]:
    """(folder below `folder`, name -> SHA-256) of the version's files, each verified; read only to be hashed.

    Raises UserErrors naming every file that is missing, was changed or was added (a pickle, say).
    """
    from mlflow.artifacts import download_artifacts

    fetched = Path(download_artifacts(artifact_uri=version.source, dst_path=str(folder), tracking_uri=store.uri))
    for name in DESCRIPTIONS:
        (fetched / name).unlink(missing_ok=True)
    actual = {name: sha256_file(path) for name, path in _files(fetched).items()}
    if faults := differences(version.weights, actual):
        title = f"version {version.number}: its files are not the ones that were judged; submit the candidate again"
        raise OtherFiles(title, faults)
    return fetched, actual


def _files(folder: Path) -> dict[str, Path]:
    """Relative path -> path of every file, sorted."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
