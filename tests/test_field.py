"""Property: guidance and soft targets are plain combinations of fields, exactly; dropping the prompt keeps the image
that an edit starts from.
"""

from __future__ import annotations

import pytest
import torch

from model.fields.base import Condition, VelocityField, concatenate, plain_fields, velocity_mse
from model.fields.guided import Guided
from model.fields.mean import Mean


def condition(rows: int = 3, source: bool = True) -> Condition:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return Condition(
        normal(rows, 5, 4), normal(rows, 4), normal(5, 4), normal(4), normal(rows, 2, 3, 3) if source else None
    )


class Formula(VelocityField):
    """Depends on every input, and row by row."""

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        numbers = condition.pooled.sum(1) + condition.embeds.sum((1, 2))
        v = x_t * t[:, None, None, None] + numbers[:, None, None, None]
        return v if condition.source is None else v + 3.0 * condition.source


field = Formula()


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

    class Counted(Formula):
        def __call__(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
            calls.append(len(x_t))
            return super().__call__(x_t, t, condition)

    torch.testing.assert_close(Guided(Counted(), 1.0)(X_T, T, condition()), field(X_T, T, condition()), rtol=0, atol=0)
    assert calls == [3]  # and costs no more


@pytest.mark.parametrize("scale", [0.0, 2.0, 7.0])
@pytest.mark.parametrize("source", [True, False])
def test_guidance_is_the_linear_combination(scale: float, source: bool) -> None:
    c = condition(source=source)
    empty, full = field(X_T, T, c.dropped()), field(X_T, T, c)
    torch.testing.assert_close(Guided(field, scale)(X_T, T, c), empty + scale * (full - empty), rtol=0, atol=0)


def test_the_mean_is_a_plain_one() -> None:
    c = condition()
    mean = Mean((field, lambda x, t, c: 5.0 * torch.ones_like(x)))
    torch.testing.assert_close(mean(X_T, T, c), 0.5 * field(X_T, T, c) + 2.5)


def test_loss_is_the_mean_square_over_all_elements() -> None:
    assert float(velocity_mse(torch.zeros(2, 1, 2, 2), torch.full((2, 1, 2, 2), 3.0))) == 9.0
    assert float(velocity_mse(X_T, X_T.clone())) == 0.0
    halves = torch.tensor(
        [256.0, 257.0], dtype=torch.float16
    )  # their squared gap is 1, which half precision of the squares would lose
    assert float(velocity_mse(halves[:1], halves[1:])) == 1.0


def test_cost_of_a_field_counts_every_network_evaluation() -> None:
    guided = Guided(field, 3.0)
    assert field.evaluations == 1 and Guided(field, 1.0).evaluations == 1 and guided.evaluations == 2
    mean = Mean((field, guided))
    assert mean.evaluations == 3 and Guided(mean, 2.0).evaluations == 6
    assert plain_fields(mean) == [field, field]
