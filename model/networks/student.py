"""The student: a network that starts from the base, a teacher or their merge, and what of it trains: all parameters, or
a LoRA adapter on it frozen."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.errors import UserError
from data.files import read_json, sha256_file, write_json
from model.backbones import TRANSFORMER, Backbone, load_backbone
from model.checkpoint import write_tensors
from model.networks.adapters import Adapter, concatenated
from model.networks.network import (
    NetworkField,
    adapter_of,
    add_adapter,
    base_weight,
    keys_in_file,
    load_adapter,
    own_layers,
)
from model.networks.teachers import ADAPTER_WEIGHTS, BASE, WEIGHTS

STUDENT = "student"  # the adapter's name
FROZEN = "frozen"  # of its frozen copy
MERGED, SPECIALISTS = "merged", "specialists"
RECORD = "student.json"
TRAINABLE = ("all", "adapter")


@dataclass(frozen=True)
class Sampled:
    """How a model is drawn: in `steps` Euler steps, guided at `guidance` (1: unguided)."""

    steps: int
    guidance: float

    @property
    def evaluations(self) -> int:
        """Of the network, an image."""
        return self.steps * (1 if self.guidance == 1.0 else 2)


def sampled(record: Mapping[str, Any], usual: int) -> Sampled:
    """How a student's record says that it is drawn; `usual`: the steps of one that any number does for."""
    return Sampled(record.get("steps") or usual, record.get("guidance") or 1.0)


@dataclass(frozen=True)
class Student:
    """`parameters` are the fp32 trainables by name; `adapter` is None when all parameters train."""

    backbone: Backbone
    network: Any
    adapter: str | None
    parameters: dict[str, nn.Parameter]

    @property
    def field(self) -> NetworkField:
        return NetworkField(self.backbone, self.network, self.adapter)

    @property
    def layers(self) -> set[str]:
        """The modules that its adapter covers."""
        return {name.rsplit(".lora_", 1)[0] for name in self.parameters} if self.adapter else set()

    @torch.no_grad()
    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def frozen_copy(self) -> NetworkField:
        """The student as it is now, as a field that no longer changes: for an adapter a second one on the same network,
        else a network of its own."""
        if self.adapter is not None:
            config = self.network.peft_config[self.adapter]
            rank, alpha, targets = config.r, config.lora_alpha, sorted(self.layers)
            copied = add_adapter(self.backbone, self.network, FROZEN, rank, alpha, seed=0, targets=targets)
            with torch.no_grad():
                for name, parameter in copied.items():
                    parameter.copy_(self.parameters[name.replace(f".{FROZEN}.", f".{self.adapter}.")])
                    parameter.requires_grad_(False)
            return NetworkField(self.backbone, self.network, FROZEN)
        network = copy.deepcopy(self.network)
        network.requires_grad_(False)
        return NetworkField(self.backbone, network, self.adapter)


def plain_weights(field: NetworkField) -> dict[str, torch.Tensor]:
    """A field's weights without adapters, in fp32: those of its network, its adapter's delta added where it has one."""
    weights = {}
    for name, value in field.network.state_dict().items():
        if "lora_" not in name:
            copied = value.detach().clone()
            weights[name.replace(".base_layer", "")] = copied.float() if copied.is_floating_point() else copied
    if field.adapter is not None:
        for name, module in field.network.named_modules():
            if hasattr(module, "get_delta_weight") and field.adapter in getattr(module, "lora_A", {}):
                weights[f"{name}.weight"] += module.get_delta_weight(field.adapter).detach()
    return weights


def merged_weights(base: NetworkField, teachers: Mapping[str, NetworkField]) -> dict[str, torch.Tensor]:
    """The base plus the mean of the teachers' differences from it (the paper's `merge` baseline). The base, where it is
    one of them, counts with difference 0."""
    start = plain_weights(base)
    others = [plain_weights(field) for teacher, field in teachers.items() if teacher != BASE]
    return {
        name: value + sum(other[name].to(value.device) - value for other in others) / len(teachers)
        for name, value in start.items()
    }


