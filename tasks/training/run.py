"""What the distill and absorb stages share: the loop run to its end, with progress, states to resume from, instruments,
and a saved student.
"""

from __future__ import annotations

import csv
import resource
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.errors import Terminated, UserError
from data.files import atomic_file, atomic_folder, digest, write_json
from data.progress import progress
from model.checkpoint import Ema, save_state, write_tensors
from model.compute.execution import (
    Execution,
    blocks_of,
    device_of,
    fit,
    moved,
    networks_of,
    prepare_networks,
    recompute_blocks,
)
from model.compute.optimizer import Optimizers, build_optimizer
from model.compute.parallel import World, shard_frozen, shared
from model.compute.settings import ExecutionParams
from model.distill import Accumulate, distill
from model.drawing import as_pictures
from model.examples import Bucket
from model.fields.base import VelocityField
from model.instruments import binned, gradient_cosines, held_out_gaps, held_out_pictures, weights_of
from model.networks.student import Student, save_student
from model.rollout import euler_grid
from model.route import Router
from model.step import LoopParams, NotFinite, Step
from tasks.training.metrics import METRICS, SHARES, SPEED, Metrics, read_metrics, state_folder
from tasks.training.processes import this_process
from tasks.training.states import Watch, _state_to_start_from

COLUMNS = ("step", "route", "loss", "t", "gradient_norm", "learning_rate", "evaluations", "floor")
VALIDATION = "validation"  # folder of the pictures
PICTURES = 4  # examples a capability


def loop_params(params: Any, **given: Any) -> LoopParams:
    """The loop's numbers out of a stage's parameters, which name them alike; `given` for those that they do not
    have.
    """
    numbers: dict[str, Any] = {
        field.name: given.get(field.name, getattr(params, field.name, None)) for field in fields(LoopParams)
    }
    return LoopParams(**numbers)


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
    return {name: step.index + 1 if name == "step" else getattr(step, name) for name in COLUMNS}


