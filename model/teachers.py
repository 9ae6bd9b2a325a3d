"""Teachers on disk and in memory: the base itself, adapters on it, or full checkpoints of the same network.

A teacher is a folder: its weights and `teacher.json`, the record that binds them to a base, a latent space and a scheduler.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from data.errors import UserError, UserErrors
from data.files import read_json, sha256_file, write_json
from model.backbones import Backbone
from model.backbones.micro import MicroBackbone, load_weights, read_tensors
from model.checkpoint import write_tensors
from model.field import Condition

BASE = "base"
RECORD = "teacher.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
KINDS = ("base", "full", "adapter")
RESERVED = ("student", "merged")  # the student's adapter, and a student's start
BACKBONES = {"micro": MicroBackbone.load}


@dataclass(frozen=True)
class TeacherRecord:
    """What `teacher.json` holds. `kind`: "base", "adapter" or "full"; rank and alpha are 0 unless it is an adapter; hashes are SHA-256 of the weight files."""

    name: str
    capability: str
    kind: str
    backbone: str
    base_sha256: str
    sha256: str
    latent_shape: list[int]
    scheduler: dict[str, Any]
    precision: str
    rank: int
    alpha: int


@dataclass(frozen=True)
class NetworkField:
    """A network, with one of its adapters switched on or all switched off, as a velocity field."""

    backbone: Backbone
    network: Any
    adapter: str | None = None

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        switch_adapter(self.network, self.adapter)
        return self.backbone.velocity(self.network, x_t, t, condition)


def switch_adapter(network: Any, adapter: str | None) -> None:
    """Makes `adapter` the active one, or None of them. A no-op on a network that has no adapters."""
    if not getattr(network, "peft_config", None) or _is_switched(network, adapter):
        return
    if adapter is None:
        network.disable_adapters()
    else:
        network.enable_adapters()
        network.set_adapter(adapter)


def _is_switched(network: Any, adapter: str | None) -> bool:
    """Whether nothing is left to switch. Layers are switched together, so the first tells; going through all of them costs as much as a small forward."""
    layer = next(module for module in network.modules() if hasattr(module, "lora_A"))
    if adapter is None or layer.disable_adapters:
        return adapter is None and bool(layer.disable_adapters)
    ready = adapter in layer.lora_A and (layer.lora_A[adapter].weight.requires_grad or not torch.is_grad_enabled())
    return ready and list(layer.active_adapters) == [adapter]


def add_adapter(backbone: Backbone, network: Any, name: str, rank: int, alpha: int, seed: int) -> dict[str, nn.Parameter]:
    """A fresh LoRA adapter on the backbone's target modules (its output is zero until trained); returns its named fp32 parameters."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters on one base are the design
        torch.manual_seed(seed)
        network.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(backbone.adapter_targets), init_lora_weights=True), adapter_name=name)
    return adapter_parameters(network, name)


def adapter_parameters(network: nn.Module, name: str) -> dict[str, nn.Parameter]:
    return {key: parameter for key, parameter in network.named_parameters() if re.search(rf"\.lora_\w+\.{re.escape(name)}\.", key)}


def weights_file(folder: Path, kind: str) -> Path:
    return folder / ADAPTER_WEIGHTS if kind == "adapter" else folder / "transformer" / WEIGHTS


def save_teacher(
    folder: Path, backbone: Backbone, network: nn.Module, *, name: str, capability: str, kind: str, base_sha256: str | None, rank: int = 0, alpha: int = 0
) -> TeacherRecord:
    """Writes weights in half precision and the record. The base brings its text encoder, codec and scheduler along; `base_sha256` is None for it."""
    if kind == "adapter":
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(
            folder / ADAPTER_WEIGHTS, {key.replace(f".{name}.", "."): value.to(torch.float16) for key, value in adapter_parameters(network, name).items()}
        )
    elif kind == "full":
        (folder / "transformer").mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "transformer" / WEIGHTS, {key: value.to(torch.float16) for key, value in network.state_dict().items()})
    else:
        backbone.save(folder, network)
    sha256 = sha256_file(weights_file(folder, kind))
    record = TeacherRecord(
        name, capability, kind, backbone.name, base_sha256 or sha256, sha256, list(backbone.latent_shape), backbone.scheduler, "float16", rank, alpha
    )
    write_json(folder / RECORD, asdict(record))
    return record


def read_records(folder: Path) -> dict[str, TeacherRecord]:
    """Every teacher's record below `folder`, by name. Raises UserErrors for records that are damaged or missing altogether."""
    records, faults = _scan(folder)
    if faults:
        raise UserErrors("teachers cannot be used:", faults)
    return records


