"""Flow-OPD: policy gradients on a stochastic rollout, groups of one prompt, the KL between the transitions of student
and teacher as the cost of a state; every step holds a group of each route.

The KL of a transition is |mean_student - mean_teacher|^2 / (2 s^2): both codebases divide by s^2, not by the deviation
squared, s^2 |dt|. Norms are means over the latent's elements. Three forms:

| form | loss of a state | its expected gradient |
|---|---|---|
| published | -A log pi, A = -KL without a gradient | 0: A does not depend on what is drawn (worldbench/DanceOPD) |
| reached | -A log pi, A = the teacher's log-density of the reached state, less the student's | that of the KL |
| kl | the KL itself, its gradient through the mean (CostaliyA/Flow-OPD, reward_mode gkd) | that of the KL |

CostaliyA/Flow-OPD's usual mode leaves A = -KL its gradient: `kl` and, added to it, `published`. Advantages are clamped
to +-5. The policy that rolls out is the one that learns, so PPO's ratio is 1, its clip never acts and its gradient is
that of log pi.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from model.fields.base import VelocityField
from model.methods.base import Backward, Losses, Method, by_batch
from model.setup import Batch

GROUP = 16  # rollouts of one prompt
ETA = 0.7  # size of the noise
ADVANTAGE_CLAMP = 5.0


@dataclass(frozen=True)
class Transition:
    """A stochastic step of n samples: the `mean` that the student gives it, with a gradient, the teacher's (`aim`) and
    the state `reached`, each (n, C, H, W); `scale` is s, `deviation` s sqrt(-dt)."""

    mean: torch.Tensor
    aim: torch.Tensor
    reached: torch.Tensor
    scale: float
    deviation: float

    @property
    def kl(self) -> torch.Tensor:
        return _mean_square(self.mean - self.aim) / (2.0 * self.scale**2)

    def scored(self, advantage: torch.Tensor) -> torch.Tensor:
        """-A times what of log pi, a mean over the elements, has a gradient."""
        density = -_mean_square(self.reached - self.mean) / (2.0 * self.deviation**2)
        return -advantage.detach().clamp(-ADVANTAGE_CLAMP, ADVANTAGE_CLAMP) * density


def _mean_square(values: torch.Tensor) -> torch.Tensor:
    return values.square().mean((1, 2, 3))


def published(step: Transition) -> torch.Tensor:
    return step.scored(-step.kl)


def reached(step: Transition) -> torch.Tensor:
    """Log-densities are taken in the KL's unit, whose mean is then -KL; the student's has no part in the expected
    gradient and takes away most of its noise. log pi is a sum over the elements here: with two means the gradient would
    be the KL's over their number, below AdamW's epsilon for large latents."""
    gain = _mean_square(step.reached - step.mean) - _mean_square(step.reached - step.aim)
    return step.mean[0].numel() * step.scored(gain / (2.0 * step.scale**2))


def kl(step: Transition) -> torch.Tensor:
    return step.kl


def transition(
    x: torch.Tensor, velocity: torch.Tensor, now: float, after: float, highest: float
) -> tuple[torch.Tensor, float, float]:
    """Mean, s and standard deviation of one stochastic step from noise level `now` to `after`, with the marginals of
    the Euler path.

    With s = eta sqrt(sigma / (1 - sigma)) and dt = after - now < 0: mean = x (1 + s^2 dt / (2 sigma)) + v (1 + s^2 (1 -
    sigma) / (2 sigma)) dt, deviation s sqrt(-dt) (Flow-GRPO, arXiv 2505.05470, equation 9, as Flow-OPD uses it). At
    sigma = 1, s has no value: there 1 - sigma is taken as 1 - `highest`, the level after the first step.
    """
    dt = after - now
    s = ETA * (now / (1.0 - min(now, highest))) ** 0.5
    mean = x * (1.0 + s * s * dt / (2.0 * now)) + velocity * (1.0 + s * s * (1.0 - now) / (2.0 * now)) * dt
    return mean, s, s * (-dt) ** 0.5


def stochastic(form: Callable[[Transition], torch.Tensor]) -> Losses:
    """The form's loss at every state of a stochastic rollout. Returns the KLs (n, N), whatever the form."""

    def losses(batch: Batch, teacher: VelocityField, backward: Backward) -> torch.Tensor:
        setup, condition, levels = batch.setup, batch.condition(), batch.setup.grid.tolist()
        x, steps, kls = batch.noise(), list(pairwise(levels)), []
        for k, (now, after) in enumerate(steps):
            t = batch.at(now)
            with torch.no_grad(), setup.precision():
                target = teacher(x, t, condition).float()
            with setup.precision():
                velocity = setup.student.field(x, t, condition).float()
            mean, scale, deviation = transition(x, velocity, now, after, levels[1])
            aim, _, _ = transition(x, target, now, after, levels[1])
            x = mean.detach() + deviation * batch.noise(f"transition/{k}")
            step = Transition(mean, aim, x, scale, deviation)
            backward(form(step) / len(steps))
            kls.append(step.kl.detach())
        return torch.stack(kls, dim=1)

    return losses


def _method(form: Callable[[Transition], torch.Tensor]) -> Method:
    return Method(
        compute=by_batch(stochastic(form)),
        cost=lambda steps, reached, teacher, query_states: (steps * (teacher + 1.0), steps),
        routing="mixed",
        dense=True,
        group=GROUP,
    )


PUBLISHED, REACHED, KL = _method(published), _method(reached), _method(kl)
