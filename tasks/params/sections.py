"""The shared sections of params.yaml as frozen records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from benchmarks.params import BenchmarkParams, JudgeParams
from data.bounds import Positive
from data.errors import UserError
from model.compute.settings import ExecutionParams
from model.route import Route, route_faults

if TYPE_CHECKING:
    from data.microworld import World


@dataclass(frozen=True)
class WorldParams:
    """Section `world`: which micro world every stage speaks of. `cell` is in pixels, `grid` in cells per edge."""

    shapes: tuple[str, ...]
    colors: tuple[str, ...]
    backgrounds: tuple[str, ...]
    styles: tuple[str, ...]
    grid: int
    cell: int

    def world(self) -> World:
        """Raises UserError for an unknown shape, colour, background or style, or an impossible grid."""
        from data.microworld import World

        return World(self.shapes, self.colors, self.backgrounds, self.styles, self.grid, self.cell)

    def faults(self) -> list[str]:
        try:
            self.world()
        except UserError as error:
            return [str(error).removeprefix("micro world: ")]
        return []


@dataclass(frozen=True)
class MicroParams:
    """Key `backbone.micro`: the size of the network that stage `teachers` trains. `width` is the hidden size, split
    evenly over `heads`.
    """

    width: Positive
    layers: Positive
    heads: Positive
    latent_channels: Positive


@dataclass(frozen=True)
class PretrainedParams:
    """Key `backbone.pretrained`: how a published checkpoint is loaded and fed.

    `precision` is the frozen networks' (float32 or bfloat16; latents, trained weights and VAE are fp32 whatever it is),
    `device` "auto", "cpu" or "cuda",
    `resolution` in px: pictures keep their aspect at about resolution^2 pixels. Prompts of more than `max_tokens`
    tokens are cut; stage `encode` counts them.
    `offload` keeps full-checkpoint teachers on the CPU but for their own steps.
    """

    precision: Literal["float32", "bfloat16"]
    device: Literal["auto", "cpu", "cuda"]
    resolution: Positive
    max_tokens: Positive
    offload: bool


@dataclass(frozen=True)
class BackboneParams:
    """Section `backbone`: the network all teachers and the student share. `name` "micro" takes the key `micro`, every
    other family `pretrained`.
    """

    name: Literal["micro", "sd3", "zimage"]
    micro: MicroParams | None
    pretrained: PretrainedParams | None

    def faults(self) -> list[str]:
        wanted, other = ("micro", "pretrained") if self.name == "micro" else ("pretrained", "micro")
        if getattr(self, wanted) is None:
            return [f"{wanted} = null: name = {self.name!r} needs it"]
        if getattr(self, other) is not None:
            return [f"{other}: name = {self.name!r} does not read it; write {other}: null"]
        if self.micro is not None:
            wrong = self.micro.width % self.micro.heads
            return (
                [f"micro.width = {self.micro.width}: expected a multiple of micro.heads = {self.micro.heads}"]
                if wrong
                else []
            )
        return []

    @property
    def bytes_a_weight(self) -> int:
        """Of the frozen networks."""
        return 2 if self.pretrained is not None and self.pretrained.precision == "bfloat16" else 4

    @property
    def offload(self) -> bool:
        return self.pretrained is not None and self.pretrained.offload

    def loading(self, device: str | None = None) -> dict[str, Any]:
        """The options of model.backbones.load_backbone, `device` in place of the section's own; none for the micro
        backbone, which is what its folder says.
        """
        if self.pretrained is None:
            return {}
        p = self.pretrained
        return {
            "dtype": p.precision,
            "device": device or p.device,
            "resolution": p.resolution,
            "max_tokens": p.max_tokens,
        }


@dataclass(frozen=True)
class SamplingParams:
    """Section `sampling`: how images are drawn for every score, unguided.

    `steps` Euler steps; `guidance` is the scale of the guided references (1 = unguided).
    """

    steps: Positive
    guidance: Annotated[float, Ge(1), "1 (unguided) or more"]
    images_per_prompt: Positive
    seed: int
    batch: Positive


@dataclass(frozen=True)
class RoutingParams:
    """Section `routing`: which teacher answers for which capability; the stages that validate, distil and score must
    agree on it.
    """

    routes: tuple[Route, ...]

    def faults(self) -> list[str]:
        return route_faults(self.routes)


SHARED: dict[str, type] = {
    "world": WorldParams,
    "backbone": BackboneParams,
    "sampling": SamplingParams,
    "routing": RoutingParams,
    "execution": ExecutionParams,
    "benchmark": BenchmarkParams,
    "judge": JudgeParams,
}
