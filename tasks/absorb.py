"""Stage `absorb`: classifier-free guidance into the student's own weights. The same loop, its teacher the frozen student under guidance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.files import read_json
from data.records import CAPABILITIES
from model.backbones import TRANSFORMER
from model.distill import LoopParams
from model.field import Guided, VelocityField
from model.route import Route, route_faults, router
from model.student import RECORD, load_student
from model.teachers import BASE, load_base, read_records
from tasks.encode import encoded_fingerprint, load_buckets
from tasks.params import BackboneParams
from tasks.training import facts_of, run_training


@dataclass(frozen=True)
class Guidance:
    """Examples of `capability` are answered by the frozen student under guidance `scale` (1 keeps it as it is); `weight` is the share of the steps."""

    capability: str
    scale: float
    weight: float


@dataclass(frozen=True)
class Params:
    """Section `absorb`. `fields`: what is absorbed, by capability; the rest is as in `distill`."""

    backbone: BackboneParams
    fields: tuple[Guidance, ...]
    seed: int
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
            "on_policy",
            "hard",
        )

    def routes(self) -> list[Route]:
        return [Route(field.capability, f"guided {field.capability}", field.weight) for field in self.fields]

    def faults(self) -> list[str]:
        found = self.loop().faults() + [fault.replace("routes", "fields") for fault in route_faults(self.routes())]
        found += [f"fields[{index}].scale = {field.scale}: expected 1 or more" for index, field in enumerate(self.fields) if field.scale < 1]
        return found + ([f"save_every = {self.save_every}: expected 1 or more"] if self.save_every < 1 else [])


def absorb(params: Params, *, encoded: Path, teachers: Path, student: Path, out: Path) -> dict[str, Any]:
    """Trains the distilled student on towards its own guided field, and writes it to `out`."""
    base = read_records(teachers)[BASE]
    learner = load_student(student, load_base(teachers, need=TRANSFORMER, **params.backbone.loading()), base.sha256)
    frozen = learner.frozen_copy()
    guided: dict[str, VelocityField] = {f"guided {field.capability}": Guided(frozen, field.scale) for field in params.fields}
    buckets = load_buckets(encoded, [field.capability for field in params.fields if field.capability in CAPABILITIES], base.sha256)
    before = read_json(student / RECORD)
    return run_training(
        "absorb", learner, guided, buckets, router(params.routes()), params.loop(), seed=params.seed, save_every=params.save_every,
        facts=facts_of(params, encoded=encoded_fingerprint(encoded), student=[before["sha256"], before["start_sha256"]]),
        record={**{key: before[key] for key in ("base_sha256", "teachers", "start", "trainable", "rank", "alpha")}, "student": before["sha256"]},
        out=out,
    )  # fmt: skip
