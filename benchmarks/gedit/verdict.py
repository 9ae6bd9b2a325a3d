"""From raw replies to GEdit's numbers: a pure function of a folder of judgements, which can be run again at will and
asks nobody."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gedit import rules
from benchmarks.gedit.judging import MadeEdit, answers_of, ask_about
from benchmarks.gedit.questions import ANCHOR, ANCHORS_FILE, SAMPLE, Entry, Job, job_key, read_manifest
from benchmarks.gedit.rules import COLUMNS, Aggregate, Sample, sample_scores
from benchmarks.judge.asking import Answers, Asking
from benchmarks.judge.protocol import JudgeSettings, stored_replies
from benchmarks.judge.reading import Outcome
from benchmarks.judge.wording import KINDS, PairWording, Wording
from benchmarks.scores.scorecard import ExampleScore, Scorecard, bounds, identity_of, summarise
from benchmarks.scores.statistics import compare_paired
from benchmarks.store import read_results, read_settings
from data.errors import UserError
from data.files import atomic_folder, digest, write_json
from data.randomness import numpy_generator
from data.records import GEDIT_CATEGORIES

Judged = list[tuple[Outcome, Outcome]]  # one pair (semantic, quality) a repeat
Scores = tuple[float, ...]


@dataclass(frozen=True)
class Judgements:
    """Everything that a folder of judgements holds, read and checked."""

    folder: Path
    about: dict[str, Any]  # the manifest: "model", "repeats", "set", "made_with" (how the images were made), "anchors"
    identity: dict[str, Any]  # of the judge
    answered_by: str  # the model's name as the server gave it
    samples: list[tuple[Entry, Judged]]
    anchors: list[tuple[Entry, Judged]]
    usage: dict[str, int]


def _judged(
    answers: Answers, entry: Entry, identity: Mapping[str, Any], wording: Wording | PairWording, repeats: int
) -> Judged:
    """What the judge of this identity said of an entry, in each repeat that has both answers."""
    judged: Judged = []
    for repeat in range(repeats) if entry.status == "ok" else ():
        jobs = [Job(entry, kind, repeat) for kind in KINDS]
        semantic, quality = [answers.outcome(job_key(job, identity, wording), job.kind) for job in jobs]
        if semantic and quality:
            judged.append((semantic, quality))
    return judged


def read_judgements(folder: Path, wording: Wording) -> Judgements:
    """Reads a folder of judgements; `wording` must be the one it was made with. Raises UserErrors for questions that
    have no answer yet, and for a run that several models answered (a name that now means another model)."""
    about, entries = read_manifest(folder)
    identity = read_settings(folder)["judge"]
    if identity["wording"] != wording.identity():
        names = f"the {identity['wording']['name']!r} wording, not with this {wording.name!r} one"
        raise UserError(f"{folder}: was judged with {names}; give the same --wording")
    answers = Answers(folder)
    judged: dict[str, list[tuple[Entry, Judged]]] = {SAMPLE: [], ANCHOR: []}
    for entry in entries:
        judged[entry.purpose].append((entry, _judged(answers, entry, identity, wording, about["repeats"])))
    who, usage = answers.answered_by(), dict(answers.usage)
    return Judgements(folder, about, identity, who, judged[SAMPLE], judged[ANCHOR], usage)


# --- samples and rows -------------------------------------------------------------------------------------------------


def _scored(judged: Judged) -> list[tuple[Scores, Scores]]:
    """The scores of the repeats in which both questions were answered."""
    return [
        (semantic.scores, quality.scores) for semantic, quality in judged if semantic.status == quality.status == "ok"
    ]


def status_of(entry: Entry, judged: Judged) -> str:
    """ok if at least one repeat gave both pairs of scores; else what became of the image, or of the first repeat."""
    if entry.status != "ok" or _scored(judged):
        return entry.status
    return next(answer.status for answer in judged[0] if answer.status != "ok")


def sample_of(entry: Entry, judged: Judged) -> Sample:
    """The scores of an image's good repeats; failed repeats take no part, and a sample without a good one has a status
    and no score."""
    pairs = _scored(judged)
    if not pairs:
        return Sample(entry.id, entry.category, status=status_of(entry, judged))
    return Sample(entry.id, entry.category, *pairs[0], repeats=tuple(pairs[1:]))


def _samples(judged: Sequence[tuple[Entry, Judged]]) -> list[tuple[Entry, Sample]]:
    """The entries that have scores."""
    samples = [(entry, sample_of(entry, answers)) for entry, answers in judged]
    return [(entry, sample) for entry, sample in samples if sample.status == "ok"]


def _reasons(entry: Entry, judged: Judged) -> tuple[str, ...]:
    """What the judge wrote, or why there is no score."""
    if entry.status != "ok":
        return (f"{entry.status}: {entry.fault}",)
    return tuple(
        f"{kind} {list(answer.scores)}: {answer.reasoning}"
        if answer.status == "ok"
        else f"{kind}: {answer.status} ({answer.fault})"
        for kind, answers in zip(KINDS, zip(*judged))
        for answer in answers
    )


def _row(model: str, entry: Entry, judged: Judged) -> ExampleScore:
    """One image's row: values {"O", "sc", "pq", "sc1", "sc2", "pq1", "pq2"}, means over the repeats; reasons in the
    judge's words."""
    status, values = status_of(entry, judged), {}
    if status == "ok":
        means = np.array([[*semantic, *quality] for semantic, quality in _scored(judged)]).mean(0)
        sc, pq, o = sample_scores(sample_of(entry, judged))
        values = {"O": o, "sc": sc, "pq": pq, **dict(zip(("sc1", "sc2", "pq1", "pq2"), map(float, means)))}
    image, reasons = entry.edited if entry.status == "ok" else "", _reasons(entry, judged)
    return ExampleScore(model, "gedit", entry.category, entry.id, 0, entry.seed, values, reasons, image, status)


