"""A step as data: its plan before it runs, its record afterwards."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, ParamSpec

import torch

from data.bounds import Above, Count, Decay, NotNegative, OneOf, Positive
from data.errors import UserError
from model.compute.optimizer import OPTIMIZERS, SCHEDULES
from model.rollout import QUERY_BIAS
from model.route import Route

P = ParamSpec("P")
STATES = ("on_policy", "off_policy")
ROUTING = ("hard", "mixed", "soft")


@dataclass(frozen=True)
class LoopNumbers:
    """Numbers of one distillation. `rollout_steps` is N of the student's Euler grid, `query` the bias of the query
    index.

    `max_gradient_norm`: a larger norm (before clipping) stops the run as one that is not finite does; 0 sets no bound.
    """

    steps: Positive
    batch: Positive
    learning_rate: Above
    optimizer: Annotated[str, OneOf(OPTIMIZERS)]
    schedule: Annotated[str, OneOf(SCHEDULES)]
    warmup: Count
    decay_from: NotNegative
    ema: Decay
    clip: Above
    max_gradient_norm: NotNegative
    rollout_steps: Positive
    query: Annotated[str, OneOf(QUERY_BIAS)]


@dataclass(frozen=True)
class LoopParams(LoopNumbers):
    """`states`: "on_policy" queries the student's own rollout, "off_policy" the forward-noised data; `query_states`: K
    of them. `routing`: "hard" takes one route a step (G = 1), "mixed" a group of each in every step, sized by the
    routes' weights (G = M), "soft" one route's examples and the mean of all teachers."""

    states: str
    routing: str
    query_states: int


@dataclass(frozen=True)
class Plan:
    """All that is random in one step but the noise, by slot: its route, its bucket's row and the indices of its K query
    states, which differ."""

    index: int
    routes: tuple[Route, ...]
    rows: tuple[int, ...]
    query: tuple[tuple[int, ...], ...]

    @property
    def taken(self) -> list[Route]:
        """The routes of the step, each once."""
        return list({route.capability: route for route in self.routes}.values())


class NotFinite(UserError):
    """A step whose loss or gradient is not finite, or too large. It was not applied: weights, moments and averages are
    those before step `plan.index`.

    `batch`: the step's samples by name, as far as this process computed them.
    """

    def __init__(self, message: str, plan: Plan, batch: dict[str, torch.Tensor]) -> None:
        super().__init__(message)
        self.plan = plan
        self.batch = {"rows": torch.tensor(plan.rows), "query": torch.tensor(plan.query), **batch}


class Measured:
    """Numbers (n,) on their way from the device; `read()` waits for them, and for nothing queued after them."""

    def __init__(self, values: torch.Tensor) -> None:
        self.host, self.arrived = values, None
        if values.device.type == "cuda":
            self.host = torch.empty(values.shape, pin_memory=True)
            self.host.copy_(values, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> list[float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return [float(value) for value in self.host.tolist()]


@dataclass(frozen=True)
class Step:
    """One optimizer step; its numbers are read when asked for, and raise NotFinite where the step was withheld.

    `levels`: the t that were asked, by slot and state. `floor`: the network evaluations that these make necessary,
    counting single samples: rollout, teacher's field and student, the backward not among them. `seconds`: since the
    step before. `measured`: whether the step was applied (1 or 0), loss, gradient norm, evaluations, wishes to stop,
    the losses.
    """

    plan: Plan
    levels: tuple[float, ...]
    floor: int
    learning_rate: float
    seconds: float
    measured: Measured
    batch: dict[str, torch.Tensor]
    limits: LoopParams

    @property
    def index(self) -> int:
        return self.plan.index

    @property
    def route(self) -> str:
        """The capabilities taken, joined by "-"."""
        return "-".join(route.capability for route in self.plan.taken)

    @property
    def teacher(self) -> str:
        """Theirs, joined by "-"."""
        return "-".join(route.teacher for route in self.plan.taken)

    @property
    def t(self) -> float:
        """The mean queried t."""
        return sum(self.levels) / len(self.levels)

    def read(self) -> list[float]:
        """The measured numbers after the first. Raises NotFinite where the step was withheld."""
        applied, loss, norm, *others = self.measured.read()
        if not applied:
            bound, rate = self.limits.max_gradient_norm, self.limits.learning_rate
            above = f" or above max_gradient_norm = {bound}" if bound else ""
            raise NotFinite(
                f"step {self.index} (route {self.route}): loss {loss} or gradient norm {norm} is not finite{above}; "
                f"lower learning_rate = {rate} and run again",
                self.plan,
                self.batch,
            )
        return [loss, norm, *others]

    @property
    def loss(self) -> float:
        return self.read()[0]

    @property
    def gradient_norm(self) -> float:
        """Before clipping."""
        return self.read()[1]

    @property
    def evaluations(self) -> int:
        """Counted at the networks, over all processes."""
        return round(self.read()[2])

    @property
    def stopped(self) -> bool:
        """A process was asked to stop; all of them know it after the same step."""
        return self.read()[3] > 0

    @property
    def losses(self) -> list[float]:
        """As `levels`: by slot and state. Their mean is the loss."""
        return self.read()[4:]


def read_late(loop: Callable[P, Generator[Step, None, None]]) -> Callable[P, Iterator[Step]]:
    """A loop whose steps are yielded once the one before is read: the host need not wait for the step under way."""

    @wraps(loop)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Iterator[Step]:
        previous: Step | None = None
        with closing(loop(*args, **kwargs)) as steps:
            for step in steps:
                if previous is not None:
                    previous.read()
                previous = step
                yield step
            if previous is not None:
                previous.read()

    return wrapped