def _scan(folder: Path) -> tuple[dict[str, TeacherRecord], list[str]]:
    """The records that can be read, and the faults of those that cannot or that are not what they say."""
    records, faults = {}, []
    for path in sorted(folder.glob(f"*/{RECORD}")):
        try:
            record = TeacherRecord(**read_json(path))
        except TypeError as error:
            faults.append(f"{path}: not a teacher record ({error})")
            continue
        except UserError as error:
            faults.append(str(error))
            continue
        if record.name != path.parent.name:
            faults.append(f"{path}: name = {record.name!r}, but the folder is called {path.parent.name!r}")
        if record.kind not in KINDS:
            faults.append(f"{path}: kind = {record.kind!r}: choose one of {list(KINDS)}")
            continue
        if record.name in RESERVED or not re.fullmatch(r"[A-Za-z0-9_-]+", record.name):
            faults.append(f"{path}: name = {record.name!r}: use letters, digits, - and _, and none of {list(RESERVED)}")
        records[path.parent.name] = record
    if not records and not faults:
        faults.append(f"{folder}: no teacher in it; `dvc pull data/teachers` brings the bundled ones")
    return records, faults


def compatibility_faults(folder: Path, names: Iterable[str]) -> list[str]:
    """Why the named teachers cannot be distilled together: missing files, changed hashes, another base, latent space or scheduler.

    Reads no weights, only their hashes.
    """
    records, faults = _scan(folder)
    base = records.get(BASE)
    for name in dict.fromkeys([BASE, *names]):
        record = records.get(name)
        if record is None:
            if not (folder / name / RECORD).exists():
                faults.append(
                    f"{folder / name}: no such teacher; have {sorted(records)}"
                    if name != BASE
                    else f"{folder / BASE}: the base is missing; every teacher is defined on it"
                )
            continue
        weights = weights_file(folder / name, record.kind)
        if not weights.exists():
            faults.append(f"{weights}: no such file; `dvc pull data/teachers` brings the bundled teachers")
        elif sha256_file(weights) != record.sha256:
            faults.append(f"{weights}: its SHA-256 is not the one of {name}/{RECORD}; the file was changed or cut short, pull it again")
        if record.backbone not in BACKBONES:
            faults.append(f"{name}: backbone = {record.backbone!r}: unknown; choose one of {sorted(BACKBONES)}")
        for field in ("backbone", "base_sha256", "latent_shape", "scheduler") if base else ():
            if getattr(record, field) != getattr(base, field):
                faults.append(
                    f"{name}: {field} = {getattr(record, field)!r}, the base has {getattr(base, field)!r}; teachers must share base, latent space and scheduler"
                )
    return faults


def load_base(folder: Path) -> Backbone:
    """The frozen base below the teachers' folder. Raises UserErrors when it is missing or damaged."""
    faults = compatibility_faults(folder, [])
    if faults:
        raise UserErrors("teachers cannot be used:", faults)
    return _load_base(folder)


def _load_base(folder: Path) -> Backbone:
    return BACKBONES[read_json(folder / BASE / RECORD)["backbone"]](folder / BASE)


def load_network(backbone: Backbone, folder: Path, record: TeacherRecord) -> Any:
    """A full checkpoint as a frozen network of its own: the base's class and configuration, without the adapters that the base may carry by now."""
    network = type(backbone.network).from_config(dict(backbone.network.config))
    load_weights(network, weights_file(folder, record.kind))
    network.requires_grad_(False)
    network.eval()
    return network


def load_teachers(folder: Path, names: Iterable[str]) -> tuple[Backbone, dict[str, NetworkField]]:
    """The shared base and the named teachers as fields: "base" is the base with every adapter off, adapters are switched on it, full checkpoints stand alone.

    Raises UserErrors with every fault when they do not belong together.
    """
    names = list(dict.fromkeys(names))
    faults = compatibility_faults(folder, names)
    if faults:
        raise UserErrors("teachers cannot be used:", faults)
    records, backbone = read_records(folder), _load_base(folder)
    fields = {}
    for name in names:
        record = records[name]
        if record.kind == "base":
            fields[name] = NetworkField(backbone, backbone.network)
        elif record.kind == "full":
            fields[name] = NetworkField(backbone, load_network(backbone, folder / name, record))
        else:
            parameters = add_adapter(backbone, backbone.network, name, record.rank, record.alpha, seed=0)
            load_adapter(parameters, weights_file(folder / name, record.kind), name)
            fields[name] = NetworkField(backbone, backbone.network, name)
    backbone.network.requires_grad_(False)
    return backbone, fields


@torch.no_grad()
def load_adapter(parameters: dict[str, nn.Parameter], path: Path, name: str) -> None:
    """Every key must match, in name and shape. Raises UserError otherwise."""
    tensors = read_tensors(path)
    expected = {key.replace(f".{name}.", "."): parameter for key, parameter in parameters.items()}
    wrong = sorted(expected.keys() ^ tensors.keys()) or sorted(key for key in expected if expected[key].shape != tensors[key].shape)
    if wrong:
        raise UserError(
            f"{path}: does not fit this adapter (first differing key: {wrong[0]}, {len(wrong)} in all); rank and target modules must be the record's"
        )
    for key, parameter in expected.items():
        parameter.copy_(tensors[key])
