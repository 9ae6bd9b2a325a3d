"""AdamW, or Muon on the blocks' matrices with AdamW on the rest.

AdamW alone has torch's betas (.9, .999), which the paper's trainers have too. Beside Muon its second moment has .99:
there it moves the embeddings, norms and biases of runs of some hundred steps, which would be over before .999 forgets
their first gradients; the bundled teachers were trained so.

Muon follows Keller Jordan's description (KellerJordan/Muon): momentum, then the update's nearest semi-orthogonal matrix
by five quintic Newton-Schulz steps. torch.optim.Muon casts that iteration to bfloat16 and takes one matrix at a time;
on a CPU without bfloat16 units that costs as much as the network itself. Ours keeps fp32 and iterates all matrices of
one shape as a batch: three to five times faster there, and free of a cast.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from data.errors import UserError
from model.backbones import Backbone

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic: singular values land in about [0.7, 1.2] after five steps


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The (approximately) nearest semi-orthogonal matrix of each; (N, rows, columns) fp32 -> the same shape."""
    a, b, c = NEWTON_SCHULZ
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for 2-D parameters; the update is scaled by 0.2 sqrt(max(rows, columns)) so that AdamW's learning rates
    carry over (Moonshot, arXiv 2502.16982)."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None, ok: torch.Tensor | None = None) -> None:  # type: ignore[override]
        """With `ok` (0-dim, 1 or 0) equal to 0 nothing changes, and the host need not know."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                for parameter in parameters:
                    if "momentum" not in self.state[parameter]:
                        self.state[parameter]["momentum"] = torch.zeros_like(parameter)
                momenta = [self.state[parameter]["momentum"] for parameter in parameters]
                gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
                if ok is None:
                    torch._foreach_mul_(momenta, group["momentum"])
                else:
                    gradients = [torch.where(ok > 0, gradient, 0.0) for gradient in gradients]
                    torch._foreach_mul_(momenta, torch.where(ok > 0, group["momentum"], 1.0))
                torch._foreach_add_(momenta, gradients)
                nesterov = torch._foreach_add(gradients, momenta, alpha=group["momentum"])
                updates = list(orthogonalize(torch.stack(nesterov)).unbind())
                if ok is not None:
                    torch._foreach_mul_(updates, ok)
                weights: list[torch.Tensor] = list(parameters)
                if group["weight_decay"]:
                    decay = group["lr"] * group["weight_decay"]
                    torch._foreach_mul_(weights, 1.0 - (decay if ok is None else decay * ok))
                torch._foreach_add_(weights, updates, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


class Optimizers:
    """One or two optimizers that step, zero and save as one."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)
        self.base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def step(self, rate: float = 1.0, ok: torch.Tensor | None = None) -> None:
        """One step at `rate` times the configured learning rates; `ok` as for Muon."""
        for optimizer, rates in zip(self.optimizers, self.base_rates, strict=True):
            for group, base in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = base * rate
            if isinstance(optimizer, Muon):
                optimizer.step(ok=ok)
                continue
            if ok is not None:
                # How GradScaler withholds a fused step.
                optimizer.found_inf = 1.0 - ok  # type: ignore[attr-defined]
            optimizer.step()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The whole state as flat named tensors, for safetensors."""
        states = [optimizer.state_dict()["state"] for optimizer in self.optimizers]
        return {
            f"{number}.{index}.{key}": torch.as_tensor(value).clone()
            for number, state in enumerate(states)
            for index, values in state.items()
            for key, value in values.items()
        }

    def load_tensors(self, named: dict[str, torch.Tensor]) -> None:
        for number, optimizer in enumerate(self.optimizers):
            content = optimizer.state_dict()
            state: dict[int, dict[str, torch.Tensor]] = {}
            for name, value in named.items():
                which, index, key = name.split(".", 2)
                if int(which) == number:
                    state.setdefault(int(index), {})[key] = value.clone()
            optimizer.load_state_dict({"state": state, "param_groups": content["param_groups"]})


def _adamw(parameters: list[nn.Parameter], learning_rate: float, beta2: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, beta2), weight_decay=0.0, fused=True)


def _build_adamw(named: list[tuple[str, nn.Parameter]], learning_rate: float, backbone: Backbone) -> Optimizers:
    return Optimizers([_adamw([parameter for _, parameter in named], learning_rate, beta2=0.999)])


def _build_muon(named: list[tuple[str, nn.Parameter]], learning_rate: float, backbone: Backbone) -> Optimizers:
    """Matrices inside the backbone's blocks go to Muon; modulations, embeddings, norms and biases to AdamW."""
    blocks, modulations = set(backbone.blocks), set(backbone.modulations)
    places = [({*name.split(".")}, p) for name, p in named if p.ndim == 2]
    matrices = [p for place, p in places if blocks & place and not modulations & place]
    if not matrices:
        where = f"the blocks of {backbone.name} ({', '.join(backbone.blocks)})"
        raise UserError(f"optimizer = 'muon': no trained parameter is a matrix in {where}; choose adamw")
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    companion = [_adamw(rest, learning_rate, beta2=0.99)] if rest else []
    return Optimizers([Muon(matrices, lr=learning_rate), *companion])


OPTIMIZERS = {"adamw": _build_adamw, "muon": _build_muon}


def build_optimizer(
    name: str, named: Iterable[tuple[str, nn.Parameter]], learning_rate: float, backbone: Backbone
) -> Optimizers:
    """Over all of `named`, whether or not an adapter is switched off just now; `backbone` says where its blocks are.

    Raises UserError for an unknown name, parameters that are not fp32, and Muon where no block has a trained matrix.
    """
    trainable = list(named)
    if name not in OPTIMIZERS:
        raise UserError(f"optimizer = {name!r}: choose one of {sorted(OPTIMIZERS)}")
    wrong = [key for key, parameter in trainable if parameter.dtype != torch.float32]
    if wrong:
        why = "Adam's second moment cannot decay in bfloat16"
        raise UserError(f"trainable parameters must be float32, {wrong[0]} is not ({why})")
    return OPTIMIZERS[name](trainable, learning_rate, backbone)


def warmup_then_linear(step: int, steps: int, warmup: int, decay_from: float) -> float:
    """Factor of the learning rate at `step`: up over `warmup` steps, 1 until `decay_from` of all, then down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    start = decay_from * steps
    return 1.0 if step < start else max(0.0, (steps - step) / max(steps - start, 1.0))


def warmup_then_cosine(step: int, steps: int, warmup: int, decay_from: float) -> float:
    """As `warmup_then_linear`, falling to 0 along half a cosine."""
    factor = warmup_then_linear(step, steps, warmup, decay_from)
    return factor if step < max(warmup, decay_from * steps) else 0.5 - 0.5 * math.cos(math.pi * factor)


def warmup_then_constant(step: int, steps: int, warmup: int, decay_from: float) -> float:
    """As `warmup_then_linear` without the fall: what is learned by a step does not depend on how many are to follow."""
    return warmup_then_linear(step, steps, warmup, 1.0) if step < warmup else 1.0


SCHEDULES = {"linear": warmup_then_linear, "cosine": warmup_then_cosine, "constant": warmup_then_constant}
