"""The model registry: candidates in, one champion out, every decision on record. All registry writes happen here.

    submit_files(project, gate_params, promote, actor, reason) -> dict   # what the flow calls after tasks.gate.judge_files
    champion(project) -> dict | None                                     # {"version", "scorecard", "scores", "run_id"}: what the gate compares with
    approve(project, ...), decide_reviews(project) -> list[dict]         # a review, by command or in the web page, and what comes of it
    promote / rollback / reject(project, ...) -> dict, reconcile(project) -> list[str], cli(argv) -> int

A candidate that passed the gate becomes a version of `danceopd` with alias `candidate`; a reviewer (or promote="auto") makes it `champion`. A refused one is
kept as a run with its reasons and files, and is never a version; neither is one whose weights are the champion's. MLflow's aliases have no compare-and-swap
and no history, so the decision is the ledger's next entry (tasks/ledger.py) and the aliases follow its last one; `reconcile` lets them catch up after a crash.

A review in the web page is three tags of the version: `review.by`, `review.reason` and, last, `review.status` = approved or rejected.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote, urlsplit

import yaml

from data.errors import UserError, UserErrors
from data.files import digest, link_or_copy, read_json, sha256_bytes, sha256_file
from tasks import environment, gate, ledger, pyfunc_model, s3, tracking
from tasks.provenance import DVC_PATHS, md5_of, provenance
from tasks.review import REVIEW_FILE

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

MODEL = "danceopd"
CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
HEAD_TAG = "ledger.head"  # of the registered model: the last entry that the aliases followed, so that a ledger cut short is noticed
LONGEST_DESCRIPTION = 5000  # PostgreSQL's column; SQLite would take more
WEIGHTS = ".safetensors"
CHECKPOINT_SUFFIXES = (WEIGHTS, ".json", ".jsonl", ".csv", ".txt", ".md", ".png")
STEPS_FILES = {"distill": "checkpoints/student/steps.csv", "absorb": "checkpoints/absorbed/steps.csv"}
PICTURES = ("t2i.png", "edits.png", "scorecard.png")  # of the report: shown on the version's page
LONGEST_ANSWER = 2000
# Its description of a logged model, and what loading one writes beside it.
MLFLOWS_OWN = ("MLmodel", "registered_model_meta", "conda.yaml", "python_env.yaml", "requirements.txt")
STATUS_TAG, BY_TAG, REASON_TAG, ANSWER_TAG = "review.status", "review.by", "review.reason", "review.answer"
LINEAGE_PREFIXES = ("git.", "dvc.", "params.", "env.", "teacher.", "base.", "mlflow.run_id")
Promote = Literal["auto", "review"]


def ledger_place(store: tracking.Store) -> ledger.Place:
    """DANCEOPD_LEDGER, if it is set: the one that all machines share. Else a folder inside the project: `mlflow/ledger` for the project's own store, one of its
    own for each other store, since version numbers are that store's. Raises UserError when the variable holds something else than an S3 address."""
    shared = environment.setting(environment.LEDGER)
    if shared is not None:
        s3.split(shared)
        return shared.rstrip("/")
    folder = store.project / tracking.FOLDER / "ledger"
    return folder if store.is_local else folder / sha256_bytes(tracking.without_credentials(store.uri).encode())[:12]


