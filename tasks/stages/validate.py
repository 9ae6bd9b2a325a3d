"""Stage `validate`: may these teachers be distilled? Scores each on its own capability and on the others', and stops
the pipeline with every fault named."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.scores.scorecard import ExampleScore, expected_scores, summarise, write_scores
from benchmarks.scores.scorer import DrawnImage
from data.errors import UserError, UserErrors
from data.files import atomic_folder, write_json
from data.progress import progress
from data.records import CAPABILITIES, HEADLINES
from model.backbones import Backbone
from model.drawing import encode_sources, latent_shape, picture_bucket, size_of
from model.fields.base import condition_of
from model.networks.network import NetworkField
from model.networks.student import Sampled
from model.networks.teachers import BASE, TeacherRecord, compatibility_faults, file_faults, load_teachers, read_records
from model.randomness import noise_for
from tasks.scoring.sampling import EvaluationSet, Scoring, ScoringParams, draw_field, guided, score_field, to_score

FINITE = 8  # examples a teacher's velocity is tried on
PREVIEWS = 4  # images that a teacher draws where nothing scores them


@dataclass(frozen=True)
class Params(ScoringParams):
    """Section `validate`. `floors`: teacher -> the least macro score on its own categories (base: guided, on GenEval's
    0..1; editors: 0..10)."""

    floors: dict[str, float]


@dataclass(frozen=True)
class Teacher:
    name: str
    field: NetworkField
    record: TeacherRecord
    capability: str  # on which it must prove itself


def _refuse(report: Path, title: str, faults: list[str]) -> None:
    """Writes the report and raises UserErrors where there are faults."""
    if faults:
        write_json(report, {"passed": False, "faults": faults, "teachers": {}})
        raise UserErrors(title, faults)


def _load(params: Params, folder: Path, report: Path) -> tuple[Backbone, list[Teacher]]:
    """The base first. Raises UserError(s) for teachers that do not belong together or to section `backbone`."""
    routes, world, name = params.routing.routes, params.world, params.backbone.name
    names = list(dict.fromkeys([BASE, *(route.teacher for route in routes)]))
    faults = compatibility_faults(folder, names) + file_faults(folder, names)
    if not faults and read_records(folder)[BASE].backbone != name:
        family = read_records(folder)[BASE].backbone
        faults.append(f"backbone.name = {name!r}, but {folder} holds teachers of {family!r}; fetch the others")
    _refuse(report, "validate: these teachers cannot be distilled together:", faults)
    backbone, fields = load_teachers(folder, names, offload=params.backbone.offload, **params.backbone.loading())
    if backbone.name == "micro" and backbone.latent_shape[1] != world.grid:
        cells = f"{backbone.latent_shape[1]} x {backbone.latent_shape[2]} cells"
        fault = f"world.grid = {world.grid}, the teachers' base draws {cells}"
        raise UserError(f"{fault}; use the grid they were trained on")
    records = read_records(folder)
    routed = {route.teacher: route.capability for route in reversed(routes)}  # of a teacher's routes the first counts
    return backbone, [
        Teacher(name, fields[name], records[name], routed.get(name, records[name].capability)) for name in names
    ]


def _faults(
    params: Params, backbone: Backbone, team: list[Teacher], evaluation: EvaluationSet, edge: int | None, folder: Path
) -> list[str]:
    """Before anything is drawn. `edge`: the size in px that the scorer reads, where the base draws another."""
    curated, records = evaluation.folder, read_records(folder)
    unproven = [teacher for teacher in team if not evaluation.only(teacher.capability).examples]
    where = f"in the {params.sampling.split} split of {curated}; nothing tells what it can do"
    faults = [f"{teacher.name}: no example of its own {teacher.capability} {where}" for teacher in unproven]
    faults += [
        f"validate.floors.{name} = {floor}: no such teacher; have {sorted(records)}"
        for name, floor in params.floors.items()
        if name not in records
    ]
    if not backbone.supports_edits:
        advice = f"the base in {folder / BASE} reads no source image; take a base that does, or leave the route out"
        edits = [route.capability for route in params.routing.routes if CAPABILITIES[route.capability].is_edit]
        faults += [f"routes: {capability!r} edits, but {advice}" for capability in edits]
    if edge is None:
        counted = Counter(example.category for example in evaluation.examples)
        single = "which has no standard error; hold out two or more, or none"
        faults += [
            f"{category}: a single example in the {params.sampling.split} split of {curated}, {single}"
            for category, count in sorted(counted.items())
            if count == 1
        ]
    else:
        sizes = f"the base draws {_edge(backbone)} px and the micro world's detector reads {edge} px"
        advice = "name GenEval's networks in section benchmark, or write floors: {}"
        text = f"nothing scores here, as {sizes}; {advice}"
        faults += [f"validate.floors.{name} = {floor}: {text}" for name, floor in params.floors.items()]
    return faults


def _edge(backbone: Backbone) -> int:
    """Of its square pictures, in px."""
    return backbone.latent_shape[1] * backbone.pixels_per_latent


@torch.no_grad()
def _finite_faults(teacher: Teacher, backbone: Backbone, evaluation: EvaluationSet) -> list[str]:
    """A teacher whose velocity is not finite somewhere on the way from noise to image cannot teach."""
    examples, edits = evaluation.only(teacher.capability).examples[:FINITE], CAPABILITIES[teacher.capability].is_edit
    pictures = [evaluation.sources[example.id] for example in examples] if edits else []
    size = picture_bucket(backbone, size_of(pictures[0]) if edits else None)
    source = encode_sources(backbone, pictures, size) if edits else None
    prompts = backbone.encode_prompts([example.prompt for example in examples], edits)
    device, count = teacher.field.device, len(examples)
    condition = condition_of(prompts, backbone.encode_prompts([""], edits), source).to(device)
    noise = noise_for(0, 0, range(count), latent_shape(backbone, size), "finite").to(device)
    times = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.02], device=device)
    bad = [round(float(t), 2) for t in times if not teacher.field(noise, t.expand(count), condition).isfinite().all()]
    advice = "the checkpoint is damaged or overflows"
    return [f"{teacher.name}: its velocity is not finite at t = {bad}; {advice}"] if bad else []


def _preview(teacher: Teacher, evaluation: EvaluationSet, scoring: Scoring) -> None:
    """A few images of the teacher's own capability, for people to look at."""
    own, sampling = evaluation.only(teacher.capability), scoring.sampling
    few, sampling = replace(own, examples=own.examples[:PREVIEWS]), replace(sampling, images_per_prompt=1)
    scale = sampling.guidance if teacher.name == BASE else 1.0
    how, few_images = Sampled(sampling.steps, scale), replace(scoring, sampling=sampling)
    list(draw_field(teacher.field, few, few_images, model=teacher.name, how=how))
    scoring.advance(PREVIEWS)


