"""Property: layers over a field are plain combinations of fields, exactly; dropping the prompt keeps the image that an
edit starts from.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from model.fields import chord_steps, composed, layer_faults, references
from model.fields.base import Condition, Sampler, VelocityField, concatenate, plain_fields, velocity_mse
from model.fields.chord import Chord
from model.fields.extrapolated import Extrapolated, anchored
from model.fields.guided import Guided
from model.fields.interval import Interval
from model.fields.mean import Mean
from model.rollout import euler_grid, euler_path


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


# --- the algebra over fields ------------------------------------------------------------------------------------------


class Linear(VelocityField):
    """dx/dt = 2 x, whatever the prompt."""

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        return 2.0 * x_t


class Curved(VelocityField):
    """Neither linear in the state nor in the prompt."""

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        return torch.sin(3.0 * x_t + t[:, None, None, None]) * (1.0 + condition.pooled.sum(1)[:, None, None, None])


@pytest.mark.parametrize(("steps", "substeps"), [(4, 4), (2, 8), (1, 3)])
def test_the_chord_of_a_linear_field_is_its_closed_form(steps: int, substeps: int) -> None:
    t = euler_grid(steps)[:-1][-1:].expand(3)  # the grid's last step: to t = 0
    length = -float(t[0]) / substeps
    closed = X_T * ((1.0 + 2.0 * length) ** substeps - 1.0) / -float(t[0])
    torch.testing.assert_close(Chord(Linear(), steps, substeps)(X_T, t, condition()), closed, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_few_steps_of_a_chord_end_where_all_steps_of_the_field_end(shift: float) -> None:
    """Rows at different levels, too: every state of the short path lies on the long one."""
    c, long = condition(), list(euler_path(Curved(), X_T, condition(), euler_grid(16, shift)))
    for steps in (2, 4, 8):
        field = Chord(Curved(), steps, 16 // steps, shift)
        short = list(euler_path(field, X_T, c, euler_grid(steps, shift)))
        for state, whole in zip(short, long[:: 16 // steps], strict=True):
            torch.testing.assert_close(state, whole, rtol=1e-4, atol=1e-5)
        grid = euler_grid(steps, shift)[[0, 1, 1]]
        rows = torch.stack([X_T[0], X_T[1], X_T[2]])
        alone = torch.cat([field(rows[i : i + 1], grid[i : i + 1], c[slice(i, i + 1)]) for i in range(3)])
        torch.testing.assert_close(field(rows, grid, c), alone)


def test_a_chord_of_one_sub_step_is_the_field_itself() -> None:
    torch.testing.assert_close(
        Chord(Curved(), 4, 1)(X_T, T, condition()), Curved()(X_T, T, condition()), rtol=0, atol=0
    )


def test_a_student_that_is_the_chord_has_no_loss() -> None:
    teacher = Chord(Guided(Curved(), 2.0), 4, 4)
    assert float(velocity_mse(teacher(X_T, T, condition()), teacher(X_T, T, condition()))) == 0.0
    assert float(velocity_mse(Guided(Curved(), 2.0)(X_T, T, condition()), teacher(X_T, T, condition()))) > 0.0


def test_the_order_of_layers_counts() -> None:
    """The chord of the guided field follows the guided path; guidance of chords mixes two paths. Both cost the same."""
    inner, outer = Chord(Guided(Curved(), 3.0), 4, 4), Guided(Chord(Curved(), 4, 4), 3.0)
    assert inner.evaluations == outer.evaluations == 8
    assert float(velocity_mse(inner(X_T, T, condition()), outer(X_T, T, condition()))) > 1e-4
    known, how = {"base": Curved()}, Sampler(16, 1.0)
    for layers, field in (
        ({"guidance": 3.0, "steps": 4}, inner),
        ({"steps": {"steps": 4, "substeps": 4}, "guidance": {"scale": 3.0}}, outer),
    ):
        assert composed(known["base"], layers, known, how) == replaced(field, known["base"])


def replaced(field: Any, base: VelocityField) -> Any:
    """The same layers over another field at the bottom."""
    return replace(field, field=replaced(field.field, base)) if hasattr(field, "field") else base


def test_guidance_holds_inside_its_interval_alone() -> None:
    c, t = condition(), torch.tensor([1.0, 0.5, 0.125])
    guided, plain = Guided(field, 3.0)(X_T, t, c), field(X_T, t, c)
    mixed = Interval(field, 3.0, 0.2, 0.5)(X_T, t, c)
    torch.testing.assert_close(mixed, torch.stack([plain[0], guided[1], plain[2]]))
    torch.testing.assert_close(Interval(field, 3.0)(X_T, t, c), guided)


def test_extrapolation_goes_along_the_line_through_reference_and_field() -> None:
    c, reference = condition(), Linear()
    for factor in (0.0, 0.5, 1.5):
        line = reference(X_T, T, c) + factor * (field(X_T, T, c) - reference(X_T, T, c))
        torch.testing.assert_close(Extrapolated(field, reference, factor)(X_T, T, c), line)
    same = Extrapolated(field, reference, 1.0)
    torch.testing.assert_close(same(X_T, T, c), field(X_T, T, c), rtol=0, atol=0)
    assert same.evaluations == 1 and Extrapolated(field, reference, 0.5).evaluations == 2


def test_an_anchor_is_the_anchored_loss() -> None:
    """d/dv of |v - f|^2 + w |v - r|^2 is (1 + w) times that of the squared gap to the anchored field."""
    c, weight = condition(), 0.3
    v = torch.randn(X_T.shape, generator=torch.Generator().manual_seed(2), requires_grad=True)
    loss = velocity_mse(v, field(X_T, T, c)) + weight * velocity_mse(v, Linear()(X_T, T, c))
    (of_loss,) = torch.autograd.grad(loss, v)
    (of_field,) = torch.autograd.grad(velocity_mse(v, anchored(field, Linear(), weight)(X_T, T, c)), v)
    torch.testing.assert_close(of_loss, (1.0 + weight) * of_field)


def test_layers_are_made_from_params() -> None:
    known, how = {"base": field, "style": Linear()}, Sampler(28, 3.0)
    made: list[tuple[dict[str, Any], VelocityField]] = [
        ({}, field),
        ({"guidance": 2}, Guided(field, 2)),
        ({"interval": {"scale": 2.0, "low": 0.1}}, Interval(field, 2.0, 0.1)),
        ({"steps": 4}, Chord(field, 4, 7, 3.0)),  # 28 steps cut down to 4
        ({"extrapolated": {"reference": "style", "factor": 1.5}}, Extrapolated(field, known["style"], 1.5)),
        ({"anchor": {"reference": "style", "weight": 1.0}}, Extrapolated(field, known["style"], 0.5)),
        ({"mean": ["style", "base"]}, Mean((field, known["style"], field))),
    ]
    for layers, expected in made:
        assert layer_faults(layers, known) == []
        assert composed(field, layers, known, how) == expected
    assert references({"mean": ["style"], "anchor": {"reference": "base", "weight": 1}, "steps": 4}) == [
        "style",
        "base",
    ]
    assert chord_steps({"guidance": 2.0}) is None and chord_steps({"steps": {"steps": 8, "substeps": 2}}) == 8


def test_all_faults_of_layers_are_named_at_once() -> None:
    faults = layer_faults(
        {
            "guidance": 0.5,
            "interval": {"scale": 2.0, "low": -1, "hihg": 1.0},
            "steps": 2.5,
            "mean": "base",
            "extrapolated": {"factor": True},
            "anchor": {"reference": "styel", "weight": float("nan")},
        },
        {"base", "style"},
    )
    assert faults == [
        "field.guidance = 0.5: expected 1 or more",
        "field.interval.low = -1: expected 0 or more",
        "field.interval.hihg = 1.0: unknown key; it takes scale, low, high",
        "field.steps = 2.5: expected a whole number",
        "field.mean = 'base': expected a list of teachers' names",
        "field.extrapolated = {'factor': True}: reference missing; it takes reference, factor",
        "field.extrapolated.factor = True: expected a number",
        "field.anchor.reference = 'styel': no such teacher as styel; have base, style",
        "field.anchor.weight = nan: expected a number",
    ]
