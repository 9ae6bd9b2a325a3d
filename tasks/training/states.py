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
from data.files import read_json
from model.checkpoint import RECORD, load_state, newest_state, read_state
from model.compute.settings import ExecutionParams
from model.step import LoopParams
from tasks.training.metrics import RUNS
from tasks.training.processes import this_process

LAYOUT = 2  # of what a state holds: one of another layout is not taken up


@dataclass(frozen=True)
class Watch:
    """When states are saved and the student is looked at.

    `save_every`: a state every so many steps, the last two kept; `keep_every`: these are kept for good (0: none).
    `validate_every`: gap to the teachers and pictures on held-out rows (0: never); `patience`: stop after so many
    validations without a smaller gap (0: never). `cosine_every`: cosine between the teachers' gradients, at the cost of
    a step for every route (0: never). `resume_from`: a state's folder of another run to start from, which must agree in
    all its facts but those in `accept_changed`.
    """

    save_every: Positive
    keep_every: Count
    validate_every: Count
    patience: Count
    cosine_every: Count
    resume_from: str
    accept_changed: tuple[str, ...]

    def conflicts(self, held_out: int) -> list[str]:
        found = []
        if self.keep_every % self.save_every:
            found.append(f"keep_every = {self.keep_every}: expected a multiple of save_every = {self.save_every}")
        if self.validate_every > 0 and held_out < 1:
            found.append(
                f"held_out = {held_out}: validate_every = {self.validate_every} needs rows that are not trained on; "
                "choose 1 or more"
            )
        if self.patience > 0 and self.validate_every < 1:
            found.append(
                f"validate_every = {self.validate_every}: patience = {self.patience} needs validations; "
                "choose 1 or more"
            )
        if self.accept_changed and not self.resume_from:
            found.append(f"accept_changed = {list(self.accept_changed)}: means nothing without resume_from; empty it")
        return found


def facts_of(loop: LoopParams, watch: Watch, execution: ExecutionParams, **others: Any) -> dict[str, Any]:
    """What decides the result, as JSON: the loop's numbers, precision, data, teachers and torch's version.

    How it is computed (processes, batches that fit, kernels) and when it is saved is not among it: a run may go on with
    other choices.
    """
    stopping = {"validate_every": watch.validate_every, "patience": watch.patience} if watch.patience else {}
    origin = (
        {"resume_from": watch.resume_from, "accept_changed": sorted(watch.accept_changed)} if watch.resume_from else {}
    )
    numbers = {**asdict(loop), **stopping, "precision": execution.precision}
    return {"params": numbers, "torch": torch.__version__, "state_layout": LAYOUT, **origin, **others}


def flat_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Nested facts under dotted names, those of `params` without the prefix."""
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            flat.update(
                {inner if name == "params" else f"{name}.{inner}": item for inner, item in flat_facts(value).items()}
            )
        else:
            flat[name] = value
    return flat


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Dotted name -> "before -> now", of all facts that are not equal but the origin itself."""
    # As JSON, which is what became of those that were saved.
    old, new = flat_facts(json.loads(json.dumps(before))), flat_facts(json.loads(json.dumps(now)))
    names = [name for name in sorted({*old, *new}) if name not in ("resume_from", "accept_changed")]
    return {
        name: f"{old.get(name, '(none)')} -> {new.get(name, '(none)')}"
        for name in names
        if old.get(name) != new.get(name)
    }


def _state_to_start_from(
    stage: str, state: Path, fingerprint: str, facts: Mapping[str, Any], watch: Watch
) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """This run's own newest state; else that of `resume_from`, if its facts agree; else None. Says so when other runs'
    states are left aside.
    """
    own = load_state(state, fingerprint)
    if own is not None:
        return own
    if not watch.resume_from:
        others = [
            newest
            for folder in RUNS.glob(f"{stage}-*")
            if folder != state and (newest := newest_state(folder)) is not None
        ]
        if others and not this_process().rank:
            latest = max(others, key=lambda path: path.stat().st_mtime)
            known = read_json(latest / RECORD).get("facts")
            names = ", ".join(differing(known, facts)) if known else "facts that it does not tell"
            print(f"{stage}: starts anew; the latest state of another run, {latest}, differs in {names}", flush=True)
        return None
    folder = Path(watch.resume_from)
    newest = folder if folder.name.startswith("step-") else newest_state(folder)
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
