"""Stage `validate`: may these teachers be distilled? Scores each on its own capability and on the others', and stops the pipeline with every fault named."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.micro import controls
from benchmarks.scorecard import ExampleScore, expected_scores, summarise, write_scores
from data.errors import UserError, UserErrors
from data.files import atomic_folder, write_json
from data.records import CAPABILITIES, read_examples
from model.backbones import Backbone
from model.field import Condition, VelocityField
from model.randomness import noise_for
from model.teachers import BASE, compatibility_faults, load_teachers, read_records
from tasks.params import RoutingParams, SamplingParams, WorldParams
from tasks.pictures import as_images
from tasks.progress import progress
from tasks.sampling import EvaluationSet, evaluation_set, score_field

MACRO = {"geneval": "geneval/overall", "gedit": "gedit/average"}
GUIDED = "base_guided"


@dataclass(frozen=True)
class Params:
    """Section `validate`. `floors`: teacher -> the least macro score on its own categories (base: guided, on GenEval's 0..1; editors: 0..10)."""

    world: WorldParams
    sampling: SamplingParams
    routing: RoutingParams
    seed: int
    resamples: int
    confidence: float
    floors: dict[str, float]

    def faults(self) -> list[str]:
        found = [f"confidence = {self.confidence}: expected between 0 and 1"] if not 0 < self.confidence < 1 else []
        return found + ([f"resamples = {self.resamples}: expected 1 or more"] if self.resamples < 1 else [])


@torch.no_grad()
def _finite_faults(name: str, field: VelocityField, backbone: Backbone, evaluation: EvaluationSet, capability: str) -> list[str]:
    """A teacher whose velocity is not finite somewhere on the way from noise to image cannot teach."""
    examples = evaluation.only(capability).examples[:8]
    embeds, pooled = backbone.encode_prompt([example.prompt for example in examples])
    empty_embeds, empty_pooled = backbone.encode_prompt([""])
    source = None
    if CAPABILITIES[capability].is_edit:
        source = torch.cat([backbone.encode_image(as_images(evaluation.sources[example.id][None])) for example in examples])
    condition = Condition(embeds, pooled, empty_embeds[0], empty_pooled[0], source)
    noise = noise_for(0, 0, range(len(examples)), backbone.latent_shape, "finite")
    bad = [t for t in (1.0, 0.75, 0.5, 0.25, 0.02) if not bool(torch.isfinite(field(noise, torch.full((len(examples),), t), condition)).all())]
    return [f"{name}: its velocity is not finite at t = {bad}; the checkpoint is damaged or overflows"] if bad else []


def validate(params: Params, *, curated: Path, teachers: Path, out: Path, report: Path) -> dict[str, Any]:
    """Writes `report` (scores by teacher, faults) and `out` (every image with its score). Raises UserErrors when a teacher must not be distilled."""
    world = params.world.world()
    routes = params.routing.routes
    names = list(dict.fromkeys([BASE, *(route.teacher for route in routes)]))
    faults = compatibility_faults(teachers, names)
    if faults:
        write_json(report, {"passed": False, "faults": faults, "teachers": {}})
        raise UserErrors("validate: these teachers cannot be distilled together:", faults)
    backbone, fields = load_teachers(teachers, names)
    records = read_records(teachers)
    examples = read_examples(curated)
    if backbone.latent_shape[1] != world.grid:
        raise UserError(
            f"world.grid = {world.grid}, the teachers' base draws {backbone.latent_shape[1]} x {backbone.latent_shape[2]} cells; "
            "use the grid they were trained on"
        )
    evaluation = evaluation_set(examples, curated)
    owns = {name: next((route.capability for route in routes if route.teacher == name), records[name].capability) for name in names}
    faults = [
        f"{name}: no example of its own {owns[name]} in the eval split of {curated}; nothing tells what it can do"
        for name in names
        if not evaluation.only(owns[name]).examples
    ]
    faults += [f"validate.floors.{name} = {floor}: no such teacher; have {sorted(records)}" for name, floor in params.floors.items() if name not in records]
    if faults:
        write_json(report, {"passed": False, "faults": faults, "teachers": {}})
        raise UserErrors("validate: these teachers cannot be judged:", faults)
    t2i = evaluation.only("t2i")
    total = (len(names) * len(evaluation.examples) + len(t2i.examples)) * params.sampling.images_per_prompt
    summary: dict[str, Any] = {}
    tested: dict[str, Any] = {}
    with atomic_folder(out) as folder, progress("validate: images", total) as advance:
        scores: list[ExampleScore] = []
        for name in names:
            capability = owns[name]
            faults += _finite_faults(name, fields[name], backbone, evaluation, capability)
            rows = score_field(fields[name], backbone, world, evaluation, params.sampling, model=name, scale=1.0, folder=folder, advance=advance)
            judged = rows
            if name == BASE:
                judged = score_field(
                    fields[name], backbone, world, t2i, params.sampling, model=GUIDED, scale=params.sampling.guidance, folder=folder, advance=advance
                )
                scores += judged
            scores += rows
            numbers: dict[str, Any] = {"seed": params.seed, "resamples": params.resamples, "confidence": params.confidence}
            metrics = summarise(rows, expected=expected_scores(evaluation.examples, params.sampling.images_per_prompt), **numbers)
            own = evaluation.only(capability).examples
            path = MACRO[CAPABILITIES[capability].benchmark]
            own_metric = summarise(
                [row for row in judged if row.category in CAPABILITIES[capability].categories],
                expected=expected_scores(own, params.sampling.images_per_prompt),
                **numbers,
            )[path]
            floor = params.floors.get(name)
            if floor is not None and own_metric.mean < floor:
                faults.append(
                    f"{name}: {path} = {own_metric.mean:.3f} on its own {capability}, below its floor {floor}; "
                    f"train it longer, or lower validate.floors.{name} knowingly"
                )
            tested[name] = {
                "capability": capability, "kind": records[name].kind, "sha256": records[name].sha256, "base_sha256": records[name].base_sha256,
                "scheduler": records[name].scheduler,
                "latent_shape": records[name].latent_shape, "floor": floor, "guidance": params.sampling.guidance if name == BASE else 1.0,
                "own": asdict(own_metric), "metrics": {path: asdict(metric) for path, metric in metrics.items()},
            }  # fmt: skip
            summary[f"{name} on {capability}"] = round(own_metric.mean, 3)
        with_target = [example for example in evaluation.examples if example.id in evaluation.targets]
        ends = controls(
            world, with_target, [evaluation.targets[example.id] for example in with_target], paths=[str(example.target) for example in with_target],
            sources=evaluation.sources, seed=params.seed,
        )  # fmt: skip
        scores += [row for rows in ends.values() for row in rows]
        write_scores(folder, scores)
    write_json(report, {"passed": not faults, "faults": faults, "teachers": tested})
    if faults:
        raise UserErrors("validate: these teachers must not be distilled:", faults)
    return summary