def rows_of(judgements: Judgements) -> list[ExampleScore]:
    """One row an image."""
    return [_row(judgements.about["model"], entry, judged) for entry, judged in judgements.samples]


def score_made(
    made: Sequence[MadeEdit], store: Path, *, model: str, settings: JudgeSettings, asking: Asking
) -> list[ExampleScore]:
    """Rows of scores for images that a stage has made itself, in order; `example_id` is the row's key. Raises
    UserError(s) as `ask_about` does, and for a run that several models answered."""
    folder, entries = ask_about(made, store, settings, asking)
    answers, identity, rows = Answers(folder), settings.identity(), []
    for edit, entry in zip(made, entries, strict=True):
        row = _row(model, entry, _judged(answers, entry, identity, settings.wording, settings.repeats))
        rows.append(replace(row, example_id=edit.task.key, k=edit.k, seed=edit.seed, image=edit.image))
    answers.answered_by()
    return rows


def coverage_of(rows: Sequence[ExampleScore]) -> dict[str, Any]:
    """What a scorecard says of images without a score: the share that has one ("coverage"), how many ended how
    ("statuses"), and the average had the others earned 0 or the highest ("bounds")."""
    statuses = dict(sorted(Counter(row.status for row in rows).items()))
    return {"coverage": statuses.get("ok", 0) / len(rows), "statuses": statuses, "bounds": list(bounds(rows))}


def answered_by(store: Path, settings: JudgeSettings) -> str:
    """The model, as the server named it, that gave all of this judge's answers below `store`; "" where there are none.
    Raises UserError where several did: scores of two stages would then not be comparable."""
    folder = answers_of(store, settings)
    replies = [reply for value in read_results(folder).values() for reply in stored_replies(value)]
    models = Counter(reply.model for reply in replies if reply.status == "ok" and reply.model)
    if len(models) > 1:
        counts = f"{len(models)} models answered under the name {settings.model}: {dict(sorted(models.items()))}"
        advice = f"name one with its date, or remove {folder} and judge everything anew"
        raise UserError(f"{folder}: {counts}; {advice}")
    return next(iter(models), "")


# --- columns ----------------------------------------------------------------------------------------------------------


def _members(judgements: Judgements, column: str) -> list[Entry]:
    language, subset = column.split("/")
    members = [entry for entry, _ in judgements.samples if entry.language == language]
    if subset == "intersection":
        return [entry for entry in members if entry.intersection]
    return [entry for entry in members if entry.category in rules.PAPER_CATEGORIES] if subset == "paper" else members


def _categories(judgements: Judgements, column: str) -> list[str]:
    """The categories that a column averages over: those that the set has in its language, whether or not the column has
    a row of them; the paper's among them in its column."""
    language, subset = column.split("/")
    present = {entry.category for entry, _ in judgements.samples if entry.language == language}
    known = rules.PAPER_CATEGORIES if subset == "paper" else GEDIT_CATEGORIES
    return [category for category in known if category in present]


