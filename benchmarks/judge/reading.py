"""How a judge's text becomes an answer or a status: nothing is ever guessed.

What stands outside the judge's thoughts is read. An answer is a complete JSON object; where a text holds several, all
of them must say the same. Fences, prose around it, trailing commas, other quotation marks and spaces, and numbers in
quotation marks change no meaning and are tolerated."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.judge.refusals import refuses
from benchmarks.scores.scorecard import HIGHEST

SCORES_A_REPLY = 2
LONGEST_REPLY = 20_000  # characters; a judge limited to a few hundred tokens stays far below
CUT = ("length", "max_tokens", "model_length")  # finish reasons of servers for a text that the limit has ended


@dataclass(frozen=True)
class Outcome:
    """How a question ended: with scores and the judge's reasoning if and only if the status is ok.

    Grades are two scores in [0, 10]. A preference is one: 1 where the first image wins, 0 where the second does, 0.5
    for a tie."""

    status: str
    scores: tuple[float, ...] = ()
    reasoning: str = ""
    fault: str = ""


class _Unreadable(ValueError):
    """Why a text holds no answer, as the judge is told it."""


# --- thoughts ---------------------------------------------------------------------------------------------------------

_NAMES = r"(?:seed:)?(?:think|thinking|thoughts?|reasoning|analysis|scratchpad|reflection)"
THOUGHTS = re.compile(
    rf"(?P<end><\s*/\s*{_NAMES}\s*>|\[/think\]|◁/think▷|<\|channel\|>\s*final\s*<\|message\|>)"
    rf"|<\s*{_NAMES}\b[^<>]*>|\[think\]|◁think▷|<\|channel\|>\s*(?:analysis|commentary)",
    re.IGNORECASE,
)


def without_thoughts(text: str) -> str | None:
    """What stands outside <think> and its like; None where the thoughts never end. A lone end means that the chat's
    frame has begun them: all before it was a thought."""
    kept, start, thinking = list[str](), 0, False
    for tag in THOUGHTS.finditer(text):
        if tag["end"]:
            kept = kept if thinking else []
            start, thinking = tag.end(), False
        elif not thinking:
            kept.append(text[start : tag.start()])
            thinking = True
    return None if thinking else "\n".join((*kept, text[start:]))


# --- objects ----------------------------------------------------------------------------------------------------------

# A string in straight, curly or low quotation marks; it ends with the text where its mark never comes again.
_STRING = r'"(?:[^"\\]|\\.?)*"?|\'(?:[^\'\\]|\\.?)*\'?|[“”„][^“”„]*[“”]?|‘[^‘’]*’?'
STRING_OR_BRACE = re.compile(rf"{_STRING}|[{{}}]", re.DOTALL)
STRING_OR_BLANK = re.compile(rf"(?P<string>{_STRING})|(?P<comma>,)(?=\s*[}}\]])|[\s\u200b\u2060\ufeff]+", re.DOTALL)


def _end_of_object(text: str, start: int) -> int:
    """Where the object that opens at `start` ends."""
    depth = 0
    for token in STRING_OR_BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return token.end()
    raise _Unreadable("a brace in it is never closed, so it holds no complete JSON object")


def _objects(text: str) -> Iterator[str]:
    """Every outermost {...}; braces inside strings do not count."""
    start = text.find("{")
    in_list = text[: max(start, 0)].rstrip().endswith("[")
    end = 0
    while start >= 0:
        end = _end_of_object(text, start)
        yield text[start:end]
        start = text.find("{", end)
    if in_list and "]" not in text[end:]:
        raise _Unreadable("a list of objects in it is never closed")


def _plain_string(written: str) -> str:
    """A string token in JSON's own quotation marks; one that never ends is left for the parser to refuse."""
    if written[0] == '"' or written[-1] not in "'“”’":
        return written
    inner = written[1:-1].replace("\\'", "'")
    return '"' + re.sub(r'(\\.)|"', lambda match: match[1] or '\\"', inner, flags=re.DOTALL) + '"'