def _network_with(backbone: Backbone, weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> Any:
    network = type(backbone.network).from_config(dict(backbone.network.config))
    network.load_state_dict(weights)
    network.eval()
    nn.Module.to(network, base_weight(backbone).device, dtype)
    return network


def start_student(
    backbone: Backbone,
    teachers: Mapping[str, NetworkField],
    start: str,
    trainable: str,
    rank: int,
    alpha: int,
    seed: int,
) -> Student:
    """A student before its first step.

    `teachers`: the routed ones, the base among them where it is. `start`: "base", a teacher's name, "merged" (the base
    plus the mean difference of all of them) or "specialists" (the same without the base among them). `trainable`: "all"
    or "adapter". An adapter that starts from the base or from adapters on it shares the base's weights in memory: what
    it starts from lies in its first ranks, so it stays a plain adapter. Every other start is a network of its own.
    Raises UserError for an unknown name, or a rank too small for the start.
    """
    others = {name: field for name, field in teachers.items() if name != BASE}
    if start == SPECIALISTS and others:
        start, teachers = MERGED, others
    base = NetworkField(backbone, backbone.network)
    if trainable not in TRAINABLE:
        raise UserError(f"trainable = {trainable!r}: choose one of {list(TRAINABLE)}")
    if start not in (BASE, *others) and not (start == MERGED and others):
        choices = (
            f"{BASE!r}, {MERGED!r}, {SPECIALISTS!r} (both need a teacher besides the base) or one of {sorted(others)}"
        )
        raise UserError(f"start = {start!r}: choose {choices}")
    if trainable == "all":
        # What trains is fp32; what is frozen keeps the base's precision, so that student and teachers compute alike.
        network = _network_with(backbone, _weights_at(start, base, teachers))
        network.requires_grad_(True)
        return Student(backbone, network, None, dict(network.named_parameters()))
    sources = list(others.values()) if start == MERGED else [others[start]] if start in others else []
    network = backbone.network
    if sources and all(field.adapter and field.network is network for field in sources):
        share = 1.0 / len(teachers) if start == MERGED else 1.0
        adapters = [(adapter_of(network, str(field.adapter)), share) for field in sources]
        return _start_in_adapter(backbone, concatenated(adapters), start, rank, alpha, seed)
    if sources:
        network = _network_with(backbone, _weights_at(start, base, teachers), base_weight(backbone).dtype)
    network.requires_grad_(False)
    return Student(backbone, network, STUDENT, add_adapter(backbone, network, STUDENT, rank, alpha, seed))


def _weights_at(start: str, base: NetworkField, teachers: Mapping[str, NetworkField]) -> dict[str, torch.Tensor]:
    return merged_weights(base, teachers) if start == MERGED else plain_weights({**teachers, BASE: base}[start])


def _start_in_adapter(backbone: Backbone, joined: Adapter, start: str, rank: int, alpha: int, seed: int) -> Student:
    """An adapter whose first ranks are `joined`, so that the student starts there exactly; the others are fresh."""
    if joined.rank > rank:
        takes = f"takes rank {joined.rank} of the student's adapter, which has rank = {rank}"
        raise UserError(f"start = {start!r} {takes}: raise rank, or train all parameters")
    network = backbone.network
    network.requires_grad_(False)
    usual = own_layers(backbone)
    targets = () if usual >= set(joined.modules) else sorted(usual | set(joined.modules))
    parameters = add_adapter(backbone, network, STUDENT, rank, alpha, seed, targets)
    with torch.no_grad():
        for module in joined.modules:
            down, up = joined.pair(module)
            parameters[f"{module}.lora_A.{STUDENT}.weight"][: joined.rank].copy_(down)
            parameters[f"{module}.lora_B.{STUDENT}.weight"][:, : joined.rank].copy_(up * (rank / alpha))
    return Student(backbone, network, STUDENT, parameters)


def save_student(folder: Path, student: Student, record: dict[str, Any]) -> None:
    """Writes `folder`: student.json, the trained weights in fp32, and for an adapter on a start of its own that start
    too.

    The record's `resolution` and `max_tokens` are those it was trained with, so that it is drawn from as it was taught.
    An adapter on the shared base leaves the base out; the record's `base_sha256` binds the two.
    """
    folder.mkdir(parents=True, exist_ok=True)
    backbone = student.backbone
    shared = student.network is backbone.network
    whole, weights = folder / "transformer" / WEIGHTS, folder / ADAPTER_WEIGHTS
    if student.adapter is None:
        weights = whole
        backbone.save(folder, student.network)
        write_tensors(whole, student.network.state_dict())
    else:
        if not shared:
            frozen = _network_with(backbone, plain_weights(replace(student.field, adapter=None)))
            backbone.save(folder, frozen)
            write_tensors(whole, frozen.state_dict())
        write_tensors(weights, keys_in_file(student.parameters, STUDENT))
    layers = student.layers
    facts = {
        "backbone": backbone.name,
        "adapter": student.adapter is not None,
        "own_start": not shared,
        "targets": sorted(layers) if layers and layers != own_layers(backbone) else [],
        "resolution": backbone.latent_shape[1] * backbone.pixels_per_latent,
        "max_tokens": backbone.max_tokens,
        "sha256": sha256_file(weights),
        "start_sha256": None if shared or weights == whole else sha256_file(whole),
    }
    write_json(folder / RECORD, {**record, **facts})


def load_student(folder: Path, backbone: Backbone, base_sha256: str, device: torch.device | str = "cpu") -> Student:
    """The student on `backbone`; one with a start of its own takes the base network's place, on its device, or on
    `device` where the base was not loaded.

    Raises UserError when the checkpoint is damaged, or was trained on another base than `backbone`'s."""
    record = read_json(folder / RECORD)
    keys = ("adapter", "own_start", "base_sha256", "sha256", "start_sha256", "backbone", "rank", "alpha")
    missing = [key for key in keys if key not in record]
    if missing:
        raise UserError(f"{folder / RECORD}: {missing[0]!r} is missing; run the stage that made it again")
    whole, weights = folder / "transformer" / WEIGHTS, folder / ADAPTER_WEIGHTS
    for file, sha256 in ((weights if record["adapter"] else whole, record["sha256"]), (whole, record["start_sha256"])):
        if sha256 is not None and (not file.exists() or sha256_file(file) != sha256):
            what = f"missing or not the file that {RECORD} names (its SHA-256 differs)"
            raise UserError(f"{file}: {what}; run the stage that made it again")
    if record["base_sha256"] != base_sha256:
        differs = f"base_sha256 = {record['base_sha256'][:12]}, the teachers' base has {base_sha256[:12]}"
        raise UserError(f"{folder / RECORD}: {differs}; distil again on this base")
    weight = base_weight(backbone)
    dtype = weight.dtype if record["adapter"] else torch.float32
    place = device if weight.is_meta else weight.device
    network = backbone.network
    if record["own_start"]:
        network = load_backbone(folder, need=TRANSFORMER, dtype=dtype, device=place).network
    if not record["adapter"]:
        network.requires_grad_(True)
        return Student(backbone, network, None, dict(network.named_parameters()))
    rank, alpha, targets = record["rank"], record["alpha"], record.get("targets", ())
    parameters = add_adapter(backbone, network, STUDENT, rank, alpha, seed=0, targets=targets)
    load_adapter(parameters, weights, STUDENT)
    return Student(backbone, network, STUDENT, parameters)


def no_adapter(student: Student) -> str:
    """Why an adapter alone is not the student, "" where it is."""
    if student.adapter is None:
        return "this student trained all its parameters: its difference from the base is no low-rank adapter"
    if student.network is not student.backbone.network:
        return (
            "this student's adapter lies on a start of its own (a full checkpoint or a merge of some), so the adapter "
            "alone is not the student"
        )
    return ""


def student_adapter(student: Student) -> Adapter:
    """The student's whole difference from the base as one adapter. Raises UserError where there is none."""
    if student.adapter is None or no_adapter(student):
        raise UserError(no_adapter(student))
    return adapter_of(student.network, student.adapter)