def _check_categories(column: str, members: Sequence[Entry], categories: Sequence[str]) -> None:
    """Raises UserError where the column has no row of a category: an average over the others would be another number
    under the same name."""
    if missing := sorted(set(categories) - {entry.category for entry in members}):
        advice = "compare the full set, or flag rows of every category"
        raise UserError(
            f"column {column}: no row of {missing}, so its average over categories does not exist; {advice}"
        )


def columns(judgements: Judgements, *, allow_partial: bool) -> dict[str, Aggregate | str]:
    """ "LANGUAGE/SUBSET" -> its means, or the sentence why it has none (too few judged, a category without rows).
    Languages are never mixed: there is no such number."""
    samples = {entry.id: sample_of(entry, judged) for entry, judged in judgements.samples}
    table: dict[str, Aggregate | str] = {}
    for column in COLUMNS:
        members = _members(judgements, column)
        if members:
            chosen, categories = [samples[entry.id] for entry in members], _categories(judgements, column)
            try:
                _check_categories(column, members, categories)
                table[column] = rules.aggregate(chosen, categories, allow_partial=allow_partial)
            except UserError as error:
                table[column] = str(error)
    return table


def column_scorecard(
    judgements: Judgements, column: str, *, allow_partial: bool, **bootstrap: Any
) -> tuple[Scorecard, list[ExampleScore]]:
    """The scorecard of a column (one of COLUMNS) with its rows. `bootstrap`: see `summarise`. Raises UserError for an
    unknown column or one without rows, UserErrors for too few judged images unless `allow_partial`."""
    if column not in COLUMNS:
        raise UserError(f"column = {column!r}; choose of {list(COLUMNS)}")
    members = _members(judgements, column)
    if not members:
        raise UserError(f"column {column}: the set has no such row")
    ids, categories = {entry.id for entry in members}, _categories(judgements, column)
    _check_categories(column, members, categories)
    rows = [row for row in rows_of(judgements) if row.example_id in ids]
    expected = {name: {(entry.id, 0) for entry in members if entry.category == name} for name in categories}
    metrics = summarise(rows, expected=expected, allow_partial=allow_partial, **bootstrap)
    language, subset = column.split("/")
    identity = {
        "prompts": digest([[entry.id, entry.category, entry.instruction, entry.source_sha256] for entry in members]),
        "set": judgements.about["set"]["kind"],
        "language": language,
        "subset": subset,
        "judge": {**judgements.identity, "answered_by": judgements.answered_by},
        "repeats": judgements.about["repeats"],
        **coverage_of(rows),
        "images": judgements.about["made_with"],
    }
    return Scorecard(judgements.about["model"], identity_of(expected), {"gedit": identity}, metrics), rows


# --- the judge's noise and drift --------------------------------------------------------------------------------------


def repeat_noise(judgements: Judgements) -> dict[str, Any] | None:
    """How far repeats lie apart, as standard deviations of O: within a sample (pooled) and of the mean over samples;
    None for a single repeat."""
    if judgements.about["repeats"] < 2:
        return None
    pairs = [_scored(judged) for _, judged in judgements.samples]
    complete = [scores for scores in pairs if len(scores) == judgements.about["repeats"]]
    noise: dict[str, Any] = {"samples": len(complete), "within": None, "of_mean": None}
    if len(complete) >= 2:
        table = np.array([[rules.overall(*pair)[2] for pair in scores] for scores in complete])  # (samples, repeats)
        noise["within"] = float(np.sqrt(table.var(1, ddof=1).mean()))
        noise["of_mean"] = float(table.mean(0).std(ddof=1))
    return noise


