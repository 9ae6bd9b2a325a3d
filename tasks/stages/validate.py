"""Stage `validate`: may these teachers be distilled? Scores each on its own capability and on the others', and stops
the pipeline with every fault named.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.micro import controls
from benchmarks.scores.scorecard import ExampleScore, expected_scores, summarise, write_scores
from data.bounds import Positive, Share
from data.errors import UserError, UserErrors
from data.files import atomic_folder, write_json
from data.microworld import MICRO, World
from data.progress import progress
from data.records import CAPABILITIES, read_examples
from model.backbones import Backbone
from model.drawing import encode_sources, latent_shape, picture_bucket, size_of
from model.fields.base import condition_of
from model.networks.network import NetworkField
from model.networks.teachers import BASE, compatibility_faults, file_faults, load_teachers, read_records
from model.randomness import noise_for
from tasks.params.sections import BackboneParams, BenchmarkParams, JudgeParams, RoutingParams, SamplingParams
from tasks.scoring.real import check_judgeable, scored_examples
from tasks.scoring.sampling import EvaluationSet, draw_field, evaluation_set, score_field

MACRO = {"geneval": "geneval/overall", "gedit": "gedit/average"}
GUIDED = "base_guided"
FINITE = 8  # examples a teacher's velocity is tried on
PREVIEWS = 4  # images a teacher draws where the micro world's detector cannot score them


@dataclass(frozen=True)
class Params:
    """Section `validate`. `floors`: teacher -> the least macro score on its own categories (base: guided, on GenEval's
    0..1; editors: 0..10).
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
    floors: dict[str, float]


@torch.no_grad()
def _finite_faults(
    name: str, field: NetworkField, backbone: Backbone, evaluation: EvaluationSet, capability: str
) -> list[str]:
    """A teacher whose velocity is not finite somewhere on the way from noise to image cannot teach."""
    examples, edits = evaluation.only(capability).examples[:FINITE], CAPABILITIES[capability].is_edit
    pictures = [evaluation.sources[example.id] for example in examples] if edits else []
    size = picture_bucket(backbone, size_of(pictures[0]) if edits else None)
    source = encode_sources(backbone, pictures, size) if edits else None
    condition = condition_of(
        backbone.encode_prompts([example.prompt for example in examples], edits),
        backbone.encode_prompts([""], edits),
        source,
    )
    device = field.device
    noise = noise_for(0, 0, range(len(examples)), latent_shape(backbone, size), "finite").to(device)
    times = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.02], device=device)
    bad = [
        float(t)
        for t in times
        if not bool(torch.isfinite(field(noise, t.expand(len(examples)), condition.to(device))).all())
    ]
    return (
        [
            f"{name}: its velocity is not finite at t = {[round(t, 2) for t in bad]}; the checkpoint is damaged or overflows"
        ]
        if bad
        else []
    )


def _preview(
    name: str, field: NetworkField, backbone: Backbone, own: EvaluationSet, sampling: SamplingParams, folder: Path
) -> None:
    """A few images of the teacher's own capability, for people to look at."""
    few = replace(own, examples=own.examples[:PREVIEWS])
    scale = sampling.guidance if name == BASE else 1.0
    for _ in draw_field(
        field, backbone, few, replace(sampling, images_per_prompt=1), model=name, scale=scale, folder=folder
    ):
        pass


