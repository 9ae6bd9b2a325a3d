"""Property: the student's rollout is Euler's method as diffusers has it, stops exactly at each row's query, and queries
where Beta(a, b) says.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from data.errors import UserError
from model.fields.base import Condition
from model.rollout import euler_grid, query_index, roll_out_to_query, sample

Field = Callable[[torch.Tensor, torch.Tensor, Condition], torch.Tensor]
SHAPE = (1, 2, 2)


def condition(rows: int) -> Condition:
    numbers = torch.arange(rows, dtype=torch.float32)
    return Condition(numbers.reshape(-1, 1, 1), numbers.reshape(-1, 1), torch.zeros(1, 1), torch.zeros(1))


def noise(rows: int) -> torch.Tensor:
    return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(0))


def curved(x_t: torch.Tensor, t: torch.Tensor, c: Condition) -> torch.Tensor:
    """Non-linear, elementwise (so that a row's result cannot depend on its batch), different for every row and time."""
    return x_t * x_t.abs() * 0.3 - t[:, None, None, None] + c.pooled[:, :, None, None] * 0.1


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 5, 16])
def test_rollout_of_a_linear_field_is_the_closed_form(steps: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix, offset = 0.5 * torch.randn(4, 4, generator=generator), torch.randn(4, generator=generator)

    def linear(x_t: torch.Tensor, t: torch.Tensor, c: Condition) -> torch.Tensor:
        return (x_t.flatten(1) @ matrix.T + offset).reshape(x_t.shape)

    grid, start = euler_grid(steps, shift), noise(6)
    index = torch.arange(6) % (steps + 1)
    a, b, eye = matrix.double(), offset.double(), torch.eye(4, dtype=torch.float64)
    expected = start.double().flatten(1)
    states = [expected]
    for now, after in pairwise(grid.double()):
        expected = (
            expected @ (eye + (after - now) * a).T + (after - now) * b
        )  # x_j = prod (I + dt A) x_0 + the offset's own part
        states.append(expected)
    query = roll_out_to_query(linear, start, condition(6), grid, index)
    for row, steps_taken in enumerate(index.tolist()):
        torch.testing.assert_close(query.x_t[row].flatten().double(), states[steps_taken][row], rtol=1e-6, atol=1e-6)
        assert float(query.t[row]) == float(grid[steps_taken])
    torch.testing.assert_close(
        sample(linear, start, condition(6), grid).flatten(1).double(), states[-1], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_steps_are_those_of_diffusers(shift: float) -> None:
    steps = 12
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(
        sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1]
    )  # unshifted; the scheduler shifts them and appends 0
    grid = euler_grid(steps, shift)
    torch.testing.assert_close(grid, scheduler.sigmas.float(), rtol=1e-6, atol=0)
    x, ours = noise(3), noise(3)
    for number, timestep in enumerate(scheduler.timesteps):
        t = scheduler.sigmas[number].expand(3)
        x = scheduler.step(curved(x, t, condition(3)), timestep, x, return_dict=False)[0]
        ours = roll_out_to_query(curved, noise(3), condition(3), grid, torch.full((3,), number + 1)).x_t
        torch.testing.assert_close(ours, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sample(curved, noise(3), condition(3), grid), ours, rtol=0, atol=0)


def test_the_grid_runs_from_noise_to_image() -> None:
    grid = euler_grid(16, 3.0)
    assert len(grid) == 17 and float(grid[0]) == 1.0 and float(grid[-1]) == 0.0 and bool((grid.diff() < 0).all())
    torch.testing.assert_close(euler_grid(4), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), rtol=0, atol=0)
    for steps, shift in ((0, 1.0), (4, 0.0)):
        with pytest.raises(UserError, match="euler grid"):
            euler_grid(steps, shift)


def test_stopping_at_the_query_changes_no_bit_of_it() -> None:
    grid, start, rows = euler_grid(16), noise(9), 9
    index = torch.tensor([3, 15, 0, 7, 7, 1, 12, 15, 4])
    states, x = [start.clone()], start.clone()
    for now, after in pairwise(grid):  # the plain path: all rows to the end, then pick
        x = x + (after - now) * curved(x, now.expand(rows), condition(rows))
        states.append(x)
    query = roll_out_to_query(curved, start, condition(rows), grid, index)
    picked = torch.stack([states[steps][row] for row, steps in enumerate(index.tolist())])
    assert torch.equal(query.x_t, picked) and torch.equal(query.t, grid[index]) and torch.equal(query.index, index)
    assert torch.equal(start, noise(9))  # the caller's noise is not written to


def test_finished_rows_leave_the_batch() -> None:
    index = torch.tensor([3, 15, 0, 7, 7])
    seen: list[list[float]] = []

    def counted(x_t: torch.Tensor, t: torch.Tensor, c: Condition) -> torch.Tensor:
        seen.append(c.pooled[:, 0].tolist())
        return curved(x_t, t, c)

    roll_out_to_query(counted, noise(5), condition(5), euler_grid(16), index)
    assert sum(len(rows) for rows in seen) == int(index.sum())
    assert [seen.count([]), len(seen)] == [0, 15]
    for row, steps in enumerate(index.tolist()):
        assert sum(float(row) in rows for rows in seen) == steps


def test_a_query_carries_no_gradient() -> None:
    weight = torch.ones((), requires_grad=True)
    query = roll_out_to_query(lambda x, t, c: weight * x, noise(2), condition(2), euler_grid(4), torch.tensor([2, 3]))
    assert not query.x_t.requires_grad


def test_query_indices_follow_beta_5_2() -> None:
    # The distribution function of Beta(5, 2) is 6 x^5 - 5 x^6; bin j of N = 16 is [j/16, (j + 1)/16).
    edges = np.arange(17) / 16
    expected = np.diff(6 * edges**5 - 5 * edges**6)
    published = [
        0,
        0.0002,
        0.001,
        0.0035,
        0.0086,
        0.0174,
        0.0305,
        0.0483,
        0.0701,
        0.0947,
        0.1194,
        0.1404,
        0.1521,
        0.1474,
        0.117,
        0.0495,
    ]
    np.testing.assert_allclose(expected, published, atol=6e-5)
    rng, draws = np.random.default_rng(0), 200_000
    drawn = np.bincount([query_index(16, "low", rng) for _ in range(draws)], minlength=16) / draws
    np.testing.assert_allclose(drawn, expected, atol=4e-3)  # five standard errors of the largest bin
    assert abs(float(drawn @ np.arange(16)) - 10.93) < 0.03


def test_other_biases_mirror_and_spread() -> None:
    share = {}
    for bias in ("low", "mid", "high", "uniform"):
        rng = np.random.default_rng(1)
        share[bias] = np.bincount([query_index(16, bias, rng) for _ in range(10_000)], minlength=16) / 10_000
    np.testing.assert_allclose(share["high"], share["low"][::-1], atol=0.02)
    np.testing.assert_allclose(share["mid"], share["mid"][::-1], atol=0.02)
    np.testing.assert_allclose(share["uniform"], 1 / 16, atol=0.015)
    assert share["mid"][7:9].sum() > 1.5 * share["uniform"][7:9].sum() and share["mid"][[0, 15]].sum() < 0.001


def test_the_last_index_is_never_the_image_itself() -> None:
    class Always:
        def beta(self, a: float, b: float) -> float:
            return 1.0

    assert query_index(16, "low", Always()) == 15  # type: ignore[arg-type]
    with pytest.raises(UserError, match="low"):
        query_index(16, "lo", np.random.default_rng(0))