def drift(judgements: Judgements, **bootstrap: Any) -> dict[str, Any] | None:
    """The anchors' scores now minus those when they were frozen, paired; None without anchors. `bootstrap`: see
    `compare_paired`. Raises UserError for anchors that were frozen with other settings: not only the judge differs."""
    frozen = judgements.about.get("anchors")
    if not frozen:
        return None
    if frozen["judge"] != judgements.identity:
        advice = "freeze them anew with these, or judge without them"
        raise UserError(f"the anchors were frozen with other settings of the judge; {advice}")
    before = {row["id"]: float(row["o"]) for row in frozen["anchors"]}
    now = {entry.key: sample_scores(sample)[2] for entry, sample in _samples(judgements.anchors)}
    both = sorted(now)
    counts = {"n": len(both), "without_score": len(before) - len(both), "frozen_with": frozen["answered_by"]}
    if len(both) < 2:
        return {**counts, "difference": None}
    a, b = ({"anchors": np.array([values[name] for name in both])} for values in (now, before))
    change = compare_paired(a, b, binary=False, **bootstrap)
    interval = {name: getattr(change, name) for name in ("difference", "low", "high", "p")}
    moves = {name: now[name] - before[name] for name in both if now[name] != before[name]}
    largest = dict(sorted(moves.items(), key=lambda move: (-abs(move[1]), move[0]))[:3])
    return {**counts, **interval, "drifted": change.low > 0.0 or change.high < 0.0, "largest": largest}


def freeze_anchors(judgements: Judgements, target: Path, *, count: int, seed: int) -> int:
    """Copies `count` judged images, spread over the categories, with their scores into `target`: the set by which the
    judge's drift is measured later. Returns how many were taken. Raises UserError when fewer than two can be."""
    scored = {entry.id: (entry, sample) for entry, sample in _samples(judgements.samples)}
    shuffled = []
    for category in GEDIT_CATEGORIES:
        names = sorted(name for name, (entry, _) in scored.items() if entry.category == category)
        order = numpy_generator(seed, 0, 0, f"anchors/{category}").permutation(len(names))
        shuffled.append([names[int(i)] for i in order])
    in_turn = [name for names in zip_longest(*shuffled) for name in names if name is not None]
    chosen = sorted(in_turn[:count])
    if len(chosen) < 2:
        raise UserError(f"anchors: {len(chosen)} images can be taken; judge at least two images with scores first")
    rows = []
    with atomic_folder(target) as folder:
        (folder / "images").mkdir()
        for name in chosen:
            entry, sample = scored[name]
            row = {"id": name} | {key: getattr(entry, key) for key in ("language", "category", "instruction")}
            for kind, path in (("source", entry.source), ("edited", entry.edited)):
                row[kind] = f"images/{name}_{kind}{Path(path).suffix}"
                shutil.copyfile(judgements.folder / path, folder / row[kind])
            row |= {"source_sha256": entry.source_sha256, "edited_sha256": entry.edited_sha256}
            rows.append({**row, **dict(zip(("sc", "pq", "o"), sample_scores(sample)))})
        about = {"judge": judgements.identity, "answered_by": judgements.answered_by}
        write_json(folder / ANCHORS_FILE, {**about, "anchors": rows})
    return len(rows)


# --- everything at once -----------------------------------------------------------------------------------------------


def _table(aggregate: Aggregate | str) -> dict[str, Any]:
    if isinstance(aggregate, str):
        return {"refused": aggregate}
    groups = {"average": aggregate.average, **aggregate.categories}
    values = {name: {**asdict(means), "coverage": means.coverage} for name, means in groups.items()}
    return {"average": values.pop("average"), "categories": values}


def summary(judgements: Judgements, *, allow_partial: bool, **bootstrap: Any) -> dict[str, Any]:
    """All columns with SC, PQ, O, the bounds by which failures could move O, coverage and statuses; noise, drift
    (`bootstrap`: see `compare_paired`), and what was judged with what."""
    pairs = [pair for _, judged in judgements.samples for pair in judged]
    answers = [(kind, answer.status) for pair in pairs for kind, answer in zip(KINDS, pair)]
    failed = Counter(f"{kind} {status}" for kind, status in answers if status != "ok")
    table = columns(judgements, allow_partial=allow_partial)
    return {
        "model": judgements.about["model"],
        "set": judgements.about["set"],
        "images": judgements.about["made_with"],
        "samples": len(judgements.samples),
        "repeats": judgements.about["repeats"],
        "judge": judgements.identity,
        "answered_by": judgements.answered_by,
        "usage": dict(sorted(judgements.usage.items())),
        "failed_questions": dict(sorted(failed.items())),
        "stretched": sum(entry.stretched for entry, _ in judgements.samples),
        "noise": repeat_noise(judgements),
        "drift": drift(judgements, **bootstrap),
        "columns": {column: _table(aggregate) for column, aggregate in table.items()},
    }
