"""The model registry, read: versions, aliases and the ledger that they follow, and the files of a version, each
verified by its hash.

    champion(project) -> dict | None                 # {"version", "scorecard", "scores", "run_id", "page"}: what the
gate compares with
    facts / all_tags / champion_files / registered / download(project, ...)
    reconcile(project) -> list[str]                  # the aliases are made to follow the ledger

Candidates come in through tasks/release/submission.py, decisions are taken in tasks/release/decisions.py. MLflow's
aliases have no compare-and-swap and no history, so a decision is the ledger's next entry (tasks/registry/ledger.py) and
the aliases follow its last one; `reconcile` lets them catch up after a crash.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from data.errors import UserError, UserErrors
from data.files import digest, read_json, sha256_bytes, sha256_file
from tasks import environment
from tasks.registry import ledger, server, tracking
from tasks.registry.files import fetch_weights, tagged_weights, weight_hashes
from tasks.s3 import objects

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


MODEL = "danceopd"
CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
# of the registered model: the last entry that the aliases followed, so that a ledger cut short is noticed
HEAD_TAG = "ledger.head"
LINEAGE_PREFIXES = ("git.", "dvc.", "params.", "env.", "teacher.", "base.", "mlflow.run_id")


def ledger_place(store: server.Store) -> ledger.Place:
    """DANCEOPD_LEDGER, if it is set: the one that all machines share. Else a folder inside the project: `mlflow/ledger`
    for the project's own store, one of its own for each other store, since version numbers are that store's. Raises
    UserError when the variable holds something else than an S3 address."""
    shared = environment.setting(environment.LEDGER)
    if shared is not None:
        objects.split(shared)
        return shared.rstrip("/")
    folder = store.project / server.FOLDER / "ledger"
    return folder if store.is_local else folder / sha256_bytes(server.without_credentials(store.uri).encode())[:12]


def get_version(store: server.Store, version: str) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        return store.client.get_model_version(MODEL, version)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        existing = ", ".join(sorted((str(one.version) for one in versions_of(store)), key=int)) or "none yet"
        raise UserError(f"{MODEL} has no version {version}; versions: {existing}") from error


def versions_of(store: server.Store) -> list[ModelVersion]:
    return list(store.client.search_model_versions(f"name='{MODEL}'"))


def aliases_of(store: server.Store) -> dict[str, str]:
    """Alias -> version; empty before the first submission."""
    from mlflow.exceptions import MlflowException

    try:
        model = store.client.get_registered_model(MODEL)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}
    return {alias: str(version) for alias, version in model.aliases.items()}


def read_ledger(store: server.Store) -> list[ledger.Entry]:
    """The verified ledger. Raises UserError also when it ends before the entry that the aliases already followed."""
    from mlflow.exceptions import MlflowException

    try:
        noted = store.client.get_registered_model(MODEL).tags.get(HEAD_TAG)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        noted = None
    entries = ledger.read(ledger_place(store))
    if noted:
        number, _, known = noted.partition(":")
        if len(entries) < int(number) or entries[int(number) - 1].hash != known:
            where = f"{ledger_place(store)}: entry {int(number):06d}"
            other = f"another ledger is meant (set {environment.LEDGER}), or this one was tampered with: restore it from a backup"
            raise UserError(f"{where} is not the one that the registry noted; {other}")
    return entries


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
    aliases = aliases_of(store)
    head = entries[-1] if entries else None
    wanted = {CHAMPION: head.to_version if head else None, PREVIOUS: head.previous if head else None}
    decided = [entry.version for entry in entries if entry.action in ("promote", "reject")]
    changed = []
    for alias, version in wanted.items():
        if aliases.get(alias) == version:
            continue
        if version is None:
            store.client.delete_registered_model_alias(MODEL, alias)
            changed.append(f"alias {alias} removed (was version {aliases[alias]})")
        else:
            get_version(store, version)
            store.client.set_registered_model_alias(MODEL, alias, version)
            changed.append(f"alias {alias} -> version {version} (was {aliases.get(alias, 'unset')})")
    if aliases.get(CANDIDATE) in decided:
        store.client.delete_registered_model_alias(MODEL, CANDIDATE)
        changed.append(f"alias {CANDIDATE} removed (version {aliases[CANDIDATE]} was decided on)")
    versions = {str(one.version): one for one in versions_of(store)} if entries else {}
    for entry in last_decisions(entries):
        review = {
            "status": "rejected" if entry.action == "reject" else "approved",
            "by": entry.actor,
            "reason": entry.reason,
            "time": entry.time,
        }
        tags = (versions.get(entry.version) or get_version(store, entry.version)).tags
        for key, value in review.items():
            if tags.get(f"review.{key}") != value:
                store.client.set_model_version_tag(MODEL, entry.version, f"review.{key}", value)
                changed.append(f"version {entry.version}: review.{key} = {value}")
    noted = f"{head.number}:{head.hash}" if head is not None else None
    if noted and store.client.get_registered_model(MODEL).tags.get(HEAD_TAG) != noted:
        store.client.set_registered_model_tag(MODEL, HEAD_TAG, noted)
    return changed


def last_decisions(entries: Sequence[ledger.Entry]) -> list[ledger.Entry]:
    """The last promotion or rejection of each version."""
    return list({entry.version: entry for entry in entries if entry.action in ("promote", "reject")}.values())


def state_of(entries: Sequence[ledger.Entry]) -> tuple[str | None, str | None]:
    """(champion, previous) after the last entry."""
    return (entries[-1].to_version, entries[-1].previous) if entries else (None, None)


@contextmanager
def opened(project: Path) -> Iterator[server.Store]:
    store = tracking.open_store(project)
    with server.explained(store.uri):
        yield store


def reconcile(project: Path) -> list[str]:
    """Aliases and review tags are made to follow the ledger (after a crash, or an alias moved in the web page); returns
    the changes, in words.
    """
    with opened(project) as store:
        return follow(store)


def champion(project: Path) -> dict[str, Any] | None:
    """The champion as the gate needs it: {"version", "scorecard" (dict), "scores" (path of its scores.parquet, or
    None), "run_id", "page" (of its report)}.

    None before the first promotion. Downloads into `runs/champion/VERSION`. Raises UserError when the registry lacks
    what the ledger names, or when a file is not the one that was judged.
    """
    with opened(project) as store:
        version, _ = state_of(read_ledger(store))
        if version is None:
            return None
        found = get_version(store, version)
        folder = store.project / "runs" / "champion" / version
        run_id = str(found.run_id)
        wanted = {name: found.tags.get(f"{name}.sha256") for name in ("scorecard.json", "scores.parquet")}
        for name, expected in wanted.items():
            if expected and not ((folder / name).is_file() and sha256_file(folder / name) == expected):
                folder.mkdir(parents=True, exist_ok=True)
                artifact = "scores/scores.parquet" if name == "scores.parquet" else name
                with tempfile.TemporaryDirectory() as temporary:
                    fetched = tracking.artifact(store, run_id, artifact, Path(temporary))
                    if sha256_file(fetched) != expected:
                        raise UserError(
                            f"champion version {version}: {artifact} of run {run_id} is not the file that was judged; restore it, or roll back"
                        )
                    shutil.copyfile(fetched, folder / name)
        if not wanted["scorecard.json"]:
            raise UserError(
                f"champion version {version} has no tag scorecard.json.sha256; it was not submitted by this pipeline: roll back"
            )
        scores = folder / "scores.parquet" if wanted["scores.parquet"] else None
        return {
            "version": version,
            "scorecard": read_json(folder / "scorecard.json"),
            "scores": scores,
            "run_id": run_id,
            "page": _report_page(store, run_id),
        }


def _report_page(store: server.Store, run_id: str) -> str | None:
    """The address of a run's report page: in MLflow's pages where there is a server, else the file's; None where it is
    kept elsewhere.
    """
    run = store.client.get_run(run_id)
    if address := server.for_browsers(store.uri):
        return f"{address}/{report_artifacts(run.info.experiment_id, run_id)}/report.html"
    place = urlsplit(str(run.info.artifact_uri))
    page = Path(unquote(place.path)) / "report" / "report.html"
    return page.as_uri() if place.scheme in ("", "file") and page.is_file() else None


def report_artifacts(experiment_id: str, run_id: str) -> str:
    return f"#/experiments/{experiment_id}/runs/{run_id}/artifacts/report"


def ledger_state(project: Path) -> tuple[ledger.Place, list[ledger.Entry], bool]:
    """(place, verified entries, whether the aliases differ from the last one)."""
    with opened(project) as store:
        entries, aliases = read_ledger(store), aliases_of(store)
        return ledger_place(store), entries, state_of(entries) != (aliases.get(CHAMPION), aliases.get(PREVIOUS))


def try_to_write(project: Path) -> None:
    """A tag of no meaning on the experiment, and on the registered model where there is one. Raises UserError when the
    account may not write.
    """
    from mlflow.exceptions import MlflowException

    with opened(project) as store:
        experiment = store.client.get_experiment_by_name(server.EXPERIMENT)
        assert experiment is not None  # open_store made it
        store.client.set_experiment_tag(
            experiment.experiment_id, "doctor", datetime.now(UTC).isoformat(timespec="seconds")
        )
        try:
            store.client.get_registered_model(MODEL)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return
        store.client.set_registered_model_tag(MODEL, "doctor", datetime.now(UTC).isoformat(timespec="seconds"))


def champion_files(project: Path, folder: Path) -> dict[str, Any]:
    """The champion's files below `folder`, as the ledger knows them: {"version", "folder", "hashes" (name -> SHA-256),
    "ledger" (number of the entry that made it champion), "lineage" (the tags about where it comes from)}.

    Raises UserError when there is no champion, and when its files are not those of the decision.
    """
    with opened(project) as store:
        entries = read_ledger(store)
        version, _ = state_of(entries)
        if version is None:
            raise UserError("there is no champion yet; promote a version first (python -m tasks promote)")
        entry = next(
            one for one in reversed(entries) if one.action in ("promote", "rollback")
        )  # what made this version the champion
        found = get_version(store, version)
        fetched, hashes = fetch_weights(store, found, folder)
        if digest(hashes) != entry.weights:
            raise UserError(
                f"champion version {version}: its files are not those of ledger entry {entry.number:06d}; roll back, or restore them"
            )
        lineage = {key: value for key, value in sorted(found.tags.items()) if key.startswith(LINEAGE_PREFIXES)}
        return {
            "version": version,
            "folder": fetched,
            "hashes": hashes,
            "ledger": entry.number,
            "lineage": {**lineage, "verdict.sha256": str(entry.verdict)},
        }


def facts(project: Path, reference: str) -> dict[str, Any]:
    """What is known of a version: {"version", "run_id", "tags", "entries" (of the ledger, as dicts), "artifacts" (name
    -> SHA-256 as kept, of the run's small files), "weights" (faults of its files, in words)}.

    reference: `models:/danceopd@champion`, `models:/danceopd/3`, `@previous` or `3`. The champion is the ledger's.
    Raises UserError when there is none.
    """
    with opened(project) as store:
        entries = read_ledger(store)
        found = get_version(store, _resolve(store, entries, reference))
        artifacts: dict[str, str | None] = {}
        with tempfile.TemporaryDirectory() as temporary:
            for name in ("verdict.json", "scorecard.json", "params.yaml", "dvc.lock"):
                artifacts[name] = _artifact_sha256(store, str(found.run_id), name, Path(temporary))
            try:
                fetch_weights(store, found, Path(temporary))
                faults = []
            except UserErrors as error:
                faults = error.faults
            except UserError as error:
                faults = [str(error)]
        decisions = [asdict(entry) for entry in entries if entry.version == str(found.version)]
        where = {"version": str(found.version), "run_id": str(found.run_id), "tags": dict(found.tags)}
        return {**where, "entries": decisions, "artifacts": artifacts, "weights": faults}


def _artifact_sha256(store: server.Store, run_id: str, name: str, folder: Path) -> str | None:
    try:
        return sha256_file(tracking.artifact(store, run_id, name, folder))
    except UserError:  # the run has none
        return None


def _resolve(store: server.Store, entries: Sequence[ledger.Entry], reference: str) -> str:
    found = re.fullmatch(rf"(?:models:/{MODEL})?(?:@(?P<alias>[A-Za-z0-9_-]+)|/?(?P<version>\d+))", reference.strip())
    if found is None:
        raise UserError(
            f"{reference!r}: not a version; expected models:/{MODEL}@{CHAMPION}, models:/{MODEL}/3, @{PREVIOUS} or 3"
        )
    if found["version"]:
        return found["version"]
    current, previous = state_of(entries)
    known = {**aliases_of(store), CHAMPION: current, PREVIOUS: previous}
    version = known.get(found["alias"])
    if version is None:
        have = ", ".join(sorted(name for name, one in known.items() if one)) or "none yet"
        raise UserError(f"{reference}: no version has this alias; aliases: {have}")
    return version


def all_tags(project: Path) -> dict[str, dict[str, str]]:
    """Version -> its tags, for the way back from a digest."""
    with opened(project) as store:
        return {
            str(one.version): dict(one.tags) for one in sorted(versions_of(store), key=lambda one: int(one.version))
        }


def registered(project: Path, uri: str) -> tuple[str, dict[str, str]]:
    """(version, relative path -> SHA-256 it was judged under) of `models:/danceopd@ALIAS` or
    `models:/danceopd/VERSION`. Raises UserError for any other.
    """
    match = re.fullmatch(r"models:/([^@/]+)(?:@(.+)|/(\d+))", uri)
    if match is None or match[1] != MODEL:
        raise UserError(f"{uri}: expected models:/{MODEL}@ALIAS or models:/{MODEL}/VERSION")
    with opened(project) as store:
        aliases = aliases_of(store)
        if match[2] and match[2] not in aliases:
            have = ", ".join(f"{alias} (version {version})" for alias, version in sorted(aliases.items())) or "none yet"
            raise UserError(f"{uri}: no such alias; have {have}")
        found = get_version(store, match[3] or aliases[match[2]])
        hashes = tagged_weights(found.tags)
    if not hashes:
        raise UserError(f"{uri}: version {found.version} has no weights.*.sha256 tag: not registered by this pipeline")
    return str(found.version), hashes


def download(project: Path, version: str, folder: Path) -> None:
    """Writes the files of a registered version into the new `folder`, each one compared with the hash it was judged
    under. Raises UserErrors otherwise.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with opened(project) as store, tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        fetched, _ = fetch_weights(store, get_version(store, version), Path(temporary))
        fetched.rename(folder)


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
    """A version by `models:/danceopd/3`, `models:/danceopd@champion` or `3`; None when nobody has the alias, or there
    is no such version.
    """
    match = REFERENCE.fullmatch(reference.strip())
    if match is None:
        raise UserError(f"model = {reference!r}: expected models:/{MODEL}/NUMBER, models:/{MODEL}@ALIAS or a number")
    store = tracking.open_store(project)
    number = match["number"] or match["bare"]
    with server.explained(store.uri):
        known = {str(one.version): one for one in store.client.search_model_versions(f"name='{MODEL}'")}
        if match["alias"]:
            models = store.client.search_registered_models(f"name='{MODEL}'")
            number = str(models[0].aliases.get(match["alias"], "")) if models else ""
    found = known.get(str(number))
    if found is None:
        return None
    weights = {
        named[1]: value for key, value in found.tags.items() if (named := re.fullmatch(r"weights\.(.+)\.sha256", key))
    }
    return Version(str(found.version), str(found.run_id), found.tags.get("git.sha"), weights, dict(found.tags))


def require(project: Path, reference: str) -> Version:
    """As `find`. Raises UserError when there is none."""
    found = find(project, reference)
    if found is None:
        raise UserError(f"model = {reference!r}: no such version; python -m tasks registry lists them")
    return found


def require_clean(version: Version) -> None:
    """Raises UserError unless the version was made from a commit without changes: what nobody can check out again is
    not promoted.
    """
    if version.tags.get("git.known") != "true" or not version.sha:
        raise UserError(
            f"version {version.number} was made from unknown code; run its revision as distill/prod and promote that version"
        )
    if version.tags.get("git.dirty") != "false":
        dirty = f"version {version.number} was made from changed files on top of {version.sha[:12]}"
        raise UserError(f"{dirty}; commit them, run distill/prod and promote that version")


def require_weights(version: Version, checkpoint: Path) -> None:
    """Raises UserErrors unless the folder holds exactly the files that were registered."""
    actual = weight_hashes(checkpoint)
    differing = {name: value for name, value in version.weights.items() if actual.get(name) != value}
    faults = [
        f"{name}: SHA-256 is {actual.get(name, 'nothing')}, registered as {value}" for name, value in differing.items()
    ]
    faults += [f"{name}: not among the files registered" for name in sorted(set(actual) - set(version.weights))]
    if faults or not version.weights:
        raise UserErrors(
            f"{checkpoint}: not the weights of version {version.number}",
            faults or ["the version has no weights.*.sha256 tags"],
        )
