"""Stage `distill`: many frozen teachers into one student, on the student's own rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from data.bounds import OneOf, Positive
from data.files import atomic_folder, digest
from data.randomness import seed_of
from model.examples import encoded_fingerprint, load_buckets
from model.methods import METHODS, method_faults
from model.networks.student import TRAINABLE, Student, save_student, start_student
from model.networks.teachers import BASE, load_teachers, read_records
from model.route import asked_of
from model.setup import setup_of, teacher_sampler, with_fields
from model.step import ROUTING, STATES, LoopParams
from tasks.params.sections import RoutingParams
from tasks.training.metrics import write_table
from tasks.training.processes import in_processes, this_process
from tasks.training.run import COLUMNS, SHARED_BASE, STEPS, TrainingParams, run_training
from tasks.training.states import facts_of

QueryStates = Literal[1, 2, 4, 8, 16]  # K, the ablation's values


@dataclass(frozen=True)
class Params(TrainingParams):
    """Section `distill`. `start`: "base", "merged", "specialists" or a teacher; `trainable`: "all" or "adapter" (of
    `rank`, `alpha`).

    The rest is tasks.training.run.TrainingParams; the shared section `execution` is
    model.compute.settings.ExecutionParams.
    """

    routing: RoutingParams
    start: str
    trainable: Annotated[str, OneOf(TRAINABLE)]
    rank: Positive
    alpha: Positive
    states: Annotated[str, OneOf(STATES)]
    routes_taken: Annotated[str, OneOf(ROUTING)]
    method: Annotated[str, OneOf(METHODS)]
    query_states: QueryStates

    def loop(self) -> LoopParams:
        return self.loop_with(self.states, self.routes_taken, self.query_states)

    def faults(self) -> list[str]:
        method = METHODS[self.method]
        faults = method_faults(self.method, self.loop(), self.start, self.routing.routes)
        if self.execution.shard_base and self.trainable == "all" and method.compute:
            faults.append(f"trainable = 'all': execution.shard_base = true {SHARED_BASE}")
        if self.execution.shard_base and not (method.lockstep and self.query_states == 1):
            able = " or ".join(repr(name) for name, other in METHODS.items() if other.lockstep and other.compute)
            faults.append(
                f"method = {self.method!r}, query_states = {self.query_states}: processes that share one base by "
                f"execution.shard_base = true must ask it equally often, which only method = {able} "
                "with query_states = 1 does; choose one of these, or set execution.shard_base: false"
            )
        return faults + self.route_faults(self.routing.routes) + self.conflicts()


def distill(params: Params, *, encoded: Path, teachers: Path, out: Path) -> dict[str, Any]:
    """Trains the student and writes it to `out`. Killed, the same command goes on where it last saved. With method
    "merge" the start is the student."""
    if params.execution.processes > this_process().size:
        return in_processes("distill", params, {"encoded": encoded, "teachers": teachers, "out": out})
    routes = params.routing.routes
    names = list(dict.fromkeys([BASE, *asked_of(routes)]))
    options = {"need": params.parts_to_load(), **params.backbone.loading(params.execution.device)}
    backbone, fields = load_teachers(teachers, names, offload=params.backbone.offload, **options)
    records = read_records(teachers)
    wanted = (encoded, [route.capability for route in routes], records[BASE].sha256)
    buckets, looked_at = load_buckets(*wanted), params.looked_at(*wanted)
    routed = {route.teacher: fields[route.teacher] for route in routes}
    student = start_student(backbone, routed, params.start, params.trainable, params.rank, params.alpha, params.seed)
    hashes = {name: records[name].sha256 for name in names}
    begun = {name: getattr(params, name) for name in ("start", "trainable", "rank", "alpha")}
    record = {"base_sha256": records[BASE].sha256, "teachers": hashes, **begun, **params.drawn(routes)}
    method = METHODS[params.method]
    if method.compute is None:
        fingerprint = digest([record, params.method])
        return _untrained(student, {**record, "stage": "distill", "trained_steps": 0, "fingerprint": fingerprint}, out)
    facts = facts_of(
        params.loop(),
        params,
        params.execution,
        seed=params.seed,
        **begun,
        routes=[route.facts() for route in routes],
        encoded=encoded_fingerprint(encoded),
        teachers=hashes,
        method=params.method,
    )
    chosen, asked = with_fields(routes, fields, dict.fromkeys(fields, teacher_sampler(backbone)))
    setup = setup_of(student, asked, buckets, chosen, params.loop(), seed_of("distill", params.seed), looked_at)
    return run_training("distill", setup, params, facts, record, out, method)


def _untrained(student: Student, record: dict[str, Any], out: Path) -> dict[str, Any]:
    """The start as it is, for a method without a step."""
    if this_process().rank == 0:
        with atomic_folder(out) as folder:
            save_student(folder, student, record)
            write_table(folder / STEPS, COLUMNS, [])
    return {"steps": 0, "trainable parameters": sum(parameter.numel() for parameter in student.parameters.values())}
