"""Stage `distill`: many frozen teachers into one student, on the student's own rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.backbones import TRANSFORMER
from model.distill import LoopParams
from model.route import router
from model.student import TRAINABLE, start_student
from model.teachers import BASE, load_teachers, read_records
from tasks.encode import encoded_fingerprint, load_buckets
from tasks.params import BackboneParams, RoutingParams
from tasks.training import facts_of, run_training


@dataclass(frozen=True)
class Params:
    """Section `distill`. `start`: "base", "merged" or a teacher; `trainable`: "all" or "adapter" (of `rank`, `alpha`); the rest is model.distill.LoopParams."""

    backbone: BackboneParams
    routing: RoutingParams
    seed: int
    start: str
    trainable: str
    rank: int
    alpha: int
    save_every: int
    steps: int
    batch: int
    learning_rate: float
    optimizer: str
    warmup: int
    decay_from: float
    ema: float
    clip: float
    rollout_steps: int
    query: str
    states: str
    routes_taken: str

    def loop(self) -> LoopParams:
        return LoopParams(
            self.steps,
            self.batch,
            self.learning_rate,
            self.optimizer,
            self.warmup,
            self.decay_from,
            self.ema,
            self.clip,
            self.rollout_steps,
            self.query,
            self.states,
            self.routes_taken,
        )

    def faults(self) -> list[str]:
        found = [fault.replace("routing =", "routes_taken =") for fault in self.loop().faults()]
        if self.trainable not in TRAINABLE:
            found.append(f"trainable = {self.trainable!r}: choose one of {list(TRAINABLE)}")
        found += [f"{name} = {getattr(self, name)}: expected 1 or more" for name in ("rank", "alpha", "save_every") if getattr(self, name) < 1]
        return found


def distill(params: Params, *, encoded: Path, teachers: Path, out: Path) -> dict[str, Any]:
    """Trains the student and writes it to `out`. Killed, the same command goes on where it last saved."""
    routes = params.routing.routes
    names = list(dict.fromkeys([BASE, *(route.teacher for route in routes)]))
    backbone, fields = load_teachers(teachers, names, offload=params.backbone.offload, need=TRANSFORMER, **params.backbone.loading())
    records = read_records(teachers)
    buckets = load_buckets(encoded, [route.capability for route in routes], records[BASE].sha256)
    student = start_student(backbone, fields, params.start, params.trainable, params.rank, params.alpha, params.seed)
    hashes = {name: records[name].sha256 for name in names}
    return run_training(
        "distill", student, fields, buckets, router(routes, names), params.loop(), seed=params.seed, save_every=params.save_every,
        facts=facts_of(params, encoded=encoded_fingerprint(encoded), teachers=hashes),
        record={
            "base_sha256": records[BASE].sha256, "teachers": hashes, "start": params.start, "trainable": params.trainable,
            "rank": params.rank, "alpha": params.alpha,
        },
        out=out,
    )  # fmt: skip
