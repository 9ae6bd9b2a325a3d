"""What distill and absorb share: the loop run to its end, with progress, states, instruments, and a saved student."""

from __future__ import annotations

import csv
import resource
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image

from data.bounds import Above, Count, Decay, NotNegative, OneOf, Positive
from data.errors import Terminated, UserError
from data.files import atomic_file, atomic_folder, digest, write_json
from data.progress import progress
from model.backbones import TRANSFORMER
from model.checkpoint import Ema, save_state, write_tensors
from model.compute.execution import Execution, blocks_of, device_of, fit, moved, prepare_networks, recompute_blocks
from model.compute.optimizer import OPTIMIZERS, SCHEDULES, Optimizers, build_optimizer
from model.compute.parallel import World, shard_frozen, shared
from model.compute.settings import ExecutionParams
from model.distill import Accumulate, distill
from model.examples import Bucket
from model.fields.base import VelocityField
from model.instruments import binned, gradient_cosines, held_out_gaps, held_out_pictures, weights_of
from model.networks.student import Student, save_student
from model.pixels import as_pictures
from model.rollout import QUERY_BIAS, euler_grid
from model.route import Router
from model.step import LoopParams, NotFinite, Step
from tasks.params.sections import BackboneParams
from tasks.training.metrics import METRICS, SHARES, SPEED, Metrics, read_metrics, state_folder
from tasks.training.processes import this_process
from tasks.training.states import Watch, _state_to_start_from

COLUMNS = ("step", "route", "loss", "t", "gradient_norm", "learning_rate", "evaluations", "floor")
VALIDATION = "validation"  # folder of the pictures
SHARED_BASE = "spreads a frozen base that teachers and student share; set trainable: adapter and start: base"
PICTURES = 4  # examples a capability


@dataclass(frozen=True)
class TrainingParams(Watch):
    """What the sections `distill` and `absorb` share: `Watch`, and the loop's numbers (model.step.LoopParams)."""

    backbone: BackboneParams
    execution: ExecutionParams
    seed: int
    held_out: Count
    steps: Positive
    batch: Positive
    learning_rate: Above
    optimizer: Annotated[str, OneOf(OPTIMIZERS)]
    schedule: Annotated[str, OneOf(SCHEDULES)]
    warmup: Count
    decay_from: NotNegative
    ema: Decay
    clip: Above
    max_gradient_norm: NotNegative
    rollout_steps: Positive
    query: Annotated[str, OneOf(QUERY_BIAS)]

    def loop_with(self, states: str, routing: str) -> LoopParams:
        numbers: dict[str, Any] = {field.name: getattr(self, field.name, None) for field in fields(LoopParams)}
        return LoopParams(**{**numbers, "states": states, "routing": routing})


def parts_to_load(watch: Watch) -> tuple[str, ...]:
    """The base's parts that a training reads: the VAE only where pictures are wanted."""
    return (*TRANSFORMER, "vae") if watch.validate_every else TRANSFORMER


