"""Decisions on registered versions, every one on record: who, why, from which champion to which.

    promote / rollback / reject(project, ...) -> dict
    approve(project, ...)                      # a review by command, as the web page's
    decide_reviews(project) -> list[dict]      # what comes of the reviews
    cli(argv) -> int                           # `python -m tasks promote`, `registry`, `review`, ...

A decision is the ledger's next entry, and the aliases follow (tasks/registry/versions.py). A review in the web page is
three tags of the version: `review.by`, `review.reason` and, last, `review.status` = approved or rejected.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import digest, read_json, sha256_file
from tasks import environment
from tasks.registry import files, ledger, server, tracking, versions
from tasks.registry.files import Refusal
from tasks.registry.versions import Version
from tasks.release import gate
from tasks.release.provenance import md5_of

STATUS_TAG, BY_TAG, REASON_TAG, ANSWER_TAG = "review.status", "review.by", "review.reason", "review.answer"
LONGEST_ANSWER = 2000
COMMANDS = {
    "promote": "Make a candidate the champion.",
    "reject": "Refuse a candidate.",
    "approve": "Note an approval; `review` acts on it.",
    "rollback": "Return to the previous champion.",
    "registry": "List versions, aliases and the ledger.",
    "reconcile": "Make aliases and review tags say what the ledger says.",
    "review": "Act on the reviews that were given on the versions' pages or by `approve`.",
}


class Stale(Refusal):
    """The champion is another than the one that the candidate was compared with."""


def require_who_and_why(actor: str, reason: str) -> None:
    """Raises UserError when either is empty."""
    missing = [name for name, text in (("a name", actor), ("a reason", reason)) if not text.strip()]
    if missing:
        raise UserError(f"a decision needs {' and '.join(missing)}: who decided, and why, is part of the record")


@contextmanager
def _deciding(project: Path, reviewer: str, reason: str) -> Iterator[tuple[server.Store, list[ledger.Entry]]]:
    """The open registry and its ledger; a decision that was interrupted is finished first."""
    require_who_and_why(reviewer, reason)
    with versions.opened(project) as store:
        versions.follow(store)
        yield store, versions.read_ledger(store)


def promote(project: Path, number: str, reviewer: str, reason: str) -> dict[str, Any]:
    """Makes a version the champion. Returns {"model", "entry" (the ledger's), "changed" (aliases and tags, in words)}.

    Raises UserError when the version did not pass the gate, was rejected, was compared with another champion than
    today's, has other weights or scores than were judged, when the reviewer or the account may not decide, or when
    somebody else decided at the same moment.
    """
    with _deciding(project, reviewer, reason) as (store, entries):
        current, _ = versions.state_of(entries)
        version = versions.get_version(store, number)
        if version.number == current:
            raise UserError(f"version {version.number} is the champion already")
        if rejection := _rejection(entries, version.number):
            by = f"version {version.number} was rejected by {rejection.actor} ({rejection.reason})"
            raise Refusal(f"{by}; submit the candidate again to have it reviewed anew")
        _require_right(store, reviewer)
        verdict, proof = _verified_verdict(store, version)
        _require_fresh(verdict, version, current)
        proof["weights"] = _verified_weights(store, version, verdict)
        moved = {"version": version.number, "to_version": version.number, "previous": current}
        return _decide(store, entries, action="promote", actor=reviewer, reason=reason, **moved, **proof)


def rollback(project: Path, reviewer: str, reason: str) -> dict[str, Any]:
    """Returns to the previous champion; rolling back again goes further back. Returns as `promote`."""
    with _deciding(project, reviewer, reason) as (store, entries):
        current, target = versions.state_of(entries)
        if target is None:
            champion = f"version {current}" if current else "none"
            raise UserError(f"there is no previous champion to return to (champion: {champion})")
        version = versions.get_version(store, target)
        _require_right(store, reviewer)
        verdict, proof = _verified_verdict(store, version)
        proof["weights"] = _verified_weights(store, version, verdict)
        promotions = [entry for entry in entries if entry.action == "promote" and entry.to_version == target]
        further = promotions[-1].previous if promotions else None
        further = None if _rejection(entries, further) else further
        moved = {"version": target, "to_version": target, "previous": further}
        return _decide(store, entries, action="rollback", actor=reviewer, reason=reason, **moved, **proof)


def reject(project: Path, number: str, reviewer: str, reason: str) -> dict[str, Any]:
    """Closes a version's review with a no. Raises UserError for the champion and for a version rejected before."""
    with _deciding(project, reviewer, reason) as (store, entries):
        current, previous = versions.state_of(entries)
        number = versions.get_version(store, number).number
        if number == current:
            raise Refusal(f"version {number} is the champion: roll back (python -m tasks rollback) before rejecting it")
        if _rejection(entries, number):
            raise UserError(f"version {number} was rejected already")
        _require_right(store, reviewer)
        kept = {"to_version": current, "previous": None if number == previous else previous}
        decision = {"version": number, **kept, "verdict": None, "weights": None}
        return _decide(store, entries, action="reject", actor=reviewer, reason=reason, **decision)


def approve(project: Path, number: str, reviewer: str, reason: str) -> dict[str, Any]:
    """Notes an approval on a version, as the web page's tags would; `decide_reviews` acts on it. Returns {"model",
    "version", "status"}.

    Raises UserError when the version did not pass the gate, was decided on, or when the verdict is stale already.
    """
    require_who_and_why(reviewer, reason)
    with versions.opened(project) as store:
        entries = versions.read_ledger(store)
        version = versions.get_version(store, number)
        if version.number in versions.last_decisions(entries):
            raise UserError(f"version {version.number} was decided on already: python -m tasks registry shows how")
        _require_right(store, reviewer)
        verdict, _ = _verified_verdict(store, version)
        _require_fresh(verdict, version, versions.state_of(entries)[0])
        for key, value in ((BY_TAG, reviewer.strip()), (REASON_TAG, reason.strip()), (STATUS_TAG, "approved")):
            store.client.set_model_version_tag(versions.MODEL, version.number, key, value)
    return {"model": versions.MODEL, "version": version.number, "status": "approved"}


def _rejection(entries: Sequence[ledger.Entry], number: str | None) -> ledger.Entry | None:
    """The version's last decision, if it is a rejection."""
    decided = versions.last_decisions(entries).get(number or "")
    return decided if decided is not None and decided.action == "reject" else None


def _require_right(store: server.Store, reviewer: str) -> None:
    """The reviewer must be named in DANCEOPD_REVIEWERS, if it is set, and the account must be allowed to change the
    model: a write of no meaning tries it, since the ledger's entry comes before the aliases."""
    allowed = environment.setting(environment.REVIEWERS)
    names = [name.strip() for name in allowed.split(",")] if allowed else []
    if names and reviewer.strip() not in names:
        raise Refusal(f"{reviewer!r} may not decide here; {environment.REVIEWERS} names {', '.join(names)}")
    if not store.is_local:
        store.client.set_registered_model_tag(versions.MODEL, "decision.account", server.account())


def _verified_verdict(store: server.Store, version: Version) -> tuple[dict[str, Any], dict[str, str]]:
    """(verdict, {"verdict": its SHA-256}): the one registered, passed, about the scorecard kept beside it."""
    tags, name, run_id = version.tags, f"version {version.number}", version.run_id
    if tags.get("gate.status") != "passed" or not run_id:
        status = f"gate.status = {tags.get('gate.status', 'unset')}"
        raise Refusal(f"{name} did not pass the gate ({status}); it cannot become champion")
    with tempfile.TemporaryDirectory() as temporary:
        path = tracking.artifact(store, run_id, "verdict.json", Path(temporary))
        card = tracking.artifact(store, run_id, "scorecard.json", Path(temporary))
        verdict, noted, scored, judged = read_json(path), sha256_file(path), sha256_file(card), md5_of(card)
    again = "submit the candidate again"
    if noted != tags.get("gate.verdict.sha256") or not gate.has_passed(verdict):
        other = f"verdict.json of run {run_id} is not the passing verdict it was registered with"
        raise Refusal(f"{name}: {other}; {again}")
    if scored != tags.get("scorecard.json.sha256") or judged != gate.rule_value(verdict, gate.SCORECARD_RULE):
        raise Refusal(f"{name}: scorecard.json of run {run_id} is not the one that was judged; {again}")
    return verdict, {"verdict": noted}


def _verified_weights(store: server.Store, version: Version, verdict: Mapping[str, Any]) -> str:
    """The digest of the hashes of the version's files, which must be those registered and those judged."""
    from tasks.student.opening import CARRIED  # loads torch

    with tempfile.TemporaryDirectory() as temporary:
        fetched, hashes = files.fetch_weights(store, version, Path(temporary))
        # the base is verified by its hashes; the verdict is about the student's files
        shutil.rmtree(fetched / CARRIED, ignore_errors=True)
        if gate.rule_value(verdict, gate.WEIGHTS_RULE) != md5_of(fetched):
            other = "its files are not the ones that were judged (the verdict names others)"
            raise Refusal(f"version {version.number}: {other}; submit the candidate again")
    return digest(hashes)


def _require_fresh(verdict: Mapping[str, Any], version: Version, current: str | None) -> None:
    judged = str(gate.rule_value(verdict, gate.CHAMPION_RULE))
    if judged != (current or gate.NO_CHAMPION):
        now = f"version {current}" if current else "nobody"
        stale = f"version {version.number} was judged against champion {judged}, but champion is {now}"
        raise Stale(f"{stale}: the verdict is stale; run the gate again and submit")


def _decide(store: server.Store, entries: list[ledger.Entry], **decision: Any) -> dict[str, Any]:
    """Takes the ledger's next entry, which stands even if the aliases cannot follow it yet."""
    decision |= {key: decision[key].strip() for key in ("actor", "reason")}
    current, _ = versions.state_of(entries)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    who = {"time": now, "account": server.account(), "from_version": current}
    entry = ledger.append(versions.ledger_place(store), entries, **who, **decision)
    changed = versions.follow(store)
    return {"model": versions.MODEL, "entry": asdict(entry), "changed": changed}


def decide_reviews(project: Path) -> list[dict[str, Any]]:
    """Acts on every review that is not in the ledger yet, lowest version first. Returns {"version", "status",
    "message"} of each.

    status: "promoted"; "rejected"; "incomplete" (a name or a reason is missing: nothing is done until they are there);
    "stale" (the champion has changed since the candidate was judged: the approval is void); "refused" (other weights
    than were judged, or no right to decide: void too); "failed" (a store did not answer: it is tried again). The middle
    three are answered on the version's page, in the tag review.answer.
    """
    with versions.opened(project) as store:
        versions.follow(store)
        decided = versions.last_decisions(versions.read_ledger(store))
        waiting = [version for version in versions.versions_of(store) if version.number not in decided]
    answers = []
    for version in waiting:
        if version.tags.get(STATUS_TAG) in ("approved", "rejected"):
            status, message = _decide_review(project, version)
            if status in ("incomplete", "stale", "refused"):
                _answer(project, version, status, message)
            answers.append({"version": version.number, "status": status, "message": message})
    return answers


def _decide_review(project: Path, version: Version) -> tuple[str, str]:
    """(status, message), as in `decide_reviews`."""
    missing = [key for key in (BY_TAG, REASON_TAG) if not version.tags.get(key, "").strip()]
    if missing:
        return "incomplete", f"set {' and '.join(missing)} too: who decided, and why, is part of the record"
    decide, status = (promote, "promoted") if version.tags[STATUS_TAG] == "approved" else (reject, "rejected")
    try:
        done = decide(project, version.number, version.tags[BY_TAG], version.tags[REASON_TAG])
    except Stale as error:
        return "stale", str(error)
    except Refusal as error:
        return "refused", str(error)
    except UserError as error:  # a store that is down, a full disk, somebody who was faster: the review stands
        return "failed", str(error)
    return status, f"ledger entry {done['entry']['number']:06d}"


def _answer(project: Path, version: Version, status: str, message: str) -> None:
    """A void approval must be given anew: after a rollback it would otherwise come true without anybody looking."""
    answer = f"{status}: {message}"[:LONGEST_ANSWER]
    with versions.opened(project) as store:
        if version.tags.get(ANSWER_TAG) != answer:
            store.client.set_model_version_tag(versions.MODEL, version.number, ANSWER_TAG, answer)
        if status != "incomplete":
            store.client.set_model_version_tag(versions.MODEL, version.number, STATUS_TAG, status)


def _listing(project: Path) -> list[str]:
    """Versions with their aliases and review, then the ledger."""
    with versions.opened(project) as store:
        entries, aliases, known = versions.read_ledger(store), versions.aliases_of(store), versions.versions_of(store)
        place = versions.ledger_place(store)
    lines = [f"{versions.MODEL} in {server.without_credentials(store.uri)}"]
    for version in known:
        tags = version.tags
        names = ", ".join(sorted(alias for alias, number in aliases.items() if number == version.number)) or "-"
        by = f" by {tags[BY_TAG]} ({tags.get(REASON_TAG, '')})" if tags.get(BY_TAG) else ""
        verdict = tags.get("gate.verdict", "no verdict")
        lines.append(f"  version {version.number}  [{names}]  {verdict}  review {tags.get(STATUS_TAG, 'unset')}{by}")
    lines += [] if known else ["  no versions yet"]
    lines.append(f"ledger {place}")
    for entry in entries:
        moved = f"champion {entry.from_version or 'none'} -> {entry.to_version or 'none'}"
        what = f"{entry.number:06d}  {entry.time}  {entry.action} version {entry.version}"
        lines.append(f"  {what}  {moved}  by {entry.actor}: {entry.reason}")
    lines += [] if entries else ["  no decisions yet"]
    if versions.state_of(entries)[0] != aliases.get(versions.CHAMPION):
        cause = "an interrupted decision, or an alias moved in the web page"
        lines.append(f"aliases and ledger differ: {cause}; mend with python -m tasks reconcile")
    return lines


def _options(name: str, arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m tasks {name}", description=COMMANDS[name])
    if name in ("promote", "reject", "approve"):
        parser.add_argument("--version", required=True, help="number of the registered version")
    if name in ("promote", "reject", "approve", "rollback"):
        parser.add_argument("--reviewer", required=True, help="who decides; kept in the ledger")
        parser.add_argument("--reason", required=True, help="why; kept in the ledger")
    if name == "registry":
        parser.add_argument("--reconcile", action="store_true", help="first make the aliases follow the ledger")
    return parser.parse_args(list(arguments))


def cli(argv: Sequence[str]) -> int:
    """The reviewer's command (`COMMANDS`, by its name) for the project in the current folder; prints what changed.

    Returns 0, or 1 when a review could not be followed. UserError is left to the caller to print.
    """
    name, *arguments = argv
    options, project = _options(name, arguments), Path.cwd()
    if name == "registry":
        changed = versions.reconcile(project) if options.reconcile else []
        print("\n".join([*changed, *_listing(project)]))
        return 0
    if name == "reconcile":
        print("\n".join(versions.reconcile(project)) or "aliases and reviews say what the ledger says")
        return 0
    if name == "review":
        answers = decide_reviews(project)
        lines = [f"version {answer['version']}: {answer['status']} ({answer['message']})" for answer in answers]
        print("\n".join(lines) or "no review waits")
        return int(any(answer["status"] not in ("promoted", "rejected") for answer in answers))
    if name == "approve":
        approved = approve(project, options.version, options.reviewer, options.reason)["version"]
        print(f"version {approved}: approved; `python -m tasks review` acts on it")
        return 0
    if name == "rollback":
        done = rollback(project, options.reviewer, options.reason)
    else:
        decide = promote if name == "promote" else reject
        done = decide(project, options.version, options.reviewer, options.reason)
    entry = done["entry"]
    print("\n".join([f"ledger entry {entry['number']:06d}: {name} version {entry['version']}", *done["changed"]]))
    return 0
