"""Candidates into the registry, with everything that a reviewer decides from.

    submit_files(project, gate_params, promote, actor, reason) -> dict   # what the flow calls after
tasks.release.gate.judge_files

A candidate that passed the gate becomes a version of `danceopd` with alias `candidate`; a reviewer (or promote="auto")
makes it `champion` (tasks/release/decisions.py). A refused one is kept as a run with its reasons and files, and is
never a version; neither is one whose weights are the champion's.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data.errors import Outage, UserError, UserErrors
from data.files import digest, link_or_copy, read_json, sha256_file
from data.yaml_files import read_yaml
from tasks.registry import files, server, tracking, versions
from tasks.release import decisions, gate
from tasks.release.card import description, teacher_metrics
from tasks.release.provenance import CHECKPOINT_FOLDER, DVC_PATHS, SCORECARD_FILE, VALIDATE_FILE, md5_of, provenance
from tasks.release.review import REVIEW_FILE
from tasks.student import opening

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


STEPS_FILES = {"distill": "checkpoints/student/steps.csv", "absorb": "checkpoints/absorbed/steps.csv"}
PICTURES = ("t2i.png", "edits.png", "scorecard.png")  # of the report: shown on the version's page
Promote = Literal["auto", "review"]


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


def _checked(submission: Submission) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, str]]:
    """(scorecard, verdict, validated, weight hashes), read before anything is sent. Raises UserErrors with all
    faults.
    """
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

    scorecard, verdict, validated = (
        read(submission.scorecard, "metrics"),
        read(submission.verdict, "rules"),
        read(submission.teachers, ""),
    )
    needed = (submission.params, submission.scores, submission.report, *submission.steps.values())
    faults += [f"{path}: no such file or folder" for path in needed if not path.exists()]
    hashes: dict[str, str] = {}
    try:
        hashes = files.weight_hashes(submission.checkpoint)
    except UserErrors as error:
        faults += [f"{submission.checkpoint}: {fault}" for fault in error.faults]
    except UserError as error:
        faults.append(str(error))
    if verdict and scorecard:
        judged = gate.rule_value(verdict, gate.SCORECARD_RULE)
        if judged != md5_of(submission.scorecard):
            faults.append(
                f"{submission.verdict}: it judged another scorecard than {submission.scorecard} (MD5 {judged}); run the gate again"
            )
        weights = gate.rule_value(verdict, gate.WEIGHTS_RULE)
        if weights != md5_of(submission.checkpoint):
            faults.append(
                f"{submission.verdict}: it judged other weights than {submission.checkpoint} (MD5 {weights}); run the gate again"
            )
    if faults:
        raise UserErrors("the candidate cannot be submitted", faults)
    return scorecard, verdict, validated, hashes


def _lineage_tags(
    project: Path,
    submission: Submission,
    scorecard: Mapping[str, Any],
    verdict: Mapping[str, Any],
    hashes: Mapping[str, str],
) -> dict[str, str]:
    origin = provenance(project)
    known = {
        key: value
        for key, value in origin.items()
        if key not in ("files", "git.changed", "git.reason") and value is not None
    }
    identities = scorecard.get("identities") or {}
    teachers = identities.get("teachers")
    failed = [rule["rule"] for rule in verdict["rules"] if not rule["passed"]]
    return {
        **{key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in known.items()},
        "params.sha256": sha256_file(submission.params),
        **{
            f"teacher.{name}.sha256": str(value)
            for name, value in (teachers if isinstance(teachers, Mapping) else {}).items()
        },
        **({"base.sha256": str(identities["base"])} if identities.get("base") else {}),
        **files.weight_tags(hashes),
        "scorecard.json.sha256": sha256_file(submission.scorecard),
        "scores.parquet.sha256": sha256_file(submission.scores),
        "gate.status": "passed" if gate.has_passed(verdict) else "refused",
        "gate.verdict": f"{len(verdict['rules']) - len(failed)} of {len(verdict['rules'])} rules passed"
        + (f"; failed: {', '.join(failed)}" if failed else ""),
        "gate.verdict.sha256": sha256_file(submission.verdict),
        "gate.champion": str(gate.rule_value(verdict, gate.CHAMPION_RULE) or gate.NO_CHAMPION),
    }


def submit(
    project: Path,
    submission: Submission,
    *,
    promote: Promote,
    actor: str,
    reason: str,
    tags: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Publishes one candidate as a run; a passing one becomes a version with alias `candidate` and, with
    promote="auto", the champion.

    `tags` are added to the lineage tags. Returns {"model", "status" ("champion" | "candidate" | "refused" |
    "identical": the champion's weights), "version" (str or None), "run_id", "tracking_uri", "reasons" (of a refusal)}.
    Repeating a submission that was interrupted finishes it. Raises UserErrors for missing or mismatched files before
    anything is sent.
    """
    if promote not in ("auto", "review"):
        raise UserError(f"promote = {promote!r}: expected 'auto' or 'review'")
    decisions.require_who_and_why(actor, reason)
    outcome = _publish(project, submission, actor, reason, tags or {})
    return (
        _promote_at_once(project, outcome, actor, reason)
        if promote == "auto" and outcome["status"] == "candidate"
        else outcome
    )


