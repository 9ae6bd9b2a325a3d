"""Stage `score`: how good the student is on held-out examples, before and after absorbing, beside its teachers as users
run them and the ends of the scale; and what an image costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.scores import figures
from benchmarks.scores.page import Report, write_report
from benchmarks.scores.scorecard import (
    ExampleScore,
    Scorecard,
    compare,
    expected_scores,
    summarise,
    write_scorecard,
    write_scores,
)
from benchmarks.scores.scorecard import scorecard as make_scorecard
from benchmarks.scores.scorer import CONTROLS, Scorer
from benchmarks.scores.statistics import Metric
from data.bounds import OPTIONAL, Positive
from data.files import atomic_folder, read_json, write_json
from data.images import read_picture
from data.progress import progress
from data.records import BUCKETS, CAPABILITIES, HEADLINES, RETENTION, Example
from model.backbones import TRANSFORMER
from model.networks.network import NetworkField
from model.networks.student import RECORD, Sampled, load_student, sampled
from model.networks.teachers import BASE, load_base, load_teachers, read_records
from tasks.scoring.cost import Contestant, Curve, quality_curves
from tasks.scoring.sampling import (
    EvaluationSet,
    Scoring,
    ScoringParams,
    guided,
    reference_scores,
    score_field,
    to_score,
)

CANDIDATE, DISTILLED, TEACHERS = "absorbed", "student", "teachers"
Rows = dict[str, list[ExampleScore]]  # by model


@dataclass(frozen=True)
class Params(ScoringParams):
    """Section `score`. `shown`: examples a category in grids and report."""

    shown: Positive
    curve: Curve = field(default=Curve((), 0), metadata=OPTIONAL, kw_only=True)


@dataclass(frozen=True)
class Results:
    """Rows of the students (`scores`), and of teachers, base and controls (`reference`), on one evaluation set.

    `drawn`: how each student was drawn."""

    params: Params
    scorer: Scorer
    evaluation: EvaluationSet
    scores: Rows
    reference: Rows
    drawn: Mapping[str, Sampled]

    @cached_property
    def expected(self) -> dict[str, set[tuple[str, int]]]:
        return expected_scores(self.evaluation.examples, self.params.sampling.images_per_prompt)

    @property
    def teacher_of(self) -> dict[str, str]:
        """Category -> the teacher that its route names; the base where none does."""
        teachers = {category: BASE for capability in CAPABILITIES.values() for category in capability.categories}
        for route in self.params.routing.routes:
            teachers |= dict.fromkeys(CAPABILITIES[route.capability].categories, route.teacher)
        return teachers

    def of_teachers(self, name: str, suffix: Callable[[str], str] = str) -> list[ExampleScore]:
        """Every category's rows of its teacher, as those of one model `name`; of `suffix(teacher)` where it was scored.
        Categories of which no teacher was scored are left out."""
        return [
            replace(row, model=name)
            for category, teacher in self.teacher_of.items()
            for row in self.reference.get(suffix(teacher), ())
            if row.category == category
        ]

    @property
    def cost(self) -> dict[str, Any]:
        """Of an image of the candidate, and of the base as users run it."""
        guided_base = Sampled(self.params.sampling.steps, self.params.sampling.guidance)
        return {**_cost(self.drawn[CANDIDATE]), BASE: _cost(guided_base)}


def _cost(how: Sampled) -> dict[str, int]:
    return {"steps": how.steps, "evaluations_per_image": how.evaluations}


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
    their comparisons."""
    scorer, evaluation = to_score(params, curated)
    scorer.check(evaluation.examples)
    loading, base = params.backbone.loading(), read_records(teachers)[BASE].sha256
    backbone, folders = load_base(teachers, **loading), {DISTILLED: student, CANDIDATE: absorbed}
    fields = {
        name: load_student(checkpoint, load_base(teachers, need=TRANSFORMER, **loading), base).field
        for name, checkpoint in folders.items()
    }
    drawn = {
        name: sampled(read_json(checkpoint / RECORD), params.sampling.steps) for name, checkpoint in folders.items()
    }
    results = Results(params, scorer, evaluation, {}, reference_scores(validated, params.routing.routes), drawn)
    total = len(fields) * len(evaluation.examples) * params.sampling.images_per_prompt
    with atomic_folder(out) as folder:
        with progress("score: images", total) as advance:
            scoring = Scoring(backbone, params.sampling, scorer, folder, advance)
            for name, field in fields.items():
                results.scores[name] = score_field(field, evaluation, scoring, model=name, how=drawn[name])
        curve = _curve(results, fields, teachers, scoring)
        cards = _cards(results, teachers, absorbed)
        comparisons = _comparisons(results)
        write_json(folder / "comparisons.json", comparisons)
        write_json(folder / "curve.json", curve)
        write_json(folder / "scorecards.json", {name: card.to_json() for name, card in cards.items()})
        write_scores(folder, [row for rows in results.scores.values() for row in rows])
        _pictures(folder, validated, results)
        figures.scorecard_plot(cards, folder / "scorecard.png")
        if curve:
            figures.cost_curves(curve, folder / "curve.png")
        trainings = {"distillation": student / "steps.csv", "absorption": absorbed / "steps.csv"}
        figures.training_curves(trainings, folder / "training.png")
        _write_report(folder, validated, results, cards, comparisons, curve)
    write_scorecard(scorecard, cards[CANDIDATE])
    headline = write_metrics(metrics, cards[CANDIDATE], cards.get(BASE))
    return {path: round(metric.mean, 3) for path, metric in headline.items()}


