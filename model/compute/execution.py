"""How a step is computed: batches that fit, precision, kernels, recomputation, the adapter merged for the rollout, and
the count of network evaluations.

Nothing here changes what is learned: all but `precision` alters a result by rounding at most.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any, TypeVar, cast

import psutil
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from data.errors import UserError
from model.compute.settings import ExecutionParams
from model.fields.base import VelocityField, plain_fields

T = TypeVar("T")
PRECISION = {"fp32": None, "bf16": torch.bfloat16}
KERNELS: dict[str, SDPBackend | None] = {
    "auto": None,  # torch chooses
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
MEMORY_SHARE = 0.6  # of the free memory that the activations of one micro-batch may take
ROLLOUT_FACTOR = 8  # rows of a rollout for each row of a micro-batch: without a graph a row costs little memory


@dataclass(frozen=True)
class Execution:
    """What a run uses, decided before its first step. `recompute`: how many of the network's blocks recompute their
    activations in the backward.

    `deferred`: losses and norms are read one step late, so that the host never waits for the device within a step.
    `lockstep`: every process runs the same sequence of forwards and backwards, which a sharded base needs; a process
    that has none left runs it on a row that counts nothing.
    """

    device: torch.device
    micro_batch: int
    rollout_batch: int
    dtype: torch.dtype | None
    attention: str
    merged: bool
    recompute: int
    deferred: bool
    lockstep: bool
    compiled_rollout: bool = False


# In fp32, nothing cut, nothing merged.
WHOLE_BATCH = Execution(torch.device("cpu"), 1 << 30, 1 << 30, None, "auto", False, 0, False, False)


def device_of(params: ExecutionParams, rank: int = 0) -> torch.device:
    """Raises UserError when CUDA is asked for and there is none."""
    if params.device == "cpu" or (params.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("execution.device = cuda: torch finds no CUDA device on this machine; choose auto or cpu")
    return torch.device("cuda", rank % torch.cuda.device_count())


def networks_of(field: VelocityField) -> list[nn.Module]:
    """The networks that a field asks; none for a field that is a formula."""
    networks = [getattr(plain, "network", None) for plain in plain_fields(field)]
    return [network for network in networks if isinstance(network, nn.Module)]


def moved(value: T, device: torch.device) -> T:
    """A tensor, or a dataclass of tensors, on `device`; through pinned memory to CUDA, so that nothing waits."""
    whole: Any = value
    if isinstance(value, torch.Tensor):
        if value.device == device:
            return value
        return (whole.pin_memory() if device.type == "cuda" else whole).to(device, non_blocking=True)
    if hasattr(value, "to"):  # it knows what of it belongs on the host
        return whole.to(device)
    values = {field.name: getattr(value, field.name) for field in dataclasses.fields(whole)}
    tensors = {name: moved(item, device) for name, item in values.items() if isinstance(item, torch.Tensor)}
    return dataclasses.replace(whole, **tensors)


# --- what fits --------------------------------------------------------------------------------------------------------


def activation_bytes(forward: Callable[[], torch.Tensor], networks: Iterable[nn.Module]) -> int:
    """Bytes that the graph of `forward()` keeps for the backward, parameters aside: counted where autograd saves them,
    so equal on every machine."""
    own = {parameter.untyped_storage().data_ptr() for network in networks for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would hold its own graph: a cycle that nothing frees

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        answer = forward()
    del answer  # held until here, so that no storage was counted twice under another's address
    return sum(kept.values())


def free_memory(device: torch.device) -> int:
    """Bytes that a further allocation may take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(psutil.virtual_memory().available)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformer, in order: the children of its lists of modules."""
    return [block for child in network.children() if isinstance(child, nn.ModuleList) for block in child]


def fit(
    params: ExecutionParams,
    device: torch.device,
    network: Any,
    row: Callable[[], torch.Tensor],
    batch: int,
    budget: int | None = None,
) -> Execution:
    """Decides batch sizes and recomputation for `row()`, the student's forward on one row. `budget` in bytes: the free
    memory's share unless given.

    Recomputes only when memory asks for it: as few blocks as let one row fit (all where `checkpointing` is "always").
    """
    if budget is None:
        budget = int(MEMORY_SHARE * free_memory(device) / (params.processes if device.type == "cpu" else 1))
    rows, recompute = max(params.micro_batch, 1), 0
    if params.micro_batch == 0 or params.checkpointing == "auto":
        with precision(device, PRECISION[params.precision]):
            recompute, need = _recomputed(params.checkpointing, network, row, budget // rows)
        if params.micro_batch == 0:
            rows = max(1, budget // max(need, 1))
    elif params.checkpointing == "always":
        recompute = len(blocks_of(network))
    rows = min(rows, batch)
    recompute_blocks(network, recompute)
    merged = params.merge_rollout == "always" or (params.merge_rollout == "auto" and params.precision == "fp32")
    return Execution(
        device,
        rows,
        min(batch, params.rollout_batch or rows * ROLLOUT_FACTOR),
        PRECISION[params.precision],
        params.attention,
        merged,
        recompute,
        device.type == "cuda",
        params.shard_base,
        params.compile == "rollout",
    )


def _recomputed(checkpointing: str, network: Any, row: Callable[[], torch.Tensor], allowed: int) -> tuple[int, int]:
    """How many blocks recompute their activations so that `row()` takes at most `allowed` bytes, and what it takes."""
    blocks = len(blocks_of(network))
    recompute_blocks(network, blocks if checkpointing == "always" else 0)
    whole = activation_bytes(row, [network])
    if checkpointing != "auto" or whole <= allowed:
        return (blocks if checkpointing == "always" else 0), whole
    recompute_blocks(network, blocks)
    # A block under recomputation rebuilds all its activations once in the backward, so the share of one block comes on
    # top of what is kept.
    share = (whole - activation_bytes(row, [network])) / max(blocks, 1)
    needs = {count: whole - count * share + (share if count else 0) for count in range(blocks + 1)}
    count = next((count for count, need in needs.items() if need <= allowed), blocks)
    return count, int(needs[count])


def recompute_blocks(network: Any, count: int) -> None:
    """The first `count` blocks recompute their activations in the backward; a network that cannot stays as it is."""
    if not hasattr(network, "enable_gradient_checkpointing"):
        return
    if not count:
        network.disable_gradient_checkpointing()
        return
    chosen = {id(block) for block in blocks_of(network)[:count]}

    def run(block: Any, *inputs: Any) -> Any:
        return checkpoint(block.__call__, *inputs, use_reentrant=False) if id(block) in chosen else block(*inputs)

    network.enable_gradient_checkpointing(run)


# --- arithmetic and kernels -------------------------------------------------------------------------------------------


@contextmanager
def precision(device: torch.device, dtype: torch.dtype | None, attention: str = "auto") -> Iterator[None]:
    """Student and teachers run inside the same one, so that equal weights give equal answers."""
    backend = KERNELS[attention]
    with ExitStack() as stack:
        if backend is not None:
            stack.enter_context(sdpa_kernel(backend))
        if dtype is not None:
            stack.enter_context(torch.autocast(device.type, dtype=dtype))
        yield


def prepare_networks(
    params: ExecutionParams,
    device: torch.device,
    student: nn.Module,
    trained: Iterable[nn.Parameter],
    teachers: Iterable[VelocityField],
) -> None:
    """Moves the networks to the device, but for offloaded teachers, which visit it when they are asked.

    In bf16 everything frozen is stored so, unless all of the student trains (then both keep fp32 and round alike).
    """
    fields = [plain for teacher in teachers for plain in plain_fields(teacher)]
    waiting = {id(network) for field in fields if getattr(field, "offload", None) for network in networks_of(field)}
    kept = {id(parameter) for parameter in trained}
    if params.compile != "none":
        check_compiler(device)
    others = [network for field in fields for network in networks_of(field)]
    networks = list({id(network): network for network in (student, *others)}.values())
    shared = all("lora_" in name for name, parameter in student.named_parameters() if id(parameter) in kept)
    for network in networks:
        if id(network) not in waiting:
            network.to(device)
        if params.precision == "bf16" and shared:
            for name, parameter in network.named_parameters():
                if "lora_" not in name:
                    parameter.data = parameter.data.to(torch.bfloat16)
        for block in blocks_of(network) if params.compile == "blocks" else []:
            block.compile(dynamic=True)  # blocks of one kind share what was compiled for the first


def check_compiler(device: torch.device) -> None:
    """Raises UserError when torch.compile would find no C++ compiler; on CUDA it brings its own."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and not shutil.which(compiler):
        remedy = "install it, name another as CXX, or choose none"
        raise UserError(f"execution.compile: torch.compile needs {compiler} on a CPU, and it is not here; {remedy}")