@contextmanager
def _stop_on_sigterm() -> Iterator[dict[str, bool]]:
    """SIGTERM lets the current step end and its state be saved."""
    asked = {"stop": False}
    before = signal.signal(signal.SIGTERM, lambda *_: asked.update(stop=True))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


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

    `facts` (params, data, teachers) name the run: state lies in runs/STAGE-<digest of facts>/ (with speed.jsonl, no
    part of the result), and the same command goes on from there. SIGTERM saves and raises Terminated. A step that is
    not finite saves the state before it and, beside it, the step's samples. Called in every process of a run; rank 0
    writes.
    """
    world = this_process()
    device = device_of(execution, world.rank)
    state = state_folder(stage, digest(dict(facts)))
    prepare_networks(execution, device, student.network, student.parameters.values(), teachers.values())
    optimizers = build_optimizer(params.optimizer, student.parameters.items(), params.learning_rate, student.backbone)
    ema, start, run = Ema(dict(student.parameters), params.ema), 0, _Run([], {}, None, 0, "", None)
    found = _state_to_start_from(stage, state, digest(dict(facts)), facts, watch)
    fitted = _fitted(student, buckets, params, execution, device, world)
    if execution.shard_base:
        if student.adapter is None or student.network is not student.backbone.network:
            raise UserError(f"execution.shard_base = true: {SHARED_BASE}")
        shard_frozen(blocks_of(student.network), device)
    if found:
        tensors, saved = found
        _restore(tensors, student, ema, optimizers)
        ema.updates, start = saved["updates"], saved["step"]
        known: dict[str, Any] = {field.name: saved.get(field.name) for field in fields(_Run)}
        run = _Run(**known)
        fitted = _as_before(fitted, saved["execution"], execution, student)
        if world.rank == 0:
            print(f"{stage}: goes on at step {start} of {params.steps} ({state})", flush=True)
    training = _Training(
        stage, student, teachers, buckets, router, params, seed, watch, dict(facts), start, fitted, optimizers, ema, run
    )
    done = training.go(compute)
    if world.rank == 0:
        training.write(out, done, record)
    return _summary(student, params, run, fitted, training.speed)


@dataclass
class _Training:
    """A process's part of a run that goes on from step `start`: what is trained on what, and how far it is."""

    stage: str
    student: Student
    teachers: Mapping[str, VelocityField]
    buckets: Mapping[str, Bucket]
    router: Router
    params: LoopParams
    seed: int
    watch: Watch
    facts: dict[str, Any]
    start: int
    fitted: Execution
    optimizers: Optimizers
    ema: Ema
    run: _Run

    def __post_init__(self) -> None:
        self.world, self.state = this_process(), state_folder(self.stage, digest(self.facts))
        self.grid = euler_grid(self.params.rollout_steps, float(self.student.backbone.scheduler["shift"]))
        self.metrics, self.speed = (
            Metrics(self.state / name, self.start, writes=self.world.rank == 0) for name in (METRICS, SPEED)
        )

    def go(self, compute: Accumulate | None) -> int:
        """Trains to the end, and returns the number of steps."""
        with _stop_on_sigterm() as asked:
            if self.start:  # a state is saved before the student is looked at
                self._look(self.start)
            if self.run.ended:
                return self.start
            with _progress(self.stage, self.params.steps - self.start, self.world) as advance:
                return self._train(advance, lambda: asked["stop"], compute)

    def _train(self, advance: Any, stop: Callable[[], bool], compute: Accumulate | None) -> int:
        """The loop. `stop` is this process's wish, which nothing here may follow: `Step.stopped` is all processes'."""
        stage, params, watch = self.stage, self.params, self.watch
        done = saved_at = self.start
        waiting: list[Step] = []
        loop = distill(
            self.student,
            self.teachers,
            self.buckets,
            self.router,
            self.optimizers,
            self.ema,
            params,
            self.grid,
            self.seed,
            self.start,
            self.fitted,
            self.world,
            stop,
            compute,
        )
        try:
            for step in loop:
                waiting.append(step)
                done = step.index + 1
                validates = bool(watch.validate_every) and done % watch.validate_every == 0
                due = done % watch.save_every == 0 or done == params.steps or validates
                looks = validates or (watch.cosine_every and done % watch.cosine_every == 0)
                # On a device that runs ahead, numbers are read a step late unless something has to know them now.
                keep, stopped = (1 if self.fitted.deferred and not due and not looks else 0), False
                while len(waiting) > (0 if stopped else keep):
                    stopped = self._note(waiting.pop(0), advance) or stopped
                if due or stopped:
                    self._save(done)
                    saved_at = done
                if stopped and done < params.steps:
                    _together(self.world)
                    raise Terminated(
                        f"{stage}: stopped by SIGTERM after step {done} of {params.steps}; its state is saved, "
                        "the same command goes on from there"
                    )
                self._look(done)
                if self.run.ended:
                    break
        except NotFinite as error:
            done = self.ema.updates = error.plan.index  # the step was withheld everywhere: this is the state before it
            samples = _save_samples(self.state, error) if self.world.rank == 0 else None
            if done > saved_at:
                self._save(done)
            _together(self.world)
            raise UserError(f"{error}; the state before it is saved, and its samples are in {samples}") from error
        except KeyboardInterrupt as interrupt:
            # The interrupted step may have been half applied, so the last saved state is what counts.
            raise KeyboardInterrupt(
                f"{stage}: interrupted in step {done + 1} of {params.steps}; "
                f"the same command goes on from step {saved_at}"
            ) from interrupt
        return done

    def _note(self, step: Step, advance: Any) -> bool:
        """Keeps a step's numbers; whether the run is to stop."""
        self.run.rows.append({name: step.index + 1 if name == "step" else getattr(step, name) for name in COLUMNS})
        for level in step.levels:
            self.run.queried[f"{level:.4f}"] = self.run.queried.get(f"{level:.4f}", 0) + 1
        self.metrics.log(step.index + 1, _step_metrics(step, self.params.batch))
        self.speed.log(step.index + 1, _speed(step, self.params.batch, self.fitted.device))
        advance(route=step.route, loss=step.loss)
        return step.stopped

    def _save(self, done: int) -> None:
        if self.world.rank:
            return
        fitted = self.fitted
        tensors = {f"trainable.{k}": v for k, v in self.student.parameters.items()} | {
            f"ema.{k}": v for k, v in self.ema.shadow.items()
        }
        how = {
            "device": fitted.device.type,
            "micro_batch": fitted.micro_batch,
            "rollout_batch": fitted.rollout_batch,
            "recompute": fitted.recompute,
        }
        save_state(
            self.state,
            done,
            tensors | {f"optimizer.{k}": v for k, v in self.optimizers.tensors().items()},
            {
                "fingerprint": digest(self.facts),
                "updates": self.ema.updates,
                **asdict(self.run),
                "facts": self.facts,
                "execution": how,
            },
            self.watch.keep_every,
        )

    def _look(self, done: int) -> None:
        """What is due after that step: the teachers' gradients, then the validation."""
        everyone = self.world.rank == 0 or self.fitted.lockstep  # a sharded base answers only when all processes ask
        if self.watch.cosine_every and done % self.watch.cosine_every == 0 and everyone:
            cosines = gradient_cosines(
                self.student,
                self.teachers,
                self.buckets,
                self.router,
                self.params,
                self.grid,
                self.seed,
                done - 1,
                self.fitted,
            )
            self.metrics.log(done, {f"gradient_cosine/{a}/{b}": value for (a, b), value in cosines.items()})
        if self.watch.validate_every and done % self.watch.validate_every == 0:
            self._validate(done, everyone)

    def _validate(self, done: int, everyone: bool) -> None:
        """Gap and pictures of the averaged weights, which will be saved; ends a run whose gap has long not fallen."""
        run, student, mean = self.run, self.student, 0.0
        if everyone:
            with weights_of(student, self.ema.shadow):
                numbers = (self.params, self.grid, self.seed, self.fitted)
                gaps = held_out_gaps(student, self.teachers, self.buckets, self.router, *numbers)
                pictures = held_out_pictures(student, self.buckets, *numbers, PICTURES)
            mean = sum(gaps.values()) / len(gaps)
            self.metrics.log(
                done, {**{f"held_out_gap/{name}": gap for name, gap in gaps.items()}, "held_out_gap": mean}
            )
            for capability, images in pictures.items() if self.world.rank == 0 else ():
                rows = [np.concatenate(as_pictures(row), axis=1) for row in images]
                path = self.state / VALIDATION / f"{capability}-{done:08d}.png"
                with atomic_file(path) as temporary:
                    Image.fromarray(np.concatenate(rows, axis=0)).save(temporary)
        mean = shared(mean, self.world)
        run.best, run.since = (mean, 0) if run.best is None or mean < run.best else (run.best, run.since + 1)
        if self.watch.patience and run.since >= self.watch.patience:
            run.ended = f"after step {done}: the held-out gap {mean:.5g} has not fallen below {run.best:.5g} "
            run.ended += f"for {run.since} validations"

    def write(self, out: Path, done: int, record: Mapping[str, Any]) -> None:
        """The result, with the EMA's weights."""
        self.student.load(self.ema.shadow)
        total = sum(self.run.queried.values())
        self.metrics.log(
            done, {f"{SHARES}t_{level}": count / total for level, count in sorted(self.run.queried.items())}
        )
        origin = {"origin": self.run.origin} if self.run.origin else {}
        with atomic_folder(out) as folder:
            extra = {"stage": self.stage, "steps": done, "fingerprint": digest(self.facts), **origin}
            save_student(folder, self.student, {**record, **extra})
            write_steps(folder / "steps.csv", self.run.rows)
            shutil.copyfile(self.metrics.path, folder / METRICS)
            if (self.state / VALIDATION).is_dir():
                shutil.copytree(self.state / VALIDATION, folder / VALIDATION)


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
