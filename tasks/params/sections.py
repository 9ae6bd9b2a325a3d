"""The shared sections of params.yaml as frozen records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge

from data.bounds import Above, Count, NotNegative, OneOf, Positive
from data.microworld import World
from data.records import EDITS
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
    """Section `routing`: which teacher a capability's examples go to, in the stages that validate, distil and score."""

    routes: tuple[Route, ...]

    def faults(self) -> list[str]:
        return route_faults(self.routes)


@dataclass(frozen=True)
class BenchmarkParams:
    """Section `benchmark`: which networks score the images that validate and score draw.

    `detector` "micro" parses the micro world's pictures; anything else is GenEval's Mask2Former (a folder, or a name on
    the hub), and `classifier` the CLIP that tells colours. They see `batch` images at once on `device`, in `workers`
    processes of this machine, or in the workers of the dask `scheduler`.
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
    """Key `judge.request`: what a request says besides text and images; all of it may move a score. `seed` null sends
    none; `resize` acts on the images ("match-source": the edited image to its source's size, "area512": both to the
    area of 512 x 512 px); `extra` are further fields of the request's body.
    """

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
    """Key `judge.server`: an OpenAI-compatible endpoint. `key_variable` names the environment variable with the key
    ("": no key); `provider` who serves the model ("": the base URL's host). Waits in seconds; `per_minute` limits the
    requests that begin in a minute (0: no limit).
    """

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
    """Section `judge`: who scores edits, unless the micro world's pictures are parsed.

    `kind` "endpoint" asks the `server`; "local" is Qwen2.5-VL in the folder `model`, on benchmark.device in `dtype`;
    "none" refuses edits. `wording` is "" (ours), or a file or folder with other texts. Edits in another `language`, or
    outside `categories` (empty: all), are left out. An image gets `repeats` judgements. `concurrency` questions run at
    once, in `workers` processes of this machine or in those of benchmark.scheduler. A later run repeats questions with
    a status in `retry`. `prices` are per million prompt and completion tokens; a run estimated above `highest_price`
    does not begin.
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
            remedy = "name the model as the server does, with its date, or the checkpoint's folder"
            faults.append(f"model is empty, but kind = {self.kind!r}: {remedy}")
        if self.kind == "endpoint" and not self.server.base_url.startswith(("http://", "https://")):
            faults.append(f"server.base_url = {self.server.base_url!r}: expected http://... or https://...")
        if self.kind == "local" and self.request.temperature:
            given = f"request.temperature = {self.request.temperature}"
            faults.append(f"{given}: a local judge decodes greedily, so it must be 0")
        return faults


SHARED: dict[str, type] = {
    "world": World,
    "backbone": BackboneParams,
    "sampling": SamplingParams,
    "routing": RoutingParams,
    "execution": ExecutionParams,
    "benchmark": BenchmarkParams,
    "judge": JudgeParams,
}
