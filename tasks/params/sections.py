"""The shared sections of params.yaml as frozen records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from data.bounds import Above, Count, NotNegative, OneOf, Positive
from data.errors import UserError
from data.records import GLOBAL_EDITS, LOCAL_EDITS
from model.compute.settings import ExecutionParams
from model.families import FAMILIES
from model.route import Route, route_faults

if TYPE_CHECKING:
    from data.microworld import World


EDITS = LOCAL_EDITS + GLOBAL_EDITS


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

    name: Annotated[str, OneOf(FAMILIES)]
    micro: MicroParams | None
    pretrained: PretrainedParams | None

    def faults(self) -> list[str]:
        wanted, other = ("micro", "pretrained") if FAMILIES[self.name].size is None else ("pretrained", "micro")
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


@dataclass(frozen=True)
class BenchmarkParams:
    """Section `benchmark`: who looks at the images that validate and score draw.

    `detector` "micro" parses the micro world's pictures; anything else is GenEval's Mask2Former (a folder, or a name on
    the hub), and `classifier` the CLIP that tells colours. `batch` images pass them together on `device`, in `workers`
    processes of this machine, or in the workers of the dask `scheduler` named.
    """

    detector: str
    classifier: str
    device: str
    batch: Positive
    workers: Positive
    scheduler: str

    def faults(self) -> list[str]:
        names = "micro, a folder, or a name on the hub such as facebook/mask2former-swin-small-coco-instance"
        return [] if self.detector else [f"detector is empty: write {names}"]


@dataclass(frozen=True)
class RequestParams:
    """Key `judge.request`: what is asked of the judge besides text and images; all of it may move a score. `seed` null
    sends none; `resize` acts on the images ("match-source": the edited one to its source's size, "area512": both to the
    area of 512 x 512 px); `extra` are further fields of the request's body."""

    temperature: NotNegative
    seed: int | None
    max_tokens: Positive
    text_first: bool
    image_format: Literal["png", "jpeg"]
    resize: Literal["match-source", "area512", "none"]
    json_schema: bool
    extra: dict[str, Any]


@dataclass(frozen=True)
class ServerParams:
    """Key `judge.server`: how an OpenAI-compatible endpoint is reached. `key_variable` names the environment variable
    with the key ("": it wants none);
    `provider` who serves the model ("": the base URL's host). Waits in seconds; `per_minute` limits requests that begin
    in a minute (0: no limit)."""

    base_url: str
    key_variable: str
    provider: str
    timeout_s: Above
    tries: Positive
    wait_s: NotNegative
    longest_wait_s: NotNegative
    per_minute: Count


@dataclass(frozen=True)
class JudgeParams:
    """Section `judge`: who scores edits where section `benchmark` names GenEval's networks; the micro world's pictures
    are parsed.

    `kind` "endpoint" asks the `server`; "local" is Qwen2.5-VL in the folder `model`, on benchmark.device in `dtype`;
    "none" refuses edits. `wording` is "" (ours), or a file or folder with other texts. Edits in another `language`, or
    outside `categories` (none named: all), are left out. An image gets
    `repeats` judgements. `concurrency` questions are under way at once, asked by `workers` processes of this machine or
    by those of benchmark.scheduler.
    `retry` names statuses whose questions a later run asks again. `prices` are per million prompt and completion
    tokens; a run estimated above
    `highest_price` does not begin.
    """

    kind: Literal["none", "endpoint", "local"]
    model: str
    wording: str
    language: Literal["en", "cn"]
    categories: tuple[Annotated[str, OneOf(EDITS)], ...]
    repeats: Positive
    request: RequestParams
    server: ServerParams
    dtype: str
    concurrency: Positive
    workers: Positive
    retry: tuple[Literal["api_error", "refused", "unparseable"], ...]
    prices: tuple[float, float] | None
    highest_price: float | None

    def faults(self) -> list[str]:
        faults = []
        if self.kind != "none" and not self.model:
            faults.append(
                f"model is empty, but kind = {self.kind!r}: name the model as the server does, with its date, or the checkpoint's folder"
            )
        if self.kind == "endpoint" and not self.server.base_url.startswith(("http://", "https://")):
            faults.append(f"server.base_url = {self.server.base_url!r}: expected http://... or https://...")
        if self.kind == "local" and self.request.temperature:
            faults.append(
                f"request.temperature = {self.request.temperature}: a local judge decodes greedily, so it must be 0"
            )
        return faults


SHARED: dict[str, type] = {
    "world": WorldParams,
    "backbone": BackboneParams,
    "sampling": SamplingParams,
    "routing": RoutingParams,
    "execution": ExecutionParams,
    "benchmark": BenchmarkParams,
    "judge": JudgeParams,
}
