"""A judge of edits, whatever answers: what it is asked, how its reply is read, and when it has given no score.

A judge answers two questions on 0 to 10 about an edited image: the semantic one sees source, result and instruction and
grades success and over-editing; the quality one sees the result alone and grades naturalness and artifacts (the
protocol of GEdit-Bench: VIEScore's "tie" task, arXiv 2312.14867, as used by stepfun-ai/Step1X-Edit). The wording is
ours; the upstream's is read at run time where a user has it. A reply that cannot be read is asked for once more, then
it is `unparseable`: no score is ever guessed.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.judge.wording import REPAIR, Wording
from benchmarks.scores.scorecard import HIGHEST
from data.errors import UserError
from data.files import digest, sha256_bytes
from data.images import decode_image, encode_png
from data.randomness import seed_of

SCORES_A_REPLY = 2
RESIZES = ("match-source", "area512", "none")
IMAGE_FORMATS = ("png", "jpeg")
JUDGES = ("endpoint", "local", "fake", "replay")
MAX_PIXELS = 64_000_000
LONGEST_REPLY = 20_000  # characters that are read; a judge limited to a few hundred tokens stays far below
OPENINGS = 20  # braces that open nothing before a reply is given up on


# --- settings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JudgeSettings:
    """What a score depends on besides the images: two results with different settings are never averaged together.

    `provider` names who serves the model (providers filter and score differently), `seed` None sends none, `resize`
    acts on the edited image ("match-source": to the source's size, as upstream; "area512": both images to 512 x 512
    pixels in area; "none"). `repeats` asks each question several times, with seed + i.
    """

    kind: str  # one of JUDGES
    model: str
    provider: str
    temperature: float
    seed: int | None
    max_tokens: int
    text_first: bool  # the text before the images, or after them
    image_format: str  # "png" or "jpeg"
    resize: str
    json_schema: bool  # ask the server to enforce the reply's form
    repeats: int
    extra: dict[str, Any]  # further fields of the request's body

    def faults(self) -> list[str]:
        found = [
            f"{name} = {value!r}: choose one of {list(known)}"
            for name, value, known in (
                ("kind", self.kind, JUDGES),
                ("image_format", self.image_format, IMAGE_FORMATS),
                ("resize", self.resize, RESIZES),
            )
            if value not in known
        ]
        found += [
            f"{name} = {getattr(self, name)}: expected 1 or more"
            for name in ("max_tokens", "repeats")
            if getattr(self, name) < 1
        ]
        found += [] if self.temperature >= 0 else [f"temperature = {self.temperature}: expected 0 or more"]
        return found + ([] if self.model else ["model: name the model that judges, with its date where it has one"])


def identity_of_judge(settings: JudgeSettings, wording: Wording) -> dict[str, Any]:
    """All that a judgement depends on besides the images and how often it was asked for."""
    return {
        **{name: value for name, value in asdict(settings).items() if name != "repeats"},
        "wording": wording.identity(),
    }


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
        return digest(
            {
                "kind": self.kind,
                "text": self.text,
                "images": [sha256_bytes(image) for image in self.images],
                "repeat": self.repeat,
            }
        )


@dataclass(frozen=True)
class Reply:
    """What came back: `status` "ok" (with whatever text), "refused" (the server says so) or "api_error" (no answer
    within the tries).
    """

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
class Outcome:
    """A question's end: two scores in [0, 10] with the judge's reasoning if and only if the status is ok."""

    status: str
    scores: tuple[float, ...] = ()
    reasoning: str = ""
    fault: str = ""


def last_object(text: str) -> str | None:
    """The last balanced {...} at the outermost level, with braces inside strings not counted; None where there is
    none.
    """
    found, start, failed = None, text.find("{"), 0
    while start >= 0 and failed < OPENINGS:
        depth, in_string, escaped, end = 0, False, False, -1
        for place in range(start, len(text)):
            mark = text[place]
            if in_string:
                escaped, in_string = mark == "\\" and not escaped, mark != '"' or escaped
            elif mark == '"':
                in_string = True
            elif mark in "{}":
                depth += 1 if mark == "{" else -1
                if depth == 0:
                    end = place
                    break
        failed += end < 0
        found = text[start : end + 1] if end >= 0 else found
        start = text.find("{", (end if end >= 0 else start) + 1)
    return found


def _without_trailing_commas(text: str) -> str:
    """Commas before a closing bracket, outside strings, are dropped."""
    return re.sub(r'("(?:[^"\\]|\\.)*")|,(?=\s*[}\]])', lambda match: match.group(1) or "", text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def parse_reply(text: str) -> Outcome:
    """Reads a judge's text: the last JSON object's `score`, a list of exactly two finite numbers from 0 to 10.

    Code fences, prose around the object and trailing commas are tolerated, nothing else: the outcome is then
    `unparseable` with the fault in words.
    """
    body = last_object(text[:LONGEST_REPLY])
    if body is None:
        return Outcome("unparseable", fault="it holds no complete JSON object")
    value: Any = None
    for candidate in (body, _without_trailing_commas(body)):
        try:
            value = json.loads(candidate, strict=False, object_pairs_hook=_unique)
            break
        except (ValueError, RecursionError):
            continue
    if value is None:
        return Outcome("unparseable", fault="its JSON object is malformed")
    scores = value.get("score")
    if not isinstance(scores, list) or len(scores) != SCORES_A_REPLY:
        return Outcome("unparseable", fault='it has no "score" that is a list of two numbers')
    if not all(isinstance(score, (int, float)) and not isinstance(score, bool) for score in scores):
        return Outcome("unparseable", fault="its scores are not numbers")
    if not all(abs(score) <= 1e9 and math.isfinite(score) and 0.0 <= score <= HIGHEST for score in scores):
        return Outcome("unparseable", fault="its scores do not lie between 0 and 10")
    reasoning = value.get("reasoning", "")
    return Outcome(
        "ok",
        tuple(float(score) for score in scores),
        reasoning if isinstance(reasoning, str) else json.dumps(reasoning),
    )


DECLINED = re.compile(
    r"\b(sorry|apologi[sz]e|unable to|can(?:no|['’])t|not able to|won['’]t)\b.*\b(assist|help|comply|provide|evaluate|rate|analy[sz]e|process|view|fulfil)",
    re.IGNORECASE | re.DOTALL,
)


def declined(text: str) -> bool:
    """Whether a reply without any JSON, list or grade in it says in words that the judge will not answer."""
    return not re.search(r"[{}\[\]]|\d", text) and bool(DECLINED.search(text))


def outcome(replies: Sequence[Reply]) -> Outcome:
    """The end of a question from its replies, of which the last one counts. A pure function: stored replies can be read
    again.
    """
    last = replies[-1]
    if last.status != "ok":
        return Outcome(last.status, fault=last.error)
    return Outcome("refused", fault=last.text[:200]) if declined(last.text) else parse_reply(last.text)


def ask_once_or_twice(ask: Ask, question: Question) -> list[Reply]:
    """The judge's replies: a second one only where the first was a text that cannot be read."""
    first = ask(question, ())
    found = outcome([first])
    if first.status != "ok" or found.status != "unparseable":
        return [first]
    return [first, ask(question, [(first.text, REPAIR.replace("<fault>", found.fault))])]