def _curve(
    results: Results, students: Mapping[str, NetworkField], teachers: Path, scoring: Scoring
) -> list[dict[str, Any]]:
    """Quality against cost, of the teachers with and without guidance and of the students."""
    params, scores, drawn = results.params, results.scores, results.drawn
    curve, usual, strong = params.curve, params.sampling.steps, params.sampling.guidance
    if not curve.examples:
        return []
    names = list(dict.fromkeys([BASE, *results.teacher_of.values()]))
    _, fields = load_teachers(teachers, names, offload=params.backbone.offload, **params.backbone.loading())
    of = {name: fields[results.teacher_of[CAPABILITIES[name].categories[0]]] for name in BUCKETS}
    known, known_guided = results.of_teachers(TEACHERS), results.of_teachers(guided(TEACHERS), guided)
    lines = [
        Contestant(name, dict.fromkeys(BUCKETS, students[name]), own.guidance, {own.steps: scores[name]})
        for name, own in ((CANDIDATE, drawn[CANDIDATE]), (DISTILLED, drawn[DISTILLED]))
    ]
    lines += [
        Contestant(TEACHERS, of, 1.0, {usual: known}),
        Contestant(guided(TEACHERS), of, strong, {usual: known_guided}),
    ]
    images = len(lines) * len(curve.steps) * len(curve.part_of(results.evaluation).examples)
    with progress("score: quality against cost", images) as advance:
        how = replace(scoring, advance=advance)
        return quality_curves(lines, curve, results.evaluation, how, params.bootstrap)


def write_metrics(out: Path, card: Scorecard, base: Scorecard | None) -> dict[str, Metric]:
    """Writes the headline figures into folder `out` for `dvc metrics`, and returns them: both averages and the
    retentions.

    A file a figure, because DVC prints a row a file and a column a key: {"mean", "low", "high", "n"}, and "base", the
    base's mean, where the base was scored on the same benchmark. Four decimals."""
    names = {path: benchmark for benchmark, path in HEADLINES.items()}
    names |= {path: path.replace("/", "_") for path in card.metrics if path.startswith(RETENTION)}
    headline = {path: metric for path, metric in card.metrics.items() if path in names}
    with atomic_folder(out) as folder:
        for path, metric in headline.items():
            values = {name: round(getattr(metric, name), 4) for name in ("mean", "low", "high", "n")}
            if base is not None and path in base.metrics:
                values["base"] = round(base.metrics[path].mean, 4)
            write_json(folder / f"{names[path]}.json", values)
    return headline


def _cards(results: Results, teachers: Path, absorbed: Path) -> dict[str, Scorecard]:
    """Everybody's scorecard in the report's order, the candidate's first."""
    params, records, record = results.params, read_records(teachers), read_json(absorbed / RECORD)
    scores, reference, how = results.scores, results.reference, params.bootstrap
    routes, examples = params.routing.routes, results.evaluation.examples
    identities = {
        "base": records[BASE].sha256,
        "teachers": {route.teacher: records[route.teacher].sha256 for route in routes},
        "distilled": record["student"],
        "student": record["sha256"],
        "routes": {route.capability: route.teacher for route in routes},
        "sampling": {key: value for key, value in asdict(params.sampling).items() if key != "batch"},
        "drawn": asdict(results.drawn[CANDIDATE]),
        "teachers_guidance": params.sampling.guidance,
        **results.scorer.identity(scores[CANDIDATE], examples),
    }
    own = {route.capability: reference[route.teacher] for route in routes}
    cards = {
        name: make_scorecard(name, scores[name], own, results.expected, of_model, **how)
        for name, of_model in ((CANDIDATE, identities), (DISTILLED, {}))
    }
    cards[CANDIDATE] = replace(cards[CANDIDATE], cost=results.cost)
    for name, rows in reference.items():
        expected = expected_scores(examples) if name in CONTROLS else results.expected  # a control has one image
        scored = {row.category for row in rows}
        kept = {category: keys for category, keys in expected.items() if category in scored}
        cards[name] = Scorecard(name, {}, {}, summarise(rows, expected=kept, **how))
    return cards


