"""What judging will cost: tokens of images, prompts and replies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.gedit.questions import Job
from benchmarks.judge.protocol import JudgeSettings
from benchmarks.judge.wording import SEMANTIC, Wording

COMPLETION_TOKENS = 80  # a typical reply
CHARACTERS_A_TOKEN = 4


def tile_tokens(width: float, height: float) -> int:
    """Tokens of an image by OpenAI's rule for tiles: to 2048 px at most, short side to 768 px at most, 85 + 170 a 512
    px tile.
    """
    scale = min(1.0, 2048 / max(width, height))
    scale *= min(1.0, 768 / (min(width, height) * scale))
    return 85 + 170 * math.ceil(width * scale / 512) * math.ceil(height * scale / 512)


def patch_tokens(width: float, height: float) -> int:
    """Tokens of an image for Qwen2.5-VL: one a patch of 28 px."""
    return math.ceil(width / 28) * math.ceil(height / 28)


IMAGE_TOKENS: dict[str, Callable[[float, float], int]] = {"tiles": tile_tokens, "patches": patch_tokens}


@dataclass(frozen=True)
class Preview:
    """What is about to be asked: questions by purpose, those already answered, and an estimate of tokens and price
    (None where no price was given).
    """

    questions: int
    answered: int
    unjudgeable: int
    prompt_tokens: int
    completion_tokens: int
    price: float | None  # in the currency of the prices given

    def text(self) -> str:
        cost = "no price was given" if self.price is None else f"about {self.price:.2f} in the prices' currency"
        return (
            f"judge: {self.questions} questions to ask, {self.answered} answered before, {self.unjudgeable} images missing or unreadable; "
            f"about {self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion tokens; {cost}"
        )


def preview(
    jobs: Sequence[Job],
    answered: int,
    unjudgeable: int,
    settings: JudgeSettings,
    wording: Wording,
    rule: str,
    prices: tuple[float, float] | None,
) -> Preview:
    """An estimate for `jobs`; `rule` is one of IMAGE_TOKENS, `prices` are per million prompt and completion tokens."""
    tokens = 0
    for job in jobs:
        tokens += math.ceil(len(wording.text(job.kind, job.entry.instruction)) / CHARACTERS_A_TOKEN)
        edited = job.entry.source_size if settings.resize == "match-source" else job.entry.edited_size
        for width, height in (job.entry.source_size, edited) if job.kind == SEMANTIC else (edited,):
            scale = math.sqrt(512 * 512 / (width * height)) if settings.resize == "area512" else 1.0
            tokens += IMAGE_TOKENS[rule](width * scale, height * scale)
    completion = COMPLETION_TOKENS * len(jobs)
    price = None if prices is None else (tokens * prices[0] + completion * prices[1]) / 1e6
    return Preview(len(jobs), answered, unjudgeable, tokens, completion, price)
