"""The protocol between GEdit-Bench and a judge: settings, questions, replies and how a question ends.

A judge answers two questions on 0 to 10 about an edited image: the semantic one sees source, result and instruction and
grades success and over-editing; the quality one sees the result alone and grades naturalness and artifacts (the
protocol of GEdit-Bench: VIEScore's "tie" task, arXiv 2312.14867, as used by stepfun-ai/Step1X-Edit). A reply that
cannot be read is asked for once more, then it is `unparseable`: no score is ever guessed."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import numpy as np
from PIL import Image

from benchmarks.judge.reading import CUT, SCORES_A_REPLY, Outcome, declined, parse_choice, parse_reply
from benchmarks.judge.wording import CHOICE_REPLY, GRADES_REPLY, KINDS, PREFERENCES, SEMANTIC, PairWording, Wording
from data.bounds import NotNegative, OneOf, Positive, expected, holds
from data.errors import UserError, UserErrors
from data.files import digest, sha256_bytes
from data.images import decode_image, encode_png
from data.randomness import seed_of

RESIZES = ("match-source", "area512", "none")
IMAGE_FORMATS = ("png", "jpeg")
JUDGES = ("endpoint", "local", "fake", "replay")
MAX_PIXELS = 64_000_000


# --- settings ---------------------------------------------------------------------------------------------------------


def out_of_range(record: Any) -> list[str]:
    """A sentence for every field of a dataclass whose value breaks a rule of its type (see `data.bounds`)."""
    hints = get_type_hints(type(record), include_extras=True)
    rules = [(name, getattr(record, name), rule) for name in hints for rule in getattr(hints[name], "__metadata__", ())]
    return [f"{name} = {value!r}: expected {expected(rule)}" for name, value, rule in rules if not holds(value, rule)]


@dataclass(frozen=True)
class JudgeSettings:
    """What a score depends on besides the images: two results with different settings are never averaged together.

    `provider` names who serves the model (providers filter and score differently), `seed` None sends none, `resize`
    acts on the edited image ("match-source": to the source's size, as upstream; "area512": both images to 512 x 512
    pixels in area; "none"). `repeats` asks each question several times, with seed + i. Raises UserErrors for values out
    of range."""

    kind: Annotated[str, OneOf(JUDGES)]
    model: str
    provider: str
    temperature: NotNegative
    seed: int | None
    max_tokens: Positive
    text_first: bool  # the text before the images, or after them
    image_format: Annotated[str, OneOf(IMAGE_FORMATS)]
    resize: Annotated[str, OneOf(RESIZES)]
    json_schema: bool  # ask the server to enforce the reply's form
    repeats: Positive
    extra: dict[str, Any]  # further fields of the request's body
    wording: Wording | PairWording

    def __post_init__(self) -> None:
        faults = out_of_range(self)
        if not self.model:
            faults.append("model: name the model that judges, with its date where it has one")
        if faults:
            raise UserErrors("the judge's settings:", faults)

    def identity(self) -> dict[str, Any]:
        """All that a judgement depends on besides the images and how often it was asked for, as JSON values."""
        identity = {**asdict(self), "wording": self.wording.identity()}
        del identity["repeats"]
        return identity


# --- questions and replies --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """One request: the text and its images as the judge receives them (encoded), for the `repeat`-th time."""

    kind: str
    text: str
    images: tuple[bytes, ...]
    media_type: str  # "image/png" or "image/jpeg"
    repeat: int

    def digest(self) -> str:
        images = [sha256_bytes(image) for image in self.images]
        return digest({"kind": self.kind, "text": self.text, "images": images, "repeat": self.repeat})


@dataclass(frozen=True)
class Reply:
    """`status` is "ok" (with whatever text), "refused" (the server says so) or "api_error" (no answer within the
    tries)."""

    status: str
    text: str
    model: str = ""  # as the server names it
    finish_reason: str = ""
    usage: dict[str, int] | None = None
    attempts: int = 1  # requests sent for this reply
    error: str = ""
    seconds: float = 0.0


Turn = tuple[str, str]  # (the judge's unusable reply, what it is told)
Ask = Callable[[Question, Sequence[Turn]], Reply]


@dataclass(frozen=True)
class Form:
    """What a kind of question wants to hear: how the judge is told, how its text is read, and the schema (named) that a
    server may enforce."""

    told: str
    read: Callable[[str], Outcome]
    name: str
    schema: Mapping[str, Any]


def _schema(**properties: Mapping[str, Any]) -> dict[str, Any]:
    """Of an object with these properties and the judge's reasoning, and no others."""
    every = {**properties, "reasoning": {"type": "string"}}
    return {"type": "object", "properties": every, "required": list(every), "additionalProperties": False}