def _publish(
    project: Path, submission: Submission, actor: str, reason: str, extra: Mapping[str, str]
) -> dict[str, Any]:
    """Sends the candidate. Every step looks first for what an interrupted submission of the same candidate has left, so
    that repeating it finishes it.
    """
    scorecard, verdict, validated, hashes = _checked(submission)
    base = opening.carried(project, submission.checkpoint)
    hashes |= {name: sha256_file(path) for name, path in base.items()}
    refusals = [f"{rule['rule']}: {rule['reason']}" for rule in verdict["rules"] if not rule["passed"]]
    tags = {**_lineage_tags(project, submission, scorecard, verdict, hashes), **extra}
    identity = digest({"weights": dict(hashes), "verdict": tags["gate.verdict.sha256"]})[:16]
    store = tracking.open_store(project)
    with server.explained(store.uri):
        known = _registered(store, identity) if gate.has_passed(verdict) else None
        if known is not None:
            with server.locked(store.project):
                if versions.aliases_of(store).get(versions.CANDIDATE) is None:
                    store.client.set_registered_model_alias(versions.MODEL, versions.CANDIDATE, str(known.version))
            return _outcome(store, "candidate", str(known.version), str(known.run_id), [])
        twin = _equal_champion(store, hashes) if gate.has_passed(verdict) else None
    name = f"candidate {hashes_name(hashes)}"
    with tracking.run(project, name, {**tags, "submitted.by": actor, "submitted.reason": reason}, identity) as tracked:
        store = tracked.store
        tracking.log_params(tracked, read_yaml(submission.params))
        for stage, path in submission.steps.items():
            tracking.log_steps(tracked, stage, path)
        lock = Path(project) / "dvc.lock"
        singles = [
            submission.scorecard,
            submission.verdict,
            submission.teachers,
            submission.params,
            *([lock] if lock.is_file() else []),
        ]
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
                tracked,
                {
                    "registered.identical": twin,
                    "mlflow.note.content": f"The same weights as champion version {twin}: not registered again.",
                },
            )
            return _outcome(
                store,
                "identical",
                twin,
                tracked.run_id,
                [f"the weights are those of champion version {twin}: there is nothing new to register"],
            )
        model_id = _log_model(tracked, submission.checkpoint, base, hashes, tags["gate.status"])
        tracking.log_scorecard(tracked, scorecard, model_id)
        compared = _compared(store, tags["gate.champion"])
        changed = " with changed files" if tags.get("git.dirty") == "true" else ""
        origin = f"Code {tags.get('git.sha', 'unversioned')[:12]}{changed}, submitted by {actor}: {reason}"
        texts = (scorecard, verdict, compared, teacher_metrics(validated), origin[:400])
        card = description(*texts, None, _lineage_lines(tracked, tags, submission))
        if not gate.has_passed(verdict):
            tracking.log_tags(tracked, {"gate.reasons": "\n".join(refusals), "mlflow.note.content": card})
            return _outcome(store, "refused", None, tracked.run_id, refusals)
        _ensure_model(store)
        version = next(
            (one for one in versions.versions_of(store) if one.run_id == tracked.run_id), None
        ) or store.client.create_model_version(
            versions.MODEL,
            source=store.client.get_logged_model(
                model_id
            ).artifact_location,  # models:/ID would be looked up in the process-wide tracking URI
            run_id=tracked.run_id,
            model_id=model_id,
            tags={**tags, tracking.IDENTITY_TAG: identity, "mlflow.run_id": tracked.run_id, "review.status": "pending"},
            description=card,
        )
        number = str(version.version)
        store.client.update_model_version(
            versions.MODEL, number, description(*texts, number, _lineage_lines(tracked, tags, submission))
        )
        tracking.log_tags(tracked, {"registered.version": number, "mlflow.note.content": card})
        with server.locked(store.project):
            store.client.set_registered_model_alias(versions.MODEL, versions.CANDIDATE, number)
    return _outcome(store, "candidate", number, tracked.run_id, [])


