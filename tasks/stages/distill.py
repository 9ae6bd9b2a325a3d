"""Stage `distill`: many frozen teachers into one student, on the student's own rollouts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.files import atomic_folder, digest
from model.compute.settings import ExecutionParams
from model.examples import encoded_fingerprint, load_buckets
from model.methods import compute_of, in_lockstep, method_faults
from model.networks.student import TRAINABLE, Student, save_student, start_student
from model.networks.teachers import BASE, load_teachers, read_records
from model.route import router
from model.step import LoopParams
from tasks.params.sections import BackboneParams, RoutingParams
from tasks.training.processes import in_processes, this_process
from tasks.training.run import SHARED_BASE, loop_params, parts_to_load, run_training, write_steps
from tasks.training.states import Watch, facts_of, watch_params


@dataclass(frozen=True)
class Params:
    """Section `distill`. `start`: "base", "merged" or a teacher; `trainable`: "all" or "adapter" (of `rank`, `alpha`).

    The rest is model.step.LoopParams and tasks.training.states.Watch; the shared section `execution` is
    model.compute.execution.ExecutionParams.
    """

    backbone: BackboneParams
    routing: RoutingParams
    execution: ExecutionParams
    seed: int
    start: str
    trainable: str
    rank: int
    alpha: int
    resume_from: str
    accept_changed: tuple[str, ...]
    save_every: int
    keep_every: int
    validate_every: int
    patience: int
    cosine_every: int
    held_out: int
    steps: int
    batch: int
    learning_rate: float
    optimizer: str
    schedule: str
    warmup: int
    decay_from: float
    ema: float
    clip: float
    max_gradient_norm: float
    rollout_steps: int
    query: str
    states: str
    routes_taken: str
    method: str
    query_states: int

    def loop(self) -> LoopParams:
        return loop_params(self, states=self.states, routing=self.routes_taken)

    def watch(self) -> Watch:
        return watch_params(self)

    def faults(self) -> list[str]:
        found = [fault.replace("routing =", "routes_taken =") for fault in self.loop().faults()]
        if self.trainable not in TRAINABLE:
            found.append(f"trainable = {self.trainable!r}: choose one of {list(TRAINABLE)}")
        found += [
            f"{name} = {getattr(self, name)}: expected 1 or more"
            for name in ("rank", "alpha")
            if getattr(self, name) < 1
        ]
        found += method_faults(self.method, self.states, self.query_states, self.start, self.batch)
        if self.execution.shard_base and self.trainable == "all" and self.method != "merge":
            found.append(f"trainable = 'all': execution.shard_base = true {SHARED_BASE}")
        if self.execution.shard_base and not in_lockstep(self.method, self.query_states):
            found.append(
                f"method = {self.method!r}, query_states = {self.query_states}: processes that share one base by "
                "execution.shard_base = true must ask it equally often, which only method = 'danceopd' or 'offpolicy' "
                "with query_states = 1 does; choose one of these, or set execution.shard_base: false"
            )
        return found + self.watch().faults(self.held_out)


def distill(params: Params, *, encoded: Path, teachers: Path, out: Path) -> dict[str, Any]:
    """Trains the student and writes it to `out`. Killed, the same command goes on where it last saved. With method
    "merge" the start is the student.
    """
    if params.execution.processes > this_process().size:
        return in_processes("distill", params, {"encoded": encoded, "teachers": teachers, "out": out}, params.execution)
    routes = params.routing.routes
    names = list(dict.fromkeys([BASE, *(route.teacher for route in routes)]))
    options = {"need": parts_to_load(params.watch()), **params.backbone.loading(params.execution.device)}
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
        watch=params.watch(),
        execution=params.execution,
        facts=facts_of(
            params.loop(),
            params.watch(),
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