def _as_json(body: str) -> str:
    """An object as strict JSON has it: straight marks, plain spaces, no comma before a closing bracket."""

    def plain(token: re.Match[str]) -> str:
        return _plain_string(token[0]) if token["string"] else "" if token["comma"] else " "

    return STRING_OR_BLANK.sub(plain, body)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _loaded(body: str) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(_as_json(body), strict=False, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _Unreadable("its JSON object is malformed") from error
    return value


# --- answers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """What an answer looks like: the key of its object that `read` takes the scores from, what an object must hold to
    count at all, how an answer that stands alone becomes an object, and the scores of a judge that judges nothing."""

    key: str
    says: re.Pattern[str]
    read: Callable[[Mapping[str, Any]], tuple[float, ...]]
    whole: Callable[[str], str]
    nothing: tuple[float, ...]


def _outside_thoughts(text: str) -> str:
    if len(text) > LONGEST_REPLY:
        raise _Unreadable(f"it is longer than {LONGEST_REPLY:,} characters")
    answer = without_thoughts(text)
    if answer is None:
        raise _Unreadable("its thoughts never end")
    return answer


def _answer(text: str, form: _Form) -> tuple[tuple[float, ...], str]:
    """The scores of the last object and its words. {} and words in braces are passed over; all objects that have the
    key must say the same."""
    bodies = [body for body in _objects(form.whole(text)) if form.says.search(body)]
    if not bodies:
        raise _Unreadable("it holds no complete JSON object with an answer")
    values = [_loaded(body) for body in bodies if form.key in body.casefold() or body is bodies[-1]]
    scores = [form.read(value) for value in values]
    if len(set(scores)) > 1:
        raise _Unreadable("it holds several JSON objects with different answers")
    reasoning = values[-1].get("reasoning", "")
    return scores[-1], reasoning if isinstance(reasoning, str) else json.dumps(reasoning, ensure_ascii=False)


def _outcome(text: str, form: _Form) -> Outcome:
    try:
        outside = _outside_thoughts(text)
        scores, words = _answer(outside, form)
    except _Unreadable as error:
        return Outcome("unparseable", fault=str(error))
    if scores == form.nothing and (refuses(words) or refuses(outside)):
        return Outcome("refused", fault=(words or outside)[:200])
    return Outcome("ok", scores, words)


# --- grades -----------------------------------------------------------------------------------------------------------

NUMBER = re.compile(r"(?:0|[1-9]\d*)(?:\.\d+)?", re.ASCII)
LIST_ALONE = re.compile(r"\s*(?:```\w*)?\s*(?P<list>\[[^\[\]{}]*\])\s*(?:```)?\s*")


def _number(value: Any) -> float:
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Unreadable("its scores are not numbers")
    return value


def _grades(value: Mapping[str, Any]) -> tuple[float, ...]:
    scores = value.get("score")
    if not isinstance(scores, list) or len(scores) != SCORES_A_REPLY:
        raise _Unreadable('it has no "score" that is a list of two numbers')
    numbers = tuple(map(_number, scores))
    if not all(0 <= number <= HIGHEST for number in numbers):
        raise _Unreadable("its scores do not lie between 0 and 10")
    return tuple(map(float, numbers))


def _grades_alone(text: str) -> str:
    alone = LIST_ALONE.fullmatch(text)
    return f'{{"score": {alone["list"]}}}' if alone else text


GRADES = _Form("score", re.compile(r"\d"), _grades, _grades_alone, (0.0, 0.0))


def parse_reply(text: str) -> Outcome:
    """Reads a judge's grades: the JSON object's `score`, a list of exactly two finite numbers from 0 to 10, or such a
    list that stands alone.

    Anything else is `unparseable` with the fault in words. Two zeros with words that nothing was judged or shown are
    `refused`."""
    return _outcome(text, GRADES)


# --- preferences ------------------------------------------------------------------------------------------------------

FIRST_WINS, TIE, SECOND_WINS = 1.0, 0.5, 0.0
WINNER = re.compile(r"(?:the )?(?:(?:image|picture|photo|result|edit|option|answer) )?(?P<name>[ab])(?: wins)?")
TIES = ("tie", "a tie", "tied", "draw", "equal", "both", "neither", "none", "same")
WORD_ALONE = re.compile(r"\s*(?:```\w*)?[\s\W]*(?P<word>a|b|tie)[\s\W]*", re.IGNORECASE)


def _preferred(value: Mapping[str, Any]) -> tuple[float, ...]:
    winner = value.get("winner")
    words = " ".join(re.sub(r"[\W_]+", " ", winner.casefold()).split()) if isinstance(winner, str) else ""
    if words in TIES:
        return (TIE,)
    named = WINNER.fullmatch(words)
    if named is None:
        raise _Unreadable('it has no "winner" that is "A", "B" or "tie"')
    return (FIRST_WINS,) if named["name"] == "a" else (SECOND_WINS,)


def _preferred_alone(text: str) -> str:
    alone = WORD_ALONE.fullmatch(text)
    return f'{{"winner": "{alone["word"]}"}}' if alone else text


PREFERENCE = _Form("winner", re.compile(r"\w"), _preferred, _preferred_alone, (TIE,))


def parse_choice(text: str) -> Outcome:
    """Reads which of two images a judge prefers: the JSON object's `winner`, or "A", "B" or "tie" that stands alone.

    Anything else is `unparseable` with the fault in words. A tie with words that nothing was judged or shown is
    `refused`."""
    return _outcome(text, PREFERENCE)


# --- refusals ---------------------------------------------------------------------------------------------------------

TO = r"\s*(?:-|–|—|/|to|through|and|bis|a|à|al|до|至|到|から|~|〜)\s*"
SCALE = re.compile(rf"(?<!\d)[01]{TO}10(?!\d)|\b(?:out|scale) of 10\b|\b10[- ]point", re.IGNORECASE)


def declined(text: str) -> bool:
    """Whether a reply without any grade in it says in words that the judge will not answer; a scale that it names
    ("from 0 to 10") is no grade."""
    if len(text) > LONGEST_REPLY:
        return False
    answer = without_thoughts(text) or ""
    return not GRADES.says.search(SCALE.sub("", answer)) and refuses(answer)
