"""The states of a training: where they lie, what they must agree with, which one to go on from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data.bounds import Count, Positive
from data.errors import UserError
from data.files import atomic_folder, digest, read_json, write_json
from model.checkpoint import RECORD, load_state, newest_state, read_state, write_tensors
from model.compute.settings import ExecutionParams
from model.step import LoopParams, NotFinite
from tasks.training.metrics import RUNS, state_folder
from tasks.training.processes import this_process

LAYOUT = 2  # of what a state holds: one of another layout is not taken up


@dataclass(frozen=True)
class Watch:
    """When states are saved and the student is looked at.

    `save_every`: a state every so many steps, the last two kept; `keep_every`: these are kept for good (0: none).
    `validate_every`: gap to the teachers and pictures (0: never), on `held_out` rows of the dev split a capability,
    spread over its categories; `patience`: stop after so many validations without a smaller gap (0: never).
    `cosine_every`: cosine between the teachers' gradients, at the cost of a step for every route (0: never).
    `resume_from`: a state's folder of another run to start from, which must agree in all its facts but those in
    `accept_changed`.
    """

    save_every: Positive
    keep_every: Count
    validate_every: Count
    patience: Count
    cosine_every: Count
    held_out: Count
    resume_from: str
    accept_changed: tuple[str, ...]

    def conflicts(self) -> list[str]:
        faults = []
        if self.keep_every % self.save_every:
            faults.append(f"keep_every = {self.keep_every}: expected a multiple of save_every = {self.save_every}")
        if self.validate_every > 0 and self.held_out < 1:
            rows = "needs rows of the dev split to look at; choose 1 or more"
            faults.append(f"held_out = {self.held_out}: validate_every = {self.validate_every} {rows}")
        if self.patience > 0 and self.validate_every < 1:
            wanted = f"patience = {self.patience} needs validations; choose 1 or more"
            faults.append(f"validate_every = {self.validate_every}: {wanted}")
        if self.accept_changed and not self.resume_from:
            faults.append(f"accept_changed = {list(self.accept_changed)}: means nothing without resume_from; empty it")
        return faults


def facts_of(loop: LoopParams, watch: Watch, execution: ExecutionParams, **others: Any) -> dict[str, Any]:
    """What decides the result, as JSON: the loop's numbers, precision, data, teachers and torch's version.

    How it is computed (processes, batches that fit, kernels) and when it is saved is not among it: a run may go on with
    other choices.
    """
    stopping = {name: getattr(watch, name) for name in ("validate_every", "patience", "held_out") if watch.patience}
    origin = {"resume_from": watch.resume_from, "accept_changed": sorted(watch.accept_changed)}
    numbers = {**asdict(loop), **stopping, "precision": execution.precision}
    facts = {"params": numbers, "torch": torch.__version__, "state_layout": LAYOUT, **others}
    return {**facts, **origin} if watch.resume_from else facts


def flat_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Nested facts under dotted names, those of `params` without the prefix."""
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            prefix = "" if name == "params" else f"{name}."
            flat.update({f"{prefix}{key}": item for key, item in flat_facts(value).items()})
        else:
            flat[name] = value
    return flat


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Dotted name -> "before -> now", of all facts that are not equal but the origin itself."""
    # As JSON, which is what became of those that were saved.
    old, new = flat_facts(json.loads(json.dumps(before))), flat_facts(json.loads(json.dumps(now)))
    names = sorted({*old, *new} - {"resume_from", "accept_changed"})
    pairs = {name: (old.get(name, "(none)"), new.get(name, "(none)")) for name in names}
    return {name: f"{was} -> {is_now}" for name, (was, is_now) in pairs.items() if was != is_now}


def state_to_start_from(
    stage: str, facts: Mapping[str, Any], watch: Watch
) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The run's newest state; else that of `resume_from`, if its facts agree; else None. Says so when other runs'
    states are left aside."""
    fingerprint = digest(dict(facts))
    folder = state_folder(stage, fingerprint)
    if (state := load_state(folder, fingerprint)) is not None:
        return state
    if not watch.resume_from:
        if not this_process().rank:
            _tell_others(stage, folder, facts)
        return None
    named = Path(watch.resume_from)
    newest = named if named.name.startswith("step-") else newest_state(named)
    if newest is None or not newest.is_dir():
        raise UserError(
            f"resume_from = {watch.resume_from!r}: no state there; name a folder runs/{stage}-... "
            "or one of its step-... folders"
        )
    tensors, record = read_state(newest)
    changed = differing(record.get("facts", {}), facts)
    refused = [f"{name}: {values}" for name, values in changed.items() if name not in watch.accept_changed]
    if refused:
        raise UserError(
            f"resume_from = {watch.resume_from!r}: its run had other facts: {'; '.join(refused)}. "
            "Set them back, or list their names in accept_changed if the run is to go on all the same"
        )
    return tensors, {**record, "origin": {"state": str(newest), "sha256": record["sha256"], "changed": sorted(changed)}}


def _tell_others(stage: str, folder: Path, facts: Mapping[str, Any]) -> None:
    newest = [newest_state(other) for other in RUNS.glob(f"{stage}-*") if other != folder]
    others = [state for state in newest if state is not None]
    if others:
        latest = max(others, key=lambda path: path.stat().st_mtime)
        known = read_json(latest / RECORD).get("facts")
        names = ", ".join(differing(known, facts)) if known else "facts that it does not tell"
        print(f"{stage}: starts anew; the latest state of another run, {latest}, differs in {names}", flush=True)


def save_samples(state: Path, error: NotFinite) -> Path:
    """The samples of a step that was withheld, for whoever wants to know why: states and the teacher's answers; and by
    slot its route, the bucket's row, the query indices."""
    folder, plan = state / f"not-finite-{error.plan.index:08d}", error.plan
    routes = [asdict(route) for route in plan.routes]
    drawn = {"step": plan.index, "routes": routes, "rows": plan.rows, "query": plan.query}
    with atomic_folder(folder) as temporary:
        write_tensors(temporary / "samples.safetensors", {name: value.clone() for name, value in error.batch.items()})
        write_json(temporary / "samples.json", {**drawn, "reason": str(error)})
    return folder
