"""Several data-parallel processes on one machine: who computes which samples, and the one reduction a step needs.

Processes meet through a file and talk over the loopback interface: no port is opened to the outside.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, nn

PATIENCE = timedelta(minutes=10)  # for a process that lives but no longer answers; a dead one is noticed at once


@dataclass(frozen=True)
class World:
    """This process among `size`; rank 0 alone reports and writes."""

    rank: int
    size: int


ALONE = World(0, 1)


@contextmanager
def joined(rank: int, size: int, meeting: Path, device: torch.device) -> Iterator[World]:
    """The process group of all that name the same new file `meeting`: gloo on the CPU, NCCL on CUDA."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    address = meeting.absolute().as_uri()
    distributed.init_process_group(backend, init_method=address, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield World(rank, size)
    finally:
        distributed.destroy_process_group()


def deal(costs: Sequence[float], size: int) -> list[list[int]]:
    """Slots by rank, so that the sums of their costs are near equal: longest first, each to the rank with the least
    (Graham's LPT rule). Slots stay sorted."""
    dealt: list[list[int]] = [[] for _ in range(size)]
    sums = [0.0] * size
    for slot in sorted(range(len(costs)), key=lambda slot: (-costs[slot], slot)):
        rank = sums.index(min(sums))
        dealt[rank].append(slot)
        sums[rank] += costs[slot]
    return [sorted(slots) for slots in dealt]


@torch.no_grad()
def reduce_gradients(parameters: Iterable[nn.Parameter], others: torch.Tensor) -> torch.Tensor:
    """Sums gradients in place (a missing one is zero), and returns the sum of `others` (n,): one collective."""
    trained = list(parameters)
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), others])
    distributed.all_reduce(flat)
    sums = flat.split([gradient.numel() for gradient in gradients] + [len(others)])
    torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(sums, gradients)])
    return flat[-len(others) :]


def _meeting_device() -> str:
    return "cuda" if distributed.get_backend() == "nccl" else "cpu"


def most(counts: Sequence[int]) -> list[int]:
    """The largest of each count over all processes."""
    if not distributed.is_initialized():
        return list(counts)
    box = torch.tensor(list(counts), device=_meeting_device())
    distributed.all_reduce(box, op=distributed.ReduceOp.MAX)
    return [int(count) for count in box.tolist()]


def shared(value: float, world: World) -> float:
    """Rank 0's value, in every process."""
    if world.size == 1:
        return value
    box = torch.tensor([value], dtype=torch.float64, device=_meeting_device())
    distributed.broadcast(box, src=0)
    return float(box[0])


def shard_frozen(blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Spreads the blocks' weights over the processes (FSDP2); each block is gathered while it computes. Adapters stay
    whole everywhere.

    From here on every process must run the same sequence of forwards and backwards (`Execution.lockstep`).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for block in blocks:
        adapters = {parameter for name, parameter in block.named_parameters() if "lora_" in name}
        fully_shard(block, mesh=mesh, ignored_params=adapters)