def validate(params: Params, *, curated: Path, teachers: Path, out: Path, report: Path) -> dict[str, Any]:
    """Writes `report` (scores by teacher, faults) and `out` (every image with its score). Raises UserErrors when a
    teacher must not be distilled.

    Where section `benchmark` names GenEval's networks, they score the teachers, and section `judge` their edits. With
    detector "micro" a base that draws pictures of the micro world's size is scored by the micro detector; of any other
    size the teachers' velocities are tried and a few images drawn.
    """
    world = params.world
    routes = params.routing.routes
    names = list(dict.fromkeys([BASE, *(route.teacher for route in routes)]))
    faults = compatibility_faults(teachers, names) + file_faults(teachers, names)
    if not faults and read_records(teachers)[BASE].backbone != params.backbone.name:
        faults.append(
            f"backbone.name = {params.backbone.name!r}, but {teachers} holds teachers of {read_records(teachers)[BASE].backbone!r}; fetch the others"
        )
    if faults:
        write_json(report, {"passed": False, "faults": faults, "teachers": {}})
        raise UserErrors("validate: these teachers cannot be distilled together:", faults)
    backbone, fields = load_teachers(teachers, names, offload=params.backbone.offload, **params.backbone.loading())
    records = read_records(teachers)
    examples = scored_examples(read_examples(curated), params.benchmark, params.judge)
    if backbone.name == "micro" and backbone.latent_shape[1] != world.grid:
        raise UserError(
            f"world.grid = {world.grid}, the teachers' base draws {backbone.latent_shape[1]} x {backbone.latent_shape[2]} cells; "
            "use the grid they were trained on"
        )
    evaluation = evaluation_set(examples, curated)
    owns = {
        name: next((route.capability for route in routes if route.teacher == name), records[name].capability)
        for name in names
    }
    faults = [
        f"{name}: no example of its own {owns[name]} in the eval split of {curated}; nothing tells what it can do"
        for name in names
        if not evaluation.only(owns[name]).examples
    ]
    faults += [
        f"validate.floors.{name} = {floor}: no such teacher; have {sorted(records)}"
        for name, floor in params.floors.items()
        if name not in records
    ]
    if not backbone.supports_edits:
        faults += [
            f"routes: {route.capability!r} edits, but the base in {teachers / BASE} reads no source image; take a base that does, or leave the route out"
            for route in routes
            if CAPABILITIES[route.capability].is_edit
        ]
    edge = backbone.latent_shape[1] * backbone.pixels_per_latent
    micro = params.benchmark.detector == MICRO
    scored = not micro or edge == world.size
    if scored:
        counted = Counter(example.category for example in evaluation.examples)
        faults += [
            f"{category}: a single example in the eval split of {curated}, which has no standard error; hold out two or more, or none"
            for category, count in sorted(counted.items())
            if count == 1
        ]
    if not micro:
        check_judgeable(evaluation.examples, params.benchmark, params.judge)
    if not scored:
        faults += [
            f"validate.floors.{name} = {floor}: nothing scores here, as the base draws {edge} px and the micro "
            f"world's detector reads {world.size} px; name GenEval's networks in section benchmark, or write floors: {{}}"
            for name, floor in params.floors.items()
        ]
    if faults:
        write_json(report, {"passed": False, "faults": faults, "teachers": {}})
        raise UserErrors("validate: these teachers cannot be judged:", faults)
    t2i = evaluation.only("t2i")
    per_model = len(evaluation.examples) if scored else PREVIEWS
    total = (len(names) * per_model + (len(t2i.examples) if scored else 0)) * (
        params.sampling.images_per_prompt if scored else 1
    )
    summary: dict[str, Any] = {}
    tested: dict[str, Any] = {}
    with atomic_folder(out) as folder, progress("validate: images", total) as advance:
        scores: list[ExampleScore] = []
        for name in names:
            capability = owns[name]
            faults += _finite_faults(name, fields[name], backbone, evaluation, capability)
            tested[name] = {
                "capability": capability,
                "kind": records[name].kind,
                "sha256": records[name].sha256,
                "base_sha256": records[name].base_sha256,
                "scheduler": records[name].scheduler,
                "latent_shape": records[name].latent_shape,
                "floor": params.floors.get(name),
                "guidance": params.sampling.guidance if name == BASE else 1.0,
                "own": None,
                "metrics": {},
            }
            if not scored:
                _preview(name, fields[name], backbone, evaluation.only(capability), params.sampling, folder)
                advance(PREVIEWS)
                summary[f"{name} on {capability}"] = "finite, not scored here"
                continue
            rows = score_field(
                fields[name],
                backbone,
                world,
                evaluation,
                params.sampling,
                model=name,
                scale=1.0,
                folder=folder,
                advance=advance,
                benchmark=params.benchmark,
                judge=params.judge,
            )
            judged = rows
            if name == BASE:
                judged = score_field(
                    fields[name],
                    backbone,
                    world,
                    t2i,
                    params.sampling,
                    model=GUIDED,
                    scale=params.sampling.guidance,
                    folder=folder,
                    advance=advance,
                    benchmark=params.benchmark,
                    judge=params.judge,
                )
                scores += judged
            scores += rows
            numbers: dict[str, Any] = {
                "seed": params.seed,
                "resamples": params.resamples,
                "confidence": params.confidence,
            }
            metrics = summarise(
                rows, expected=expected_scores(evaluation.examples, params.sampling.images_per_prompt), **numbers
            )
            own = evaluation.only(capability).examples
            path = MACRO[CAPABILITIES[capability].benchmark]
            own_metric, unguided = (
                summarise(
                    [row for row in one if row.category in CAPABILITIES[capability].categories],
                    expected=expected_scores(own, params.sampling.images_per_prompt),
                    **numbers,
                )[path]
                for one in (judged, rows)
            )
            floor = params.floors.get(name)
            if floor is not None and own_metric.mean < floor:
                faults.append(
                    f"{name}: {path} = {own_metric.mean:.3f} on its own {capability}, below its floor {floor}; "
                    f"train it longer, or lower validate.floors.{name} knowingly"
                )
            if not unguided.mean and any(route.teacher == name for route in routes):
                faults.append(
                    f"{name}: scores 0 on its own {capability}, so no student could retain anything of it; check its weights, or route another"
                )
            tested[name] |= {
                "own": asdict(own_metric),
                "metrics": {path: asdict(metric) for path, metric in metrics.items()},
            }
            summary[f"{name} on {capability}"] = round(own_metric.mean, 3)
        if scored and micro:
            with_target = [example for example in evaluation.examples if example.id in evaluation.targets]
            ends = controls(
                world,
                with_target,
                [evaluation.targets[example.id] for example in with_target],
                paths=[str(example.target) for example in with_target],
                sources=evaluation.sources,
                seed=params.seed,
            )
            scores += [row for rows in ends.values() for row in rows]
        write_scores(folder, scores)
    write_json(report, {"passed": not faults, "faults": faults, "teachers": tested})
    if faults:
        raise UserErrors("validate: these teachers must not be distilled:", faults)
    return summary
