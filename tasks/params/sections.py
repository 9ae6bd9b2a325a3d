"""The shared sections of params.yaml as frozen records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge

from benchmarks.params import BenchmarkParams, JudgeParams
from data.bounds import OneOf, Positive
from data.microworld import World
from data.records import HELD_OUT
from model.compute.settings import ExecutionParams
from model.families import FAMILIES
from model.route import Route, route_faults


@dataclass(frozen=True)
class MicroParams:
    """Key `backbone.micro`: the network that stage `teachers` trains. `width`: hidden size, split over `heads`."""

    width: Positive
    layers: Positive
    heads: Positive
    latent_channels: Positive


@dataclass(frozen=True)
class PretrainedParams:
    """Key `backbone.pretrained`: how a published checkpoint is loaded and fed.

    `precision` of the frozen networks; latents, trained weights and VAE are always fp32. `resolution` in px: pictures
    keep their aspect at about resolution^2 pixels. Prompts of more than `max_tokens` tokens are cut; stage `encode`
    counts them. `offload` keeps full-checkpoint teachers on the CPU except for their steps.
    """

    precision: Literal["float32", "bfloat16"]
    device: Literal["auto", "cpu", "cuda"]
    resolution: Positive
    max_tokens: Positive
    offload: bool


@dataclass(frozen=True)
class BackboneParams:
    """Section `backbone`: the network of teachers and student. `name` "micro" reads `micro`, others `pretrained`."""

    name: Annotated[str, OneOf(FAMILIES)]
    micro: MicroParams | None
    pretrained: PretrainedParams | None

    def faults(self) -> list[str]:
        wanted, other = ("micro", "pretrained") if FAMILIES[self.name].size is None else ("pretrained", "micro")
        if getattr(self, wanted) is None:
            return [f"{wanted} = null: name = {self.name!r} needs it"]
        if getattr(self, other) is not None:
            return [f"{other}: name = {self.name!r} does not read it; write {other}: null"]
        micro = self.micro
        if micro is not None and micro.width % micro.heads:
            return [f"micro.width = {micro.width}: expected a multiple of micro.heads = {micro.heads}"]
        return []

    @property
    def bytes_a_weight(self) -> int:
        """Of the frozen networks."""
        return 2 if self.pretrained is not None and self.pretrained.precision == "bfloat16" else 4

    @property
    def offload(self) -> bool:
        return self.pretrained is not None and self.pretrained.offload

    def loading(self, device: str | None = None) -> dict[str, Any]:
        """Options of model.backbones.load_backbone, `device` instead of the section's; none for the micro backbone."""
        if (p := self.pretrained) is None:
            return {}
        sizes = {"resolution": p.resolution, "max_tokens": p.max_tokens}
        return {"dtype": p.precision, "device": device or p.device, **sizes}


@dataclass(frozen=True)
class SamplingParams:
    """Section `sampling`: which examples every score is of, and how their images are drawn, unguided.

    `split`: "dev" to choose numbers on, "eval" to report. `steps` Euler steps; `guidance` is the scale of the guided
    references (1 = unguided).
    """

    split: Annotated[str, OneOf(HELD_OUT)]
    steps: Positive
    guidance: Annotated[float, Ge(1), "1 (unguided) or more"]
    images_per_prompt: Positive
    seed: int
    batch: Positive


@dataclass(frozen=True)
class RoutingParams:
    """Section `routing`: which teacher a capability's examples go to, in the stages that validate, distil and score."""

    routes: tuple[Route, ...]

    def faults(self) -> list[str]:
        return route_faults(self.routes)


SHARED: dict[str, type] = {
    "world": World,
    "backbone": BackboneParams,
    "sampling": SamplingParams,
    "routing": RoutingParams,
    "execution": ExecutionParams,
    "benchmark": BenchmarkParams,
    "judge": JudgeParams,
}