def _registered(store: server.Store, identity: str) -> ModelVersion | None:
    """The version of this very candidate (weights and verdict) that waits for its review, with its run finished; None
    when there is none.
    """
    decided = {entry.version for entry in versions.read_ledger(store) if entry.action in ("promote", "reject")}
    same = (
        one
        for one in versions.versions_of(store)
        if one.tags.get(tracking.IDENTITY_TAG) == identity and str(one.version) not in decided
    )
    return next((one for one in same if store.client.get_run(str(one.run_id)).info.status == "FINISHED"), None)


def _weights_only(hashes: Mapping[str, str]) -> dict[str, str]:
    """Without records and step tables, which hold times."""
    return {name: value for name, value in hashes.items() if name.endswith(files.WEIGHTS)}


def _equal_champion(store: server.Store, hashes: Mapping[str, str]) -> str | None:
    """The champion's version when its weights are these, byte for byte."""
    current, _ = versions.state_of(versions.read_ledger(store))
    if current is None:
        return None
    return (
        current
        if _weights_only(files.tagged_weights(versions.get_version(store, current).tags)) == _weights_only(hashes)
        else None
    )


def _log_inputs(tracked: tracking.Run, tags: Mapping[str, str]) -> None:
    """Data and teachers as the run's datasets, by the digests that DVC and the scorecard know them under."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    found = [
        (name, f"dvc:{path}", tags.get(f"dvc.{name}.md5"), "training")
        for name, path in DVC_PATHS.items()
        if name in ("curated", "encoded", "teachers")
    ]
    found += [
        (f"teacher {match[1]}", "dvc:data/teachers", value, "teacher")
        for key, value in tags.items()
        if (match := re.fullmatch(r"teacher\.(.+)\.sha256", key))
    ]
    inputs = [
        DatasetInput(Dataset(name, value[:36], "dvc", source), [InputTag("mlflow.data.context", context)])
        for name, source, value, context in found
        if value
    ]
    if inputs:
        tracked.store.client.log_inputs(tracked.run_id, inputs)


def _lineage_lines(tracked: tracking.Run, tags: Mapping[str, str], submission: Submission) -> list[str]:
    """Where the page leads on to: the run's files, and what data and teachers it came from."""
    teachers = ", ".join(
        f"{match[1]} {value[:8]}"
        for key, value in tags.items()
        if (match := re.fullmatch(r"teacher\.(.+)\.sha256", key))
    )
    data = ", ".join(
        f"{name} {tags[f'dvc.{name}.md5'][:8]}" for name in ("curated", "encoded") if f"dvc.{name}.md5" in tags
    )
    lines = [f"Teachers: {teachers or 'unknown'}. Data: {data or 'unversioned'}. All of it: `python -m tasks lineage`."]
    if tracked.store.uri.startswith("http"):
        page = versions.report_artifacts(tracked.experiment_id, tracked.run_id)
        pictures = [name for name in PICTURES if (submission.report / name).is_file()]
        lines[:0] = [f"[Report and grids]({page}/report.html)"]
        lines += ["", *(f"![{name}](get-artifact?path=report/{name}&run_uuid={tracked.run_id})" for name in pictures)]
    return lines


