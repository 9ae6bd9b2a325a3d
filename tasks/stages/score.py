"""Stage `score`: how good the student is on held-out examples, before and after absorbing guidance, beside its teachers
and the ends of the scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.micro import CONTROLS
from benchmarks.scores.figures import edit_strips, sample_grid, scorecard_plot, training_curves
from benchmarks.scores.page import Report, write_report
from benchmarks.scores.scorecard import (
    MACRO,
    ExampleScore,
    Scorecard,
    compare,
    expected_scores,
    read_scores,
    summarise,
    write_scorecard,
    write_scores,
)
from benchmarks.scores.scorecard import scorecard as make_scorecard
from benchmarks.scores.statistics import Metric
from data.bounds import Positive, Share
from data.errors import UserError
from data.files import atomic_folder, read_json, write_json
from data.images import read_picture
from data.microworld import MICRO, World
from data.progress import progress
from data.records import CAPABILITIES, Example, read_examples
from model.backbones import TRANSFORMER
from model.networks.student import RECORD, load_student
from model.networks.teachers import BASE, load_base, read_records
from tasks.params.sections import BackboneParams, BenchmarkParams, JudgeParams, RoutingParams, SamplingParams
from tasks.scoring.real import check_judgeable, identities_of_scores, notes_of_scores, scored_examples
from tasks.scoring.sampling import EvaluationSet, evaluation_set, score_field

CANDIDATE, DISTILLED, DISTILLED_GUIDED = "absorbed", "student", "student_guided"


@dataclass(frozen=True)
class Params:
    """Section `score`. `resamples` and `confidence` of the bootstrap intervals; `shown`: examples a category in grids
    and report.
    """

    world: World
    backbone: BackboneParams
    sampling: SamplingParams
    routing: RoutingParams
    benchmark: BenchmarkParams
    judge: JudgeParams
    seed: int
    resamples: Positive
    confidence: Share
    shown: Positive


def _first(examples: tuple[Example, ...], count: int) -> list[Example]:
    """The first `count` examples of every category, by id."""
    chosen: dict[str, list[Example]] = {}
    for example in sorted(examples, key=lambda example: example.id):
        if len(chosen.setdefault(example.category, [])) < count:
            chosen[example.category].append(example)
    return [example for members in chosen.values() for example in members]


def _pictures(
    folder: Path, validated: Path, evaluation: EvaluationSet, teacher_of: Mapping[str, str], shown: int
) -> None:
    """Sample grids and edit strips, for people who would rather look than read."""
    t2i = _first(evaluation.only("t2i").examples, shown)
    if t2i:
        images = [read_picture(folder / f"images/{CANDIDATE}/{example.id}-0.png") for example in t2i]
        sample_grid(
            images, [example.prompt for example in t2i], folder / "t2i.png", columns=2 * shown if shown < 4 else shown
        )
    edits = _first(evaluation.only("edit").examples, shown)
    if edits:
        edit_strips(
            [evaluation.sources[example.id] for example in edits],
            [
                read_picture(validated / f"images/{teacher_of[example.category]}/{example.id}-0.png")
                for example in edits
            ],
            [read_picture(folder / f"images/{CANDIDATE}/{example.id}-0.png") for example in edits],
            [example.prompt for example in edits],
            folder / "edits.png",
        )


def score(
    params: Params,
    *,
    curated: Path,
    teachers: Path,
    validated: Path,
    student: Path,
    absorbed: Path,
    out: Path,
    scorecard: Path,
    metrics: Path,
) -> dict[str, Any]:
    """Writes `scorecard` (the absorbed student's), `metrics` (its headline figures, a small file each) and `out`.

    `out` holds every image with its score, report.html, grids, the curves of both trainings, all models' scorecards and
    their comparisons.
    """
    world, routes = params.world, params.routing.routes
    records = read_records(teachers)
    loading = params.backbone.loading()
    backbone = load_base(teachers, **loading)
    distilled = load_student(student, load_base(teachers, need=TRANSFORMER, **loading), records[BASE].sha256)
    candidate = load_student(absorbed, load_base(teachers, need=TRANSFORMER, **loading), records[BASE].sha256)
    evaluation = evaluation_set(scored_examples(read_examples(curated), params.benchmark, params.judge), curated)
    if params.benchmark.detector != MICRO:
        check_judgeable(evaluation.examples, params.benchmark, params.judge)
    expected = expected_scores(evaluation.examples, params.sampling.images_per_prompt)
    numbers = {"seed": params.seed, "resamples": params.resamples, "confidence": params.confidence}
    reference: dict[str, list[ExampleScore]] = {}
    for row in read_scores(validated):
        reference.setdefault(row.model, []).append(row)
    missing = sorted({route.teacher for route in routes} - reference.keys())
    if missing:
        raise UserError(f"{validated}: no scores of {missing}; run the validate stage again")
    total = 3 * len(evaluation.examples) * params.sampling.images_per_prompt
    with atomic_folder(out) as folder:
        scores: dict[str, list[ExampleScore]] = {}
        with progress("score: images", total) as advance:
            for name, field, scale in (
                (DISTILLED, distilled.field, 1.0),
                (DISTILLED_GUIDED, distilled.field, params.sampling.guidance),
                (CANDIDATE, candidate.field, 1.0),
            ):
                scores[name] = score_field(
                    field,
                    backbone,
                    world,
                    evaluation,
                    params.sampling,
                    model=name,
                    scale=scale,
                    folder=folder,
                    advance=advance,
                    benchmark=params.benchmark,
                    judge=params.judge,
                )
        card, cards = _cards(params, expected, scores, reference, teachers, absorbed, evaluation)
        comparisons = _comparisons(expected, scores, reference, evaluation, params.sampling.images_per_prompt, numbers)
        write_json(folder / "comparisons.json", comparisons)
        write_json(folder / "scorecards.json", {name: other.to_json() for name, other in cards.items()})
        write_scores(folder, [row for rows in scores.values() for row in rows])
        teacher_of = {
            category: route.teacher for route in routes for category in CAPABILITIES[route.capability].categories
        }
        teacher_of = {
            category: teacher_of.get(category, BASE)
            for capability in CAPABILITIES.values()
            for category in capability.categories
        }
        _pictures(folder, validated, evaluation, teacher_of, params.shown)
        scorecard_plot(cards, folder / "scorecard.png")
        trainings = {"distillation": student / "steps.csv", "absorption": absorbed / "steps.csv"}
        training_curves(trainings, folder / "training.png")
        beside = {
            example.id: ([("source", curated / example.source)] if example.source else [])
            + [
                (
                    f"teacher {teacher_of[example.category]}",
                    validated / f"images/{teacher_of[example.category]}/{example.id}-0.png",
                )
            ]
            for example in evaluation.examples
        }
        report = Report(
            cards=cards,
            scores=scores[CANDIDATE],
            folder=folder,
            images=beside,
            prompts={example.id: example.prompt for example in evaluation.examples},
            per_category=params.shown,
            files=["reports/score/scores.parquet", "data/validated/scores.parquet"],
            records={example.id: example.record for example in evaluation.examples},
            comparisons=comparisons,
            notes=notes_of_scores(scores[CANDIDATE], card.identities),
            others={
                **{name: (folder, rows) for name, rows in scores.items()},
                **{name: (curated if name in CONTROLS else validated, rows) for name, rows in reference.items()},
            },
        )
        write_report(folder / "report.html", report)
    write_scorecard(scorecard, card)
    headline = write_metrics(metrics, card, cards.get(BASE))
    return {path: round(metric.mean, 3) for path, metric in headline.items()}


def write_metrics(out: Path, card: Scorecard, base: Scorecard | None) -> dict[str, Metric]:
    """Writes the headline figures into folder `out` for `dvc metrics`, and returns them: both averages and the
    retentions.

    A file a figure, because DVC prints a row a file and a column a key: {"mean", "low", "high", "n"}, and "base", the
    base's mean, where the base was scored on the same benchmark. Four decimals.
    """
    found = {
        path: metric for path, metric in card.metrics.items() if path.startswith("retention/") or path in MACRO.values()
    }
    with atomic_folder(out) as folder:
        for path, metric in found.items():
            values = {name: round(getattr(metric, name), 4) for name in ("mean", "low", "high", "n")}
            if base is not None and path in base.metrics:
                values["base"] = round(base.metrics[path].mean, 4)
            benchmark, _, name = path.partition("/")
            write_json(
                folder / (f"{benchmark}_{name}.json" if benchmark == "retention" else f"{benchmark}.json"), values
            )
    return found


def _cards(
    params: Params,
    expected: Any,
    scores: Mapping[str, list[ExampleScore]],
    reference: Mapping[str, list[ExampleScore]],
    teachers: Path,
    absorbed: Path,
    evaluation: EvaluationSet,
) -> tuple[Scorecard, dict[str, Scorecard]]:
    """The candidate's scorecard and, in the report's order, everybody's."""
    numbers: dict[str, Any] = {"seed": params.seed, "resamples": params.resamples, "confidence": params.confidence}
    records = read_records(teachers)
    record = read_json(absorbed / RECORD)
    identities = {
        "base": records[BASE].sha256,
        "teachers": {route.teacher: records[route.teacher].sha256 for route in params.routing.routes},
        "distilled": record["student"],
        "student": record["sha256"],
        "routes": {route.capability: route.teacher for route in params.routing.routes},
        "sampling": {key: value for key, value in asdict(params.sampling).items() if key != "batch"},
        "guidance": 1.0,
    }
    if params.benchmark.detector != MICRO:
        identities |= identities_of_scores(scores[CANDIDATE], evaluation.examples, params.benchmark, params.judge)
    own = {route.capability: reference[route.teacher] for route in params.routing.routes}
    card = make_scorecard(CANDIDATE, scores[CANDIDATE], own, expected, identities, **numbers)
    cards = {CANDIDATE: card, DISTILLED: make_scorecard(DISTILLED, scores[DISTILLED], own, expected, {}, **numbers)}
    for name, rows in {DISTILLED_GUIDED: scores[DISTILLED_GUIDED], **reference}.items():
        kept = {category: keys for category, keys in expected.items() if any(row.category == category for row in rows)}
        if name in CONTROLS:
            kept = {
                category: {(example.id, 0) for example in evaluation.examples if example.category == category}
                for category in kept
            }
        cards[name] = Scorecard(name, {}, {}, summarise(rows, expected=kept, **numbers))
    return card, cards


def _comparisons(
    expected: Any,
    scores: Mapping[str, list[ExampleScore]],
    reference: Mapping[str, list[ExampleScore]],
    evaluation: EvaluationSet,
    samples: int,
    numbers: Any,
) -> list[dict[str, Any]]:
    """Paired differences, on equal prompts and equal noise: what absorbing guidance cost, and what distilling did to
    T2I.
    """
    t2i = expected_scores(evaluation.only("t2i").examples, samples)
    pairs = [
        (CANDIDATE, scores[CANDIDATE], DISTILLED_GUIDED, scores[DISTILLED_GUIDED], expected),
        (DISTILLED, scores[DISTILLED], BASE, reference[BASE], t2i),
        (CANDIDATE, scores[CANDIDATE], BASE, reference[BASE], t2i),
        (CANDIDATE, scores[CANDIDATE], DISTILLED, scores[DISTILLED], expected),
    ]
    rows = []
    for a, a_scores, b, b_scores, on in pairs:
        a_rows, b_rows = ([row for row in of if row.category in on] for of in (a_scores, b_scores))
        if on:
            rows += [
                {"a": a, "b": b, "path": path, **asdict(value)}
                for path, value in compare(a_rows, b_rows, expected=on, **numbers).items()
            ]
    return rows
