"""Stage `absorb`: classifier-free guidance into the student's own weights. The same loop, its teacher the frozen
student under the fields named."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from data.bounds import Above, OneOf, expected, holds
from data.files import read_json
from data.records import CapabilityName
from model.examples import encoded_fingerprint, load_buckets
from model.fields import FIELDS, composed
from model.networks.student import RECORD, load_student
from model.networks.teachers import BASE, load_base, read_records
from model.route import Route, route_faults, router
from model.setup import setup_of
from model.step import LoopParams
from tasks.training.processes import in_processes, this_process
from tasks.training.run import TrainingParams, run_training
from tasks.training.states import facts_of


@dataclass(frozen=True)
class Absorbed:
    """Examples of `capability` are answered by the frozen student under `field`: entries of model.fields.FIELDS,
    applied in the order written ({guidance: 2.0}; 1 keeps it as it is). `weight` is the share of the steps."""

    capability: CapabilityName
    field: dict[Annotated[str, OneOf(FIELDS)], float]
    weight: Above

    def faults(self) -> list[str]:
        """Values outside the range that the field's constructor names in its type."""
        faults = []
        for name, value in self.field.items():
            hints = typing.get_type_hints(FIELDS[name], include_extras=True)
            rules = [rule for hint in hints.values() for rule in getattr(hint, "__metadata__", ())]
            faults += [f"field.{name} = {value}: expected {expected(rule)}" for rule in rules if not holds(value, rule)]
        return faults


@dataclass(frozen=True)
class Params(TrainingParams):
    """Section `absorb`. `fields`: what is absorbed, by capability; the rest is as in `distill`."""

    fields: tuple[Absorbed, ...]

    def loop(self) -> LoopParams:
        return self.loop_with("on_policy", "hard", 1)

    def routes(self) -> list[Route]:
        return [Route(field.capability, f"guided {field.capability}", field.weight) for field in self.fields]

    def faults(self) -> list[str]:
        faults = [fault.replace("routes", "fields") for fault in route_faults(self.routes())]
        return faults + self.conflicts(self.held_out)


def absorb(params: Params, *, encoded: Path, teachers: Path, student: Path, out: Path) -> dict[str, Any]:
    """Trains the distilled student on towards its own guided field, and writes it to `out`."""
    if params.execution.processes > this_process().size:
        paths = {"encoded": encoded, "teachers": teachers, "student": student, "out": out}
        return in_processes("absorb", params, paths)
    base = read_records(teachers)[BASE]
    options = {"need": params.parts_to_load(), **params.backbone.loading(params.execution.device)}
    learner = load_student(student, load_base(teachers, **options), base.sha256)
    frozen, routes = learner.frozen_copy(), params.routes()
    fields = {
        route.teacher: composed(frozen, absorbed.field) for route, absorbed in zip(routes, params.fields, strict=True)
    }
    buckets = load_buckets(encoded, [route.capability for route in routes], base.sha256)
    before = read_json(student / RECORD)
    facts = facts_of(
        params.loop(),
        params,
        params.execution,
        seed=params.seed,
        fields=[[field.capability, list(field.field.items()), field.weight] for field in params.fields],
        encoded=encoded_fingerprint(encoded),
        student=[before["sha256"], before["start_sha256"]],
    )
    kept = {key: before[key] for key in ("base_sha256", "teachers", "start", "trainable", "rank", "alpha")}
    setup = setup_of(learner, fields, buckets, router(routes), params.loop(), params.seed)
    return run_training("absorb", setup, params, facts, {**kept, "student": before["sha256"]}, out)
