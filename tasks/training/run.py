"""What distill and absorb share: the loop run to its end, with progress, states, instruments, and a saved student."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge
from PIL import Image

from data.bounds import OPTIONAL
from data.errors import Terminated, UserError
from data.files import atomic_file, atomic_folder, digest
from data.progress import progress
from model.backbones import TRANSFORMER
from model.checkpoint import Ema, load_training, save_state, training_tensors
from model.compute.execution import Execution, blocks_of, device_of, fit, moved, prepare_networks, recompute_blocks
from model.compute.optimizer import Optimizers, build_optimizer
from model.compute.parallel import World, shard_frozen, shared
from model.compute.settings import ExecutionParams
from model.distill import distill
from model.examples import Bucket, load_held_out
from model.instruments import gradient_cosines, held_out_gaps, held_out_pictures, weights_of
from model.methods import danceopd
from model.methods.base import Method
from model.networks.student import save_student
from model.pixels import as_pictures
from model.route import Route, drawn_in, grid_faults, route_faults
from model.setup import Setup
from model.step import LoopNumbers, LoopParams, NotFinite, Step
from tasks.params.sections import BackboneParams
from tasks.training.metrics import METRICS, SHARES, SPEED, Metrics, state_folder, write_table
from tasks.training.numbers import step_metrics, step_speed, summary
from tasks.training.processes import on_sigterm, this_process
from tasks.training.states import Watch, save_samples, state_to_start_from

STEPS = "steps.csv"
COLUMNS = ("step", "route", "loss", "t", "gradient_norm", "learning_rate", "evaluations", "floor")
VALIDATION = "validation"  # folder of the pictures
SHARED_BASE = "spreads a frozen base that teachers and student share; set trainable: adapter and start: base"
PICTURES = 4  # examples a capability


@dataclass(frozen=True)
class TrainingParams(LoopNumbers, Watch):
    """What the sections `distill` and `absorb` share: `Watch`, and the loop's numbers.

    `guidance`: the scale at which the student will be drawn, 1 where its routes absorb guidance (the paper's beta).
    """

    backbone: BackboneParams
    execution: ExecutionParams
    seed: int
    guidance: Annotated[float, Ge(1)] = field(default=1.0, metadata=OPTIONAL, kw_only=True)

    def loop_with(self, states: str, routing: str, query_states: int) -> LoopParams:
        numbers: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(LoopNumbers)}
        return LoopParams(**numbers, states=states, routing=routing, query_states=query_states)

    def looked_at(self, encoded: Path, capabilities: Sequence[str], base_sha256: str) -> dict[str, Bucket]:
        """What validations look at, by capability; nothing where there are none. Raises UserErrors as load_held_out."""
        return load_held_out(encoded, capabilities, base_sha256, self.held_out) if self.validate_every else {}

    def route_faults(self, routes: Sequence[Route]) -> list[str]:
        """What is wrong with the routes of a student with this grid."""
        return [*route_faults(routes), *grid_faults(routes, self.rollout_steps)]

    def drawn(self, routes: Sequence[Route], before: int | None = None) -> dict[str, Any]:
        """How the student is drawn, for student.json. `before`: the steps of the student that goes on learning."""
        return {"steps": drawn_in(routes) or before, "guidance": self.guidance}

    def parts_to_load(self) -> tuple[str, ...]:
        """The base's parts that a training reads: the VAE only where pictures are wanted."""
        return (*TRANSFORMER, "vae") if self.validate_every else TRANSFORMER


@contextmanager
def _progress(stage: str, total: int, world: World) -> Iterator[Any]:
    if world.rank:
        yield lambda n=1, **fields: None
    else:
        with progress(stage, total) as advance:
            yield advance


def _fitted(
    setup: Setup, params: ExecutionParams, device: torch.device, world: World, before: Mapping[str, Any] | None
) -> Execution:
    """What fits the memory. A run that goes on keeps the batches that it had `before` where none is set by hand: the
    free memory is another now, and sums in another order are other bits."""
    student, buckets = setup.student, setup.buckets

    def numbers_of(capability: str) -> int:
        images = 1 if buckets[capability].at([0]).source is None else 2
        return images * int(np.prod(setup.shape_of(capability, 0)))

    largest = max(buckets, key=numbers_of)
    shape = setup.shape_of(largest, 0)

    def row() -> torch.Tensor:
        x_t, t = torch.zeros(1, *shape, device=device), torch.ones(1, device=device)
        return student.field(x_t, t, moved(buckets[largest].at([0]), device))

    fitted = fit(params, device, student.network, row, max(1, setup.params.batch // world.size))
    names = ("micro_batch", "rollout_batch", "recompute")
    # Rank 0 decides: processes that saw other amounts of free memory would compute in other batches.
    sizes = {name: int(shared(float(getattr(fitted, name)), world)) for name in names}
    if before and not params.micro_batch and before["device"] == device.type and params.checkpointing == "auto":
        rollout_batch = params.rollout_batch or before["rollout_batch"]
        sizes = {**{name: before[name] for name in names}, "rollout_batch": rollout_batch}
    recompute_blocks(student.network, sizes["recompute"])
    changes: dict[str, Any] = sizes
    return replace(fitted, **changes)


@dataclass
class History:
    """What is saved of a run, beside the trainables, averages and moments: it grows with the steps."""

    rows: list[dict[str, Any]]
    queried: dict[str, int]
    best: float | None
    since: int
    ended: str
    origin: dict[str, Any] | None


def run_training(
    stage: str,
    setup: Setup,
    params: TrainingParams,
    facts: Mapping[str, Any],
    record: Mapping[str, Any],
    out: Path,
    method: Method = danceopd.METHOD,
) -> dict[str, Any]:
    """Runs the loop and writes `out`: the student with its EMA weights, student.json, steps.csv, metrics.jsonl and the
    pictures of its validations.

    `facts` (params, data, teachers) name the run: state lies in runs/STAGE-<digest of facts>/ (with speed.jsonl, no
    part of the result), and the same command goes on from there. SIGTERM saves and raises Terminated. A step that is
    not finite saves the state before it and, beside it, the step's samples. Called in every process of a run; rank 0
    writes.
    """
    world, student, execution = this_process(), setup.student, params.execution
    device = device_of(execution, world.rank)
    prepare_networks(execution, device, student.network, student.parameters.values(), setup.teachers.values())
    rate = setup.params.learning_rate
    optimizers = build_optimizer(setup.params.optimizer, student.parameters.items(), rate, student.backbone)
    ema = Ema(dict(student.parameters), setup.params.ema)
    tensors, saved = state_to_start_from(stage, facts, params) or ({}, None)
    fitted = _fitted(setup, execution, device, world, saved["execution"] if saved else None)
    if execution.shard_base:
        if student.adapter is None or student.network is not student.backbone.network:
            raise UserError(f"execution.shard_base = true: {SHARED_BASE}")
        shard_frozen(blocks_of(student.network), device)
    start, history = 0, History([], {}, None, 0, "", None)
    if saved:
        load_training(tensors, student.parameters, ema, optimizers)
        ema.updates, start = saved["updates"], saved["step"]
        history = History(**{field.name: saved[field.name] for field in fields(History)})
        if world.rank == 0:
            state = state_folder(stage, digest(dict(facts)))
            print(f"{stage}: goes on at step {start} of {setup.params.steps} ({state})", flush=True)
    setup = replace(setup, execution=fitted)
    training = _Training(stage, setup, params, dict(facts), start, optimizers, ema, history)
    done = training.go(method)
    if world.rank == 0:
        training.write(out, done, record)
    return summary(setup, history.rows, history.ended, training.speed)


@dataclass
class _Training:
    """A process's part of a run that goes on from step `start`: what is trained on what, and how far it is."""

    stage: str
    setup: Setup
    watch: Watch
    facts: dict[str, Any]
    start: int
    optimizers: Optimizers
    ema: Ema
    history: History

    def __post_init__(self) -> None:
        self.world, self.state = this_process(), state_folder(self.stage, digest(self.facts))
        writes = self.world.rank == 0
        self.metrics, self.speed = (Metrics(self.state / name, self.start, writes) for name in (METRICS, SPEED))

    def go(self, method: Method) -> int:
        """Trains to the end, and returns the number of steps."""
        asked: list[bool] = []
        with on_sigterm(lambda: asked.append(True)):  # the current step ends and its state is saved
            if self.start:  # a state is saved before the student is looked at
                self._look(self.start)
            if self.history.ended:
                return self.start
            with _progress(self.stage, self.setup.params.steps - self.start, self.world) as advance:
                return self._train(advance, lambda: bool(asked), method)

    def _train(self, advance: Any, stop: Callable[[], bool], method: Method) -> int:
        """The loop. `stop` is this process's wish, which nothing here may follow: `Step.stopped` is all processes'."""
        stage, steps = self.stage, self.setup.params.steps
        done = saved_at = self.start
        waiting: list[Step] = []
        loop = distill(self.setup, self.optimizers, self.ema, self.start, self.world, stop, method)
        try:
            for step in loop:
                waiting.append(step)
                done = step.index + 1
                saves = self._is_due(self.watch.save_every, done) or self._validates(done) or done == steps
                now = saves or self._is_due(self.watch.cosine_every, done)
                # On a device that runs ahead, numbers are read a step late unless something has to know them now.
                keep, stopped = (1 if self.setup.execution.deferred and not now else 0), False
                while len(waiting) > (0 if stopped else keep):
                    stopped = self._note(waiting.pop(0), advance) or stopped
                if saves or stopped:
                    self._save(done)
                    saved_at = done
                if stopped and done < steps:
                    _together(self.world)
                    raise Terminated(
                        f"{stage}: stopped by SIGTERM after step {done} of {steps}; its state is saved, "
                        "the same command goes on from there"
                    )
                self._look(done)
                if self.history.ended:
                    break
        except NotFinite as error:
            done = self.ema.updates = error.plan.index  # the step was withheld everywhere: this is the state before it
            samples = save_samples(self.state, error) if self.world.rank == 0 else None
            if done > saved_at:
                self._save(done)
            _together(self.world)
            raise UserError(f"{error}; the state before it is saved, and its samples are in {samples}") from error
        except KeyboardInterrupt as interrupt:
            # The interrupted step may have been half applied, so the last saved state is what counts.
            raise KeyboardInterrupt(
                f"{stage}: interrupted in step {done + 1} of {steps}; the same command goes on from step {saved_at}"
            ) from interrupt
        return done

    def _is_due(self, every: int, done: int) -> bool:
        return every > 0 and done % every == 0

    def _validates(self, done: int) -> bool:
        return self._is_due(self.watch.validate_every, done)

    def _note(self, step: Step, advance: Any) -> bool:
        """Keeps a step's numbers; whether the run is to stop."""
        done, batch, queried = step.index + 1, self.setup.params.batch, self.history.queried
        self.history.rows.append({name: done if name == "step" else getattr(step, name) for name in COLUMNS})
        for level in step.levels:
            queried[f"{level:.4f}"] = queried.get(f"{level:.4f}", 0) + 1
        self.metrics.log(done, step_metrics(step, batch))
        self.speed.log(done, step_speed(step, batch, self.setup.execution.device))
        advance(route=step.route, loss=step.loss)
        return step.stopped

    def _save(self, done: int) -> None:
        if self.world.rank:
            return
        fitted = self.setup.execution
        how = {name: getattr(fitted, name) for name in ("micro_batch", "rollout_batch", "recompute")}
        record = {
            "fingerprint": digest(self.facts),
            "updates": self.ema.updates,
            **asdict(self.history),
            "facts": self.facts,
            "execution": {"device": fitted.device.type, **how},
        }
        tensors = training_tensors(self.setup.student.parameters, self.ema, self.optimizers)
        save_state(self.state, done, tensors, record, self.watch.keep_every)

    def _look(self, done: int) -> None:
        """What is due after that step: the teachers' gradients, then the validation."""
        # A sharded base answers only when all processes ask.
        everyone = self.world.rank == 0 or self.setup.execution.lockstep
        if self._is_due(self.watch.cosine_every, done) and everyone:
            cosines = gradient_cosines(self.setup, done - 1)
            self.metrics.log(done, {f"gradient_cosine/{a}/{b}": value for (a, b), value in cosines.items()})
        if self._validates(done):
            self._validate(done, everyone)

    def _validate(self, done: int, everyone: bool) -> None:
        """Gap and pictures of the averaged weights, which will be saved; ends a run whose gap has long not fallen."""
        history, mean = self.history, 0.0
        if everyone:
            with weights_of(self.setup.student, self.ema.shadow):
                gaps, pictures = held_out_gaps(self.setup), held_out_pictures(self.setup, PICTURES)
            mean = sum(gaps.values()) / len(gaps)
            self.metrics.log(
                done, {**{f"held_out_gap/{name}": gap for name, gap in gaps.items()}, "held_out_gap": mean}
            )
            for capability, images in pictures.items() if self.world.rank == 0 else ():
                rows = [np.concatenate(as_pictures(row), axis=1) for row in images]
                with atomic_file(self.state / VALIDATION / f"{capability}-{done:08d}.png") as temporary:
                    Image.fromarray(np.concatenate(rows, axis=0)).save(temporary)
        mean = shared(mean, self.world)
        better = history.best is None or mean < history.best
        history.best, history.since = (mean, 0) if better else (history.best, history.since + 1)
        if self.watch.patience and history.since >= self.watch.patience:
            history.ended = f"after step {done}: the held-out gap {mean:.5g} has not fallen below {history.best:.5g} "
            history.ended += f"for {history.since} validations"

    def write(self, out: Path, done: int, record: Mapping[str, Any]) -> None:
        """The result, with the EMA's weights."""
        history, student = self.history, self.setup.student
        student.load(self.ema.shadow)
        total = sum(history.queried.values())
        shares = {f"{SHARES}t_{level}": count / total for level, count in sorted(history.queried.items())}
        self.metrics.log(done, shares)
        extra = {"stage": self.stage, "trained_steps": done, "fingerprint": digest(self.facts)}
        with atomic_folder(out) as folder:
            origin = {"origin": history.origin} if history.origin else {}
            save_student(folder, student, {**record, **extra, **origin})
            write_table(folder / STEPS, COLUMNS, history.rows)
            shutil.copyfile(self.metrics.path, folder / METRICS)
            if (self.state / VALIDATION).is_dir():
                shutil.copytree(self.state / VALIDATION, folder / VALIDATION)


def _together(world: World) -> None:
    """Waits for rank 0 to have written before any process ends."""
    shared(0.0, world)
