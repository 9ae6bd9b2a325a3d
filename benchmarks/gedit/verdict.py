"""From raw replies to GEdit's numbers: a pure function of a folder of judgements, which can be run again at will and
asks nobody anything.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gedit.judging import MadeEdit, MakeAsk, answers_of, ask_about
from benchmarks.gedit.questions import ANCHOR, ANCHORS_FILE, SAMPLE, Entry, Job, job_key, read_manifest
from benchmarks.gedit.rules import (
    LANGUAGES,
    PAPER_CATEGORIES,
    SUBSETS,
    Aggregate,
    Sample,
    aggregate,
    overall,
    sample_scores,
)
from benchmarks.judge.protocol import JudgeSettings, Outcome, identity_of_judge, outcome, reply_from_json
from benchmarks.judge.wording import KINDS, QUALITY, SEMANTIC, Wording
from benchmarks.scores.scorecard import ExampleScore, Scorecard, identity_of, summarise
from benchmarks.scores.statistics import compare_paired
from benchmarks.store import read_results, read_settings
from data.errors import UserError, UserErrors
from data.files import atomic_folder, digest, write_json
from data.randomness import numpy_generator
from data.records import GEDIT_CATEGORIES

Judged = list[tuple[Outcome, Outcome]]  # one pair (semantic, quality) a repeat


@dataclass(frozen=True)
class Judgements:
    """Everything a folder of judgements holds, read and checked."""

    model: str
    repeats: int
    about_set: dict[str, Any]  # "digest", and "kind": "official" or "custom"
    made_with: dict[
        str, Any
    ]  # the settings that the images' folder names: model, sampler, seed; empty for images made elsewhere
    identity: dict[str, Any]  # of the judge
    answered_by: str  # the model's name as the server gave it
    samples: list[tuple[Entry, Judged]]
    anchors: list[tuple[Entry, Judged]]
    frozen: dict[str, Any]  # the anchors' record, with their reference scores; empty without anchors
    usage: dict[str, int]


class _Replies:
    """Stored replies, read image by image, with a tally of what is missing, who answered and what it took."""

    def __init__(self, results: Mapping[str, Any], identity: Mapping[str, Any], wording: Wording, repeats: int) -> None:
        self._results, self._identity, self._wording, self._repeats = results, identity, wording, repeats
        self._seen: set[str] = set()
        self.open_questions = 0
        self.models: Counter[str] = Counter()
        self.usage: Counter[str] = Counter()

    @property
    def answered_by(self) -> str:
        return next(iter(self.models), "")

    def _outcome(self, key: str) -> Outcome | None:
        value = self._results.get(key)
        if value is None:
            self.open_questions += 1
            return None
        replies = [reply_from_json(reply) for reply in value["replies"]]
        if key not in self._seen:  # equal images share a question
            self._seen.add(key)
            self.models.update({reply.model for reply in replies if reply.status == "ok" and reply.model})
            for reply in replies:
                self.usage.update({"requests": reply.attempts, **(reply.usage or {})})
        return outcome(replies)

    def of(self, entry: Entry) -> Judged:
        judged: Judged = []
        for repeat in range(self._repeats) if entry.status == "ok" else ():
            pair = {
                kind: self._outcome(job_key(Job(entry, kind, repeat), self._identity, self._wording)) for kind in KINDS
            }
            semantic, quality = pair[SEMANTIC], pair[QUALITY]
            if semantic is not None and quality is not None:
                judged.append((semantic, quality))
        return judged

    def check(self, out: str | Path) -> None:
        faults = []
        if self.open_questions:
            faults.append(
                f"{self.open_questions} questions have no answer yet; run `python -m benchmarks gedit judge` again, it goes on"
            )
        if len(self.models) > 1:
            faults.append(
                f"{len(self.models)} models answered: {dict(sorted(self.models.items()))}; name one with its date, and judge anew into another folder"
            )
        if faults:
            raise UserErrors(f"{out}: these judgements make no score:", faults)


def read_judgements(out: str | Path, wording: Wording) -> Judgements:
    """Reads a folder of judgements; `wording` must be the one it was made with.

    Raises UserErrors for questions that have no answer yet, and for a run that several models answered (a floating name
    whose meaning has changed).
    """
    manifest, entries = read_manifest(out)
    identity = read_settings(out)["judge"]
    if identity["wording"] != wording.identity():
        raise UserError(
            f"{out}: was judged with the {identity['wording']['name']!r} wording, not with this {wording.name!r} one; give the same --wording"
        )
    replies = _Replies(read_results(out), identity, wording, int(manifest["repeats"]))
    found: dict[str, list[tuple[Entry, Judged]]] = {SAMPLE: [], ANCHOR: []}
    for entry in entries:
        found[entry.purpose].append((entry, replies.of(entry)))
    replies.check(out)
    return Judgements(
        manifest["model"],
        int(manifest["repeats"]),
        manifest["set"],
        manifest["made_with"],
        identity,
        replies.answered_by,
        found[SAMPLE],
        found[ANCHOR],
        manifest.get("anchors", {}),
        dict(replies.usage),
    )


# --- samples and rows -------------------------------------------------------------------------------------------------


def status_of(entry: Entry, judged: Judged) -> str:
    """ok if at least one repeat gave both pairs of scores; else what became of the image, or of the first repeat."""
    if entry.status != "ok":
        return entry.status
    if any(semantic.status == quality.status == "ok" for semantic, quality in judged):
        return "ok"
    semantic, quality = judged[0]
    return semantic.status if semantic.status != "ok" else quality.status


def sample_of(entry: Entry, judged: Judged) -> Sample:
    """The scores of an image's good repeats; failed repeats take no part, and a sample without a good one has a status
    and no score.
    """
    pairs = [
        (semantic.scores, quality.scores) for semantic, quality in judged if semantic.status == quality.status == "ok"
    ]
    if not pairs:
        return Sample(entry.id, entry.category, status=status_of(entry, judged))
    return Sample(entry.id, entry.category, *pairs[0], repeats=tuple(pairs[1:]))


def _reasons(entry: Entry, judged: Judged) -> tuple[str, ...]:
    """What the judge wrote, or why there is no score."""
    if entry.status != "ok":
        return (f"{entry.status}: {entry.fault}",)
    texts = []
    for kind, place in ((SEMANTIC, 0), (QUALITY, 1)):
        for pair in judged:
            found = pair[place]
            texts.append(
                f"{kind} {list(found.scores)}: {found.reasoning}"
                if found.status == "ok"
                else f"{kind}: {found.status} ({found.fault})"
            )
    return tuple(texts)


def rows_of(judgements: Judgements) -> list[ExampleScore]:
    """One row an image: values {"O", "sc", "pq", "sc1", "sc2", "pq1", "pq2"}, means over the repeats; reasons are the
    judge's own words.
    """
    return [
        _row(judgements.model, entry, judged, k=0, seed=entry.seed, image=entry.edited if entry.status == "ok" else "")
        for entry, judged in judgements.samples
    ]


def _row(model: str, entry: Entry, judged: Judged, *, k: int, seed: int, image: str) -> ExampleScore:
    sample = sample_of(entry, judged)
    values: dict[str, float] = {}
    if sample.status == "ok":
        sc, pq, o = sample_scores(sample)
        pairs = np.array(
            [[*semantic, *quality] for semantic, quality in ((sample.semantic, sample.quality), *sample.repeats)]
        ).mean(0)
        values = {"O": o, "sc": sc, "pq": pq, **dict(zip(("sc1", "sc2", "pq1", "pq2"), map(float, pairs), strict=True))}
    return ExampleScore(
        model, "gedit", entry.category, entry.id, k, seed, values, _reasons(entry, judged), image, sample.status
    )


def score_made(
    made: Sequence[MadeEdit],
    store: str | Path,
    *,
    model: str,
    settings: JudgeSettings,
    wording: Wording,
    make_ask: MakeAsk,
    **how: Any,
) -> tuple[list[ExampleScore], dict[str, Any]]:
    """Rows of scores for images that a stage has made itself, in order, and the judge's identity; `example_id` is the
    row's key. `how`: see `ask_about`.

    Raises UserError(s) as `ask_about` does, and for a run that several models answered.
    """
    folder, entries = ask_about(made, store, settings=settings, wording=wording, make_ask=make_ask, **how)
    identity = identity_of_judge(settings, wording)
    replies = _Replies(read_results(folder), identity, wording, settings.repeats)
    judged = [replies.of(entry) for entry in entries]
    replies.check(folder)
    rows = [
        _row(model, entry, found, k=one.k, seed=one.seed, image=one.image)
        for one, entry, found in zip(made, entries, judged, strict=True)
    ]
    rows = [replace(row, example_id=one.task.key) for row, one in zip(rows, made, strict=True)]
    return rows, {**identity, "answered_by": replies.answered_by}


def coverage_of(rows: Sequence[ExampleScore]) -> float:
    """The lowest share, over the categories, of images that have a score."""
    categories = {row.category for row in rows}
    return min(
        float(np.mean([row.status == "ok" for row in rows if row.category == category])) for category in categories
    )


def answered_by(store: str | Path, settings: JudgeSettings, wording: Wording) -> str:
    """The model, as the server named it, that gave all of this judge's answers below `store`; "" where there are none.

    Raises UserError where several did: scores of two stages would then not be comparable.
    """
    folder = answers_of(store, settings, wording)
    replies = [reply_from_json(reply) for value in read_results(folder).values() for reply in value["replies"]]
    models = Counter(reply.model for reply in replies if reply.status == "ok" and reply.model)
    if len(models) > 1:
        advice = f"name one with its date, or remove {folder} and judge everything anew"
        raise UserError(
            f"{folder}: {len(models)} models answered under the name {settings.model}: {dict(sorted(models.items()))}; {advice}"
        )
    return next(iter(models), "")


# --- columns ----------------------------------------------------------------------------------------------------------


def _column(entries: Sequence[Entry], language: str, subset: str) -> list[Entry]:
    members = [entry for entry in entries if entry.language == language]
    if subset == "intersection":
        return [entry for entry in members if entry.intersection]
    return [entry for entry in members if entry.category in PAPER_CATEGORIES] if subset == "paper" else members


def categories_of(entries: Sequence[Entry]) -> list[str]:
    present = {entry.category for entry in entries}
    return [category for category in GEDIT_CATEGORIES if category in present]


def columns(judgements: Judgements, *, allow_partial: bool) -> dict[str, Aggregate | str]:
    """ "LANGUAGE/SUBSET" -> its means, or the sentence why it has none (too few judged). Languages are never mixed:
    there is no such number.
    """
    samples = {entry.id: sample_of(entry, judged) for entry, judged in judgements.samples}
    found: dict[str, Aggregate | str] = {}
    for language in LANGUAGES:
        for subset in SUBSETS:
            members = _column([entry for entry, _ in judgements.samples], language, subset)
            if not members:
                continue
            try:
                found[f"{language}/{subset}"] = aggregate(
                    [samples[entry.id] for entry in members], categories_of(members), allow_partial=allow_partial
                )
            except UserError as error:
                found[f"{language}/{subset}"] = str(error)
    return found


def column_scorecard(
    judgements: Judgements, column: str, *, allow_partial: bool, seed: int, resamples: int, confidence: float
) -> tuple[Scorecard, list[ExampleScore]]:
    """The scorecard of one column ("en/full", "cn/paper", ...) with its rows.

    Raises UserError for an unknown column or one without rows, UserErrors for too few judged images unless
    `allow_partial`.
    """
    language, _, subset = column.partition("/")
    if language not in LANGUAGES or subset not in SUBSETS:
        raise UserError(
            f"column = {column!r}; choose of {[f'{language}/{subset}' for language in LANGUAGES for subset in SUBSETS]}"
        )
    members = _column([entry for entry, _ in judgements.samples], language, subset)
    if not members:
        raise UserError(f"column {column}: the set has no such row")
    kept = {entry.id for entry in members}
    rows = [row for row in rows_of(judgements) if row.example_id in kept]
    expected = {
        category: {(entry.id, 0) for entry in members if entry.category == category}
        for category in categories_of(members)
    }
    metrics = summarise(
        rows, expected=expected, seed=seed, resamples=resamples, confidence=confidence, allow_partial=allow_partial
    )
    statuses = Counter(row.status for row in rows)
    identity = {
        "prompts": digest([[entry.id, entry.category, entry.instruction, entry.source_sha256] for entry in members]),
        "set": judgements.about_set["kind"],
        "language": language,
        "subset": subset,
        "judge": {**judgements.identity, "answered_by": judgements.answered_by},
        "repeats": judgements.repeats,
        "coverage": coverage_of(rows),
        "statuses": dict(sorted(statuses.items())),
        "images": judgements.made_with,
    }
    return Scorecard(judgements.model, identity_of(expected), {"gedit": identity}, metrics), rows


# --- the judge's own noise --------------------------------------------------------------------------------------------


def repeat_noise(judgements: Judgements) -> dict[str, Any] | None:
    """How far repeats lie apart, as standard deviations of O: within a sample (pooled) and of the mean over samples;
    None for a single repeat.
    """
    if judgements.repeats < 2:
        return None
    complete = []
    for _, judged in judgements.samples:
        pairs = [(s.scores, q.scores) for s, q in judged if s.status == q.status == "ok"]
        if len(pairs) == judgements.repeats:
            complete.append([overall(semantic, quality)[2] for semantic, quality in pairs])
    if len(complete) < 2:
        return {"samples": len(complete), "within": None, "of_mean": None}
    table = np.array(complete)  # (samples, repeats)
    return {
        "samples": len(complete),
        "within": float(np.sqrt(table.var(1, ddof=1).mean())),
        "of_mean": float(table.mean(0).std(ddof=1)),
    }


def drift(judgements: Judgements, *, seed: int, resamples: int, confidence: float) -> dict[str, Any] | None:
    """The anchors' scores now minus those when they were frozen, paired; None without anchors.

    Raises UserError when the anchors were frozen with other settings, because the difference would then not be the
    judge's.
    """
    if not judgements.frozen:
        return None
    if judgements.frozen["judge"] != judgements.identity:
        raise UserError(
            "the anchors were frozen with other settings of the judge; freeze them anew with these, or judge without them"
        )
    reference = {row["id"]: float(row["o"]) for row in judgements.frozen["anchors"]}
    now = {
        entry.key: sample_scores(sample)[2]
        for entry, judged in judgements.anchors
        if (sample := sample_of(entry, judged)).status == "ok"
    }
    both = sorted(now)
    result: dict[str, Any] = {
        "n": len(both),
        "without_score": len(reference) - len(both),
        "frozen_with": judgements.frozen["answered_by"],
    }
    if len(both) < 2:
        return {**result, "difference": None}
    a, b = ({"anchors": np.array([values[name] for name in both])} for values in (now, reference))
    found = compare_paired(a, b, binary=False, seed=seed, resamples=resamples, confidence=confidence)
    moves = sorted(both, key=lambda name: (-abs(now[name] - reference[name]), name))[:3]
    moved = found.low > 0.0 or found.high < 0.0
    return {
        **result,
        "difference": found.difference,
        "low": found.low,
        "high": found.high,
        "p": found.p,
        "drifted": moved,
        "largest": {name: now[name] - reference[name] for name in moves if now[name] != reference[name]},
    }


def freeze_anchors(judgements: Judgements, out: str | Path, target: str | Path, *, count: int, seed: int) -> int:
    """Copies `count` judged images, spread over the categories, with their scores into `target`: the set by which the
    judge's drift is measured later.

    Raises UserError when fewer than two can be taken.
    """
    scored = {
        entry.id: (entry, sample)
        for entry, judged in judgements.samples
        if (sample := sample_of(entry, judged)).status == "ok"
    }
    circles = {
        category: [names[int(i)] for i in numpy_generator(seed, 0, 0, f"anchors/{category}").permutation(len(names))]
        for category in GEDIT_CATEGORIES
        if (names := sorted(name for name, (entry, _) in scored.items() if entry.category == category))
    }
    order = [
        names[turn]
        for turn in range(max(map(len, circles.values()), default=0))
        for names in circles.values()
        if turn < len(names)
    ]
    chosen = sorted(order[:count])
    if len(chosen) < 2:
        raise UserError(f"anchors: {len(chosen)} images can be taken; judge at least two images with scores first")
    rows = []
    with atomic_folder(target) as folder:
        (folder / "images").mkdir()
        for name in chosen:
            entry, sample = scored[name]
            files = {
                kind: f"images/{name}_{kind}{Path(path).suffix}"
                for kind, path in (("source", entry.source), ("edited", entry.edited))
            }
            for kind, path in (("source", entry.source), ("edited", entry.edited)):
                shutil.copyfile(Path(out) / path, folder / files[kind])
            sc, pq, o = sample_scores(sample)
            rows.append(
                {
                    "id": name,
                    "language": entry.language,
                    "category": entry.category,
                    "instruction": entry.instruction,
                    **files,
                    "source_sha256": entry.source_sha256,
                    "edited_sha256": entry.edited_sha256,
                    "sc": sc,
                    "pq": pq,
                    "o": o,
                }
            )
        write_json(
            folder / ANCHORS_FILE,
            {"judge": judgements.identity, "answered_by": judgements.answered_by, "anchors": rows},
        )
    return len(rows)


# --- everything at once -----------------------------------------------------------------------------------------------


def _means(value: Any) -> dict[str, Any]:
    return {**asdict(value), "coverage": value.coverage}


def summary(
    judgements: Judgements, *, allow_partial: bool, seed: int, resamples: int, confidence: float
) -> dict[str, Any]:
    """All columns with SC, PQ, O, the bounds by which failures could move O, coverage and statuses; noise, drift, and
    what was judged with what.
    """
    table: dict[str, Any] = {}
    for name, found in columns(judgements, allow_partial=allow_partial).items():
        if isinstance(found, str):
            table[name] = {"refused": found}
        else:
            table[name] = {
                "average": _means(found.average),
                "categories": {category: _means(means) for category, means in found.categories.items()},
            }
    entries = [entry for entry, _ in judgements.samples]
    failed: Mapping[str, int] = Counter(
        f"{kind} {found.status}"
        for _, judged in judgements.samples
        for pair in judged
        for kind, found in zip(KINDS, pair, strict=True)
        if found.status != "ok"
    )
    return {
        "model": judgements.model,
        "set": judgements.about_set,
        "images": judgements.made_with,
        "samples": len(entries),
        "repeats": judgements.repeats,
        "judge": judgements.identity,
        "answered_by": judgements.answered_by,
        "usage": dict(sorted(judgements.usage.items())),
        "failed_questions": dict(sorted(failed.items())),
        "stretched": sum(entry.stretched for entry in entries),
        "noise": repeat_noise(judgements),
        "drift": drift(judgements, seed=seed, resamples=resamples, confidence=confidence),
        "columns": table,
    }
