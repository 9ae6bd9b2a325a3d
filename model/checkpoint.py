"""Training state on disk: safetensors and JSON, written whole, the last two kept. Never pickle."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data.errors import UserError
from data.files import atomic_folder, read_json, sha256_file, write_json

if TYPE_CHECKING:
    from model.compute.optimizer import Optimizers

TENSORS, RECORD = "state.safetensors", "state.json"
KEPT = 2


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Tensors as safetensors, readable as other files are.

    Raises OSError where the operating system refuses, which safetensors reports as an error of its own.
    """
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    path.chmod(0o644)  # safetensors leaves it to the owner alone


def save_state(
    folder: Path, step: int, tensors: dict[str, torch.Tensor], record: dict[str, Any], keep_every: int = 0
) -> None:
    """Writes `folder`/step-NNNNNNNN whole or not at all, then drops all but the last two and every `keep_every`-th step
    (0: none). `record` must be JSON."""
    with atomic_folder(folder / f"step-{step:08d}") as temporary:
        write_tensors(temporary / TENSORS, tensors)
        write_json(temporary / RECORD, {**record, "step": step, "sha256": sha256_file(temporary / TENSORS)})
    for old in _steps(folder)[:-KEPT]:
        if not keep_every or int(old.name.removeprefix("step-")) % keep_every:
            shutil.rmtree(old)
    for left in folder.glob(".step-*"):  # of a run killed while it was saving
        shutil.rmtree(left, ignore_errors=True)


def load_state(folder: Path, fingerprint: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The newest state, or None when there is none.

    Raises UserError when it is damaged (size, hash, format) or belongs to other params, data or teachers.
    """
    newest = newest_state(folder)
    if newest is None:
        return None
    tensors, record = read_state(newest)
    if record["fingerprint"] != fingerprint:
        raise UserError(f"{newest}: belongs to other params, data or teachers; remove {folder} to start anew")
    return tensors, record


def newest_state(folder: Path) -> Path | None:
    """The newest step-NNNNNNNN below `folder`, if there is one."""
    return next(reversed(_steps(folder)), None)


def read_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """One state's tensors and record. Raises UserError when it is damaged."""
    record, remedy = read_json(path / RECORD), f"remove {path} to go on from the state before it"
    unknown = [key for key in ("fingerprint", "sha256", "step") if not isinstance(record, dict) or key not in record]
    if unknown:
        raise UserError(f"{path / RECORD}: {unknown[0]!r} is missing; {remedy}")
    try:
        if sha256_file(path / TENSORS) != record["sha256"]:
            differs = "truncated or changed since it was written (its SHA-256 differs)"
            raise UserError(f"{path / TENSORS}: {differs}; {remedy}")
        return load_file(path / TENSORS), record
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a whole checkpoint ({error}); {remedy}") from error


class Ema:
    """Exponential moving average of named fp32 parameters; decay 0 keeps the parameters themselves.

    The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates, so that short runs are not averages of their
    start.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise UserError(f"ema = {decay}: must be in [0, 1)")
        self.decay, self.updates = decay, 0
        self.shadow = {name: value.detach().clone() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, torch.Tensor], ok: torch.Tensor | None = None) -> None:
        """`ok`, a 0-dim tensor of 1 or 0: with 0 the average stays exactly as it is, without the host knowing."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averages, values = list(self.shadow.values()), [parameters[name].detach() for name in self.shadow]
        if ok is None:
            torch._foreach_lerp_(averages, values, 1.0 - decay)
        else:
            steps = torch._foreach_sub(values, averages)
            torch._foreach_mul_(steps, ok * (1.0 - decay))
            torch._foreach_add_(averages, steps)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Raises UserError when the file is missing, truncated, not safetensors, or holds a value that is not finite."""
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        hint = "`dvc pull` brings the bundled teachers, `dvc repro` makes the rest"
        raise UserError(f"{path}: no such file; {hint}") from error
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); make or pull it again") from error
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(f"{path}: tensor {name} holds values that are not finite; the checkpoint is damaged")
    return tensors


def training_tensors(
    parameters: Mapping[str, torch.Tensor], ema: Ema, optimizers: Optimizers
) -> dict[str, torch.Tensor]:
    """What a training goes on from: trained values, their averages and the optimizers' moments, by name."""
    groups = {"trainable": parameters, "ema": ema.shadow, "optimizer": optimizers.tensors()}
    return {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}


@torch.no_grad()
def load_training(
    tensors: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor], ema: Ema, optimizers: Optimizers
) -> None:
    """Puts `training_tensors` back."""
    for name, parameter in parameters.items():
        parameter.copy_(tensors[f"trainable.{name}"])
        ema.shadow[name].copy_(tensors[f"ema.{name}"])
    prefix = "optimizer."
    optimizers.load_tensors({key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)})
