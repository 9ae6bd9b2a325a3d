"""The model registry: versions with their tags and verified files, aliases, and the ledger that the aliases follow.

    champion(project) -> dict | None          # {"version", "scorecard", "scores", "run_id", "page"}: for the gate
    require / find / download(project, "models:/danceopd@champion", ...)
    reconcile(project) -> list[str]           # lets the aliases follow the ledger

Candidates come in through tasks/release/submission.py, decisions are taken in tasks/release/decisions.py. A decision is
the ledger's next entry (tasks/registry/ledger.py), and `follow` copies the last one into aliases and review tags.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from data.errors import UserError, UserErrors
from data.files import digest, read_json, sha256_bytes, sha256_file
from tasks import environment
from tasks.registry import files, ledger, server, tracking
from tasks.s3 import objects

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

MODEL = "danceopd"
CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
# of the registered model: the last entry that the aliases followed, so that a ledger cut short is noticed
HEAD_TAG = "ledger.head"
LINEAGE_PREFIXES = ("git.", "dvc.", "params.", "env.", "teacher.", "base.", "mlflow.run_id")


class NoVersion(UserError):
    """There is no such version, or no version has the alias."""


@dataclass(frozen=True)
class Version:
    """A registered version: its number as text, the id of its MLflow run, its tags, the address of its files."""

    number: str
    run_id: str
    tags: Mapping[str, str]
    source: str = ""

    @property
    def sha(self) -> str | None:
        """The git revision that it was made from."""
        return self.tags.get("git.sha")

    @property
    def weights(self) -> dict[str, str]:
        """Name -> SHA-256 of each file that was registered."""
        return files.hashes_of("weights", self.tags)


@contextmanager
def opened(project: Path) -> Iterator[server.Store]:
    store = tracking.open_store(project)
    with server.explained(store.uri):
        yield store


def registered_model(store: server.Store) -> RegisteredModel | None:
    """None before the first submission."""
    from mlflow.exceptions import MlflowException

    try:
        return store.client.get_registered_model(MODEL)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def get_version(store: server.Store, number: str) -> Version:
    from mlflow.exceptions import MlflowException

    try:
        return _version(store.client.get_model_version(MODEL, number))
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        existing = ", ".join(version.number for version in versions_of(store)) or "none yet"
        raise NoVersion(f"{MODEL} has no version {number}; versions: {existing}") from error


def versions_of(store: server.Store) -> list[Version]:
    """All versions, lowest number first."""
    versions = map(_version, store.client.search_model_versions(f"name='{MODEL}'"))
    return sorted(versions, key=lambda version: int(version.number))


def _version(registered: ModelVersion) -> Version:
    return Version(str(registered.version), str(registered.run_id or ""), dict(registered.tags), str(registered.source))


def aliases_of(store: server.Store) -> dict[str, str]:
    """Alias -> version; empty before the first submission."""
    model = registered_model(store)
    return {alias: str(version) for alias, version in model.aliases.items()} if model else {}


def ledger_place(store: server.Store) -> ledger.Place:
    """DANCEOPD_LEDGER, which all machines share, if it is set. Else a folder inside the project: `mlflow/ledger` for
    the project's own store, another folder for each other store, since version numbers are that store's. Raises
    UserError when the variable holds something else than an S3 address.
    """
    shared = environment.setting(environment.LEDGER)
    if shared is not None:
        objects.split(shared)
        return shared.rstrip("/")
    folder = store.project / server.FOLDER / "ledger"
    return folder if store.is_local else folder / sha256_bytes(server.without_credentials(store.uri).encode())[:12]


def read_ledger(store: server.Store) -> list[ledger.Entry]:
    """The verified ledger. Raises UserError also when it ends before the entry that the aliases already followed."""
    model = registered_model(store)
    entries = ledger.read(ledger_place(store))
    number, _, known = (model.tags.get(HEAD_TAG, "") if model else "").partition(":")
    if number and (len(entries) < int(number) or entries[int(number) - 1].hash != known):
        where = f"{ledger_place(store)}: entry {int(number):06d} is not the one that the registry noted"
        other = f"another ledger is meant (set {environment.LEDGER}), or this one was tampered with"
        raise UserError(f"{where}; {other}: restore it from a backup")
    return entries


def state_of(entries: Sequence[ledger.Entry]) -> tuple[str | None, str | None]:
    """(champion, previous) after the last entry."""
    return (entries[-1].to_version, entries[-1].previous) if entries else (None, None)


def last_decisions(entries: Sequence[ledger.Entry]) -> dict[str, ledger.Entry]:
    """Version -> its last promotion or rejection."""
    return {entry.version: entry for entry in entries if entry.action in ("promote", "reject")}


def follow(store: server.Store) -> list[str]:
    """Makes the aliases say what the ledger's last entry says; returns what it changed.

    One process of this machine at a time. Other machines may follow an older entry meanwhile, so the ledger is read
    again after writing: whoever writes last has then seen the last entry.
    """
    changed: list[str] = []
    with server.locked(store.project):
        entries = read_ledger(store)
        while True:
            changed += _copy_to_registry(store, entries)
            again = read_ledger(store)
            if len(again) == len(entries):
                return changed
            entries = again


def _copy_to_registry(store: server.Store, entries: Sequence[ledger.Entry]) -> list[str]:
    aliases, decisions, changed = aliases_of(store), last_decisions(entries), []
    for alias, version in zip((CHAMPION, PREVIOUS), state_of(entries), strict=True):
        if aliases.get(alias) == version:
            continue
        if version is None:
            store.client.delete_registered_model_alias(MODEL, alias)
            changed.append(f"alias {alias} removed (was version {aliases[alias]})")
        else:
            get_version(store, version)
            store.client.set_registered_model_alias(MODEL, alias, version)
            changed.append(f"alias {alias} -> version {version} (was {aliases.get(alias, 'unset')})")
    if aliases.get(CANDIDATE) in decisions:
        store.client.delete_registered_model_alias(MODEL, CANDIDATE)
        changed.append(f"alias {CANDIDATE} removed (version {aliases[CANDIDATE]} was decided on)")
    tags = {version.number: version.tags for version in versions_of(store)} if entries else {}
    for version, entry in decisions.items():
        status = "rejected" if entry.action == "reject" else "approved"
        review = {"status": status, "by": entry.actor, "reason": entry.reason, "time": entry.time}
        known = tags[version] if version in tags else get_version(store, version).tags
        for key, value in review.items():
            if known.get(f"review.{key}") != value:
                store.client.set_model_version_tag(MODEL, version, f"review.{key}", value)
                changed.append(f"version {version}: review.{key} = {value}")
    if entries:
        noted = f"{entries[-1].number}:{entries[-1].hash}"
        if store.client.get_registered_model(MODEL).tags.get(HEAD_TAG) != noted:
            store.client.set_registered_model_tag(MODEL, HEAD_TAG, noted)
    return changed


def reconcile(project: Path) -> list[str]:
    """As `follow`: after a crash, or when an alias was moved in the web page."""
    with opened(project) as store:
        return follow(store)


def ledger_state(project: Path) -> tuple[ledger.Place, list[ledger.Entry], bool]:
    """(place, verified entries, whether the aliases differ from the last one)."""
    with opened(project) as store:
        entries, aliases = read_ledger(store), aliases_of(store)
        return ledger_place(store), entries, state_of(entries) != (aliases.get(CHAMPION), aliases.get(PREVIOUS))


def try_to_write(project: Path) -> None:
    """Tags of no meaning on experiment and model (if any). Raises UserError when the account may not write."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with opened(project) as store:
        experiment = store.client.get_experiment_by_name(server.EXPERIMENT)
        assert experiment is not None  # open_store made it
        store.client.set_experiment_tag(experiment.experiment_id, "doctor", now)
        if registered_model(store):
            store.client.set_registered_model_tag(MODEL, "doctor", now)