def _test(
    params: Params, teacher: Teacher, evaluation: EvaluationSet, scoring: Scoring
) -> tuple[list[ExampleScore], dict[str, Any], list[str]]:
    """The teacher's rows, its metrics on all categories and on its own ("own"), and why it must not be distilled."""
    name, capability, samples = teacher.name, teacher.capability, params.sampling.images_per_prompt
    plain, strong = (Sampled(params.sampling.steps, scale) for scale in (1.0, params.sampling.guidance))
    rows = score_field(teacher.field, evaluation, scoring, model=name, how=plain)
    own_part = evaluation.only(capability)
    beside = score_field(teacher.field, own_part, scoring, model=guided(name), how=strong)
    judged = beside if name == BASE else rows
    metrics = summarise(rows, expected=expected_scores(evaluation.examples, samples), **params.bootstrap)
    categories, path = CAPABILITIES[capability].categories, HEADLINES[CAPABILITIES[capability].benchmark]
    expected = expected_scores(own_part.examples, samples)
    own, unguided = (
        summarise([row for row in of if row.category in categories], expected=expected, **params.bootstrap)[path]
        for of in (judged, rows)
    )
    faults, floor = [], params.floors.get(name)
    if floor is not None and own.mean < floor:
        remedy = f"train it longer, or lower validate.floors.{name} knowingly"
        faults.append(f"{name}: {path} = {own.mean:.3f} on its own {capability}, below its floor {floor}; {remedy}")
    if not unguided.mean and any(route.teacher == name for route in params.routing.routes):
        nothing = "so no student could retain anything of it; check its weights, or route another"
        faults.append(f"{name}: scores 0 on its own {capability}, {nothing}")
    tested = {"own": asdict(own), "metrics": {path: asdict(metric) for path, metric in metrics.items()}}
    return beside + rows, tested, faults


