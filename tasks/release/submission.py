"""Candidates into the registry, with everything that a reviewer decides from.

    submit_files(project, gate_params, promote, actor, reason) -> dict   # after tasks.release.gate.judge_files

A candidate that passed the gate becomes a version of `danceopd` with alias `candidate`; a reviewer (or promote="auto")
makes it `champion` (tasks/release/decisions.py). A refused candidate is kept as a run with its reasons and files and
is never a version; nor is a candidate whose weights are the champion's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from data.errors import Outage, UserError, UserErrors
from data.files import digest, link_or_copy, read_json, sha256_file
from data.yaml_files import read_yaml
from tasks.registry import files, server, tracking, versions
from tasks.registry.server import Store
from tasks.release import card, decisions, gate
from tasks.release.provenance import CHECKPOINT_FOLDER, DVC_PATHS, SCORECARD_FILE, VALIDATE_FILE, md5_of, provenance
from tasks.release.review import REVIEW_FILE

STEPS_FILES = {"distill": "checkpoints/student/steps.csv", "absorb": "checkpoints/absorbed/steps.csv"}
REPORT_FOLDER = "reports/score"
PICTURES = ("t2i.png", "edits.png", "scorecard.png")  # of the report: shown on the version's page
JUDGED = (
    (gate.SCORECARD_RULE, SCORECARD_FILE, "another scorecard"),
    (gate.WEIGHTS_RULE, CHECKPOINT_FOLDER, "other weights"),
)
Promote = Literal["auto", "review"]


@dataclass(frozen=True)
class Candidate:
    """What is submitted, read and checked before anything is sent."""

    project: Path
    scorecard: dict[str, Any]
    verdict: dict[str, Any]
    validated: dict[str, Any]
    base: dict[str, Path]  # name in the artifact -> file, of the base that an adapter student lies on
    hashes: dict[str, str]  # name -> SHA-256, of the checkpoint's and the base's files
    tags: dict[str, str]  # where it comes from and how the gate judged it
    identity: str  # the same for the same weights and verdict

    @property
    def passed(self) -> bool:
        return gate.has_passed(self.verdict)


def submit_files(project: Path, gate_params: gate.Params, promote: Promote, actor: str, reason: str) -> dict[str, Any]:
    """Publishes what the stages left as a run; a passing candidate becomes a version with alias `candidate` and, with
    promote="auto", the champion.

    Returns {"model", "status" ("champion" | "candidate" | "refused" | "identical": the champion's weights), "version"
    (str or None), "run_id", "tracking_uri", "reasons" (of a refusal)}. Repeating a submission that was interrupted
    finishes it. Raises UserErrors for missing or mismatched files before anything is sent.
    """
    if promote not in ("auto", "review"):
        raise UserError(f"promote = {promote!r}: expected 'auto' or 'review'")
    decisions.require_who_and_why(actor, reason)
    candidate = _checked(Path(project).resolve(), {"gate.params.sha256": digest(asdict(gate_params))})
    outcome = _publish(candidate, actor, reason)
    if promote == "review" or outcome["status"] != "candidate":
        return outcome
    try:
        decisions.promote(project, outcome["version"], actor, f"automatic promotion: {reason}")
    except UserError as error:
        kind = Outage if isinstance(error, Outage) else UserError
        done = f"{versions.MODEL} version {outcome['version']} is registered as candidate"
        raise kind(f"{done}, but was not promoted: {error}") from error
    return {**outcome, "status": "champion"}


def _checked(project: Path, tags: Mapping[str, str]) -> Candidate:
    """Raises UserErrors with all faults of the candidate's files."""
    from tasks.student import opening  # loads torch

    faults: list[str] = []

    def read(name: str, key: str) -> dict[str, Any]:
        try:
            value = read_json(project / name)
        except UserError as error:
            faults.append(str(error))
            return {}
        if not isinstance(value, dict) or key not in value:
            faults.append(f"{project / name}: no {key!r} in it; run the stage that makes it again")
            return {}
        return value

    scorecard, verdict = read(SCORECARD_FILE, "metrics"), read(gate.VERDICT_FILE, "rules")
    validated = read(VALIDATE_FILE, "teachers")
    needed = [project / name for name in ("params.yaml", gate.SCORES_FILE, *STEPS_FILES.values())]
    faults += [f"{path}: no such file or folder" for path in needed if not path.exists()]
    checkpoint, hashes = project / CHECKPOINT_FOLDER, {}
    try:
        hashes = files.weight_hashes(checkpoint)
    except UserErrors as error:
        faults += [f"{checkpoint}: {fault}" for fault in error.faults]
    if verdict and scorecard:
        for rule, name, what in JUDGED:
            judged = gate.rule_value(verdict, rule)
            if judged != md5_of(project / name):
                other = f"it judged {what} than {project / name} (MD5 {judged})"
                faults.append(f"{project / gate.VERDICT_FILE}: {other}; run the gate again")
    if faults:
        raise UserErrors("the candidate cannot be submitted", faults)
    base = opening.carried(project, checkpoint)
    hashes |= {name: sha256_file(path) for name, path in base.items()}
    tags = {**_lineage_tags(project, scorecard), **_verdict_tags(project, verdict), **files.weight_tags(hashes), **tags}
    identity = digest({"weights": hashes, "verdict": tags["gate.verdict.sha256"]})[:16]
    return Candidate(project, scorecard, verdict, validated, base, hashes, tags, identity)


def _lineage_tags(project: Path, scorecard: Mapping[str, Any]) -> dict[str, str]:
    origin = provenance(project)
    hidden = ("files", "git.changed", "git.reason")
    known = {key: value for key, value in origin.items() if key not in hidden and value is not None}
    identities = scorecard.get("identities") or {}
    teachers = identities.get("teachers")
    teachers = teachers if isinstance(teachers, Mapping) else {}
    return {
        **{key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in known.items()},
        **{f"teacher.{name}.sha256": str(value) for name, value in teachers.items()},
        **({"base.sha256": str(identities["base"])} if identities.get("base") else {}),
    }


def _verdict_tags(project: Path, verdict: Mapping[str, Any]) -> dict[str, str]:
    failed, count = [rule["rule"] for rule in verdict["rules"] if not rule["passed"]], len(verdict["rules"])
    told = f"{count - len(failed)} of {count} rules passed" + (f"; failed: {', '.join(failed)}" if failed else "")
    return {
        "scorecard.json.sha256": sha256_file(project / SCORECARD_FILE),
        "scores.parquet.sha256": sha256_file(project / gate.SCORES_FILE),
        "gate.status": "passed" if gate.has_passed(verdict) else "refused",
        "gate.verdict": told,
        "gate.verdict.sha256": sha256_file(project / gate.VERDICT_FILE),
        "gate.champion": str(gate.rule_value(verdict, gate.CHAMPION_RULE) or gate.NO_CHAMPION),
    }


def _publish(candidate: Candidate, actor: str, reason: str) -> dict[str, Any]:
    """Sends the candidate; every step goes on from what an interrupted submission of the same candidate left."""
    tags = candidate.tags
    twin = None
    if candidate.passed:
        with versions.opened(candidate.project) as store:
            if known := _waiting(store, candidate.identity):
                with server.locked(store.project):
                    if versions.CANDIDATE not in versions.aliases_of(store):
                        store.client.set_registered_model_alias(versions.MODEL, versions.CANDIDATE, known.number)
                return _outcome(store, "candidate", known.number, known.run_id)
            twin = _equal_champion(store, candidate.hashes)
    name = f"candidate {digest(candidate.hashes)[:10]}"
    who = {"submitted.by": actor, "submitted.reason": reason}
    with tracking.run(candidate.project, name, {**tags, **who}, candidate.identity) as tracked:
        _log_files(tracked, candidate)
        if twin is not None:
            note = f"The same weights as champion version {twin}: not registered again."
            tracking.log_tags(tracked, {"registered.identical": twin, "mlflow.note.content": note})
            nothing = f"the weights are those of champion version {twin}: there is nothing new to register"
            return _outcome(tracked.store, "identical", twin, tracked.run_id, [nothing])
        model_id = _log_model(tracked, candidate)
        tracking.log_scorecard(tracked, candidate.scorecard, model_id)
        teachers = {name: teacher["metrics"] for name, teacher in candidate.validated["teachers"].items()}
        others = {**_compared(tracked.store, tags["gate.champion"]), **teachers}
        lines = _lineage_lines(tracked, candidate, f"submitted by {actor}: {reason}")
        describe = partial(card.description, candidate.scorecard["metrics"], candidate.verdict, others, lines)
        text = describe()
        if not candidate.passed:
            reasons = [f"{rule['rule']}: {rule['reason']}" for rule in candidate.verdict["rules"] if not rule["passed"]]
            tracking.log_tags(tracked, {"gate.reasons": "\n".join(reasons), "mlflow.note.content": text})
            return _outcome(tracked.store, "refused", None, tracked.run_id, reasons)
        number = _version(tracked, candidate, model_id, text)
        tracked.store.client.update_model_version(versions.MODEL, number, describe(version=number))
        tracking.log_tags(tracked, {"registered.version": number, "mlflow.note.content": text})
        with server.locked(candidate.project):
            tracked.store.client.set_registered_model_alias(versions.MODEL, versions.CANDIDATE, number)
    return _outcome(tracked.store, "candidate", number, tracked.run_id)


def _outcome(store: Store, status: str, number: str | None, run_id: str, reasons: Sequence[str] = ()) -> dict[str, Any]:
    where = {"run_id": run_id, "tracking_uri": server.without_credentials(store.uri)}
    return {"model": versions.MODEL, "status": status, "version": number, **where, "reasons": list(reasons)}


def _waiting(store: Store, identity: str) -> versions.Version | None:
    """The version of this candidate that waits for its review, with its run finished; None when there is none."""
    decided = versions.last_decisions(versions.read_ledger(store))
    same = [version for version in versions.versions_of(store) if version.tags.get(tracking.IDENTITY_TAG) == identity]
    for version in same:
        if version.number not in decided and store.client.get_run(version.run_id).info.status == "FINISHED":
            return version
    return None


def _equal_champion(store: Store, hashes: Mapping[str, str]) -> str | None:
    """The champion's version when its weights are these, byte for byte; records and step tables hold times."""
    current, _ = versions.state_of(versions.read_ledger(store))
    if current is None:
        return None
    theirs = versions.get_version(store, current).weights
    names = [name for name in {**hashes, **theirs} if name.endswith(files.WEIGHTS)]
    return current if all(hashes.get(name) == theirs.get(name) for name in names) else None


def _log_files(tracked: tracking.Run, candidate: Candidate) -> None:
    """Params, figures and files of the stages, and the digests of data and teachers."""
    project = candidate.project
    tracking.log_params(tracked, read_yaml(project / "params.yaml"))
    for stage, name in STEPS_FILES.items():
        tracking.log_steps(tracked, stage, project / name)
    for name in (SCORECARD_FILE, gate.VERDICT_FILE, VALIDATE_FILE, "params.yaml", "dvc.lock"):
        if (project / name).is_file():
            tracking.log_files(tracked, {"": project / name})
    steps = {f"steps/{stage}": project / name for stage, name in STEPS_FILES.items()}
    tracking.log_files(tracked, {"scores": project / gate.SCORES_FILE, "report": project / REPORT_FOLDER, **steps})
    if (review := project / REVIEW_FILE).is_file():
        with tempfile.TemporaryDirectory() as temporary:  # beside the report here, not above it
            beside = Path(temporary) / review.name
            beside.write_text(review.read_text(encoding="utf-8").replace('"score/', '"'), encoding="utf-8")
            tracking.log_files(tracked, {"report": beside})
    _log_inputs(tracked, candidate.tags)


def _log_inputs(tracked: tracking.Run, tags: Mapping[str, str]) -> None:
    """Data and teachers as the run's datasets, by the digests that DVC and the scorecard know them under."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data = {name: tags[f"dvc.{name}.md5"] for name in ("curated", "encoded", "teachers") if f"dvc.{name}.md5" in tags}
    rows = [(name, DVC_PATHS[name], value, "training") for name, value in data.items()]
    teachers = files.hashes_of("teacher", tags)
    rows += [(f"teacher {name}", DVC_PATHS["teachers"], value, "teacher") for name, value in teachers.items()]
    inputs = [
        DatasetInput(Dataset(name, value[:36], "dvc", f"dvc:{path}"), [InputTag("mlflow.data.context", context)])
        for name, path, value, context in rows
        if value
    ]
    if inputs:
        tracked.store.client.log_inputs(tracked.run_id, inputs)


def _log_model(tracked: tracking.Run, candidate: Candidate) -> str:
    """The id of the MLflow logged model: checkpoint, its base, a pyfunc. One sent in part is marked FAILED."""
    client = tracked.store.client
    same = client.search_logged_models([tracked.experiment_id], f"source_run_id = '{tracked.run_id}'", max_results=10)
    whole = next((model for model in same if str(model.status) in ("READY", "LoggedModelStatus.READY")), None)
    if whole is not None:
        return str(whole.model_id)
    tags = {**files.weight_tags(candidate.hashes), "gate.status": candidate.tags["gate.status"]}
    kind = {"name": "student", "model_type": "diffusion"}
    logged = client.create_logged_model(tracked.experiment_id, **kind, source_run_id=tracked.run_id, tags=tags)
    checkpoint = candidate.project / CHECKPOINT_FOLDER
    try:
        client.log_model_artifacts(logged.model_id, str(checkpoint))
        with tempfile.TemporaryDirectory(dir=checkpoint.parent) as temporary:
            for name, path in candidate.base.items():
                link_or_copy(path, Path(temporary) / name)
            _write_mlmodel(Path(temporary))
            client.log_model_artifacts(logged.model_id, temporary)
    except BaseException:
        with suppress(Exception):  # the first failure is the one to tell
            client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    return str(logged.model_id)


def _write_mlmodel(folder: Path) -> None:
    """A pyfunc whose loader is the project's module: no code and nothing to unpickle travels with it."""
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    from tasks.student import opening

    kinds = {int: "long", float: "double"}
    described = Model()
    pyfunc.add_to_model(described, loader_module="tasks.pyfunc_model")
    described.signature = ModelSignature(
        Schema([ColSpec("string", "prompt"), ColSpec("string", "source", required=False)]),
        Schema([ColSpec("string", "image")]),
        ParamSchema([ParamSpec(name, kinds[type(value)], value) for name, value in opening.DEFAULTS.items()]),
    )
    described.save(str(folder / "MLmodel"))


def _version(tracked: tracking.Run, candidate: Candidate, model_id: str, text: str) -> str:
    """The number of the run's version, which is made unless it is there."""
    from mlflow.exceptions import MlflowException

    client, run_id = tracked.store.client, tracked.run_id
    try:
        service = "Students distilled from several flow-matching teachers; alias champion is in service."
        client.create_registered_model(versions.MODEL, description=service)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for version in versions.versions_of(tracked.store):
        if version.run_id == run_id:
            return version.number
    tags = {tracking.IDENTITY_TAG: candidate.identity, "mlflow.run_id": run_id, "review.status": "pending"}
    # models:/ID as source would be looked up in the process-wide tracking URI
    place = client.get_logged_model(model_id).artifact_location
    how = {"run_id": run_id, "model_id": model_id, "description": text}
    return str(client.create_model_version(versions.MODEL, place, tags={**candidate.tags, **tags}, **how).version)


def _compared(store: Store, number: str) -> dict[str, card.Metrics]:
    """Title -> metrics of the champion that the verdict compared with."""
    if number == gate.NO_CHAMPION:
        return {"champion (none)": {}}
    run_id = versions.get_version(store, number).run_id
    with tempfile.TemporaryDirectory() as temporary:
        scorecard = read_json(tracking.artifact(store, run_id, "scorecard.json", Path(temporary)))
    return {f"champion (v{number})": scorecard["metrics"]}


def _lineage_lines(tracked: tracking.Run, candidate: Candidate, who: str) -> list[str]:
    """What code, data and teachers it came from, and where the page leads on to: the run's files."""
    tags = candidate.tags
    changed = " with changed files" if tags.get("git.dirty") == "true" else ""
    code = f"Code {tags.get('git.sha', 'unversioned')[:12]}{changed}, {who}"[:400]
    teachers = ", ".join(f"{name} {value[:8]}" for name, value in files.hashes_of("teacher", tags).items())
    known = [name for name in ("curated", "encoded") if f"dvc.{name}.md5" in tags]
    data = ", ".join(f"{name} {tags[f'dvc.{name}.md5'][:8]}" for name in known)
    line = f"Teachers: {teachers or 'unknown'}. Data: {data or 'unversioned'}. All of it: `python -m tasks lineage`."
    if not tracked.store.uri.startswith("http"):
        return [code, line]
    page = versions.report_artifacts(tracked.experiment_id, tracked.run_id)
    pictures = [name for name in PICTURES if (candidate.project / REPORT_FOLDER / name).is_file()]
    shown = [f"![{name}](get-artifact?path=report/{name}&run_uuid={tracked.run_id})" for name in pictures]
    return [code, f"[Report and grids]({page}/report.html)", line, "", *shown]
