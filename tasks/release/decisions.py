"""Decisions on registered versions, every one on record: who, why, from which champion to which.

    promote / rollback / reject(project, ...) -> dict
    approve(project, ...), decide_reviews(project) -> list[dict]         # a review, by command or in the web page, and
what comes of it
    cli(argv) -> int                                                     # `python -m tasks promote`, `registry`,
`review`, ...

A decision is the ledger's next entry, and the aliases follow (tasks/registry/versions.py). A review in the web page is
three tags of the version: `review.by`,
`review.reason` and, last, `review.status` = approved or rejected.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import UserError
from data.files import digest, read_json, sha256_file
from tasks import environment
from tasks.registry import files, ledger, server, tracking
from tasks.registry import versions as registry
from tasks.registry.files import Refusal
from tasks.release import gate
from tasks.release.provenance import md5_of
from tasks.student import opening

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


STATUS_TAG, BY_TAG, REASON_TAG, ANSWER_TAG = "review.status", "review.by", "review.reason", "review.answer"
LONGEST_ANSWER = 2000


class Stale(Refusal):
    """The champion is another than the one that the candidate was compared with."""


def require_who_and_why(actor: str, reason: str) -> None:
    """Raises UserError when either is empty."""
    missing = [name for name, text in (("a name", actor), ("a reason", reason)) if not text.strip()]
    if missing:
        raise UserError(f"a decision needs {' and '.join(missing)}: who decided, and why, is part of the record")


def _require_right(store: server.Store, reviewer: str) -> None:
    """The reviewer must be one of those named, where they are, and the account must be allowed to change the model:
    found out by a write that means nothing, since the ledger's entry comes before the aliases."""
    allowed = environment.setting(environment.REVIEWERS)
    names = [name.strip() for name in allowed.split(",")] if allowed else []
    if names and reviewer.strip() not in names:
        raise Refusal(f"{reviewer!r} may not decide here; {environment.REVIEWERS} names {', '.join(names)}")
    if not store.is_local:
        store.client.set_registered_model_tag(registry.MODEL, "decision.account", server.account())


def _verified_weights(store: server.Store, found: ModelVersion, verdict: Mapping[str, Any]) -> str:
    """Downloads the version's files and compares each with the hash it was registered under, and all with the verdict;
    returns the digest of the hashes.
    """
    with tempfile.TemporaryDirectory() as temporary:
        fetched, actual = files.fetch_weights(store, found, Path(temporary))
        shutil.rmtree(
            fetched / opening.CARRIED, ignore_errors=True
        )  # verified by its hashes; the verdict is about the student's own files
        if gate.rule_value(verdict, gate.WEIGHTS_RULE) != md5_of(fetched):
            raise Refusal(
                f"version {found.version}: its files are not the ones that were judged (the verdict names others); submit the candidate again"
            )
    return digest(actual)


def _verified_verdict(store: server.Store, found: ModelVersion) -> tuple[dict[str, Any], str]:
    """(verdict, SHA-256 of its file), which must be the one noted at registration, must have passed, and must be about
    the scorecard kept beside it.
    """
    if found.tags.get("gate.status") != "passed" or not found.run_id:
        raise Refusal(
            f"version {found.version} did not pass the gate (gate.status = {found.tags.get('gate.status', 'unset')}); it cannot become champion"
        )
    with tempfile.TemporaryDirectory() as temporary:
        path = tracking.artifact(store, found.run_id, "verdict.json", Path(temporary))
        verdict, noted = read_json(path), sha256_file(path)
        card = tracking.artifact(store, found.run_id, "scorecard.json", Path(temporary))
        scored, judged = sha256_file(card), md5_of(card)
    where = f"of run {found.run_id}"
    if noted != found.tags.get("gate.verdict.sha256") or not gate.has_passed(verdict):
        raise Refusal(
            f"version {found.version}: verdict.json {where} is not the passing verdict it was registered with; submit the candidate again"
        )
    if scored != found.tags.get("scorecard.json.sha256") or judged != gate.rule_value(verdict, gate.SCORECARD_RULE):
        raise Refusal(
            f"version {found.version}: scorecard.json {where} is not the one that was judged; submit the candidate again"
        )
    return verdict, noted