def weight_hashes(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file of a checkpoint folder.

    Raises UserErrors when it is missing, holds no readable safetensors, or holds a file of a kind that could carry code (pickle).
    """
    from safetensors import SafetensorError, safe_open

    if not folder.is_dir():
        raise UserError(f"{folder}: no such checkpoint folder; run the absorb stage first")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    allowed = ", ".join(CHECKPOINT_SUFFIXES)
    faults = [f"{name}: only {allowed} files belong in a checkpoint" for name, path in files.items() if path.suffix not in CHECKPOINT_SUFFIXES]
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


def _get_version(store: tracking.Store, version: str) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        return store.client.get_model_version(MODEL, version)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        existing = ", ".join(sorted((str(one.version) for one in _versions(store)), key=int)) or "none yet"
        raise UserError(f"{MODEL} has no version {version}; versions: {existing}") from error


def _versions(store: tracking.Store) -> list[ModelVersion]:
    return list(store.client.search_model_versions(f"name='{MODEL}'"))


def _aliases(store: tracking.Store) -> dict[str, str]:
    """Alias -> version; empty before the first submission."""
    from mlflow.exceptions import MlflowException

    try:
        model = store.client.get_registered_model(MODEL)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}
    return {alias: str(version) for alias, version in model.aliases.items()}


def _ensure_model(store: tracking.Store) -> None:
    from mlflow.exceptions import MlflowException

    try:
        store.client.create_registered_model(MODEL, description="Students distilled from several flow-matching teachers; alias champion is in service.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _read_ledger(store: tracking.Store) -> list[ledger.Entry]:
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


def _follow(store: tracking.Store) -> list[str]:
    """Makes the aliases say what the ledger's last entry says; returns what it changed.

    One process of this machine at a time. Other machines may follow an older entry meanwhile, so the ledger is read again after writing: whoever writes last
    has then seen the last entry.
    """
    changed: list[str] = []
    with tracking.locked(store.project):
        entries = _read_ledger(store)
        while True:
            changed += _copy_to_registry(store, entries)
            again = _read_ledger(store)
            if len(again) == len(entries):
                return changed
            entries = again


def _copy_to_registry(store: tracking.Store, entries: Sequence[ledger.Entry]) -> list[str]:
    aliases = _aliases(store)
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
            _get_version(store, version)
            store.client.set_registered_model_alias(MODEL, alias, version)
            changed.append(f"alias {alias} -> version {version} (was {aliases.get(alias, 'unset')})")
    if aliases.get(CANDIDATE) in decided:
        store.client.delete_registered_model_alias(MODEL, CANDIDATE)
        changed.append(f"alias {CANDIDATE} removed (version {aliases[CANDIDATE]} was decided on)")
    versions = {str(one.version): one for one in _versions(store)} if entries else {}
    for entry in _last_decisions(entries):
        review = {"status": "rejected" if entry.action == "reject" else "approved", "by": entry.actor, "reason": entry.reason, "time": entry.time}
        tags = (versions.get(entry.version) or _get_version(store, entry.version)).tags
        for key, value in review.items():
            if tags.get(f"review.{key}") != value:
                store.client.set_model_version_tag(MODEL, entry.version, f"review.{key}", value)
                changed.append(f"version {entry.version}: review.{key} = {value}")
    noted = f"{head.number}:{head.hash}" if head is not None else None
    if noted and store.client.get_registered_model(MODEL).tags.get(HEAD_TAG) != noted:
        store.client.set_registered_model_tag(MODEL, HEAD_TAG, noted)
    return changed


def _last_decisions(entries: Sequence[ledger.Entry]) -> list[ledger.Entry]:
    """The last promotion or rejection of each version."""
    return list({entry.version: entry for entry in entries if entry.action in ("promote", "reject")}.values())


def _state(entries: Sequence[ledger.Entry]) -> tuple[str | None, str | None]:
    """(champion, previous) after the last entry."""
    return (entries[-1].to_version, entries[-1].previous) if entries else (None, None)


@contextmanager
def _opened(project: Path) -> Iterator[tracking.Store]:
    store = tracking.open_store(project)
    with tracking.explained(store.uri):
        yield store


def reconcile(project: Path) -> list[str]:
    """Aliases and review tags are made to follow the ledger (after a crash, or an alias moved in the web page); returns the changes, in words."""
    with _opened(project) as store:
        return _follow(store)


def champion(project: Path) -> dict[str, Any] | None:
    """The champion as the gate needs it: {"version", "scorecard" (dict), "scores" (path of its scores.parquet, or None), "run_id", "page" (of its report)}.

    None before the first promotion. Downloads into `runs/champion/VERSION`. Raises UserError when the registry lacks what the ledger names, or when a file
    is not the one that was judged.
    """
    with _opened(project) as store:
        version, _ = _state(_read_ledger(store))
        if version is None:
            return None
        found = _get_version(store, version)
        folder = store.project / "runs" / "champion" / version
        run_id = str(found.run_id)
        wanted = {name: found.tags.get(f"{name}.sha256") for name in ("scorecard.json", "scores.parquet")}
        for name, expected in wanted.items():
            if expected and not ((folder / name).is_file() and sha256_file(folder / name) == expected):
                folder.mkdir(parents=True, exist_ok=True)
                artifact = "scores/scores.parquet" if name == "scores.parquet" else name
                with tempfile.TemporaryDirectory() as temporary:
                    fetched = Path(store.client.download_artifacts(run_id, artifact, temporary))
                    if sha256_file(fetched) != expected:
                        raise UserError(f"champion version {version}: {artifact} of run {run_id} is not the file that was judged; restore it, or roll back")
                    shutil.copyfile(fetched, folder / name)
        if not wanted["scorecard.json"]:
            raise UserError(f"champion version {version} has no tag scorecard.json.sha256; it was not submitted by this pipeline: roll back")
        scores = folder / "scores.parquet" if wanted["scores.parquet"] else None
        return {"version": version, "scorecard": read_json(folder / "scorecard.json"), "scores": scores, "run_id": run_id, "page": _report_page(store, run_id)}


def _report_page(store: tracking.Store, run_id: str) -> str | None:
    """The address of a run's report page: in MLflow's pages where there is a server, else the file's; None where it is kept elsewhere."""
    run = store.client.get_run(run_id)
    if address := tracking.for_browsers(store.uri):
        return f"{address}/{_report_artifacts(run.info.experiment_id, run_id)}/report.html"
    place = urlsplit(str(run.info.artifact_uri))
    page = Path(unquote(place.path)) / "report" / "report.html"
    return page.as_uri() if place.scheme in ("", "file") and page.is_file() else None


def _report_artifacts(experiment_id: str, run_id: str) -> str:
    return f"#/experiments/{experiment_id}/runs/{run_id}/artifacts/report"


def ledger_state(project: Path) -> tuple[ledger.Place, list[ledger.Entry], bool]:
    """(place, verified entries, whether the aliases differ from the last one)."""
    with _opened(project) as store:
        entries, aliases = _read_ledger(store), _aliases(store)
        return ledger_place(store), entries, _state(entries) != (aliases.get(CHAMPION), aliases.get(PREVIOUS))


def try_to_write(project: Path) -> None:
    """A tag of no meaning on the experiment, and on the registered model where there is one. Raises UserError when the account may not write."""
    from mlflow.exceptions import MlflowException

    with _opened(project) as store:
        experiment = store.client.get_experiment_by_name(tracking.EXPERIMENT)
        assert experiment is not None  # open_store made it
        store.client.set_experiment_tag(experiment.experiment_id, "doctor", datetime.now(UTC).isoformat(timespec="seconds"))
        try:
            store.client.get_registered_model(MODEL)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return
        store.client.set_registered_model_tag(MODEL, "doctor", datetime.now(UTC).isoformat(timespec="seconds"))


def champion_files(project: Path, folder: Path) -> dict[str, Any]:
    """The champion's files below `folder`, as the ledger knows them: {"version", "folder", "hashes" (name -> SHA-256), "ledger" (number of the entry that made
    it champion), "lineage" (the tags about where it comes from)}.

    Raises UserError when there is no champion, and when its files are not those of the decision.
    """
    with _opened(project) as store:
        entries = _read_ledger(store)
        version, _ = _state(entries)
        if version is None:
            raise UserError("there is no champion yet; promote a version first (python -m tasks promote)")
        entry = next(one for one in reversed(entries) if one.action in ("promote", "rollback"))  # what made this version the champion
        found = _get_version(store, version)
        fetched, hashes = fetch_weights(store, found, folder)
        if digest(hashes) != entry.weights:
            raise UserError(f"champion version {version}: its files are not those of ledger entry {entry.number:06d}; roll back, or restore them")
        lineage = {key: value for key, value in sorted(found.tags.items()) if key.startswith(LINEAGE_PREFIXES)}
        return {"version": version, "folder": fetched, "hashes": hashes, "ledger": entry.number, "lineage": {**lineage, "verdict.sha256": str(entry.verdict)}}


def facts(project: Path, reference: str) -> dict[str, Any]:
    """What is known of a version: {"version", "run_id", "tags", "entries" (of the ledger, as dicts), "artifacts" (name -> SHA-256 as kept, of the run's small
    files), "weights" (faults of its files, in words)}.

    reference: `models:/danceopd@champion`, `models:/danceopd/3`, `@previous` or `3`. The champion is the ledger's. Raises UserError when there is none.
    """
    with _opened(project) as store:
        entries = _read_ledger(store)
        found = _get_version(store, _resolve(store, entries, reference))
        artifacts: dict[str, str | None] = {}
        with tempfile.TemporaryDirectory() as temporary:
            for name in ("verdict.json", "scorecard.json", "params.yaml", "dvc.lock"):
                artifacts[name] = _artifact_hash(store, str(found.run_id), name, Path(temporary))
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


def _artifact_hash(store: tracking.Store, run_id: str, name: str, folder: Path) -> str | None:
    from mlflow.exceptions import MlflowException

    try:
        return sha256_file(store.client.download_artifacts(run_id, name, str(folder)))
    except (MlflowException, OSError) as error:
        if isinstance(error, MlflowException) and store.uri.startswith("http") and tracking.is_outage(error):
            raise
        return None


def _resolve(store: tracking.Store, entries: Sequence[ledger.Entry], reference: str) -> str:
    found = re.fullmatch(rf"(?:models:/{MODEL})?(?:@(?P<alias>[A-Za-z0-9_-]+)|/?(?P<version>\d+))", reference.strip())
    if found is None:
        raise UserError(f"{reference!r}: not a version; expected models:/{MODEL}@{CHAMPION}, models:/{MODEL}/3, @{PREVIOUS} or 3")
    if found["version"]:
        return found["version"]
    current, previous = _state(entries)
    known = {**_aliases(store), CHAMPION: current, PREVIOUS: previous}
    version = known.get(found["alias"])
    if version is None:
        have = ", ".join(sorted(name for name, one in known.items() if one)) or "none yet"
        raise UserError(f"{reference}: no version has this alias; aliases: {have}")
    return version


def all_tags(project: Path) -> dict[str, dict[str, str]]:
    """Version -> its tags, for the way back from a digest."""
    with _opened(project) as store:
        return {str(one.version): dict(one.tags) for one in sorted(_versions(store), key=lambda one: int(one.version))}


# What a reviewer reads


def _number(metric: Mapping[str, Any] | None) -> str:
    mean = gate.finite((metric or {}).get("mean"))
    if mean is None:
        return "-"
    low, high = gate.finite((metric or {}).get("low")), gate.finite((metric or {}).get("high"))
    return f"{mean:.3f}" if low is None or high is None else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def teacher_metrics(validated: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Teacher -> metric path -> metric, from reports/validate.json (`teachers: {NAME: {"metrics": {...}}}`)."""
    teachers = validated.get("teachers")
    found = {name: one.get("metrics") for name, one in teachers.items() if isinstance(one, Mapping)} if isinstance(teachers, Mapping) else {}
    return {name: metrics for name, metrics in found.items() if isinstance(metrics, Mapping)}


def _cell(text: Any) -> str:
    return str(text).replace("|", "/").replace("\n", " ")


def description(
    scorecard: Mapping[str, Any],
    verdict: Mapping[str, Any],
    compared: tuple[str, Mapping[str, Any]] | None,
    teachers: Mapping[str, Mapping[str, Any]],
    origin: str,
    version: str | None,
    lineage: Sequence[str] = (),
) -> str:
    """Markdown that a reviewer can decide from, under 5000 characters: how to decide, scores with intervals, the verdict's rules, where the grids are.

    compared: (version, metrics) of the champion. teachers: name -> metrics. version: None while its number is unknown. lineage: lines about data, teachers and
    files. Rows and rules that do not fit are counted, never dropped in silence.
    """
    kept = sum(rule["passed"] for rule in verdict["rules"])
    command = f"`python -m tasks promote --version {version or 'N'} --reviewer NAME --reason TEXT`"
    here = "Decide here: set the tags `review.by`, `review.reason` and then `review.status` = `approved` or `rejected`."
    registered = f"{here} Or promote with {command}; refuse: the same with `reject`; undo: `python -m tasks rollback`."
    pictures = ["", *(line for line in lineage if line.startswith("!["))]  # below the tables: figures decide
    head = [
        f"**Gate: {'passed' if _passed(verdict) else 'refused'}**, {kept} of {len(verdict['rules'])} rules. {origin}",
        "",
        registered if _passed(verdict) else "Refused: kept as a run, registered as no version.",
        "Sample grids and the report page: the source run's artifacts, folder `report`.",
        *(line for line in lineage if line and line not in pictures),
        "",
    ]
    metrics = scorecard["metrics"]
    order = [path for path in gate.known_paths() if path in metrics] + sorted(path for path in metrics if path not in set(gate.known_paths()))
    order.sort(key=lambda path: not path.startswith("retention/") and path.partition("/")[2] not in gate.HEADLINES.values())  # what decides comes first
    titles = ["metric", "candidate", f"champion (v{compared[0]})" if compared else "champion (none)", *teachers]
    table = ["| " + " | ".join(map(_cell, titles)) + " |", "|---" * len(titles) + "|"]
    for path in order:
        others = [compared[1] if compared else {}, *teachers.values()]
        table.append("| " + " | ".join([path, _number(metrics[path]), *(_number(other.get(path)) for other in others)]) + " |")
    rules = ["", "| rule | outcome | value | bound |", "|---|---|---|---|"]
    for rule in sorted(verdict["rules"], key=lambda rule: rule["passed"]):
        shown = [f"{value:.4g}" if isinstance(value, float) else _cell("-" if value is None else value)[:12] for value in (rule["value"], rule["bound"])]
        rules.append(f"| {rule['rule']} | {'pass' if rule['passed'] else '**FAIL**'} | {shown[0]} | {shown[1]} |")
    text = head
    for block, name in ((table, "metrics are in scorecard.json"), (rules, "rules are in verdict.json")):
        for index, line in enumerate(block):
            if len("\n".join([*text, line, *pictures])) > LONGEST_DESCRIPTION - 200:
                text = [*text, "", f"({len(block) - index} more {name})", ""]
                break
            text = [*text, line]
    return "\n".join([*text, *pictures])[: LONGEST_DESCRIPTION - 1]


# Submitting


@dataclass(frozen=True)
class Submission:
    """The files of one candidate. `steps`: stage -> its steps.csv."""

    params: Path
    checkpoint: Path
    scorecard: Path
    scores: Path
    teachers: Path
    verdict: Path
    report: Path
    steps: Mapping[str, Path]


def _rule_value(verdict: Mapping[str, Any], name: str) -> Any:
    return next((rule["value"] for rule in verdict["rules"] if rule["rule"] == name), None)


def _checked(submission: Submission) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, str]]:
    """(scorecard, verdict, validated, weight hashes), read before anything is sent. Raises UserErrors with all faults."""
    faults: list[str] = []

    def read(path: Path, key: str) -> dict[str, Any]:
        try:
            value = read_json(path)
        except UserError as error:
            faults.append(str(error))
            return {}
        if not isinstance(value, dict) or (key and key not in value):
            faults.append(f"{path}: no {key!r} in it; run the stage that makes it again")
            return {}
        return value

    scorecard, verdict, validated = read(submission.scorecard, "metrics"), read(submission.verdict, "rules"), read(submission.teachers, "")
    needed = (submission.params, submission.scores, submission.report, *submission.steps.values())
    faults += [f"{path}: no such file or folder" for path in needed if not path.exists()]
    hashes: dict[str, str] = {}
    try:
        hashes = weight_hashes(submission.checkpoint)
    except UserErrors as error:
        faults += [f"{submission.checkpoint}: {fault}" for fault in error.faults]
    except UserError as error:
        faults.append(str(error))
    if verdict and scorecard:
        judged = _rule_value(verdict, gate.SCORECARD_RULE)
        if judged != md5_of(submission.scorecard):
            faults.append(f"{submission.verdict}: it judged another scorecard than {submission.scorecard} (MD5 {judged}); run the gate again")
        weights = _rule_value(verdict, gate.WEIGHTS_RULE)
        if weights != md5_of(submission.checkpoint):
            faults.append(f"{submission.verdict}: it judged other weights than {submission.checkpoint} (MD5 {weights}); run the gate again")
    if faults:
        raise UserErrors("the candidate cannot be submitted", faults)
    return scorecard, verdict, validated, hashes


def _passed(verdict: Mapping[str, Any]) -> bool:
    return bool(verdict["rules"]) and verdict.get("passed") is True and all(rule["passed"] is True for rule in verdict["rules"])


def _weight_tags(hashes: Mapping[str, str]) -> dict[str, str]:
    return {f"weights.{name}.sha256": value for name, value in hashes.items()}


def _tagged_weights(tags: Mapping[str, str]) -> dict[str, str]:
    return {match[1]: value for key, value in tags.items() if (match := re.fullmatch(r"weights\.(.+)\.sha256", key))}


def _lineage_tags(project: Path, submission: Submission, scorecard: Mapping[str, Any], verdict: Mapping[str, Any], hashes: Mapping[str, str]) -> dict[str, str]:
    origin = provenance(project)
    known = {key: value for key, value in origin.items() if key not in ("files", "git.changed", "git.reason") and value is not None}
    identities = scorecard.get("identities") or {}
    teachers = identities.get("teachers")
    failed = [rule["rule"] for rule in verdict["rules"] if not rule["passed"]]
    return {
        **{key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in known.items()},
        "params.sha256": sha256_file(submission.params),
        **{f"teacher.{name}.sha256": str(value) for name, value in (teachers if isinstance(teachers, Mapping) else {}).items()},
        **({"base.sha256": str(identities["base"])} if identities.get("base") else {}),
        **_weight_tags(hashes),
        "scorecard.json.sha256": sha256_file(submission.scorecard),
        "scores.parquet.sha256": sha256_file(submission.scores),
        "gate.status": "passed" if _passed(verdict) else "refused",
        "gate.verdict": f"{len(verdict['rules']) - len(failed)} of {len(verdict['rules'])} rules passed" + (f"; failed: {', '.join(failed)}" if failed else ""),
        "gate.verdict.sha256": sha256_file(submission.verdict),
        "gate.champion": str(_rule_value(verdict, gate.CHAMPION_RULE) or gate.NO_CHAMPION),
    }


def submit(project: Path, submission: Submission, *, promote: Promote, actor: str, reason: str, tags: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Publishes one candidate as a run; a passing one becomes a version with alias `candidate` and, with promote="auto", the champion.

    `tags` are added to the lineage tags. Returns {"model", "status" ("champion" | "candidate" | "refused" | "identical": the champion's weights),
    "version" (str or None), "run_id", "tracking_uri", "reasons" (of a refusal)}. Repeating a submission that was interrupted finishes it. Raises UserErrors for
    missing or mismatched files before anything is sent.
    """
    if promote not in ("auto", "review"):
        raise UserError(f"promote = {promote!r}: expected 'auto' or 'review'")
    _need(actor, reason)
    outcome = _publish(project, submission, actor, reason, tags or {})
    return _promote_at_once(project, outcome, actor, reason) if promote == "auto" and outcome["status"] == "candidate" else outcome


def _publish(project: Path, submission: Submission, actor: str, reason: str, extra: Mapping[str, str]) -> dict[str, Any]:
    """Sends the candidate. Every step looks first for what an interrupted submission of the same candidate has left, so that repeating it finishes it."""
    scorecard, verdict, validated, hashes = _checked(submission)
    base = pyfunc_model.carried(project, submission.checkpoint)
    hashes |= {name: sha256_file(path) for name, path in base.items()}
    refusals = [f"{rule['rule']}: {rule['reason']}" for rule in verdict["rules"] if not rule["passed"]]
    tags = {**_lineage_tags(project, submission, scorecard, verdict, hashes), **extra}
    identity = digest({"weights": dict(hashes), "verdict": tags["gate.verdict.sha256"]})[:16]
    store = tracking.open_store(project)
    with tracking.explained(store.uri):
        known = _registered(store, identity) if _passed(verdict) else None
        if known is not None:
            with tracking.locked(store.project):
                if _aliases(store).get(CANDIDATE) is None:
                    store.client.set_registered_model_alias(MODEL, CANDIDATE, str(known.version))
            return _outcome(store, "candidate", str(known.version), str(known.run_id), [])
        twin = _equal_champion(store, hashes) if _passed(verdict) else None
    name = f"candidate {hashes_name(hashes)}"
    with tracking.run(project, name, {**tags, "submitted.by": actor, "submitted.reason": reason}, identity) as tracked:
        store = tracked.store
        tracking.log_params(tracked, _params_of(submission.params))
        for stage, path in submission.steps.items():
            tracking.log_steps(tracked, stage, path)
        lock = Path(project) / "dvc.lock"
        singles = [submission.scorecard, submission.verdict, submission.teachers, submission.params, *([lock] if lock.is_file() else [])]
        for path in singles:
            tracking.log_files(tracked, {"": path})
        steps = {f"steps/{stage}": path for stage, path in submission.steps.items()}
        tracking.log_files(tracked, {"scores": submission.scores, "report": submission.report, **steps})
        if (review := Path(project) / REVIEW_FILE).is_file():
            with tempfile.TemporaryDirectory() as temporary:  # beside the report here, not above it
                beside = Path(temporary) / review.name
                beside.write_text(review.read_text(encoding="utf-8").replace('"score/', '"'), encoding="utf-8")
                tracking.log_files(tracked, {"report": beside})
        _log_inputs(tracked, tags)
        if twin is not None:
            tracking.log_tags(
                tracked, {"registered.identical": twin, "mlflow.note.content": f"The same weights as champion version {twin}: not registered again."}
            )
            return _outcome(store, "identical", twin, tracked.run_id, [f"the weights are those of champion version {twin}: there is nothing new to register"])
        model_id = _log_model(tracked, submission.checkpoint, base, hashes, tags["gate.status"])
        tracking.log_scorecard(tracked, scorecard, model_id)
        compared = _compared(store, tags["gate.champion"])
        changed = " with changed files" if tags.get("git.dirty") == "true" else ""
        origin = f"Code {tags.get('git.sha', 'unversioned')[:12]}{changed}, submitted by {actor}: {reason}"
        texts = (scorecard, verdict, compared, teacher_metrics(validated), origin[:400])
        card = description(*texts, None, _lineage_lines(tracked, tags, submission))
        if not _passed(verdict):
            tracking.log_tags(tracked, {"gate.reasons": "\n".join(refusals), "mlflow.note.content": card})
            return _outcome(store, "refused", None, tracked.run_id, refusals)
        _ensure_model(store)
        version = next((one for one in _versions(store) if one.run_id == tracked.run_id), None) or store.client.create_model_version(
            MODEL,
            source=store.client.get_logged_model(model_id).artifact_location,  # models:/ID would be looked up in the process-wide tracking URI
            run_id=tracked.run_id,
            model_id=model_id,
            tags={**tags, tracking.IDENTITY_TAG: identity, "mlflow.run_id": tracked.run_id, "review.status": "pending"},
            description=card,
        )
        number = str(version.version)
        store.client.update_model_version(MODEL, number, description(*texts, number, _lineage_lines(tracked, tags, submission)))
        tracking.log_tags(tracked, {"registered.version": number, "mlflow.note.content": card})
        with tracking.locked(store.project):
            store.client.set_registered_model_alias(MODEL, CANDIDATE, number)
    return _outcome(store, "candidate", number, tracked.run_id, [])


def _registered(store: tracking.Store, identity: str) -> ModelVersion | None:
    """The version of this very candidate (weights and verdict) that waits for its review, with its run finished; None when there is none."""
    decided = {entry.version for entry in _read_ledger(store) if entry.action in ("promote", "reject")}
    same = (one for one in _versions(store) if one.tags.get(tracking.IDENTITY_TAG) == identity and str(one.version) not in decided)
    return next((one for one in same if store.client.get_run(str(one.run_id)).info.status == "FINISHED"), None)


def _weights_only(hashes: Mapping[str, str]) -> dict[str, str]:
    """Without records and step tables, which hold times."""
    return {name: value for name, value in hashes.items() if name.endswith(WEIGHTS)}


def _equal_champion(store: tracking.Store, hashes: Mapping[str, str]) -> str | None:
    """The champion's version when its weights are these, byte for byte."""
    current, _ = _state(_read_ledger(store))
    if current is None:
        return None
    return current if _weights_only(_tagged_weights(_get_version(store, current).tags)) == _weights_only(hashes) else None


def _log_inputs(tracked: tracking.Run, tags: Mapping[str, str]) -> None:
    """Data and teachers as the run's datasets, by the digests that DVC and the scorecard know them under."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    found = [(name, f"dvc:{path}", tags.get(f"dvc.{name}.md5"), "training") for name, path in DVC_PATHS.items() if name in ("curated", "encoded", "teachers")]
    found += [
        (f"teacher {match[1]}", "dvc:data/teachers", value, "teacher") for key, value in tags.items() if (match := re.fullmatch(r"teacher\.(.+)\.sha256", key))
    ]
    inputs = [
        DatasetInput(Dataset(name, value[:36], "dvc", source), [InputTag("mlflow.data.context", context)]) for name, source, value, context in found if value
    ]
    if inputs:
        tracked.store.client.log_inputs(tracked.run_id, inputs)


def _lineage_lines(tracked: tracking.Run, tags: Mapping[str, str], submission: Submission) -> list[str]:
    """Where the page leads on to: the run's files, and what data and teachers it came from."""
    teachers = ", ".join(f"{match[1]} {value[:8]}" for key, value in tags.items() if (match := re.fullmatch(r"teacher\.(.+)\.sha256", key)))
    data = ", ".join(f"{name} {tags[f'dvc.{name}.md5'][:8]}" for name in ("curated", "encoded") if f"dvc.{name}.md5" in tags)
    lines = [f"Teachers: {teachers or 'unknown'}. Data: {data or 'unversioned'}. All of it: `python -m tasks lineage`."]
    if tracked.store.uri.startswith("http"):
        page = _report_artifacts(tracked.experiment_id, tracked.run_id)
        pictures = [name for name in PICTURES if (submission.report / name).is_file()]
        lines[:0] = [f"[Report and grids]({page}/report.html)"]
        lines += ["", *(f"![{name}](get-artifact?path=report/{name}&run_uuid={tracked.run_id})" for name in pictures)]
    return lines


def hashes_name(hashes: Mapping[str, str]) -> str:
    """A short name for these weights, equal for equal weights."""
    return digest(dict(hashes))[:10]


def _outcome(store: tracking.Store, status: str, version: str | None, run_id: str, reasons: list[str]) -> dict[str, Any]:
    return {"model": MODEL, "status": status, "version": version, "run_id": run_id, "tracking_uri": tracking.without_credentials(store.uri), "reasons": reasons}


def _params_of(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({error})") from error
    return value if isinstance(value, dict) else {}


def _write_mlmodel(folder: Path) -> None:
    """MLflow's description of the model: a pyfunc whose loader is the project's own module, so that no code and nothing to unpickle travels with it."""
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    kinds = {int: "long", float: "double"}
    described = Model()
    pyfunc.add_to_model(described, loader_module="tasks.pyfunc_model")
    described.signature = ModelSignature(
        Schema([ColSpec("string", "prompt"), ColSpec("string", "source", required=False)]),
        Schema([ColSpec("string", "image")]),
        ParamSchema([ParamSpec(name, kinds[type(value)], value) for name, value in pyfunc_model.DEFAULTS.items()]),
    )
    described.save(str(folder / "MLmodel"))


def _log_model(tracked: tracking.Run, checkpoint: Path, base: Mapping[str, Path], hashes: Mapping[str, str], status: str) -> str:
    """The checkpoint as an MLflow logged model: safetensors and JSON, the base of an adapter student beside it, and a pyfunc that samples it.

    A half-sent one is marked FAILED.
    """
    client = tracked.store.client
    same = client.search_logged_models([tracked.experiment_id], f"source_run_id = '{tracked.run_id}'", max_results=10)
    whole = next((one for one in same if str(one.status) in ("READY", "LoggedModelStatus.READY")), None)
    if whole is not None:
        return str(whole.model_id)
    logged = client.create_logged_model(
        tracked.experiment_id, name="student", source_run_id=tracked.run_id, tags={**_weight_tags(hashes), "gate.status": status}, model_type="diffusion"
    )
    try:
        client.log_model_artifacts(logged.model_id, str(checkpoint))
        with tempfile.TemporaryDirectory(dir=checkpoint.parent) as temporary:
            for name, path in base.items():
                link_or_copy(path, Path(temporary) / name)
            _write_mlmodel(Path(temporary))
            client.log_model_artifacts(logged.model_id, temporary)
    except BaseException:
        with suppress(Exception):  # the first failure is the one to tell
            client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    return str(logged.model_id)


def _compared(store: tracking.Store, version: str) -> tuple[str, Mapping[str, Any]] | None:
    """(version, metrics) of the champion that the verdict compared with."""
    if version == gate.NO_CHAMPION:
        return None
    found = _get_version(store, version)
    with tempfile.TemporaryDirectory() as temporary:
        return version, read_json(store.client.download_artifacts(str(found.run_id), "scorecard.json", temporary))["metrics"]


def submit_files(project: Path, gate_params: gate.Params, promote: Promote, actor: str, reason: str) -> dict[str, Any]:
    """`submit` with the files where the stages leave them; the digest of the gate's params is kept as tag `gate.params.sha256`."""
    project = Path(project).resolve()
    submission = Submission(
        params=project / "params.yaml",
        checkpoint=project / gate.CHECKPOINT_FOLDER,
        scorecard=project / gate.SCORECARD_FILE,
        scores=project / gate.SCORES_FILE,
        teachers=project / gate.VALIDATE_FILE,
        verdict=project / gate.VERDICT_FILE,
        report=(project / gate.SCORES_FILE).parent,
        steps={stage: project / path for stage, path in STEPS_FILES.items()},
    )
    return submit(project, submission, promote=promote, actor=actor, reason=reason, tags={"gate.params.sha256": digest(asdict(gate_params))})


# Deciding


class Refusal(UserError):
    """A decision that may not be taken, however often it is tried."""


class Stale(Refusal):
    """The champion is another than the one that the candidate was compared with."""


class OtherFiles(UserErrors, Refusal):
    """The files of a version are not the ones that were judged."""


def _need(actor: str, reason: str) -> None:
    missing = [name for name, text in (("a name", actor), ("a reason", reason)) if not text.strip()]
    if missing:
        raise UserError(f"a decision needs {' and '.join(missing)}: who decided, and why, is part of the record")


def _require_right(store: tracking.Store, reviewer: str) -> None:
    """The reviewer must be one of those named, where they are, and the account must be allowed to change the model: found out by a write that means nothing,
    since the ledger's entry comes before the aliases."""
    allowed = environment.setting(environment.REVIEWERS)
    names = [name.strip() for name in allowed.split(",")] if allowed else []
    if names and reviewer.strip() not in names:
        raise Refusal(f"{reviewer!r} may not decide here; {environment.REVIEWERS} names {', '.join(names)}")
    if not store.is_local:
        store.client.set_registered_model_tag(MODEL, "decision.account", tracking.account())


def fetch_weights(store: tracking.Store, found: ModelVersion, folder: Path) -> tuple[Path, dict[str, str]]:
    """(folder below `folder`, name -> SHA-256) of the version's files, each of them the one it was registered under. Nothing is opened but for its hash.

    Raises UserErrors naming every file that is missing, was changed or was added (a pickle, say).
    """
    from mlflow.artifacts import download_artifacts

    expected = _tagged_weights(found.tags)
    fetched = Path(download_artifacts(artifact_uri=found.source, dst_path=str(folder), tracking_uri=store.uri))
    for name in MLFLOWS_OWN:
        (fetched / name).unlink(missing_ok=True)
    actual = {path.relative_to(fetched).as_posix(): sha256_file(path) for path in sorted(fetched.rglob("*")) if path.is_file()}
    faults = [f"{name}: missing" for name in expected if name not in actual]
    faults += [f"{name}: not among the files registered" for name in actual if name not in expected]
    faults += [f"{name}: SHA-256 is {actual[name]}, registered as {value}" for name, value in expected.items() if name in actual and actual[name] != value]
    if faults or not expected:
        title = f"version {found.version}: its files are not the ones that were judged; submit the candidate again"
        raise OtherFiles(title, faults or ["no weights.*.sha256 tag: not registered by this pipeline"])
    return fetched, actual


def _verified_weights(store: tracking.Store, found: ModelVersion, verdict: Mapping[str, Any]) -> str:
    """Downloads the version's files and compares each with the hash it was registered under, and all with the verdict; returns the digest of the hashes."""
    with tempfile.TemporaryDirectory() as temporary:
        fetched, actual = fetch_weights(store, found, Path(temporary))
        shutil.rmtree(fetched / pyfunc_model.CARRIED, ignore_errors=True)  # verified by its hashes; the verdict is about the student's own files
        if _rule_value(verdict, gate.WEIGHTS_RULE) != md5_of(fetched):
            raise Refusal(f"version {found.version}: its files are not the ones that were judged (the verdict names others); submit the candidate again")
    return digest(actual)


def _verified_verdict(store: tracking.Store, found: ModelVersion) -> tuple[dict[str, Any], str]:
    """(verdict, SHA-256 of its file), which must be the one noted at registration, must have passed, and must be about the scorecard kept beside it."""
    if found.tags.get("gate.status") != "passed" or not found.run_id:
        raise Refusal(f"version {found.version} did not pass the gate (gate.status = {found.tags.get('gate.status', 'unset')}); it cannot become champion")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(store.client.download_artifacts(found.run_id, "verdict.json", temporary))
        verdict, noted = read_json(path), sha256_file(path)
        card = Path(store.client.download_artifacts(found.run_id, "scorecard.json", temporary))
        scored, judged = sha256_file(card), md5_of(card)
    where = f"of run {found.run_id}"
    if noted != found.tags.get("gate.verdict.sha256") or not _passed(verdict):
        raise Refusal(f"version {found.version}: verdict.json {where} is not the passing verdict it was registered with; submit the candidate again")
    if scored != found.tags.get("scorecard.json.sha256") or judged != _rule_value(verdict, gate.SCORECARD_RULE):
        raise Refusal(f"version {found.version}: scorecard.json {where} is not the one that was judged; submit the candidate again")
    return verdict, noted


def _require_fresh(verdict: Mapping[str, Any], version: str, current: str | None) -> None:
    judged = str(_rule_value(verdict, gate.CHAMPION_RULE))
    if judged != (current or gate.NO_CHAMPION):
        now = f"version {current}" if current else "nobody"
        stale = f"version {version} was judged against champion {judged}, but champion is {now}"
        raise Stale(f"{stale}: the verdict is stale; run the gate again and submit")


def _decide(store: tracking.Store, entries: list[ledger.Entry], action: str, actor: str, reason: str, **decision: Any) -> dict[str, Any]:
    """Takes the ledger's next entry, then lets the aliases follow. From the first on the decision stands, whatever happens to the second."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    who = {"actor": actor.strip(), "reason": reason.strip(), "account": tracking.account()}
    entry = ledger.append(ledger_place(store), entries, time=now, action=action, **who, **decision)
    changed = _follow(store)
    return {"model": MODEL, "entry": asdict(entry), "changed": changed}


def promote(project: Path, version: str, reviewer: str, reason: str) -> dict[str, Any]:
    """Makes a version the champion. Returns {"model", "entry" (the ledger's), "changed" (aliases and tags, in words)}.

    Raises UserError when the version did not pass the gate, was rejected, was compared with another champion than today's, has other weights or scores than
    were judged, when the reviewer or the account may not decide, or when somebody else decided at the same moment.
    """
    _need(reviewer, reason)
    with _opened(project) as store:
        _follow(store)  # a decision that was interrupted is finished first
        entries = _read_ledger(store)
        current, _ = _state(entries)
        found = _get_version(store, version)
        version = str(found.version)
        if version == current:
            raise UserError(f"version {version} is the champion already")
        _require_undecided(entries, version)
        _require_right(store, reviewer)
        verdict, verdict_hash = _verified_verdict(store, found)
        _require_fresh(verdict, version, current)
        weights = _verified_weights(store, found, verdict)
        return _decide(
            store,
            entries,
            "promote",
            reviewer,
            reason,
            version=version,
            from_version=current,
            to_version=version,
            previous=current,
            verdict=verdict_hash,
            weights=weights,
        )


def _require_undecided(entries: Sequence[ledger.Entry], version: str) -> None:
    rejected = next((entry for entry in _last_decisions(entries) if entry.version == version and entry.action == "reject"), None)
    if rejected is not None:
        raise Refusal(f"version {version} was rejected by {rejected.actor} ({rejected.reason}); submit the candidate again to have it reviewed anew")


# Reviews: an intent, on the version's page or by command, that `decide_reviews` turns into a decision


def approve(project: Path, version: str, reviewer: str, reason: str) -> dict[str, Any]:
    """Notes an approval on a version, as the web page's tags would; `decide_reviews` acts on it. Returns {"model", "version", "status"}.

    Raises UserError when the version did not pass the gate, was decided on, or when the verdict is stale already.
    """
    _need(reviewer, reason)
    with _opened(project) as store:
        entries = _read_ledger(store)
        found = _get_version(store, version)
        if str(found.version) in {entry.version for entry in _last_decisions(entries)}:
            raise UserError(f"version {found.version} was decided on already: python -m tasks registry shows how")
        _require_right(store, reviewer)
        verdict, _ = _verified_verdict(store, found)
        _require_fresh(verdict, str(found.version), _state(entries)[0])
        for key, value in ((BY_TAG, reviewer.strip()), (REASON_TAG, reason.strip()), (STATUS_TAG, "approved")):
            store.client.set_model_version_tag(MODEL, str(found.version), key, value)
    return {"model": MODEL, "version": str(found.version), "status": "approved"}


def decide_reviews(project: Path) -> list[dict[str, Any]]:
    """Acts on every review that is not in the ledger yet, lowest version first. Returns one {"version", "status", "message"} for each.

    status: "promoted"; "rejected"; "incomplete" (a name or a reason is missing: nothing is done until they are there); "stale" (the champion has changed since
    the candidate was judged: the approval is void); "refused" (other weights than were judged, or no right to decide: void too); "failed" (a store did not
    answer: it is tried again). The middle three are answered on the version's page, in the tag review.answer.
    """
    with _opened(project) as store:
        _follow(store)
        decided = {entry.version for entry in _last_decisions(_read_ledger(store))}
        waiting = [one for one in _versions(store) if str(one.version) not in decided and one.tags.get(STATUS_TAG) in ("approved", "rejected")]
    answers = []
    for found in sorted(waiting, key=lambda one: int(one.version)):
        version, status, message = str(found.version), found.tags[STATUS_TAG], ""
        actor, reason = found.tags.get(BY_TAG, ""), found.tags.get(REASON_TAG, "")
        missing = [key for key, text in ((BY_TAG, actor), (REASON_TAG, reason)) if not text.strip()]
        if missing:
            outcome, message = "incomplete", f"set {' and '.join(missing)} too: who decided, and why, is part of the record"
        else:
            try:
                done = promote(project, version, actor, reason) if status == "approved" else reject(project, version, actor, reason)
                outcome, message = ("promoted" if status == "approved" else "rejected"), f"ledger entry {done['entry']['number']:06d}"
            except Stale as error:
                outcome, message = "stale", str(error)
            except Refusal as error:
                outcome, message = "refused", str(error)
            except UserError as error:  # a store that is down, a full disk, somebody who decided at the same moment: the review stands, and is tried again
                outcome, message = "failed", str(error)
        if outcome in ("incomplete", "stale", "refused"):
            _answer(project, found, outcome, message)
        answers.append({"version": version, "status": outcome, "message": message})
    return answers


def _answer(project: Path, found: ModelVersion, outcome: str, message: str) -> None:
    """A void approval must be given anew: after a rollback it would otherwise come true without anybody looking."""
    with _opened(project) as store:
        if found.tags.get(ANSWER_TAG) != f"{outcome}: {message}"[:LONGEST_ANSWER]:
            store.client.set_model_version_tag(MODEL, str(found.version), ANSWER_TAG, f"{outcome}: {message}"[:LONGEST_ANSWER])
        if outcome != "incomplete":
            store.client.set_model_version_tag(MODEL, str(found.version), STATUS_TAG, outcome)


def _promote_at_once(project: Path, outcome: dict[str, Any], actor: str, reason: str) -> dict[str, Any]:
    try:
        promote(project, outcome["version"], actor, f"automatic promotion: {reason}")
    except UserError as error:
        raise UserError(f"{MODEL} version {outcome['version']} is registered as candidate, but was not promoted: {error}") from error
    return {**outcome, "status": "champion"}


def _rejected(entries: Sequence[ledger.Entry]) -> set[str]:
    return {entry.version for entry in _last_decisions(entries) if entry.action == "reject"}


def rollback(project: Path, reviewer: str, reason: str) -> dict[str, Any]:
    """Returns to the previous champion; the one rolled back is not kept as `previous`, so rolling back again goes further back. Returns as `promote`."""
    _need(reviewer, reason)
    with _opened(project) as store:
        _follow(store)
        entries = _read_ledger(store)
        current, target = _state(entries)
        if target is None:
            raise UserError(f"there is no previous champion to return to (champion: {f'version {current}' if current else 'none'})")
        found = _get_version(store, target)
        _require_right(store, reviewer)
        verdict, verdict_hash = _verified_verdict(store, found)
        weights = _verified_weights(store, found, verdict)
        further = next((entry.previous for entry in reversed(entries) if entry.action == "promote" and entry.to_version == target), None)
        return _decide(
            store,
            entries,
            "rollback",
            reviewer,
            reason,
            version=target,
            from_version=current,
            to_version=target,
            previous=None if further in _rejected(entries) else further,
            verdict=verdict_hash,
            weights=weights,
        )


def reject(project: Path, version: str, reviewer: str, reason: str) -> dict[str, Any]:
    """Closes a version's review with a no. Returns as `promote`. Raises UserError for the champion (roll back instead) and for one rejected already."""
    _need(reviewer, reason)
    with _opened(project) as store:
        _follow(store)
        entries = _read_ledger(store)
        current, previous = _state(entries)
        version = str(_get_version(store, version).version)
        if version == current:
            raise Refusal(f"version {version} is the champion: roll back (python -m tasks rollback) before rejecting it")
        if version in _rejected(entries):
            raise UserError(f"version {version} was rejected already")
        _require_right(store, reviewer)
        kept = None if version == previous else previous
        decision = {"version": version, "from_version": current, "to_version": current, "previous": kept, "verdict": None, "weights": None}
        return _decide(store, entries, "reject", reviewer, reason, **decision)


# Reading a version's files


def registered(project: Path, uri: str) -> tuple[str, dict[str, str]]:
    """(version, relative path -> SHA-256 it was judged under) of `models:/danceopd@ALIAS` or `models:/danceopd/VERSION`. Raises UserError for any other."""
    match = re.fullmatch(r"models:/([^@/]+)(?:@(.+)|/(\d+))", uri)
    if match is None or match[1] != MODEL:
        raise UserError(f"{uri}: expected models:/{MODEL}@ALIAS or models:/{MODEL}/VERSION")
    with _opened(project) as store:
        aliases = _aliases(store)
        if match[2] and match[2] not in aliases:
            have = ", ".join(f"{alias} (version {version})" for alias, version in sorted(aliases.items())) or "none yet"
            raise UserError(f"{uri}: no such alias; have {have}")
        found = _get_version(store, match[3] or aliases[match[2]])
        hashes = _tagged_weights(found.tags)
    if not hashes:
        raise UserError(f"{uri}: version {found.version} has no weights.*.sha256 tag: not registered by this pipeline")
    return str(found.version), hashes


def download(project: Path, version: str, folder: Path) -> None:
    """Writes the files of a registered version into the new `folder`, each one compared with the hash it was judged under. Raises UserErrors otherwise."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _opened(project) as store, tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        fetched, _ = fetch_weights(store, _get_version(store, version), Path(temporary))
        fetched.rename(folder)


# The command line


def _show(project: Path) -> str:
    """Versions with their aliases and review, then the ledger."""
    with _opened(project) as store:
        entries = _read_ledger(store)
        names: dict[str, list[str]] = {}
        for alias, version in _aliases(store).items():
            names.setdefault(version, []).append(alias)
        versions = sorted(_versions(store), key=lambda one: int(one.version))
        lines = [f"{MODEL} in {tracking.without_credentials(store.uri)}"]
        for one in versions:
            tags = one.tags
            review = f"review {tags.get('review.status', 'unset')}" + (f" by {tags['review.by']} ({tags['review.reason']})" if tags.get("review.by") else "")
            alias = ", ".join(sorted(names.get(str(one.version), []))) or "-"
            lines.append(f"  version {one.version}  [{alias}]  {tags.get('gate.verdict', 'no verdict')}  {review}")
        lines += [] if versions else ["  no versions yet"]
        lines.append(f"ledger {ledger_place(store)}")
        for entry in entries:
            moved = f"champion {entry.from_version or 'none'} -> {entry.to_version or 'none'}"
            lines.append(f"  {entry.number:06d}  {entry.time}  {entry.action} version {entry.version}  {moved}  by {entry.actor}: {entry.reason}")
        lines += [] if entries else ["  no decisions yet"]
        if _state(entries)[0] != _aliases(store).get(CHAMPION):
            lines.append("aliases and ledger differ: an interrupted decision, or an alias moved in the web page; mend with python -m tasks reconcile")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tasks", description="Decisions on registered students. Each is written to the ledger with who and why.")
    commands = parser.add_subparsers(dest="command", required=True)
    words = {
        "promote": "make a candidate the champion",
        "reject": "refuse a candidate",
        "approve": "note an approval; `review` acts on it",
        "rollback": "return to the previous champion",
    }
    for name, text in words.items():
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        if name != "rollback":
            command.add_argument("--version", required=True, help="number of the registered version")
        command.add_argument("--reviewer", required=True, help="who decides; kept in the ledger")
        command.add_argument("--reason", required=True, help="why; kept in the ledger")
    shown = commands.add_parser("registry", help="list versions, aliases and the ledger", description="List versions, aliases and the ledger.")
    shown.add_argument("--reconcile", action="store_true", help="first make the aliases follow the ledger")
    commands.add_parser("reconcile", help="make the aliases follow the ledger", description="Make aliases and review tags say what the ledger says.")
    commands.add_parser("review", help="act on the reviews", description="Act on the reviews that were given on the versions' pages or by `approve`.")
    return parser


def cli(argv: Sequence[str]) -> int:
    """The reviewer's commands for the project in the current folder; prints what changed. UserError is left to the caller to print.

    Returns 0, or 1 when a review could not be followed.
    """
    options, project = _parser().parse_args(list(argv)), Path.cwd()
    if options.command == "registry":
        for line in reconcile(project) if options.reconcile else []:
            print(line)
        print(_show(project))
        return 0
    if options.command == "reconcile":
        print("\n".join(reconcile(project)) or "aliases and reviews say what the ledger says")
        return 0
    if options.command == "review":
        answers = decide_reviews(project)
        for one in answers:
            print(f"version {one['version']}: {one['status']} ({one['message']})")
        if not answers:
            print("no review waits")
        return int(any(one["status"] not in ("promoted", "rejected") for one in answers))
    if options.command == "approve":
        print("version {version}: {status}; `python -m tasks review` acts on it".format(**approve(project, options.version, options.reviewer, options.reason)))
        return 0
    if options.command == "rollback":
        done = rollback(project, options.reviewer, options.reason)
    else:
        done = (promote if options.command == "promote" else reject)(project, options.version, options.reviewer, options.reason)
    print(f"ledger entry {done['entry']['number']:06d}: {options.command} version {done['entry']['version']}")
    for line in done["changed"]:
        print(line)
    return 0
