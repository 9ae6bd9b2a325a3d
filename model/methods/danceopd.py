"""On-policy generative field distillation (DanceOPD, arXiv 2606.27377, algorithm 1): one state of the student's own
rollout, or K of them, and the mean squared velocity gap to the routed teacher."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from model.compute.lockstep import filled_up, missing
from model.fields.base import Condition, VelocityField, noised, velocity_gaps
from model.methods.base import Backward, Method, by_batch, gaps_to, rollout
from model.rollout import roll_out_to_query
from model.setup import Batch, Setup
from model.step import Plan


@dataclass(frozen=True)
class Question:
    """What teacher and student are both asked, n samples; `weight`: that of a sample in the step's mean loss."""

    x_t: torch.Tensor
    t: torch.Tensor
    condition: Condition
    weight: float

    def put_to(self, field: VelocityField) -> torch.Tensor:
        return field(self.x_t, self.t, self.condition)


def accumulate(
    setup: Setup, teacher: VelocityField, plan: Plan, slots: Sequence[int]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`Accumulate` of the paper's method, and of its off-policy ablation.

    Teacher and student answer on the very same micro-batches, so that equal weights answer equal bits.
    """
    states = roll_out(setup, plan, slots)
    batches = list(setup.batches(plan, slots, setup.execution.micro_batch))
    asked = (_question(batch, states) for batch in batches)
    questions = list(filled_up(asked, lambda: _idle(setup, plan), setup.execution))
    targets = ask(setup, teacher, questions)
    gaps = compare(setup, questions, targets)[: len(batches)]

    order = [slot for batch in batches for slot in batch.slots]
    losses = torch.zeros(len(plan.rows), device=setup.execution.device)
    if order:
        losses.index_copy_(0, setup.moved(torch.tensor(order)), torch.cat(gaps))
    answers = [row for target in targets[: len(batches)] for row in target.unbind()]
    samples = {f"x_t.{slot:03d}": states[slot] for slot in order}
    return losses, samples | {f"target.{slot:03d}": answer for slot, answer in zip(order, answers, strict=True)}


def roll_out(setup: Setup, plan: Plan, slots: Sequence[int]) -> dict[int, torch.Tensor]:
    """Where the student goes: x_t (C, H, W) by slot, on its own path or, off-policy, on the data's."""
    on_policy = setup.params.states == "on_policy"
    batches = list(setup.batches(plan, slots, setup.execution.rollout_batch, lambda slot: -plan.query[slot][0]))
    forwards = sum(int(batch.index.max()) for batch in batches) if on_policy else 0
    idle = missing(forwards, setup.execution)
    states: dict[int, torch.Tensor] = {}
    with setup.rolling_out():
        for batch in batches:
            if on_policy:
                path = setup.student.field, batch.noise(), batch.condition(), setup.grid
                x_t = roll_out_to_query(*path, batch.index).x_t
            else:
                x_t = noised(batch.targets(), batch.noise(), batch.levels(batch.index))
            states.update(zip(batch.slots, x_t.unbind(), strict=True))
        for _ in range(idle):
            _idle(setup, plan).put_to(setup.student.field)
    return states


def ask(setup: Setup, teacher: VelocityField, questions: Iterable[Question]) -> list[torch.Tensor]:
    """What the teacher would do there. All questions at once: switching adapters to and fro costs as much as a small
    forward."""
    with torch.no_grad(), setup.precision():
        return [question.put_to(teacher) for question in questions]


def compare(setup: Setup, questions: Iterable[Question], targets: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The gaps (n,) between student and teacher, and their gradient in the student."""
    gaps = []
    for question, target in zip(questions, targets, strict=True):
        with setup.precision():
            gap = velocity_gaps(question.put_to(setup.student.field), target)
        (gap.sum() * question.weight).backward()
        gaps.append(gap.detach())
    return gaps


def _question(batch: Batch, states: dict[int, torch.Tensor]) -> Question:
    x_t = torch.stack([states[slot] for slot in batch.slots])
    return Question(x_t, batch.levels(batch.index), batch.condition(), 1.0 / len(batch.plan.rows))


def _idle(setup: Setup, plan: Plan) -> Question:
    """A question that counts nothing."""
    batch = Batch(setup, plan, [0])
    shape = setup.shape_of(batch.capability, plan.rows[0])
    return Question(torch.zeros(1, *shape, device=setup.execution.device), batch.at(1.0), batch.condition(), 0.0)


def several_states(batch: Batch, teacher: VelocityField, backward: Backward) -> torch.Tensor:
    """K query states of one rollout: the mean of their losses (the ablation of K)."""
    setup, condition = batch.setup, batch.condition()
    index = torch.tensor([batch.plan.query[slot] for slot in batch.slots]).T
    states, gaps = torch.stack(rollout(batch, int(index.max()))), []
    for at_k in index:
        x_t = states[setup.moved(at_k), setup.moved(torch.arange(len(at_k)))]
        gap = gaps_to(teacher, setup, x_t, batch.levels(at_k), condition)
        backward(gap / len(index))
        gaps.append(gap.detach())
    return torch.stack(gaps, dim=1)


def compute(
    setup: Setup, teacher: VelocityField, plan: Plan, slots: Sequence[int]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    step = accumulate if setup.params.query_states == 1 else by_batch(several_states)
    return step(setup, teacher, plan, slots)


def cost(steps: int, reached: float, teacher: float, query_states: int) -> tuple[float, int]:
    return reached + query_states * (teacher + 1.0), query_states


METHOD = Method(compute, cost, several=True, states=None, lockstep=True)