def hashes_name(hashes: Mapping[str, str]) -> str:
    """A short name for these weights, equal for equal weights."""
    return digest(dict(hashes))[:10]


def _outcome(store: server.Store, status: str, version: str | None, run_id: str, reasons: list[str]) -> dict[str, Any]:
    address = server.without_credentials(store.uri)
    return {
        "model": versions.MODEL,
        "status": status,
        "version": version,
        "run_id": run_id,
        "tracking_uri": address,
        "reasons": reasons,
    }


def _write_mlmodel(folder: Path) -> None:
    """MLflow's description of the model: a pyfunc whose loader is the project's own module, so that no code and nothing
    to unpickle travels with it.
    """
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    kinds = {int: "long", float: "double"}
    described = Model()
    pyfunc.add_to_model(described, loader_module="tasks.pyfunc_model")
    described.signature = ModelSignature(
        Schema([ColSpec("string", "prompt"), ColSpec("string", "source", required=False)]),
        Schema([ColSpec("string", "image")]),
        ParamSchema([ParamSpec(name, kinds[type(value)], value) for name, value in opening.DEFAULTS.items()]),
    )
    described.save(str(folder / "MLmodel"))


def _log_model(
    tracked: tracking.Run, checkpoint: Path, base: Mapping[str, Path], hashes: Mapping[str, str], status: str
) -> str:
    """The checkpoint as an MLflow logged model: safetensors and JSON, the base of an adapter student beside it, and a
    pyfunc that samples it.

    A half-sent one is marked FAILED.
    """
    client = tracked.store.client
    same = client.search_logged_models([tracked.experiment_id], f"source_run_id = '{tracked.run_id}'", max_results=10)
    whole = next((one for one in same if str(one.status) in ("READY", "LoggedModelStatus.READY")), None)
    if whole is not None:
        return str(whole.model_id)
    logged = client.create_logged_model(
        tracked.experiment_id,
        name="student",
        source_run_id=tracked.run_id,
        model_type="diffusion",
        tags={**files.weight_tags(hashes), "gate.status": status},
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


def _compared(store: server.Store, version: str) -> tuple[str, Mapping[str, Any]] | None:
    """(version, metrics) of the champion that the verdict compared with."""
    if version == gate.NO_CHAMPION:
        return None
    found = versions.get_version(store, version)
    with tempfile.TemporaryDirectory() as temporary:
        scorecard = read_json(tracking.artifact(store, str(found.run_id), "scorecard.json", Path(temporary)))
    return version, scorecard["metrics"]


def _promote_at_once(project: Path, outcome: dict[str, Any], actor: str, reason: str) -> dict[str, Any]:
    try:
        decisions.promote(project, outcome["version"], actor, f"automatic promotion: {reason}")
    except UserError as error:
        kind = Outage if isinstance(error, Outage) else UserError
        done = f"{versions.MODEL} version {outcome['version']} is registered as candidate"
        raise kind(f"{done}, but was not promoted: {error}") from error
    return {**outcome, "status": "champion"}


def submit_files(project: Path, gate_params: gate.Params, promote: Promote, actor: str, reason: str) -> dict[str, Any]:
    """`submit` with the files where the stages leave them; the digest of the gate's params is kept as tag
    `gate.params.sha256`.
    """
    project = Path(project).resolve()
    submission = Submission(
        params=project / "params.yaml",
        checkpoint=project / CHECKPOINT_FOLDER,
        scorecard=project / SCORECARD_FILE,
        scores=project / gate.SCORES_FILE,
        teachers=project / VALIDATE_FILE,
        verdict=project / gate.VERDICT_FILE,
        report=(project / gate.SCORES_FILE).parent,
        steps={stage: project / path for stage, path in STEPS_FILES.items()},
    )
    return submit(
        project,
        submission,
        promote=promote,
        actor=actor,
        reason=reason,
        tags={"gate.params.sha256": digest(asdict(gate_params))},
    )


def _ensure_model(store: server.Store) -> None:
    from mlflow.exceptions import MlflowException

    try:
        text = "Students distilled from several flow-matching teachers; alias champion is in service."
        store.client.create_registered_model(versions.MODEL, description=text)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
