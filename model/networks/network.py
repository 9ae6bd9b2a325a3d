"""Networks as velocity fields: adapters added, switched and loaded, networks that visit the device."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig
from torch import nn

from data.errors import UserError
from model.backbones import Backbone, parts
from model.checkpoint import read_tensors
from model.fields.base import Condition, VelocityField
from model.networks.adapters import Adapter, linear_modules

T = TypeVar("T")


@dataclass(frozen=True)
class NetworkField(VelocityField):
    """A network, with one of its adapters switched on or all switched off, as a velocity field.

    `offload` names the device that the network visits for each of its evaluations, living on the CPU between them;
    None: it stays where it is.
    """

    backbone: Backbone
    network: Any
    adapter: str | None = None
    offload: torch.device | None = None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        device: torch.device = next(self.network.parameters()).device
        return self.offload or device

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        switch_adapter(self.network, self.adapter)
        with visiting(self.network, self.offload):
            return self.backbone.velocity(self.network, x_t, t, condition)


@contextmanager
def visiting(network: nn.Module, device: torch.device | None) -> Iterator[None]:
    """The frozen network's tensors on `device` for the length of the block. The copies are dropped, not brought back:
    nothing in them has changed."""
    if device is None:
        yield
        return
    home = {value: value.data for value in [*network.parameters(), *network.buffers()]}
    try:
        for value in home:
            value.data = value.data.to(device, copy=True, non_blocking=True)
        yield
    finally:
        for value, data in home.items():
            value.data = data


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
    """Whether nothing is left to switch. Layers are switched together, so the first tells; going through all of them
    costs as much as a small forward."""
    layer = next(module for module in network.modules() if hasattr(module, "lora_A"))
    if adapter is None or layer.disable_adapters:
        return adapter is None and bool(layer.disable_adapters)
    ready = adapter in layer.lora_A and (layer.lora_A[adapter].weight.requires_grad or not torch.is_grad_enabled())
    return ready and list(layer.active_adapters) == [adapter]


def add_adapter(
    backbone: Backbone, network: Any, name: str, rank: int, alpha: int, seed: int, targets: Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """A fresh LoRA adapter on `targets`, or else the backbone's own (its output is zero until trained); returns its
    named fp32 parameters."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several on one base are the design
        torch.manual_seed(seed)
        layers = list(targets or backbone.adapter_targets)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, init_lora_weights=True)
        network.add_adapter(config, adapter_name=name)
    parameters = adapter_parameters(network, name)
    for parameter in parameters.values():  # PEFT gives them the base's precision, in which moments would not decay
        parameter.data = parameter.data.float()
    return parameters


def adapter_parameters(network: nn.Module, name: str) -> dict[str, nn.Parameter]:
    pattern = re.compile(rf"\.lora_\w+\.{re.escape(name)}\.")
    return {key: parameter for key, parameter in network.named_parameters() if pattern.search(key)}


def keys_in_file(parameters: Mapping[str, T], name: str) -> dict[str, T]:
    """An adapter's parameters under the keys of its file, which do not name it."""
    return {key.replace(f".{name}.", "."): parameter for key, parameter in parameters.items()}


def base_weight(backbone: Backbone) -> torch.Tensor:
    """The base's first weight, which tells its precision and device."""
    return next(iter(parts.plain_state(backbone.network).values()))


def own_layers(backbone: Backbone) -> set[str]:
    """The linear layers of the base that an adapter of the family covers when nothing else is said."""
    ends = tuple(f".{end}" for end in backbone.adapter_targets)
    return {name for name in linear_modules(backbone.network) if f".{name}".endswith(ends)}


def adapter_of(network: Any, name: str) -> Adapter:
    """An adapter that is on a network by now, as a value: fp32 copies."""
    parameters = keys_in_file(adapter_parameters(network, name), name)
    tensors = {key: value.detach().float().cpu().clone() for key, value in parameters.items()}
    modules = sorted({key.rsplit(".lora_", 1)[0] for key in tensors})
    config = network.peft_config[name]
    return Adapter(tensors, tuple(modules), int(config.r), int(config.lora_alpha))


@torch.no_grad()
def load_adapter(parameters: dict[str, nn.Parameter], path: Path, name: str) -> None:
    """Every key must match, in name and shape. Raises UserError otherwise."""
    tensors, expected = read_tensors(path), keys_in_file(parameters, name)
    wrong = sorted(expected.keys() ^ tensors.keys())
    wrong = wrong or sorted(key for key in expected if expected[key].shape != tensors[key].shape)
    if wrong:
        differing = f"first differing key: {wrong[0]}, {len(wrong)} in all"
        remedy = "rank and target modules must be the record's"
        raise UserError(f"{path}: does not fit this adapter ({differing}); {remedy}")
    for key, parameter in expected.items():
        parameter.copy_(tensors[key])
