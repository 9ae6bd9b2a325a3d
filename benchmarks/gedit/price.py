"""What judging will cost: tokens of images, prompts and replies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.gedit.questions import Job
from benchmarks.judge.protocol import JudgeSettings
from benchmarks.judge.wording import SEMANTIC
from data.errors import UserError

COMPLETION_TOKENS = 80  # a typical reply
CHARACTERS_A_TOKEN = 4


def tile_tokens(width: float, height: float) -> int:
    """Tokens of an image by OpenAI's rule: scaled to at most 2048 px and a short side of at most 768 px, then 85 and
    170 for each tile of 512 px."""
    scale = min(1.0, 2048 / max(width, height))
    scale *= min(1.0, 768 / (min(width, height) * scale))
    return 85 + 170 * math.ceil(width * scale / 512) * math.ceil(height * scale / 512)


def patch_tokens(width: float, height: float) -> int:
    """Tokens of an image for Qwen2.5-VL: one for each patch of 28 px."""
    return math.ceil(width / 28) * math.ceil(height / 28)


IMAGE_TOKENS: dict[str, Callable[[float, float], int]] = {"tiles": tile_tokens, "patches": patch_tokens}


@dataclass(frozen=True)
class Preview:
    """What is about to be asked, what was answered before, and an estimate of tokens and price."""

    questions: int
    answered: int
    unjudgeable: int  # images that are missing or unreadable
    prompt_tokens: int
    completion_tokens: int
    price: float | None  # in the currency of the prices; None where none were given

    def text(self) -> str:
        cost = "no price was given" if self.price is None else f"about {self.price:.2f} in the prices' currency"
        tokens = f"about {self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion tokens"
        questions = f"{self.questions} questions to ask, {self.answered} answered before"
        return f"judge: {questions}, {self.unjudgeable} images missing or unreadable; {tokens}; {cost}"

    def check(self, highest: float | None) -> None:
        """Raises UserError for a price that is above `highest`, or unknown where there is a highest."""
        if highest is not None and self.questions and (self.price is None or self.price > highest):
            advice = "raise it, give the prices, or judge fewer images"
            raise UserError(f"judge: that is not within the highest price, {highest:g}: {advice}")


Size = tuple[float, float]  # (width, height) in px
Prices = tuple[float, float] | None  # per million prompt and completion tokens


def estimate(
    asked: Sequence[tuple[str, Sequence[Size]]], counts: tuple[int, int], resize: str, rule: str, prices: Prices
) -> Preview:
    """For questions given as text and sizes of images, which `resize` may change; `rule` is one of IMAGE_TOKENS. The
    `counts` are of questions answered before, and of images that cannot be judged."""
    tokens = 0
    for text, sizes in asked:
        tokens += math.ceil(len(text) / CHARACTERS_A_TOKEN)
        for width, height in sizes:
            scale = math.sqrt(512 * 512 / (width * height)) if resize == "area512" else 1.0
            tokens += IMAGE_TOKENS[rule](width * scale, height * scale)
    completion = COMPLETION_TOKENS * len(asked)
    price = None if prices is None else (tokens * prices[0] + completion * prices[1]) / 1e6
    return Preview(len(asked), *counts, tokens, completion, price)


def preview(
    jobs: Sequence[Job], answered: int, unjudgeable: int, settings: JudgeSettings, rule: str, prices: Prices
) -> Preview:
    """An estimate for `jobs`; `rule` is one of IMAGE_TOKENS."""
    asked = []
    for job in jobs:
        source = job.entry.source_size
        edited = source if settings.resize == "match-source" else job.entry.edited_size
        sizes = [source, edited] if job.kind == SEMANTIC else [edited]
        asked.append((settings.wording.text(job.kind, job.entry.instruction), sizes))
    return estimate(asked, (answered, unjudgeable), settings.resize, rule, prices)