def _facts(params: Params, teacher: Teacher) -> dict[str, Any]:
    record = asdict(teacher.record)
    return {
        "capability": teacher.capability,
        **{key: record[key] for key in ("kind", "sha256", "base_sha256", "scheduler", "latent_shape")},
        "floor": params.floors.get(teacher.name),
        "guidance": params.sampling.guidance if teacher.name == BASE else 1.0,
        "own": None,
        "metrics": {},
    }


def _targets(evaluation: EvaluationSet, seed: int) -> list[DrawnImage]:
    """Every known target as if it had been drawn for its example."""
    folder, source = evaluation.folder, evaluation.source_file
    return [
        DrawnImage("", example, 0, seed, example.target, folder / example.target, source(example))
        for example in evaluation.examples
        if example.target
    ]


def validate(params: Params, *, curated: Path, teachers: Path, out: Path, report: Path) -> dict[str, Any]:
    """Writes `report` (scores by teacher, faults) and `out` (every image with its score). Raises UserErrors when a
    teacher must not be distilled.

    Sections `benchmark` and `judge` say who scores. Where that scorer cannot read pictures of the base's size (the
    micro world's detector), the teachers' velocities are tried and a few images drawn."""
    backbone, team = _load(params, teachers, report)
    scorer, evaluation = to_score(params, curated)
    scored = scorer.edge in (None, _edge(backbone))
    faults = _faults(params, backbone, team, evaluation, None if scored else scorer.edge, teachers)
    scorer.check(evaluation.examples)
    _refuse(report, "validate: these teachers cannot be judged:", faults)
    images = sum(len(evaluation.examples) + len(evaluation.only(teacher.capability).examples) for teacher in team)
    total = images * params.sampling.images_per_prompt if scored else len(team) * PREVIEWS
    summary: dict[str, Any] = {}
    tested: dict[str, dict[str, Any]] = {}
    scores: list[ExampleScore] = []
    with atomic_folder(out) as folder, progress("validate: images", total) as advance:
        scoring = Scoring(backbone, params.sampling, scorer, folder, advance)
        for teacher in team:
            faults += _finite_faults(teacher, backbone, evaluation)
            tested[teacher.name], title = _facts(params, teacher), f"{teacher.name} on {teacher.capability}"
            if scored:
                rows, measured, weak = _test(params, teacher, evaluation, scoring)
                tested[teacher.name] |= measured
                scores, faults = scores + rows, faults + weak
                summary[title] = round(measured["own"]["mean"], 3)
            else:
                _preview(teacher, evaluation, scoring)
                summary[title] = "finite, not scored here"
        if scored:
            scores += scorer.controls(_targets(evaluation, params.seed), params.seed)
        write_scores(folder, scores)
    write_json(report, {"passed": not faults, "faults": faults, "teachers": tested})
    if faults:
        raise UserErrors("validate: these teachers must not be distilled:", faults)
    return summary
