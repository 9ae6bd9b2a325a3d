"""Stage `absorb`: classifier-free guidance into the student's own weights. The same loop, its teacher the frozen
student under guidance.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from data.bounds import Above
from data.files import read_json
from data.records import CAPABILITIES, CapabilityName
from model.examples import encoded_fingerprint, load_buckets
from model.fields.base import VelocityField
from model.fields.guided import Guided
from model.networks.student import RECORD, load_student
from model.networks.teachers import BASE, load_base, read_records
from model.route import Route, route_faults, router
from model.step import LoopParams
from tasks.training.processes import in_processes, this_process
from tasks.training.run import TrainingParams, parts_to_load, run_training
from tasks.training.states import facts_of


@dataclass(frozen=True)
class Guidance:
    """Examples of `capability` are answered by the frozen student under guidance `scale` (1 keeps it as it is);
    `weight` is the share of the steps.
    """

    capability: CapabilityName
    scale: Annotated[float, Ge(1)]
    weight: Above


@dataclass(frozen=True)
class Params(TrainingParams):
    """Section `absorb`. `fields`: what is absorbed, by capability; the rest is as in `distill`."""

    fields: tuple[Guidance, ...]

    def loop(self) -> LoopParams:
        return self.loop_with("on_policy", "hard")

    def routes(self) -> list[Route]:
        return [Route(field.capability, f"guided {field.capability}", field.weight) for field in self.fields]

    def faults(self) -> list[str]:
        return [fault.replace("routes", "fields") for fault in route_faults(self.routes())] + self.conflicts(
            self.held_out
        )


def absorb(params: Params, *, encoded: Path, teachers: Path, student: Path, out: Path) -> dict[str, Any]:
    """Trains the distilled student on towards its own guided field, and writes it to `out`."""
    if params.execution.processes > this_process().size:
        return in_processes(
            "absorb",
            params,
            {"encoded": encoded, "teachers": teachers, "student": student, "out": out},
            params.execution,
        )
    base = read_records(teachers)[BASE]
    options = {"need": parts_to_load(params), **params.backbone.loading(params.execution.device)}
    learner = load_student(student, load_base(teachers, **options), base.sha256)
    frozen = learner.frozen_copy()
    guided: dict[str, VelocityField] = {
        f"guided {field.capability}": Guided(frozen, field.scale) for field in params.fields
    }
    buckets = load_buckets(
        encoded, [field.capability for field in params.fields if field.capability in CAPABILITIES], base.sha256
    )
    before = read_json(student / RECORD)
    return run_training(
        "absorb",
        learner,
        guided,
        buckets,
        router(params.routes()),
        params.loop(),
        seed=params.seed,
        watch=params,
        execution=params.execution,
        facts=facts_of(
            params.loop(),
            params,
            params.execution,
            seed=params.seed,
            fields=[asdict(field) for field in params.fields],
            encoded=encoded_fingerprint(encoded),
            student=[before["sha256"], before["start_sha256"]],
        ),
        record={
            **{key: before[key] for key in ("base_sha256", "teachers", "start", "trainable", "rank", "alpha")},
            "student": before["sha256"],
        },
        out=out,
    )
