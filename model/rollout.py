"""The student's own path, and the one state on it where student and teacher are compared.

State j of an Euler rollout costs j evaluations, so the query index is drawn first and each row stops at its own: the
same distribution as rolling out in full and picking afterwards (DanceOPD, section "low-noise query"), with E[j]
evaluations instead of N.
"""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from data.errors import UserError
from model.compute.execution import moved
from model.fields.base import Condition, VelocityField, shifted

# Beta(a, b) over the step index. "early" falls steadily from the first step on, where a picture's layout is decided.
QUERY_BIAS = {"low": (5.0, 2.0), "mid": (5.0, 5.0), "high": (2.0, 5.0), "uniform": (1.0, 1.0), "early": (1.0, 2.0)}


@dataclass(frozen=True)
class Query:
    """x_t (B, C, H, W) detached, t (B,), index (B,) the steps already taken."""

    x_t: torch.Tensor
    t: torch.Tensor
    index: torch.Tensor


def euler_grid(steps: int, shift: float = 1.0) -> torch.Tensor:
    """The noise levels t_0 = 1 > t_1 > ... > t_N = 0: (steps + 1,) float32.

    `shift` is that of `shifted`; 1 leaves the grid uniform.
    """
    if steps < 1 or shift <= 0:
        raise UserError(f"euler grid: steps = {steps} must be 1 or more and shift = {shift} above 0")
    t = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    return shifted(t, shift).to(torch.float32)


def query_index(uniform_steps: int, bias: str, rng: np.random.Generator) -> int:
    """j = min(floor(u N), N - 1) with u ~ Beta(a, b) of the named bias; "low" is Beta(5, 2), the low-noise side
    (DanceOPD)."""
    if bias not in QUERY_BIAS:
        raise UserError(f"query = {bias!r}: choose one of {sorted(QUERY_BIAS)}")
    return min(int(rng.beta(*QUERY_BIAS[bias]) * uniform_steps), uniform_steps - 1)


def query_indices(uniform_steps: int, bias: str, count: int, rng: np.random.Generator) -> tuple[int, ...]:
    """`count` distinct ones, each drawn as `query_index` does and again where it is there already; all N, in order,
    where `count` is N or more."""
    if count >= uniform_steps:
        return tuple(range(uniform_steps))
    found: dict[int, None] = {}
    while len(found) < count:
        found[query_index(uniform_steps, bias, rng)] = None
    return tuple(found)


@torch.no_grad()
def roll_out_to_query(
    field: VelocityField, noise: torch.Tensor, condition: Condition, grid: torch.Tensor, index: torch.Tensor
) -> Query:
    """Euler steps from `noise` (B, C, H, W) until row b has taken index[b] steps; rows that have arrived leave the
    batch.

    Costs sum(index) row evaluations. No gradient flows into the result. `grid` and `index` lie on the host, where every
    shape of the rollout is known before its first step; latents and arithmetic are fp32 whatever the field computes in.
    """
    device, taken = noise.device, sorted(index.tolist(), reverse=True)  # the longest-running rows come first
    order = torch.argsort(index, descending=True, stable=True)
    levels = moved(grid, device)
    rows, x = condition[moved(order, device)], noise[moved(order, device)]
    for step in range(taken[0]):
        active = bisect_left(taken, -step, key=operator.neg)  # rows that take more than `step` steps
        velocity = field(x[:active], levels[step].expand(active), rows[slice(0, active)]).float()
        x[:active] += float(grid[step + 1] - grid[step]) * velocity
    return Query(x[moved(torch.argsort(order), device)], moved(grid[index], device), index)


@torch.no_grad()
def euler_path(
    field: VelocityField, noise: torch.Tensor, condition: Condition, grid: torch.Tensor
) -> Iterator[torch.Tensor]:
    """The states x_0 = noise, x_1, ..., x_N of a rollout, each (B, C, H, W); state j costs j evaluations."""
    x = noise
    yield x
    for now, after in pairwise(grid.tolist()):
        t = torch.full((len(x),), now, device=x.device)
        x = x + (after - now) * field(x, t, condition).float()
        yield x


def sample(field: VelocityField, noise: torch.Tensor, condition: Condition, grid: torch.Tensor) -> torch.Tensor:
    """The full Euler rollout: latents (B, C, H, W) at t = 0."""
    return deque(euler_path(field, noise, condition, grid), maxlen=1).pop()