_SCORE = {"type": "array", "items": {"type": "number"}, "minItems": SCORES_A_REPLY, "maxItems": SCORES_A_REPLY}
_GRADES = Form(GRADES_REPLY, parse_reply, "grades", _schema(score=_SCORE))
_WINNER = {"type": "string", "enum": ["A", "B", "tie"]}
_PREFERENCE = Form(CHOICE_REPLY, parse_choice, "preference", _schema(winner=_WINNER))
FORMS = {**dict.fromkeys(KINDS, _GRADES), **dict.fromkeys(PREFERENCES, _PREFERENCE)}  # by the question's kind


def outcome(replies: Sequence[Reply], kind: str = SEMANTIC) -> Outcome:
    """How a question of this kind ended, by the last of its replies. A pure function: stored replies can be read
    again."""
    last = replies[-1]
    if last.status != "ok":
        return Outcome(last.status, fault=last.error)
    if last.finish_reason.lower() in CUT:
        return Outcome("unparseable", fault="it was cut off by the limit of its length")
    found = FORMS[kind].read(last.text)
    refused = found.status == "unparseable" and declined(last.text)
    return Outcome("refused", fault=last.text[:200]) if refused else found


def ask_once_or_twice(ask: Ask, question: Question) -> list[Reply]:
    """The judge's replies: a second one only where the first was a text that cannot be read."""
    first = ask(question, ())
    found = outcome([first], question.kind)
    if found.status != "unparseable":
        return [first]
    told = f"That reply cannot be used: {found.fault}. {FORMS[question.kind].told}"
    return [first, ask(question, [(first.text, told)])]


def stored_replies(value: Mapping[str, Any]) -> list[Reply]:
    """The replies of a stored result. Raises UserError for what is none."""
    try:
        return [Reply(**reply) for reply in value["replies"]]
    except (KeyError, TypeError) as error:
        advice = "remove that line of the shard, and it is asked for again"
        raise UserError(f"stored replies {str(value)[:80]}: {error}; {advice}") from error


# --- images -----------------------------------------------------------------------------------------------------------


def read_rgb(path: Path) -> Image.Image:
    """The upright RGB image of a file. Raises ImageFault."""
    return decode_image(path, max_pixels=MAX_PIXELS, convert_modes=True)


def _to_area(image: Image.Image, area: int) -> Image.Image:
    """Resized to about `area` pixels, aspect kept."""
    scale = math.sqrt(area / (image.width * image.height))
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def match_source(source_size: tuple[int, int], edited: Image.Image, settings: JudgeSettings) -> Image.Image:
    """The edited image stretched to the source's (width, height) under "match-source", as upstream; else unchanged."""
    return edited.resize(source_size) if settings.resize == "match-source" and edited.size != source_size else edited


def prepare_images(source: Image.Image | None, edited: Image.Image, settings: JudgeSettings) -> tuple[bytes, ...]:
    """The images of a question, encoded as the judge receives them: (source, edited) or, without a source, (edited,).

    "match-source" needs the source's size: pass what `match_source` returns."""
    return encoded([edited] if source is None else [source, edited], settings)


def encoded(images: Sequence[Image.Image], settings: JudgeSettings) -> tuple[bytes, ...]:
    """Images as the judge receives them: under "area512" in that area, else in the size that they have."""
    if settings.resize == "area512":
        images = [_to_area(image, 512 * 512) for image in images]
    return tuple(_encoded(image, settings.image_format) for image in images)


def _encoded(image: Image.Image, image_format: str) -> bytes:
    if image_format == "png":
        return encode_png(np.asarray(image))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG")  # Pillow's default quality, as upstream
    return buffer.getvalue()


# --- judges without a network -----------------------------------------------------------------------------------------


def fake_judge() -> Ask:
    """Answers that are a function of the question's digest: for trials of the pipeline, never for a result."""

    def ask(question: Question, turns: Sequence[Turn]) -> Reply:
        draws = [seed_of(0, 0, slot, question.digest()) for slot in range(SCORES_A_REPLY)]
        grades = {"score": [draw % 11 for draw in draws]} if question.kind in KINDS else {"winner": "AB"[draws[0] % 2]}
        text = json.dumps({**grades, "reasoning": "made up from the images' digest"})
        return Reply("ok", text, model="fake", finish_reason="stop")

    return ask


def replay_judge(results: Mapping[str, Any]) -> Ask:
    """Answers from stored results (`benchmarks.store.read_results` of an earlier run); what was not asked then is an
    api_error now."""
    recorded = {value["question"]: stored_replies(value) for value in results.values() if "question" in value}

    def ask(question: Question, turns: Sequence[Turn]) -> Reply:
        replies = recorded.get(question.digest(), [])
        if len(turns) < len(replies):
            return replies[len(turns)]
        return Reply("api_error", "", attempts=0, error="not among the recorded replies")

    return ask
