"""Registered versions as the flows need them: found by number or alias, with the revision and the hashes they were registered under."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import UserError, UserErrors
from data.files import read_json, sha256_file
from tasks import gate, tracking
from tasks.provenance import SCORECARD_FILE
from tasks.registry import MODEL, weight_hashes

REFERENCE = re.compile(rf"(?:models:/{MODEL}(?:/(?P<number>\d+)|@(?P<alias>[A-Za-z0-9_-]+)))|(?P<bare>\d+)")


@dataclass(frozen=True)
class Version:
    """One version: its number, MLflow run, git commit, the SHA-256 of each weight file, and all its tags."""

    number: str
    run_id: str
    sha: str | None
    weights: Mapping[str, str]
    tags: Mapping[str, str]


def is_reference(text: str) -> bool:
    return REFERENCE.fullmatch(text.strip()) is not None


def find(project: Path, reference: str) -> Version | None:
    """A version by `models:/danceopd/3`, `models:/danceopd@champion` or `3`; None when nobody has the alias, or there is no such version."""
    match = REFERENCE.fullmatch(reference.strip())
    if match is None:
        raise UserError(f"model = {reference!r}: expected models:/{MODEL}/NUMBER, models:/{MODEL}@ALIAS or a number")
    store = tracking.open_store(project)
    number = match["number"] or match["bare"]
    with tracking.explained(store.uri):
        known = {str(one.version): one for one in store.client.search_model_versions(f"name='{MODEL}'")}
        if match["alias"]:
            models = store.client.search_registered_models(f"name='{MODEL}'")
            number = str(models[0].aliases.get(match["alias"], "")) if models else ""
    found = known.get(str(number))
    if found is None:
        return None
    weights = {named[1]: value for key, value in found.tags.items() if (named := re.fullmatch(r"weights\.(.+)\.sha256", key))}
    return Version(str(found.version), str(found.run_id), found.tags.get("git.sha"), weights, dict(found.tags))


def require(project: Path, reference: str) -> Version:
    """As `find`. Raises UserError when there is none."""
    found = find(project, reference)
    if found is None:
        raise UserError(f"model = {reference!r}: no such version; python -m tasks registry lists them")
    return found


def require_clean(version: Version) -> None:
    """Raises UserError unless the version was made from a commit without changes: what nobody can check out again is not promoted."""
    if version.tags.get("git.known") != "true" or not version.sha:
        raise UserError(f"version {version.number} was made from unknown code; run its revision as distill/prod and promote that version")
    if version.tags.get("git.dirty") != "false":
        dirty = f"version {version.number} was made from changed files on top of {version.sha[:12]}"
        raise UserError(f"{dirty}; commit them, run distill/prod and promote that version")


def require_weights(version: Version, checkpoint: Path) -> None:
    """Raises UserErrors unless the folder holds exactly the files that were registered."""
    actual = weight_hashes(checkpoint)
    differing = {name: value for name, value in version.weights.items() if actual.get(name) != value}
    faults = [f"{name}: SHA-256 is {actual.get(name, 'nothing')}, registered as {value}" for name, value in differing.items()]
    faults += [f"{name}: not among the files registered" for name in sorted(set(actual) - set(version.weights))]
    if faults or not version.weights:
        raise UserErrors(f"{checkpoint}: not the weights of version {version.number}", faults or ["the version has no weights.*.sha256 tags"])


def registered_scorecard(project: Path, version: Version, folder: Path) -> dict[str, Any]:
    """The scorecard that the version was judged by. Raises UserError when it is not the one registered."""
    store = tracking.open_store(project)
    folder.mkdir(parents=True, exist_ok=True)
    with tracking.explained(store.uri):
        path = Path(store.client.download_artifacts(version.run_id, Path(SCORECARD_FILE).name, str(folder)))
    if sha256_file(path) != version.tags.get("scorecard.json.sha256"):
        raise UserError(f"version {version.number}: scorecard.json of run {version.run_id} is not the file that was judged")
    scorecard: dict[str, Any] = read_json(path)
    return scorecard


def drifted(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Metrics whose new mean lies outside the interval it was registered with, or is missing: [{"metric", "registered", "low", "high", "now"}]."""
    rows = []
    for path, metric in before["metrics"].items():
        now = gate.finite((after["metrics"].get(path) or {}).get("mean"))
        if now is None or not metric["low"] <= now <= metric["high"]:
            rows.append({"metric": path, "registered": metric["mean"], "low": metric["low"], "high": metric["high"], "now": now})
    return rows
