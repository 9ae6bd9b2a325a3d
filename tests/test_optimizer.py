"""Property: Muon's updates are orthogonal in the promised band, both optimizers descend and come back from disk, and
only fp32 trains.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from data.errors import UserError
from model.compute.optimizer import Muon, Optimizers, build_optimizer, orthogonalize, warmup_then_linear


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def named(seed: int = 0) -> list[tuple[str, nn.Parameter]]:
    """A block's two matrices, its modulation and a bias, and an embedding outside the blocks."""
    shapes = {
        "blocks.0.up": (12, 6),
        "blocks.0.down": (6, 12),
        "blocks.0.norm1.linear": (6, 6),
        "blocks.0.bias": (6,),
        "embed": (5, 6),
    }
    return [(name, nn.Parameter(normal(*shape, seed=seed + row))) for row, (name, shape) in enumerate(shapes.items())]


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 24, 8), (2, 8, 24), (1, 32, 4)])
def test_orthogonalized_singular_values_are_near_one(shape: tuple[int, int, int]) -> None:
    matrices = normal(*shape) if shape[1] != shape[2] else normal(*shape) + 4.0 * torch.eye(shape[1])
    for scale in (1e-4, 1.0, 1e4):
        values = torch.linalg.svdvals(orthogonalize(scale * matrices))
        assert float(values.min()) > 0.6 and float(values.max()) < 1.3


def test_orthogonalizing_keeps_the_singular_vectors_and_each_matrix_to_itself() -> None:
    matrices = normal(3, 10, 6)
    together = orthogonalize(matrices)
    for one, result in zip(matrices, together, strict=True):
        torch.testing.assert_close(orthogonalize(one[None])[0], result, rtol=1e-5, atol=1e-6)
        u, _, vh = torch.linalg.svd(one, full_matrices=False)
        core = u.T @ result @ vh.T  # diagonal when both share singular vectors
        torch.testing.assert_close(core, torch.diag(core.diag()), rtol=0, atol=1e-4)
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))


def test_muons_first_step_is_the_scaled_orthogonal_gradient() -> None:
    weight = nn.Parameter(normal(8, 4))
    before, gradient = weight.detach().clone(), normal(8, 4, seed=1)
    weight.grad = gradient.clone()
    Muon([weight], lr=0.01).step()
    expected = before - 0.01 * 0.2 * 8**0.5 * orthogonalize(gradient[None])[0]  # momentum only scales the first update
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_both_descend_a_quadratic(name: str) -> None:
    parameters = named()
    targets = {key: normal(*value.shape, seed=50 + row) for row, (key, value) in enumerate(parameters)}

    def loss() -> torch.Tensor:
        return torch.stack([(value - targets[key]).square().mean() for key, value in parameters]).sum()

    optimizers, before = build_optimizer(name, parameters, 0.2), loss().item()
    for step in range(80):
        optimizers.zero_grad()
        loss().backward()
        optimizers.step(warmup_then_linear(step, 80, 0, 0.3))
    assert loss().item() < before / 20


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest() -> None:
    parameters = named()
    muon, adamw = build_optimizer("muon", parameters, 0.1).optimizers
    names = {id(value): key for key, value in parameters}
    assert isinstance(muon, Muon) and [names[id(value)] for value in muon.param_groups[0]["params"]] == [
        "blocks.0.up",
        "blocks.0.down",
    ]
    assert [names[id(value)] for value in adamw.param_groups[0]["params"]] == [
        "blocks.0.norm1.linear",
        "blocks.0.bias",
        "embed",
    ]
    assert len(build_optimizer("muon", parameters[:2], 0.1).optimizers) == 1  # an adapter has matrices only


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_state_saved_and_loaded_goes_on_bit_for_bit(name: str) -> None:
    def run(optimizers: Optimizers, parameters: list[tuple[str, nn.Parameter]], steps: range) -> None:
        for step in steps:
            for row, (_, value) in enumerate(parameters):
                value.grad = normal(*value.shape, seed=100 * step + row)
            optimizers.step(warmup_then_linear(step, 6, 2, 0.5))

    straight, first, second = named(), named(), named(seed=900)
    run(build_optimizer(name, straight, 0.01), straight, range(6))
    stopped = build_optimizer(name, first, 0.01)
    run(stopped, first, range(3))
    saved = stopped.tensors()
    assert all(isinstance(value, torch.Tensor) for value in saved.values())
    with torch.no_grad():
        for (_, value), (_, old) in zip(second, first, strict=True):
            value.copy_(old)
    resumed = build_optimizer(name, second, 0.01)
    resumed.load_tensors(saved)
    run(stopped, first, range(3, 4))  # what was saved is a copy: going on with the old one does not touch it
    run(resumed, second, range(3, 6))
    assert all(torch.equal(value, other) for (_, value), (_, other) in zip(straight, second, strict=True))
    assert resumed.tensors().keys() == saved.keys()


def test_only_full_precision_trains() -> None:
    half = [("blocks.0.up", nn.Parameter(normal(4, 4).bfloat16()))]
    with pytest.raises(UserError, match=r"float32.*blocks\.0\.up"):
        build_optimizer("adamw", half, 0.1)
    with pytest.raises(UserError, match="optimizer = 'adam'.*adamw.*muon"):
        build_optimizer("adam", named(), 0.1)


def test_the_schedule_warms_up_holds_and_falls_to_zero() -> None:
    factors = [warmup_then_linear(step, 10, 2, 0.6) for step in range(11)]
    np.testing.assert_allclose(factors, [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    assert [warmup_then_linear(step, 5, 0, 1.0) for step in range(5)] == [1.0] * 5