def reply_to_json(reply: Reply) -> dict[str, Any]:
    return asdict(reply)


def reply_from_json(value: Mapping[str, Any]) -> Reply:
    """Raises UserError for what is not a stored reply."""
    try:
        return Reply(**value)
    except TypeError as error:
        raise UserError(
            f"stored reply {str(value)[:80]}: {error}; remove that line of the shard, and it is asked for again"
        ) from error


# --- images -----------------------------------------------------------------------------------------------------------


def read_rgb(path: Path) -> Image.Image:
    """The upright RGB image of a file. Raises ImageFault."""
    return decode_image(path, max_pixels=MAX_PIXELS, convert_modes=True)


def _to_area(image: Image.Image, area: int) -> Image.Image:
    """Resized to about `area` pixels, aspect kept."""
    scale = math.sqrt(area / (image.width * image.height))
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def prepare_images(source: Image.Image | None, edited: Image.Image, settings: JudgeSettings) -> tuple[bytes, ...]:
    """The images of a question, encoded as the judge receives them: (source, edited) or, without a source, (edited,).

    "match-source" needs the source's size: for the quality question pass the edited image already resized by
    `match_source`.
    """
    images = [edited] if source is None else [source, edited]
    if settings.resize == "area512":
        images = [_to_area(image, 512 * 512) for image in images]
    return tuple(_encoded(image, settings.image_format) for image in images)


def match_source(source_size: tuple[int, int], edited: Image.Image, settings: JudgeSettings) -> Image.Image:
    """The edited image as it is judged: stretched to the source's (width, height) under "match-source", where aspect is
    not kept, as upstream.
    """
    return edited.resize(source_size) if settings.resize == "match-source" and edited.size != source_size else edited


def _encoded(image: Image.Image, image_format: str) -> bytes:
    import numpy as np

    if image_format == "png":
        return encode_png(np.asarray(image))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG")  # Pillow's own quality, as upstream
    return buffer.getvalue()


# --- judges that ask nobody -------------------------------------------------------------------------------------------


def fake_judge() -> Ask:
    """Scores that are a function of the question's digest: for trials of the pipeline, never for a result."""

    def ask(question: Question, turns: Sequence[Turn]) -> Reply:
        scores = [seed_of(0, 0, slot, question.digest()) % 11 for slot in range(SCORES_A_REPLY)]
        return Reply(
            "ok",
            json.dumps({"score": scores, "reasoning": "made up from the images' digest"}),
            model="fake",
            finish_reason="stop",
        )

    return ask


def replay_judge(values: Mapping[str, Any]) -> Ask:
    """Answers from stored results (`benchmarks.store.read_results` of an earlier run); what was not asked then is an
    api_error now.
    """
    known = {
        value["question"]: [reply_from_json(reply) for reply in value["replies"]]
        for value in values.values()
        if "question" in value
    }

    def ask(question: Question, turns: Sequence[Turn]) -> Reply:
        replies = known.get(question.digest(), [])
        return (
            replies[len(turns)]
            if len(turns) < len(replies)
            else Reply("api_error", "", attempts=0, error="not among the recorded replies")
        )

    return ask