@contextmanager
def rollout_ready(network: nn.Module, adapter: str | None, execution: Execution) -> Iterator[None]:
    """Within it the network is as fast as a forward without gradient can be: adapter merged, blocks compiled."""
    with ExitStack() as stack:
        if execution.merged:
            stack.enter_context(merged_adapter(network, adapter))
        if execution.compiled_rollout:
            stack.enter_context(compiled_blocks(network))
        yield


@contextmanager
def merged_adapter(network: nn.Module, adapter: str | None) -> Iterator[None]:
    """Within it every LoRA layer that has `adapter`, the active one, multiplies by W + s B A, made anew in each call,
    and answers no gradient.

    On rows of many tokens that costs a fraction of the two extra products, takes no memory of its own, and leaves the
    base's weights untouched. A no-op without an adapter.
    """
    named: list[Any] = [module for module in network.modules() if hasattr(module, "get_delta_weight")]
    layers = [layer for layer in named if adapter is not None and adapter in layer.lora_A]
    with _other_forwards({layer: _merged_forward for layer in layers}):
        yield


def _merged_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    base, name = layer.base_layer, layer.active_adapters[0]
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    weight = torch.addmm(base.weight.to(down.dtype), up, down, alpha=layer.scaling[name])
    return nn.functional.linear(x, weight.to(base.weight.dtype), base.bias)


@contextmanager
def compiled_blocks(network: nn.Module) -> Iterator[None]:
    """Within it the blocks run compiled, for any number of rows. The first call of a kind takes tens of seconds."""
    with _other_forwards({block: compiled_forward(cast(Any, type(block))) for block in blocks_of(network)}):
        yield


@cache
def compiled_forward(kind: Any) -> Callable[..., Any]:
    """The compiled forward of a class of modules, module first, so that all of the class share it."""
    return torch.compile(kind.forward, dynamic=True)


@contextmanager
def _other_forwards(chosen: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """Modules with another forward(module, ...) for a while."""
    for module, forward in chosen.items():
        module.forward = MethodType(forward, module)
    try:
        yield
    finally:
        for module in chosen:
            del module.forward  # the class's own shows again


# --- counting ---------------------------------------------------------------------------------------------------------


class EvaluationCounter:
    """Counts the rows that networks are asked, at the networks; recomputed blocks are no evaluations."""

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        self.rows, distinct = 0, {id(network): network for network in networks}.values()
        self.handles = [network.register_forward_pre_hook(self._count, with_kwargs=True) for network in distinct]

    def _count(self, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        first = inputs[0] if inputs else next(named[key] for key in ("hidden_states", "x") if key in named)
        self.rows += len(first)

    def take(self) -> int:
        counted, self.rows = self.rows, 0
        return counted

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
