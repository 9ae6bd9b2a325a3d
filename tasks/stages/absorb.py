"""Stage `absorb`: guidance and few steps into the student's own weights. The same loop, on fields of the teachers or of
the student itself as it came, frozen."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data.bounds import OPTIONAL, Positive
from data.files import digest, read_json
from data.randomness import seed_of
from model.compute.parallel import shared
from model.examples import encoded_fingerprint, load_buckets
from model.fields.base import Sampler
from model.networks.student import RECORD, load_student
from model.networks.teachers import BASE, load_teachers, read_records
from model.route import Route, asked_of
from model.setup import setup_of, teacher_sampler, with_fields
from model.step import LoopParams
from tasks.training.metrics import state_folder
from tasks.training.processes import in_processes, this_process
from tasks.training.run import TrainingParams, run_training
from tasks.training.states import facts_of

STUDENT = "student"  # as a route's teacher: the student before this stage, frozen


@dataclass(frozen=True)
class Params(TrainingParams):
    """Section `absorb`. `routes`: as in section `routing`; the teacher "student" is the distilled student, frozen.

    `phases`: grids on which the student is trained before that of `rollout_steps`, each for `steps` steps ([8] before a
    grid of 4); the product of a phase is the "student" of the next. The rest is as in `distill`.
    """

    routes: tuple[Route, ...]
    phases: tuple[Positive, ...] = field(default=(), metadata=OPTIONAL, kw_only=True)

    def loop(self) -> LoopParams:
        return self.loop_with("on_policy", "hard", 1)

    def faults(self) -> list[str]:
        grids = [*self.phases, self.rollout_steps]
        faults = (
            []
            if grids == sorted(set(grids), reverse=True)
            else [f"phases = {list(self.phases)}: expected falling numbers above rollout_steps = {grids[-1]}"]
        )
        return faults + self.route_faults(self.routes) + self.conflicts()

    def on_grid(self, steps: int) -> Params:
        """The same for a phase: its rollout and its chords are on a grid of so many steps."""
        routes = tuple(
            replace(route, field=route.field | ({"steps": steps} if "steps" in route.field else {}))
            for route in self.routes
        )
        return self if steps == self.rollout_steps else replace(self, rollout_steps=steps, routes=routes)


def absorb(params: Params, *, encoded: Path, teachers: Path, student: Path, out: Path) -> dict[str, Any]:
    """Trains the distilled student on towards its routes' fields, phase by phase, and writes it to `out`."""
    if params.execution.processes > this_process().size:
        paths = {"encoded": encoded, "teachers": teachers, "student": student, "out": out}
        return in_processes("absorb", params, paths)
    summary: dict[str, Any] = {}
    for steps in (*params.phases, params.rollout_steps):
        last = steps == params.rollout_steps
        summary = _phase(params.on_grid(steps), encoded, teachers, student, out if last else None)
        student = summary.pop("student")
    return summary


def _phase(params: Params, encoded: Path, teachers: Path, student: Path, out: Path | None) -> dict[str, Any]:
    """One grid's training. `out` None: the product goes beside the run's states, and is not made twice."""
    names = list(dict.fromkeys([BASE, *(name for name in asked_of(params.routes) if name != STUDENT)]))
    records, before = read_records(teachers), read_json(student / RECORD)
    facts = facts_of(
        params.loop(),
        params,
        params.execution,
        seed=params.seed,
        routes=[route.facts() for route in params.routes],
        encoded=encoded_fingerprint(encoded),
        student=[before["sha256"], before["start_sha256"]],
        teachers={name: records[name].sha256 for name in names if name in records},
    )
    made = out or state_folder("absorb", digest(facts)) / STUDENT
    if out is None and made.exists():
        return {"student": made}
    options = {"need": params.parts_to_load(), **params.backbone.loading(params.execution.device)}
    backbone, fields = load_teachers(teachers, names, offload=params.backbone.offload, **options)
    learner = load_student(student, backbone, records[BASE].sha256)
    usual = teacher_sampler(backbone)
    samplers = {**dict.fromkeys(names, usual), STUDENT: Sampler(before["steps"] or usual.steps, usual.shift)}
    router, asked = with_fields(params.routes, {**fields, STUDENT: learner.frozen_copy()}, samplers)
    wanted = (encoded, [route.capability for route in params.routes], records[BASE].sha256)
    buckets, looked_at = load_buckets(*wanted), params.looked_at(*wanted)
    kept = {key: before[key] for key in ("base_sha256", "teachers", "start", "trainable", "rank", "alpha")}
    record = {**kept, "student": before["sha256"], **params.drawn(params.routes, before["steps"])}
    setup = setup_of(learner, asked, buckets, router, params.loop(), seed_of("absorb", params.seed), looked_at)
    summary = run_training("absorb", setup, params, facts, record, made)
    shared(0.0, this_process())  # the next phase reads what rank 0 has written
    return {**summary, "student": made}