def write_steps(path: Path, rows: list[dict[str, Any]]) -> None:
    with atomic_file(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


# --- what is measured -------------------------------------------------------------------------------------------------


def _step_metrics(step: Step, batch: int) -> dict[str, float]:
    named = {f"loss/{step.route}/{name}": value for name, value in binned(step.losses, step.levels).items()}
    named |= {f"gradient_norm/{step.route}": step.gradient_norm, "learning_rate": step.learning_rate}
    return named | {"evaluations_per_sample": step.evaluations / batch, "floor_per_sample": step.floor / batch}


def _speed(step: Step, batch: int, device: torch.device) -> dict[str, float]:
    return {
        "seconds": step.seconds,
        "samples_per_second": batch / max(step.seconds, 1e-9),
        "memory_bytes": float(peak_memory(device)),
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: the process's largest resident size, or on CUDA the largest sum of its tensors."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """What is saved of a run, beside the trainables, averages and moments: it grows with the steps."""

    rows: list[dict[str, Any]]
    queried: dict[str, int]
    best: float | None
    since: int
    ended: str
    origin: dict[str, Any] | None


def _fitted(
    student: Student,
    buckets: Mapping[str, Bucket],
    params: LoopParams,
    execution: ExecutionParams,
    device: torch.device,
    world: World,
) -> Execution:
    bucket = max(
        buckets.values(),
        key=lambda bucket: (
            np.prod(bucket.shape_of(0) or student.backbone.latent_shape) * (1 if bucket.at([0]).source is None else 2)
        ),
    )
    shape = bucket.shape_of(0) or student.backbone.latent_shape

    def row() -> torch.Tensor:
        return student.field(
            torch.zeros(1, *shape, device=device), torch.ones(1, device=device), moved(bucket.at([0]), device)
        )

    fitted = fit(execution, device, student.network, row, max(1, params.batch // world.size))
    # Rank 0 decides: processes that saw other amounts of free memory would compute in other batches.
    micro_batch, rollout_batch, recompute = (
        int(shared(float(n), world)) for n in (fitted.micro_batch, fitted.rollout_batch, fitted.recompute)
    )
    recompute_blocks(student.network, recompute)
    return replace(fitted, micro_batch=micro_batch, rollout_batch=rollout_batch, recompute=recompute)


def run_training(
    stage: str,
    student: Student,
    teachers: Mapping[str, VelocityField],
    buckets: Mapping[str, Bucket],
    router: Router,
    params: LoopParams,
    *,
    seed: int,
    watch: Watch,
    execution: ExecutionParams,
    facts: Mapping[str, Any],
    record: Mapping[str, Any],
    out: Path,
    compute: Accumulate | None = None,
) -> dict[str, Any]:
    """Runs the loop and writes `out`: the student with its EMA weights, student.json, steps.csv, metrics.jsonl and the
    pictures of its validations.

    `facts` (params, data, teachers) name the run: state lies in runs/STAGE-<digest of facts>/ (with the run's speed,
    which is no part of the result, in speed.jsonl), and the same command goes on from there. SIGTERM saves and raises
    Terminated. A step that is not finite saves the state before it and, beside it, the step's samples. Called in every
    process of a run; rank 0 writes.
    """
    world = this_process()
    device = device_of(execution, world.rank)
    fingerprint = digest(dict(facts))
    state = state_folder(stage, fingerprint)
    prepare_networks(
        execution,
        device,
        student.network,
        student.parameters.values(),
        [n for field in teachers.values() for n in networks_of(field)],
    )
    optimizers = build_optimizer(params.optimizer, student.parameters.items(), params.learning_rate)
    ema, start, run = Ema(dict(student.parameters), params.ema), 0, _Run([], {}, None, 0, "", None)
    found = _state_to_start_from(stage, state, fingerprint, facts, watch)
    fitted = _fitted(student, buckets, params, execution, device, world)
    if execution.shard_base:
        if student.adapter is None or student.network is not student.backbone.network:
            raise UserError(
                "execution.shard_base = true: spreads a frozen base that teachers and student share; set trainable: adapter and start: base"
            )
        shard_frozen(blocks_of(student.network), device)
    if found:
        tensors, saved = found
        _restore(tensors, student, ema, optimizers)
        ema.updates, start = saved["updates"], saved["step"]
        run = _Run(saved["rows"], saved["queried"], saved["best"], saved["since"], saved["ended"], saved.get("origin"))
        fitted = _as_before(fitted, saved["execution"], execution, student)
        if world.rank == 0:
            print(f"{stage}: goes on at step {start} of {params.steps} ({state})", flush=True)

    def save(done: int) -> None:
        if world.rank:
            return
        tensors = {f"trainable.{k}": v for k, v in student.parameters.items()} | {
            f"ema.{k}": v for k, v in ema.shadow.items()
        }
        how = {
            "device": device.type,
            "micro_batch": fitted.micro_batch,
            "rollout_batch": fitted.rollout_batch,
            "recompute": fitted.recompute,
        }
        save_state(
            state,
            done,
            tensors | {f"optimizer.{k}": v for k, v in optimizers.tensors().items()},
            {"fingerprint": fingerprint, "updates": ema.updates, **asdict(run), "facts": dict(facts), "execution": how},
            watch.keep_every,
        )

    grid = euler_grid(params.rollout_steps, float(student.backbone.scheduler["shift"]))
    metrics, speed = (Metrics(state / name, start, writes=world.rank == 0) for name in (METRICS, SPEED))
    steps = params.steps if not run.ended else start
    with _stop_on_sigterm() as asked, _progress(stage, steps - start, world) as advance:
        done = saved_at = start
        first = params.steps if run.ended else start  # a run that had ended early only writes its result again
        loop = distill(
            student,
            teachers,
            buckets,
            router,
            optimizers,
            ema,
            params,
            grid,
            seed,
            first,
            fitted,
            world,
            lambda: asked["stop"],
            compute,
        )
        waiting: list[Step] = []
        try:
            for step in loop:
                waiting.append(step)
                done = step.index + 1
                due = done % watch.save_every == 0 or done == params.steps
                looked = [every for every in (watch.validate_every, watch.cosine_every) if every and done % every == 0]
                # On a device that runs ahead, numbers are read a step late unless something has to know them now.
                keep = 1 if fitted.deferred and not due and not looked and not asked["stop"] else 0
                stopped = False
                while len(waiting) > keep:
                    one = waiting.pop(0)
                    stopped = stopped or one.stopped
                    run.rows.append(_row(one))
                    for level in one.levels:
                        run.queried[f"{level:.4f}"] = run.queried.get(f"{level:.4f}", 0) + 1
                    metrics.log(one.index + 1, _step_metrics(one, params.batch))
                    speed.log(one.index + 1, _speed(one, params.batch, device))
                    advance(route=one.route, loss=one.loss)
                if watch.cosine_every and done % watch.cosine_every == 0 and (world.rank == 0 or fitted.lockstep):
                    cosines = gradient_cosines(
                        student, teachers, buckets, router, params, grid, seed, step.index, fitted
                    )
                    metrics.log(done, {f"gradient_cosine/{a}/{b}": value for (a, b), value in cosines.items()})
                if watch.validate_every and done % watch.validate_every == 0:
                    _validate(
                        done,
                        run,
                        watch,
                        student,
                        ema,
                        teachers,
                        buckets,
                        router,
                        params,
                        grid,
                        seed,
                        fitted,
                        world,
                        metrics,
                        state,
                    )
                if due or stopped or run.ended:
                    save(done)
                    saved_at = done
                if run.ended:
                    break
                if stopped and done < params.steps:
                    _together(world)
                    raise Terminated(
                        f"{stage}: stopped by SIGTERM after step {done} of {params.steps}; its state is saved, the same command goes on from there"
                    )
        except NotFinite as error:
            done = ema.updates = error.plan.index  # the step was withheld everywhere: this is the state before it
            samples = _save_samples(state, error) if world.rank == 0 else None
            if done > saved_at:
                save(done)
            _together(world)
            raise UserError(f"{error}; the state before it is saved, and its samples are in {samples}") from error
        except KeyboardInterrupt as interrupt:
            # The interrupted step may have been half applied, so the last saved state is what counts.
            raise KeyboardInterrupt(
                f"{stage}: interrupted in step {done + 1} of {params.steps}; the same command goes on from step {saved_at}"
            ) from interrupt
    if world.rank == 0:
        student.load(ema.shadow)
        total = sum(run.queried.values())
        metrics.log(done, {f"{SHARES}t_{level}": count / total for level, count in sorted(run.queried.items())})
        with atomic_folder(out) as folder:
            extra = {
                "stage": stage,
                "steps": done,
                "fingerprint": fingerprint,
                **({"origin": run.origin} if run.origin else {}),
            }
            save_student(folder, student, {**record, **extra})
            write_steps(folder / "steps.csv", run.rows)
            shutil.copyfile(metrics.path, folder / METRICS)
            if (state / VALIDATION).is_dir():
                shutil.copytree(state / VALIDATION, folder / VALIDATION)
    return _summary(student, params, run, fitted, speed)


def _summary(student: Student, params: LoopParams, run: _Run, fitted: Execution, speed: Metrics) -> dict[str, Any]:
    rows = run.rows
    last = rows[-len(rows) // 10 :] if rows else []
    samples = max(params.batch * len(rows), 1)
    seconds = [line["value"] for line in read_metrics(speed.path) if line["name"] == "seconds"]
    return {
        "steps": len(rows),
        **({"ended": run.ended} if run.ended else {}),
        "loss, last tenth": round(sum(row["loss"] for row in last) / max(len(last), 1), 5),
        **({"samples per second": round(params.batch * len(seconds) / max(sum(seconds), 1e-9), 1)} if seconds else {}),
        "evaluations per sample": round(sum(row["evaluations"] for row in rows) / samples, 4),
        "floor per sample": round(sum(row["floor"] for row in rows) / samples, 4),
        "micro-batch": fitted.micro_batch,
        "peak memory, GB": round(peak_memory(fitted.device) / 1e9, 2),
        "trainable parameters": sum(parameter.numel() for parameter in student.parameters.values()),
    }


@contextmanager
def _progress(stage: str, total: int, world: World) -> Iterator[Any]:
    if world.rank:
        yield lambda n=1, **fields: None
    else:
        with progress(stage, total) as advance:
            yield advance


def _together(world: World) -> None:
    """Waits for rank 0 to have written before any process ends."""
    shared(0.0, world)


def _restore(tensors: Mapping[str, torch.Tensor], student: Student, ema: Ema, optimizers: Optimizers) -> None:
    student.load(
        {name.removeprefix("trainable."): value for name, value in tensors.items() if name.startswith("trainable.")}
    )
    for name, shadow in ema.shadow.items():
        shadow.copy_(tensors[f"ema.{name}"])
    optimizers.load_tensors(
        {name.removeprefix("optimizer."): value for name, value in tensors.items() if name.startswith("optimizer.")}
    )


def _as_before(fitted: Execution, saved: Mapping[str, Any], execution: ExecutionParams, student: Student) -> Execution:
    """The batch sizes that the run began with, where they are not set by hand: the free memory is another now, and sums
    in another order are other bits.
    """
    if execution.micro_batch or saved["device"] != fitted.device.type or execution.checkpointing != "auto":
        return fitted
    recompute_blocks(student.network, saved["recompute"])
    return replace(
        fitted,
        micro_batch=saved["micro_batch"],
        rollout_batch=execution.rollout_batch or saved["rollout_batch"],
        recompute=saved["recompute"],
    )


def _validate(
    done: int,
    run: _Run,
    watch: Watch,
    student: Student,
    ema: Ema,
    teachers: Mapping[str, VelocityField],
    buckets: Mapping[str, Bucket],
    router: Router,
    params: LoopParams,
    grid: torch.Tensor,
    seed: int,
    fitted: Execution,
    world: World,
    metrics: Metrics,
    state: Path,
) -> None:
    """Gap and pictures of the averaged weights, which are what will be saved; notes the end of the run when the gap has
    not become smaller for long.
    """
    mean = 0.0
    if world.rank == 0 or fitted.lockstep:  # a sharded base answers only when all processes ask
        with weights_of(student, ema.shadow):
            gaps = held_out_gaps(student, teachers, buckets, router, params, grid, seed, fitted)
            pictures = held_out_pictures(student, buckets, params, grid, seed, fitted, PICTURES)
        mean = sum(gaps.values()) / len(gaps)
        metrics.log(done, {**{f"held_out_gap/{name}": gap for name, gap in gaps.items()}, "held_out_gap": mean})
        for capability, images in pictures.items() if world.rank == 0 else ():
            rows = [np.concatenate(as_pictures(row), axis=1) for row in images]
            path = state / VALIDATION / f"{capability}-{done:08d}.png"
            with atomic_file(path) as temporary:
                Image.fromarray(np.concatenate(rows, axis=0)).save(temporary)
    mean = shared(mean, world)
    run.best, run.since = (mean, 0) if run.best is None or mean < run.best else (run.best, run.since + 1)
    if watch.patience and run.since >= watch.patience:
        run.ended = f"after step {done}: the held-out gap {mean:.5g} has not fallen below {run.best:.5g} for {run.since} validations"


def _save_samples(state: Path, error: NotFinite) -> Path:
    """The samples of a step that was withheld, for whoever wants to know why: states and the teacher's answers, rows of
    the bucket, query indices.
    """
    folder = state / f"not-finite-{error.plan.index:08d}"
    with atomic_folder(folder) as temporary:
        write_tensors(temporary / "samples.safetensors", {name: value.clone() for name, value in error.batch.items()})
        plan = {
            "step": error.plan.index,
            **asdict(error.plan.route),
            "rows": list(error.plan.rows),
            "query": list(error.plan.query),
        }
        write_json(temporary / "samples.json", {**plan, "reason": str(error)})
    return folder