def _comparisons(results: Results) -> list[dict[str, Any]]:
    """Paired differences, on equal prompts and equal noise: against each category's teacher as users run it (guided, in
    its own steps) and unguided, and what absorbing cost."""
    strong = guided(TEACHERS)
    models = {**results.scores, strong: results.of_teachers(strong, guided), TEACHERS: results.of_teachers(TEACHERS)}
    rows = []
    for a, b in ((CANDIDATE, strong), (CANDIDATE, TEACHERS), (CANDIDATE, DISTILLED), (DISTILLED, TEACHERS)):
        scored = {row.category for row in models[b]}
        if expected := {name: keys for name, keys in results.expected.items() if name in scored}:
            of_a, of_b = ([row for row in models[name] if row.category in expected] for name in (a, b))
            differences = compare(of_a, of_b, expected=expected, **results.params.bootstrap)
            rows += [{"a": a, "b": b, "path": path, **asdict(value)} for path, value in differences.items()]
    return rows


# --- what people look at ----------------------------------------------------------------------------------------------


def _image(folder: Path, model: str, example: Example) -> Path:
    return folder / f"images/{model}/{example.id}-0.png"


def _first(examples: tuple[Example, ...], count: int) -> list[Example]:
    """The first `count` examples of every category, by id."""
    chosen: dict[str, list[Example]] = {}
    for example in sorted(examples, key=lambda example: example.id):
        if len(chosen.setdefault(example.category, [])) < count:
            chosen[example.category].append(example)
    return [example for members in chosen.values() for example in members]


def _pictures(folder: Path, validated: Path, results: Results) -> None:
    """Sample grids and edit strips, for people who would rather look than read."""
    evaluation, shown, teacher_of = results.evaluation, results.params.shown, results.teacher_of
    t2i, edits = (_first(evaluation.only(capability).examples, shown) for capability in ("t2i", "edit"))
    if t2i:
        images = [read_picture(_image(folder, CANDIDATE, example)) for example in t2i]
        columns = 2 * shown if shown < 4 else shown
        figures.sample_grid(images, [example.prompt for example in t2i], folder / "t2i.png", columns)
    if edits:
        figures.edit_strips(
            [evaluation.sources[example.id] for example in edits],
            [read_picture(_image(validated, teacher_of[example.category], example)) for example in edits],
            [read_picture(_image(folder, CANDIDATE, example)) for example in edits],
            [example.prompt for example in edits],
            folder / "edits.png",
        )


def _write_report(
    folder: Path,
    validated: Path,
    results: Results,
    cards: Mapping[str, Scorecard],
    comparisons: list[dict[str, Any]],
    curve: list[dict[str, Any]],
) -> None:
    examples, curated, rows = results.evaluation.examples, results.evaluation.folder, results.scores[CANDIDATE]
    beside: dict[str, list[tuple[str, Path]]] = {}
    for example in examples:
        teacher = results.teacher_of[example.category]
        source = [("source", curated / example.source)] if example.source else []
        beside[example.id] = [*source, (f"teacher {teacher}", _image(validated, teacher, example))]
    others = {name: (folder, scores) for name, scores in results.scores.items()}
    others |= {name: (curated if name in CONTROLS else validated, scores) for name, scores in results.reference.items()}
    report = Report(
        cards=cards,
        scores=rows,
        folder=folder,
        images=beside,
        prompts={example.id: example.prompt for example in examples},
        per_category=results.params.shown,
        files=["reports/score/scores.parquet", "data/validated/scores.parquet"],
        confusions=results.scorer.confusions(rows, examples),
        comparisons=comparisons,
        notes=results.scorer.notes(rows, cards[CANDIDATE].identities),
        others=others,
        curve=folder / "curve.png" if curve else None,
        points=curve,
    )
    write_report(folder / "report.html", report)
