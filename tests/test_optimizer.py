"""Property: Muon's updates are orthogonal in the promised band, both optimizers descend and come back from disk, and
only fp32 trains.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from data.errors import UserError
from model.backbones.micro import MicroBackbone
from model.backbones.sd3 import SD3Backbone
from model.backbones.zimage import ZImageBackbone
from model.compute.optimizer import Muon, Optimizers, build_optimizer, orthogonalize, warmup_then_linear
from tests.tiny import new_backbone
from tests.tiny_families import sd3_network, zimage_network

BLOCKS: Any = MicroBackbone  # which says by itself where its blocks are


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def named(seed: int = 0) -> list[tuple[str, nn.Parameter]]:
    """A block's two matrices, its modulation and a bias, and an embedding outside the blocks."""
    block = "transformer_blocks.0"
    shapes = {
        f"{block}.up": (12, 6),
        f"{block}.down": (6, 12),
        f"{block}.norm1.linear": (6, 6),
        f"{block}.bias": (6,),
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

    optimizers, before = build_optimizer(name, parameters, 0.2, BLOCKS), loss().item()
    for step in range(80):
        optimizers.zero_grad()
        loss().backward()
        optimizers.step(warmup_then_linear(step, 80, 0, 0.3))
    assert loss().item() < before / 20


def names_of(optimizer: torch.optim.Optimizer, parameters: list[tuple[str, nn.Parameter]]) -> list[str]:
    names = {id(value): key for key, value in parameters}
    return [names[id(value)] for group in optimizer.param_groups for value in group["params"]]


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest() -> None:
    parameters = named()
    muon, adamw = build_optimizer("muon", parameters, 0.1, BLOCKS).optimizers
    assert isinstance(muon, Muon)
    taken, rest = names_of(muon, parameters), names_of(adamw, parameters)
    assert taken == ["transformer_blocks.0.up", "transformer_blocks.0.down"]
    assert rest == ["transformer_blocks.0.norm1.linear", "transformer_blocks.0.bias", "embed"]
    assert len(build_optimizer("muon", parameters[:2], 0.1, BLOCKS).optimizers) == 1  # an adapter has matrices only


@pytest.mark.parametrize(("name", "beta2"), [("adamw", 0.999), ("muon", 0.99)])
def test_adamw_alone_is_torchs_and_beside_muon_forgets_sooner(name: str, beta2: float) -> None:
    """Of two gradients of 1 and 0, the second moment keeps beta2 of the first."""
    parameters = named()
    optimizers = build_optimizer(name, parameters, 0.1, BLOCKS)
    usual = torch.optim.AdamW([nn.Parameter(normal(2))]).defaults
    assert usual["betas"][1] == 0.999
    for gradient in (1.0, 0.0):
        for _, value in parameters:
            value.grad = torch.full_like(value, gradient)
        optimizers.step()
    rest = optimizers.optimizers[-1]
    (state,) = [rest.state[value] for key, value in parameters if key == "embed"]
    torch.testing.assert_close(state["exp_avg_sq"], torch.full((5, 6), beta2 * (1.0 - beta2)))


FAMILIES: dict[str, Any] = {
    "micro": new_backbone,
    "sd3": lambda: SD3Backbone(Path("sd3"), sd3_network(), {}, 8, 256),
    "zimage": lambda: ZImageBackbone(Path("zimage"), zimage_network(), {}, 8, 256),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_muon_takes_every_linear_layer_of_every_block_but_the_modulations(family: str) -> None:
    """The blocks are found by their classes here, and by their names in the product: the two must agree."""
    backbone = FAMILIES[family]()
    parameters = list(backbone.network.named_parameters())
    muon, adamw = build_optimizer("muon", parameters, 0.1, backbone).optimizers
    taken, rest = names_of(muon, parameters), names_of(adamw, parameters)
    inside = [
        f"{name}.{inner}.weight"
        for name, block in backbone.network.named_modules()
        if type(block).__name__ in ("JointTransformerBlock", "ZImageTransformerBlock")
        for inner, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    modulations = [name for name in inside if ".norm1" in name or "adaLN" in name]
    assert isinstance(muon, Muon) and sorted(taken) == sorted(set(inside) - set(modulations))
    assert modulations and set(modulations) <= set(rest) and len(taken) + len(rest) == len(parameters)


def test_muon_without_a_matrix_of_a_block_is_refused() -> None:
    outside = [parameter for parameter in named() if parameter[0] == "embed"]
    with pytest.raises(UserError, match=r"'muon': no trained parameter .* zimage \(noise_refiner.*choose adamw"):
        build_optimizer("muon", outside, 0.1, FAMILIES["zimage"]())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_state_saved_and_loaded_goes_on_bit_for_bit(name: str) -> None:
    def run(optimizers: Optimizers, parameters: list[tuple[str, nn.Parameter]], steps: range) -> None:
        for step in steps:
            for row, (_, value) in enumerate(parameters):
                value.grad = normal(*value.shape, seed=100 * step + row)
            optimizers.step(warmup_then_linear(step, 6, 2, 0.5))

    straight, first, second = named(), named(), named(seed=900)
    run(build_optimizer(name, straight, 0.01, BLOCKS), straight, range(6))
    stopped = build_optimizer(name, first, 0.01, BLOCKS)
    run(stopped, first, range(3))
    saved = stopped.tensors()
    assert all(isinstance(value, torch.Tensor) for value in saved.values())
    with torch.no_grad():
        for (_, value), (_, old) in zip(second, first, strict=True):
            value.copy_(old)
    resumed = build_optimizer(name, second, 0.01, BLOCKS)
    resumed.load_tensors(saved)
    run(stopped, first, range(3, 4))  # what was saved is a copy: going on with the old one does not touch it
    run(resumed, second, range(3, 6))
    assert all(torch.equal(value, other) for (_, value), (_, other) in zip(straight, second, strict=True))
    assert resumed.tensors().keys() == saved.keys()


def test_only_full_precision_trains() -> None:
    half = [("transformer_blocks.0.up", nn.Parameter(normal(4, 4).bfloat16()))]
    with pytest.raises(UserError, match=r"float32.*blocks\.0\.up"):
        build_optimizer("adamw", half, 0.1, BLOCKS)
    with pytest.raises(UserError, match="optimizer = 'adam'.*adamw.*muon"):
        build_optimizer("adam", named(), 0.1, BLOCKS)


def test_the_schedule_warms_up_holds_and_falls_to_zero() -> None:
    factors = [warmup_then_linear(step, 10, 2, 0.6) for step in range(11)]
    np.testing.assert_allclose(factors, [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    assert [warmup_then_linear(step, 5, 0, 1.0) for step in range(5)] == [1.0] * 5