def champion(project: Path) -> dict[str, Any] | None:
    """The champion as the gate needs it: {"version", "scorecard" (dict), "scores" (path of its scores.parquet, or
    None), "run_id", "page" (of its report)}.

    None before the first promotion. Downloads into `runs/champion/VERSION`. Raises UserError when the registry lacks
    what the ledger names, or when a file is not the one that was judged.
    """
    with opened(project) as store:
        number, _ = state_of(read_ledger(store))
        if number is None:
            return None
        version = get_version(store, number)
        folder = store.project / "runs" / "champion" / number
        scored = "scores.parquet.sha256" in version.tags
        return {
            "version": number,
            "scorecard": read_json(judged_file(store, version, "scorecard.json", folder)),
            "scores": judged_file(store, version, "scores/scores.parquet", folder) if scored else None,
            "run_id": version.run_id,
            "page": _report_page(store, version.run_id),
        }


def judged_file(store: server.Store, version: Version, name: str, folder: Path) -> Path:
    """A file of the version's run, fetched unless it is there. Raises UserError unless it is the file judged."""
    path = folder / Path(name).name
    expected = version.tags.get(f"{path.name}.sha256")
    if expected is None:
        missing = f"version {version.number} has no tag {path.name}.sha256"
        raise UserError(f"{missing}; it was not submitted by this pipeline: roll back")
    if not path.is_file() or sha256_file(path) != expected:
        with tempfile.TemporaryDirectory() as temporary:
            fetched = tracking.artifact(store, version.run_id, name, Path(temporary))
            if sha256_file(fetched) != expected:
                other = f"version {version.number}: {name} of run {version.run_id} is not the file that was judged"
                raise UserError(f"{other}; restore it, or roll back")
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(fetched, path)
    return path


