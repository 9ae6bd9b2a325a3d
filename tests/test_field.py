"""Property: guidance and soft targets are plain combinations of fields, exactly; dropping the prompt keeps the image
that an edit starts from.
"""

from __future__ import annotations

import pytest
import torch

from model.fields.base import Condition, concatenate, velocity_mse
from model.fields.cost import evaluations
from model.fields.guided import Guided
from model.fields.mean import Mean


def condition(rows: int = 3, source: bool = True) -> Condition:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return Condition(
        normal(rows, 5, 4), normal(rows, 4), normal(5, 4), normal(4), normal(rows, 2, 3, 3) if source else None
    )


def field(x_t: torch.Tensor, t: torch.Tensor, c: Condition) -> torch.Tensor:
    """Depends on every input, and row by row."""
    v = x_t * t[:, None, None, None] + c.pooled.sum(1)[:, None, None, None] + c.embeds.sum((1, 2))[:, None, None, None]
    return v if c.source is None else v + 3.0 * c.source


X_T = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(1))
T = torch.tensor([1.0, 0.5, 0.125])


def test_dropping_empties_the_prompt_and_keeps_the_source() -> None:
    whole = condition()
    empty = whole.dropped()
    assert empty.source is whole.source
    for row in range(3):
        torch.testing.assert_close(empty.embeds[row], whole.empty_embeds, rtol=0, atol=0)
        torch.testing.assert_close(empty.pooled[row], whole.empty_pooled, rtol=0, atol=0)
    assert condition(source=False).dropped().source is None


@pytest.mark.parametrize("source", [True, False])
def test_slices_and_joins_keep_rows_together(source: bool) -> None:
    whole = condition(source=source)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(field(X_T[order], T[order], whole[order]), field(X_T, T, whole)[order], rtol=0, atol=0)
    joined = concatenate([whole[slice(0, 1)], whole[slice(1, 3)]])
    assert len(joined) == 3 and (joined.source is None) == (not source)
    torch.testing.assert_close(field(X_T, T, joined), field(X_T, T, whole), rtol=0, atol=0)


def test_guidance_of_scale_one_is_the_field_itself() -> None:
    calls = []

    def counted(x_t: torch.Tensor, t: torch.Tensor, c: Condition) -> torch.Tensor:
        calls.append(len(x_t))
        return field(x_t, t, c)

    torch.testing.assert_close(Guided(counted, 1.0)(X_T, T, condition()), field(X_T, T, condition()), rtol=0, atol=0)
    assert calls == [3]  # and costs no more


@pytest.mark.parametrize("scale", [0.0, 2.0, 7.0])
@pytest.mark.parametrize("source", [True, False])
def test_guidance_is_the_linear_combination(scale: float, source: bool) -> None:
    c = condition(source=source)
    empty, full = field(X_T, T, c.dropped()), field(X_T, T, c)
    torch.testing.assert_close(Guided(field, scale)(X_T, T, c), empty + scale * (full - empty), rtol=0, atol=0)


def test_the_mean_weighs_its_fields() -> None:
    c = condition()
    mean = Mean((field, lambda x, t, c: 5.0 * torch.ones_like(x)), (3.0, 1.0))
    torch.testing.assert_close(mean(X_T, T, c), 0.75 * field(X_T, T, c) + 1.25)


def test_loss_is_the_mean_square_over_all_elements() -> None:
    assert float(velocity_mse(torch.zeros(2, 1, 2, 2), torch.full((2, 1, 2, 2), 3.0))) == 9.0
    assert float(velocity_mse(X_T, X_T.clone())) == 0.0
    halves = torch.tensor(
        [256.0, 257.0], dtype=torch.float16
    )  # their squared gap is 1, which half precision of the squares would lose
    assert float(velocity_mse(halves[:1], halves[1:])) == 1.0


def test_cost_of_a_field_counts_every_network_evaluation() -> None:
    assert evaluations(field) == 1
    assert evaluations(Guided(field, 1.0)) == 1 and evaluations(Guided(field, 2.0)) == 2
    assert evaluations(Mean((field, Guided(field, 3.0)), (1.0, 1.0))) == 3