def _require_fresh(verdict: Mapping[str, Any], version: str, current: str | None) -> None:
    judged = str(gate.rule_value(verdict, gate.CHAMPION_RULE))
    if judged != (current or gate.NO_CHAMPION):
        now = f"version {current}" if current else "nobody"
        stale = f"version {version} was judged against champion {judged}, but champion is {now}"
        raise Stale(f"{stale}: the verdict is stale; run the gate again and submit")


def _decide(
    store: server.Store, entries: list[ledger.Entry], action: str, actor: str, reason: str, **decision: Any
) -> dict[str, Any]:
    """Takes the ledger's next entry, then lets the aliases follow. From the first on the decision stands, whatever
    happens to the second.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    who = {"actor": actor.strip(), "reason": reason.strip(), "account": server.account()}
    entry = ledger.append(registry.ledger_place(store), entries, time=now, action=action, **who, **decision)
    changed = registry.follow(store)
    return {"model": registry.MODEL, "entry": asdict(entry), "changed": changed}


def promote(project: Path, version: str, reviewer: str, reason: str) -> dict[str, Any]:
    """Makes a version the champion. Returns {"model", "entry" (the ledger's), "changed" (aliases and tags, in words)}.

    Raises UserError when the version did not pass the gate, was rejected, was compared with another champion than
    today's, has other weights or scores than were judged, when the reviewer or the account may not decide, or when
    somebody else decided at the same moment.
    """
    require_who_and_why(reviewer, reason)
    with registry.opened(project) as store:
        registry.follow(store)  # a decision that was interrupted is finished first
        entries = registry.read_ledger(store)
        current, _ = registry.state_of(entries)
        found = registry.get_version(store, version)
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
    rejected = next(
        (entry for entry in registry.last_decisions(entries) if entry.version == version and entry.action == "reject"),
        None,
    )
    if rejected is not None:
        raise Refusal(
            f"version {version} was rejected by {rejected.actor} ({rejected.reason}); submit the candidate again to have it reviewed anew"
        )


def _rejected(entries: Sequence[ledger.Entry]) -> set[str]:
    return {entry.version for entry in registry.last_decisions(entries) if entry.action == "reject"}


def rollback(project: Path, reviewer: str, reason: str) -> dict[str, Any]:
    """Returns to the previous champion; the one rolled back is not kept as `previous`, so rolling back again goes
    further back. Returns as `promote`.
    """
    require_who_and_why(reviewer, reason)
    with registry.opened(project) as store:
        registry.follow(store)
        entries = registry.read_ledger(store)
        current, target = registry.state_of(entries)
        if target is None:
            raise UserError(
                f"there is no previous champion to return to (champion: {f'version {current}' if current else 'none'})"
            )
        found = registry.get_version(store, target)
        _require_right(store, reviewer)
        verdict, verdict_hash = _verified_verdict(store, found)
        weights = _verified_weights(store, found, verdict)
        further = next(
            (entry.previous for entry in reversed(entries) if entry.action == "promote" and entry.to_version == target),
            None,
        )
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
    """Closes a version's review with a no. Returns as `promote`. Raises UserError for the champion (roll back instead)
    and for one rejected already.
    """
    require_who_and_why(reviewer, reason)
    with registry.opened(project) as store:
        registry.follow(store)
        entries = registry.read_ledger(store)
        current, previous = registry.state_of(entries)
        version = str(registry.get_version(store, version).version)
        if version == current:
            raise Refusal(
                f"version {version} is the champion: roll back (python -m tasks rollback) before rejecting it"
            )
        if version in _rejected(entries):
            raise UserError(f"version {version} was rejected already")
        _require_right(store, reviewer)
        kept = None if version == previous else previous
        decision = {
            "version": version,
            "from_version": current,
            "to_version": current,
            "previous": kept,
            "verdict": None,
            "weights": None,
        }
        return _decide(store, entries, "reject", reviewer, reason, **decision)


def approve(project: Path, version: str, reviewer: str, reason: str) -> dict[str, Any]:
    """Notes an approval on a version, as the web page's tags would; `decide_reviews` acts on it. Returns {"model",
    "version", "status"}.

    Raises UserError when the version did not pass the gate, was decided on, or when the verdict is stale already.
    """
    require_who_and_why(reviewer, reason)
    with registry.opened(project) as store:
        entries = registry.read_ledger(store)
        found = registry.get_version(store, version)
        if str(found.version) in {entry.version for entry in registry.last_decisions(entries)}:
            raise UserError(f"version {found.version} was decided on already: python -m tasks registry shows how")
        _require_right(store, reviewer)
        verdict, _ = _verified_verdict(store, found)
        _require_fresh(verdict, str(found.version), registry.state_of(entries)[0])
        for key, value in ((BY_TAG, reviewer.strip()), (REASON_TAG, reason.strip()), (STATUS_TAG, "approved")):
            store.client.set_model_version_tag(registry.MODEL, str(found.version), key, value)
    return {"model": registry.MODEL, "version": str(found.version), "status": "approved"}


def decide_reviews(project: Path) -> list[dict[str, Any]]:
    """Acts on every review that is not in the ledger yet, lowest version first. Returns one {"version", "status",
    "message"} for each.

    status: "promoted"; "rejected"; "incomplete" (a name or a reason is missing: nothing is done until they are there);
    "stale" (the champion has changed since the candidate was judged: the approval is void); "refused" (other weights
    than were judged, or no right to decide: void too); "failed" (a store did not
    answer: it is tried again). The middle three are answered on the version's page, in the tag review.answer.
    """
    with registry.opened(project) as store:
        registry.follow(store)
        decided = {entry.version for entry in registry.last_decisions(registry.read_ledger(store))}
        waiting = [
            one
            for one in registry.versions_of(store)
            if str(one.version) not in decided and one.tags.get(STATUS_TAG) in ("approved", "rejected")
        ]
    answers = []
    for found in sorted(waiting, key=lambda one: int(one.version)):
        version, status, message = str(found.version), found.tags[STATUS_TAG], ""
        actor, reason = found.tags.get(BY_TAG, ""), found.tags.get(REASON_TAG, "")
        missing = [key for key, text in ((BY_TAG, actor), (REASON_TAG, reason)) if not text.strip()]
        if missing:
            outcome, message = (
                "incomplete",
                f"set {' and '.join(missing)} too: who decided, and why, is part of the record",
            )
        else:
            try:
                done = (
                    promote(project, version, actor, reason)
                    if status == "approved"
                    else reject(project, version, actor, reason)
                )
                outcome, message = (
                    ("promoted" if status == "approved" else "rejected"),
                    f"ledger entry {done['entry']['number']:06d}",
                )
            except Stale as error:
                outcome, message = "stale", str(error)
            except Refusal as error:
                outcome, message = "refused", str(error)
            # a store that is down, a full disk, somebody who decided at the same moment: the review stands, and is
            # tried again
            except UserError as error:
                outcome, message = "failed", str(error)
        if outcome in ("incomplete", "stale", "refused"):
            _answer(project, found, outcome, message)
        answers.append({"version": version, "status": outcome, "message": message})
    return answers


def _answer(project: Path, found: ModelVersion, outcome: str, message: str) -> None:
    """A void approval must be given anew: after a rollback it would otherwise come true without anybody looking."""
    with registry.opened(project) as store:
        if found.tags.get(ANSWER_TAG) != f"{outcome}: {message}"[:LONGEST_ANSWER]:
            store.client.set_model_version_tag(
                registry.MODEL, str(found.version), ANSWER_TAG, f"{outcome}: {message}"[:LONGEST_ANSWER]
            )
        if outcome != "incomplete":
            store.client.set_model_version_tag(registry.MODEL, str(found.version), STATUS_TAG, outcome)


def _show(project: Path) -> str:
    """Versions with their aliases and review, then the ledger."""
    with registry.opened(project) as store:
        entries = registry.read_ledger(store)
        names: dict[str, list[str]] = {}
        for alias, version in registry.aliases_of(store).items():
            names.setdefault(version, []).append(alias)
        versions = sorted(registry.versions_of(store), key=lambda one: int(one.version))
        lines = [f"{registry.MODEL} in {server.without_credentials(store.uri)}"]
        for one in versions:
            tags = one.tags
            review = f"review {tags.get('review.status', 'unset')}" + (
                f" by {tags['review.by']} ({tags['review.reason']})" if tags.get("review.by") else ""
            )
            alias = ", ".join(sorted(names.get(str(one.version), []))) or "-"
            lines.append(f"  version {one.version}  [{alias}]  {tags.get('gate.verdict', 'no verdict')}  {review}")
        lines += [] if versions else ["  no versions yet"]
        lines.append(f"ledger {registry.ledger_place(store)}")
        for entry in entries:
            moved = f"champion {entry.from_version or 'none'} -> {entry.to_version or 'none'}"
            lines.append(
                f"  {entry.number:06d}  {entry.time}  {entry.action} version {entry.version}  {moved}  by {entry.actor}: {entry.reason}"
            )
        lines += [] if entries else ["  no decisions yet"]
        if registry.state_of(entries)[0] != registry.aliases_of(store).get(registry.CHAMPION):
            lines.append(
                "aliases and ledger differ: an interrupted decision, or an alias moved in the web page; mend with python -m tasks reconcile"
            )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tasks",
        description="Decisions on registered students. Each is written to the ledger with who and why.",
    )
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
    shown = commands.add_parser(
        "registry", help="list versions, aliases and the ledger", description="List versions, aliases and the ledger."
    )
    shown.add_argument("--reconcile", action="store_true", help="first make the aliases follow the ledger")
    commands.add_parser(
        "reconcile",
        help="make the aliases follow the ledger",
        description="Make aliases and review tags say what the ledger says.",
    )
    commands.add_parser(
        "review",
        help="act on the reviews",
        description="Act on the reviews that were given on the versions' pages or by `approve`.",
    )
    return parser


def cli(argv: Sequence[str]) -> int:
    """The reviewer's commands for the project in the current folder; prints what changed. UserError is left to the
    caller to print.

    Returns 0, or 1 when a review could not be followed.
    """
    options, project = _parser().parse_args(list(argv)), Path.cwd()
    if options.command == "registry":
        for line in registry.reconcile(project) if options.reconcile else []:
            print(line)
        print(_show(project))
        return 0
    if options.command == "reconcile":
        print("\n".join(registry.reconcile(project)) or "aliases and reviews say what the ledger says")
        return 0
    if options.command == "review":
        answers = decide_reviews(project)
        for one in answers:
            print(f"version {one['version']}: {one['status']} ({one['message']})")
        if not answers:
            print("no review waits")
        return int(any(one["status"] not in ("promoted", "rejected") for one in answers))
    if options.command == "approve":
        print(
            "version {version}: {status}; `python -m tasks review` acts on it".format(
                **approve(project, options.version, options.reviewer, options.reason)
            )
        )
        return 0
    if options.command == "rollback":
        done = rollback(project, options.reviewer, options.reason)
    else:
        done = (promote if options.command == "promote" else reject)(
            project, options.version, options.reviewer, options.reason
        )
    print(f"ledger entry {done['entry']['number']:06d}: {options.command} version {done['entry']['version']}")
    for line in done["changed"]:
        print(line)
    return 0
