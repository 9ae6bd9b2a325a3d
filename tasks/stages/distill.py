"""Stage `distill`: many frozen teachers into one student, on the student's own rollouts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from data.bounds import OneOf, Positive
from data.files import atomic_folder, digest
from model.examples import encoded_fingerprint, load_buckets
from model.methods import METHODS, QueryStates, compute_of, in_lockstep, method_faults
from model.networks.student import TRAINABLE, Student, save_student, start_student
from model.networks.teachers import BASE, load_teachers, read_records
from model.route import router
from model.step import ROUTING, STATES, LoopParams
from tasks.params.sections import RoutingParams
from tasks.training.processes import in_processes, this_process
from tasks.training.run import SHARED_BASE, TrainingParams, parts_to_load, run_training, write_steps
from tasks.training.states import facts_of


@dataclass(frozen=True)
class Params(TrainingParams):
    """Section `distill`. `start`: "base", "merged" or a teacher; `trainable`: "all" or "adapter" (of `rank`, `alpha`).

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
        return self.loop_with(self.states, self.routes_taken)

    def faults(self) -> list[str]:
        found = method_faults(self.method, self.states, self.query_states, self.start, self.batch)
        if self.execution.shard_base and self.trainable == "all" and self.method != "merge":
            found.append(f"trainable = 'all': execution.shard_base = true {SHARED_BASE}")
        if self.execution.shard_base and not in_lockstep(self.method, self.query_states):
            found.append(
                f"method = {self.method!r}, query_states = {self.query_states}: processes that share one base by "
                "execution.shard_base = true must ask it equally often, which only method = 'danceopd' or 'offpolicy' "
                "with query_states = 1 does; choose one of these, or set execution.shard_base: false"
            )
        return found + self.conflicts(self.held_out)


def distill(params: Params, *, encoded: Path, teachers: Path, out: Path) -> dict[str, Any]:
    """Trains the student and writes it to `out`. Killed, the same command goes on where it last saved. With method
    "merge" the start is the student.
    """
    if params.execution.processes > this_process().size:
        return in_processes("distill", params, {"encoded": encoded, "teachers": teachers, "out": out}, params.execution)
    routes = params.routing.routes
    names = list(dict.fromkeys([BASE, *(route.teacher for route in routes)]))
    options = {"need": parts_to_load(params), **params.backbone.loading(params.execution.device)}
    backbone, fields = load_teachers(teachers, names, offload=params.backbone.offload, **options)
    records = read_records(teachers)
    buckets = load_buckets(encoded, [route.capability for route in routes], records[BASE].sha256)
    student = start_student(backbone, fields, params.start, params.trainable, params.rank, params.alpha, params.seed)
    hashes = {name: records[name].sha256 for name in names}
    record = {
        "base_sha256": records[BASE].sha256,
        "teachers": hashes,
        "start": params.start,
        "trainable": params.trainable,
        "rank": params.rank,
        "alpha": params.alpha,
    }
    # Named only where they are not the paper's, so that a run that was begun before there was a choice goes on.
    method = (
        {"method": params.method, "query_states": params.query_states}
        if (params.method, params.query_states) != ("danceopd", 1)
        else {}
    )
    if params.method == "merge":
        return _merge(student, {**record, "stage": "distill", "steps": 0, "fingerprint": digest([record, method])}, out)
    return run_training(
        "distill",
        student,
        fields,
        buckets,
        router(routes, names),
        params.loop(),
        seed=params.seed,
        watch=params,
        execution=params.execution,
        facts=facts_of(
            params.loop(),
            params,
            params.execution,
            seed=params.seed,
            start=params.start,
            trainable=params.trainable,
            rank=params.rank,
            alpha=params.alpha,
            routes=[asdict(route) for route in routes],
            encoded=encoded_fingerprint(encoded),
            teachers=hashes,
            **method,
        ),
        record=record,
        compute=compute_of(params.method, params.query_states),
        out=out,
    )


def _merge(student: Student, record: dict[str, Any], out: Path) -> dict[str, Any]:
    """The mean of the teachers, as it is: the paper's baseline without training."""
    if this_process().rank == 0:
        with atomic_folder(out) as folder:
            save_student(folder, student, record)
            write_steps(folder / "steps.csv", [])
    return {"steps": 0, "trainable parameters": sum(parameter.numel() for parameter in student.parameters.values())}