def _report_page(store: server.Store, run_id: str) -> str | None:
    """The address of a run's report page: MLflow's, else the file's; None where it is kept elsewhere."""
    run = store.client.get_run(run_id).info
    if address := server.for_browsers(store.uri):
        return f"{address}/{report_artifacts(run.experiment_id, run_id)}/report.html"
    place = urlsplit(str(run.artifact_uri))
    page = Path(unquote(place.path)) / "report" / "report.html"
    return page.as_uri() if place.scheme in ("", "file") and page.is_file() else None


def report_artifacts(experiment_id: str, run_id: str) -> str:
    return f"#/experiments/{experiment_id}/runs/{run_id}/artifacts/report"


def champion_files(project: Path, folder: Path) -> dict[str, Any]:
    """The champion's files below `folder`, as the ledger knows them: {"version", "folder", "hashes" (name -> SHA-256),
    "ledger" (number of the entry that made it champion), "lineage" (the tags about where it comes from)}.

    Raises UserError when there is no champion, and when its files are not those of the decision.
    """
    with opened(project) as store:
        entries = read_ledger(store)
        number, _ = state_of(entries)
        if number is None:
            raise UserError("there is no champion yet; promote a version first (python -m tasks promote)")
        entry = next(entry for entry in reversed(entries) if entry.action != "reject")  # what made it the champion
        version = get_version(store, number)
        fetched, hashes = files.fetch_weights(store, version, folder)
        if digest(hashes) != entry.weights:
            other = f"champion version {number}: its files are not those of ledger entry {entry.number:06d}"
            raise UserError(f"{other}; roll back, or restore them")
        lineage = {key: value for key, value in sorted(version.tags.items()) if key.startswith(LINEAGE_PREFIXES)}
        lineage["verdict.sha256"] = str(entry.verdict)
        return {"version": number, "folder": fetched, "hashes": hashes, "ledger": entry.number, "lineage": lineage}


def _parse(reference: str) -> re.Match[str] | None:
    number, alias = r"(?P<number>\d+)", r"@(?P<alias>[A-Za-z0-9_-]+)"
    return re.fullmatch(rf"(?:models:/{MODEL}/)?{number}|(?:models:/{MODEL})?{alias}", reference.strip())


def is_reference(text: str) -> bool:
    return _parse(text) is not None


def resolve(store: server.Store, reference: str, entries: Sequence[ledger.Entry] | None = None) -> Version:
    """As `require`; champion and previous are the ledger's, where its entries are given."""
    match = _parse(reference)
    if match is None:
        forms = f"models:/{MODEL}@{CHAMPION}, models:/{MODEL}/3, @{PREVIOUS} or 3"
        raise UserError(f"{reference!r}: not a version; expected {forms}")
    number, alias = match["number"], match["alias"]
    if number is None:
        aliases: dict[str, str | None] = {**aliases_of(store)}
        if entries is not None:
            aliases[CHAMPION], aliases[PREVIOUS] = state_of(entries)
        number = aliases.get(alias)
        if number is None:
            have = ", ".join(f"{name} (version {known})" for name, known in sorted(aliases.items()) if known)
            raise NoVersion(f"{reference}: no such alias; have {have or 'none yet'}")
    return get_version(store, number)


def require(project: Path, reference: str) -> Version:
    """By `models:/danceopd/3`, `models:/danceopd@champion`, `@champion` or `3`. Raises UserError (NoVersion)."""
    with opened(project) as store:
        return resolve(store, reference)


def find(project: Path, reference: str) -> Version | None:
    """As `require`; None when nobody has the alias, or there is no such version."""
    try:
        return require(project, reference)
    except NoVersion:
        return None


def download(project: Path, number: str, folder: Path) -> None:
    """Writes the version's files into the new `folder`. Raises UserErrors unless all are those judged."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with opened(project) as store, tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        fetched, _ = files.fetch_weights(store, get_version(store, number), Path(temporary))
        fetched.rename(folder)


def require_clean(version: Version) -> None:
    """Raises UserError unless the version can be checked out again: made from a commit without changes."""
    if version.tags.get("git.known") != "true" or not version.sha:
        remedy = "run its revision as distill/prod and promote that version"
        raise UserError(f"version {version.number} was made from unknown code; {remedy}")
    if version.tags.get("git.dirty") != "false":
        dirty = f"version {version.number} was made from changed files on top of {version.sha[:12]}"
        raise UserError(f"{dirty}; commit them, run distill/prod and promote that version")


def require_weights(version: Version, checkpoint: Path) -> None:
    """Raises UserErrors unless the folder holds exactly the files that were registered."""
    if faults := files.differences(version.weights, files.weight_hashes(checkpoint)):
        raise UserErrors(f"{checkpoint}: not the weights of version {version.number}", faults)
