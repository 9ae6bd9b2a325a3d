"""What the distill and absorb stages share: the loop run to its end, with progress, checkpoints to resume from, a step table and a saved student."""

from __future__ import annotations

import csv
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data.errors import UserError
from data.files import atomic_file, atomic_folder, digest
from model.checkpoint import Ema, load_state, save_state
from model.distill import Bucket, LoopParams, Step, distill
from model.field import VelocityField
from model.optimizer import build_optimizer
from model.rollout import euler_grid
from model.route import Router
from model.student import Student, save_student
from tasks.progress import progress

RUNS = Path("runs")
COLUMNS = ("step", "route", "loss", "t", "gradient_norm", "evaluations", "seconds")


@contextmanager
def _stop_on_sigterm() -> Iterator[dict[str, bool]]:
    """SIGTERM lets the current step end and its state be saved."""
    asked = {"stop": False}
    before = signal.signal(signal.SIGTERM, lambda *_: asked.update(stop=True))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def _row(step: Step) -> dict[str, Any]:
    row = {"step": step.index + 1, "route": step.route, "loss": step.loss, "t": step.t, "gradient_norm": step.gradient_norm, "evaluations": step.evaluations}
    return {**row, "seconds": round(step.seconds, 4)}


def write_steps(path: Path, rows: list[dict[str, Any]]) -> None:
    with atomic_file(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def run_training(
    stage: str,
    student: Student,
    teachers: Mapping[str, VelocityField],
    buckets: Mapping[str, Bucket],
    router: Router,
    params: LoopParams,
    *,
    seed: int,
    save_every: int,
    facts: Mapping[str, Any],
    record: Mapping[str, Any],
    out: Path,
) -> dict[str, Any]:
    """Runs the loop and writes `out`: the student with its EMA weights, student.json and steps.csv.

    `facts` (params, data, teachers) name the run: state lies in runs/STAGE-<digest of facts>/, and the same command goes on from there.
    SIGTERM saves and stops.
    """
    fingerprint = digest(dict(facts))
    state = RUNS / f"{stage}-{fingerprint[:12]}"
    optimizers = build_optimizer(params.optimizer, student.parameters.items(), params.learning_rate)
    ema, start, rows = Ema(dict(student.parameters), params.ema), 0, []
    found = load_state(state, fingerprint)
    if found:
        tensors, saved = found
        student.load({name.removeprefix("trainable."): value for name, value in tensors.items() if name.startswith("trainable.")})
        for name, shadow in ema.shadow.items():
            shadow.copy_(tensors[f"ema.{name}"])
        optimizers.load_tensors({name.removeprefix("optimizer."): value for name, value in tensors.items() if name.startswith("optimizer.")})
        ema.updates, start, rows = saved["updates"], saved["step"], saved["rows"]
        print(f"{stage}: goes on at step {start} of {params.steps} ({state})", flush=True)

    def save(done: int) -> None:
        tensors = {f"trainable.{k}": v for k, v in student.parameters.items()} | {f"ema.{k}": v for k, v in ema.shadow.items()}
        save_state(
            state,
            done,
            tensors | {f"optimizer.{k}": v for k, v in optimizers.tensors().items()},
            {"fingerprint": fingerprint, "updates": ema.updates, "rows": rows},
        )

    grid = euler_grid(params.rollout_steps, float(student.backbone.scheduler["shift"]))
    with _stop_on_sigterm() as asked, progress(stage, params.steps - start) as advance:
        done = saved_at = start
        try:
            for step in distill(student, teachers, buckets, router, optimizers, ema, params, grid, seed, start):
                rows.append(_row(step))
                done = step.index + 1
                advance(route=step.route, loss=step.loss)
                if done % save_every == 0 or done == params.steps or asked["stop"]:
                    save(done)
                    saved_at = done
                if asked["stop"] and done < params.steps:
                    raise UserError(f"{stage}: stopped by SIGTERM after step {done} of {params.steps}; its state is saved, the same command goes on from there")
        except UserError:
            if done > saved_at:  # a step that was not finite; what was learned before it is kept
                save(done)
            raise
        except KeyboardInterrupt as interrupt:
            # The interrupted step may have been half applied, so the last saved state is what counts.
            raise KeyboardInterrupt(f"{stage}: interrupted in step {done + 1} of {params.steps}; the same command goes on from step {saved_at}") from interrupt
    student.load(ema.shadow)
    with atomic_folder(out) as folder:
        save_student(folder, student, {**record, "stage": stage, "steps": params.steps, "fingerprint": fingerprint})
        write_steps(folder / "steps.csv", rows)
    last = rows[-len(rows) // 10 :] if rows else []
    seconds = sum(row["seconds"] for row in rows)
    return {
        "steps": params.steps,
        "loss, last tenth": round(sum(row["loss"] for row in last) / max(len(last), 1), 5),
        "samples per second": round(params.batch * len(rows) / max(seconds, 1e-9), 1),
        "trainable parameters": sum(parameter.numel() for parameter in student.parameters.values()),
    }


def facts_of(params: Any, **others: Any) -> dict[str, Any]:
    """Params and the hashes of what a run reads, as JSON."""
    return {"params": asdict(params), "torch": torch.__version__, **others}
