"""Sections `benchmark` and `judge` of params.yaml: who scores the images that the stages draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from data.bounds import Above, Count, NotNegative, OneOf, Positive
from data.records import EDITS


@dataclass(frozen=True)
class BenchmarkParams:
    """Section `benchmark`: who scores the images that validate and score draw.

    `detector` "micro" parses the micro world's pictures; anything else is GenEval's Mask2Former (a folder, or a name on
    the hub), and `classifier` the CLIP that tells colours. `batch` images pass them together on `device`, in `workers`
    processes of this machine or those of the dask `scheduler`."""

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
    """Key `judge.request`: the request besides text and images; all of it may move a score.

    `seed` null sends none; `resize` acts on the images ("match-source": the edited one to its source's size, "area512":
    both to the area of 512 x 512 px); `extra` are further fields of the request's body."""

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
    """Key `judge.server`: how an OpenAI-compatible endpoint is reached.

    `key_variable` names the environment variable with the key ("": none is needed), `provider` who serves the model
    ("": the base URL's host). Waits in seconds; `per_minute` limits requests that begin in a minute (0: no limit)."""

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
    outside `categories` (none named: all), are left out. An image gets `repeats` judgements. `concurrency` questions
    are under way at once, asked by `workers` processes of this machine or by those of benchmark.scheduler. `retry`
    names statuses whose questions a later run asks again. `prices` are per million prompt and completion tokens; a run
    estimated above `highest_price` does not begin."""

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
            name = "name the model as the server does, with its date, or the checkpoint's folder"
            faults.append(f"model is empty, but kind = {self.kind!r}: {name}")
        if self.kind == "endpoint" and not self.server.base_url.startswith(("http://", "https://")):
            faults.append(f"server.base_url = {self.server.base_url!r}: expected http://... or https://...")
        if self.kind == "local" and self.request.temperature:
            reason = "a local judge decodes greedily, so it must be 0"
            faults.append(f"request.temperature = {self.request.temperature}: {reason}")
        return faults
