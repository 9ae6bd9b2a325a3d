"""A judge behind an OpenAI-compatible endpoint: a hosted model, or a server of one's own (vLLM and others speak the
same).

Every request is bounded: so many tries, so long a wait between them, so many seconds for one. What the server answers
after that is the reply's status. The key comes from an environment variable and is nowhere else: it is struck out of
every text that is kept.
"""

from __future__ import annotations

import base64
import email.utils
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import openai
import tenacity

from benchmarks.judge.protocol import SCORES_A_REPLY, Ask, JudgeSettings, Question, Reply, Turn
from data.errors import UserError
from data.randomness import seed_of

RETRIED = {408, 409, 425, 429}  # and every 5xx
FILTERED = {
    "content_filter",
    "content_policy_violation",
    "moderation_blocked",
    "responsibleaipolicyviolation",
    "responsible_ai_policy_violation",
}
OUT_OF_CREDIT = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
LONGEST_ERROR = 500  # characters kept of an error's text
LONGEST_CHECK_S = 20.0  # seconds that a try to reach the server may take
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "grades",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {
                "score": {
                    "type": "array",
                    "items": {"type": "number"},
                    "minItems": SCORES_A_REPLY,
                    "maxItems": SCORES_A_REPLY,
                },
                "reasoning": {"type": "string"},
            },
            "required": ["score", "reasoning"],
            "additionalProperties": False,
        },
    },
}


@dataclass(frozen=True)
class Endpoint:
    """How a server is reached; none of it changes a score, so none of it is part of the judge's identity.

    `key_variable` names the environment variable that holds the key ("" for a server that asks for none). A failed
    request is tried up to `tries` times with exponential waits from `wait_s` up to `longest_wait_s` (seconds), or what
    the server's Retry-After says, up to the same bound. `per_minute` limits the requests that begin in a minute, 0 does
    not.
    """

    base_url: str
    key_variable: str
    timeout_s: float
    tries: int
    wait_s: float
    longest_wait_s: float
    per_minute: int

    def faults(self) -> list[str]:
        found = (
            []
            if self.base_url.startswith(("http://", "https://"))
            else [f"base_url = {self.base_url!r}: expected http://... or https://..."]
        )
        found += [
            f"{name} = {getattr(self, name)}: expected more than 0"
            for name in ("timeout_s", "tries")
            if getattr(self, name) <= 0
        ]
        return found + [
            f"{name} = {getattr(self, name)}: expected 0 or more"
            for name in ("wait_s", "longest_wait_s", "per_minute")
            if getattr(self, name) < 0
        ]


class _Again(Exception):
    """A fault that may pass; `after` is the wait in seconds that the server asks for, None where it names none."""

    def __init__(self, text: str, after: float | None = None) -> None:
        self.after = after
        super().__init__(text)


class _Final(Exception):
    """A fault that will not pass, with the status that the reply gets."""

    def __init__(self, status: str, text: str) -> None:
        self.status = status
        super().__init__(text)


class _Pace:
    """Spreads the beginnings of requests evenly over a minute; threads share it."""

    def __init__(self, per_minute: int) -> None:
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, sleep: Callable[[float], None]) -> None:
        with self._lock:
            now = time.monotonic()
            begin = max(now, self._next)
            self._next = begin + self._gap
        if begin > now:
            sleep(begin - now)


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that a server asks to wait: Retry-After-Ms, or Retry-After as seconds or as a date (`now`: since 1970);
    None where it says nothing usable.
    """
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        try:
            seconds = float(value) * unit
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
            except (TypeError, ValueError, IndexError):
                continue
        if seconds == seconds and abs(seconds) < 1e9:
            return max(0.0, seconds)
    return None


def _codes(error: openai.APIStatusError) -> set[str]:
    """Every code and type that an error's body names, in lower case."""
    body = error.body if isinstance(error.body, dict) else {}
    inner = body.get("innererror") if isinstance(body.get("innererror"), dict) else {}
    values = (error.code, error.type, body.get("code"), body.get("type"), (inner or {}).get("code"))
    return {str(value).lower() for value in values if value}


def _judge_of_fault(error: openai.APIStatusError, model: str) -> Exception:
    """What an HTTP error means for the question: tried again, a status, or (a UserError) the end of the run."""
    codes, status, text = _codes(error), error.status_code, str(error.message)
    if codes & FILTERED:
        return _Final("refused", text)
    if codes & OUT_OF_CREDIT:
        return UserError(
            f"judge {model}: the account has no credit left ({text}); what was judged is kept: run the same command again once it has"
        )
    if status in (401, 403):
        return UserError(
            f"judge {model}: HTTP {status}, the key is refused ({text}); check the environment variable that holds it"
        )
    if status == 404 or "model_not_found" in codes:
        return UserError(
            f"judge {model!r}: HTTP {status}, the server does not know it ({text}); check the model's name and the base URL"
        )
    if status in RETRIED or status >= 500:
        return _Again(f"HTTP {status}: {text}", retry_after(error.response.headers, time.time()))
    return _Final("api_error", f"HTTP {status}: {text}")


def _messages(question: Question, turns: Sequence[Turn], settings: JudgeSettings) -> list[dict[str, Any]]:
    images = [
        {
            "type": "image_url",
            "image_url": {"url": f"data:{question.media_type};base64,{base64.b64encode(image).decode()}"},
        }
        for image in question.images
    ]
    text = {"type": "text", "text": question.text}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [text, *images] if settings.text_first else [*images, text]}
    ]
    for reply, answer in turns:
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": answer}]
    return messages


def _read(response: Any) -> tuple[str, str, str, dict[str, int], str]:
    """(text, refusal, finish reason, token counts, model) of a completion. Raises _Again for a body without an
    answer.
    """
    choices = getattr(response, "choices", None)
    if not isinstance(choices, list) or not choices or getattr(choices[0], "message", None) is None:
        found = (
            (getattr(response, "model_extra", None) or {}).get("error")
            if hasattr(response, "model_extra")
            else str(response)[:200]
        )
        raise _Again(f"the server's answer holds no choice ({found})")
    message, usage = choices[0].message, getattr(response, "usage", None)
    content = message.content
    if content is not None and not isinstance(content, str):
        raise _Again("the server's answer holds no text")
    counts = (
        {name: int(getattr(usage, name, 0) or 0) for name in ("prompt_tokens", "completion_tokens")} if usage else {}
    )
    return (
        content or "",
        str(getattr(message, "refusal", None) or ""),
        str(choices[0].finish_reason or ""),
        counts,
        str(getattr(response, "model", "") or ""),
    )


def _key(settings: JudgeSettings, endpoint: Endpoint) -> str:
    key = os.environ.get(endpoint.key_variable, "") if endpoint.key_variable else "none"
    if not key:
        hint = 'export it, name another variable, or "" for a server that needs no key'
        raise UserError(f"judge {settings.model}: the environment variable {endpoint.key_variable} is not set; {hint}")
    return key


def check_reachable(settings: JudgeSettings, endpoint: Endpoint) -> None:
    """Asks the server for its models, which costs nothing. Raises UserError for a key variable that is not set, a
    refused key, or a server that is not there.

    Any other answer will do: not every server lists its models.
    """
    key = _key(settings, endpoint)
    client = openai.OpenAI(
        base_url=endpoint.base_url,
        api_key=key,
        max_retries=min(2, endpoint.tries - 1),
        timeout=min(endpoint.timeout_s, LONGEST_CHECK_S),
    )
    try:
        client.models.list()
    except openai.AuthenticationError as error:
        text = str(error.message).replace(key, "[key]")
        raise UserError(
            f"judge {settings.model}: the key in {endpoint.key_variable or 'no variable'} is refused ({text})"
        ) from error
    except openai.APIConnectionError as error:
        cause = f": {error.__cause__}" if error.__cause__ else ""
        advice = "start it or correct the base URL; nothing was asked or drawn"
        raise UserError(
            f"judge {settings.model}: no server answers at {endpoint.base_url} ({type(error).__name__}{cause}); {advice}"
        ) from error
    except (openai.OpenAIError, ValueError):
        return


def endpoint_judge(
    settings: JudgeSettings,
    endpoint: Endpoint,
    halt: threading.Event | None = None,
    sleep: Callable[[float], None] | None = None,
) -> Ask:
    """A judge that asks a server. Threads may share it. Once `halt` is set no request is tried again; `sleep` is what
    it waits with (default: for `halt`).

    Raises UserError at once for a key variable that is not set; while asking, for a refused key, an unknown model and
    an account without credit, because no further request could succeed. Every other fault ends as a reply's status.
    """
    key = _key(settings, endpoint)
    client = openai.OpenAI(base_url=endpoint.base_url, api_key=key, max_retries=0, timeout=endpoint.timeout_s)
    pace, plain, halt = _Pace(endpoint.per_minute), threading.Event(), halt or threading.Event()
    sleep = sleep or tenacity.sleep_using_event(halt)

    def clean(text: str) -> str:
        return text.replace(key, "[key]") if endpoint.key_variable else text

    def request(question: Question, turns: Sequence[Turn]) -> tuple[str, str, str, dict[str, int], str]:
        """One HTTP request. Raises _Again, _Final or UserError."""
        pace.wait(sleep)
        optional: dict[str, Any] = {} if settings.seed is None else {"seed": settings.seed + question.repeat}
        structured = settings.json_schema and not plain.is_set()
        if structured:
            optional["response_format"] = SCHEMA
        try:
            messages: Any = _messages(question, turns, settings)
            completion = client.chat.completions.create(
                model=settings.model,
                messages=messages,
                max_tokens=settings.max_tokens,
                temperature=settings.temperature,
                extra_body=settings.extra or None,
                **optional,
            )
            return _read(completion)
        except openai.APIStatusError as error:
            if (
                structured
                and error.status_code in (400, 422)
                and any(word in str(error).lower() for word in ("response_format", "json_schema", "guided"))
            ):
                plain.set()  # the server knows no schemas: the wording alone asks for the form
                raise _Again(f"HTTP {error.status_code}: the server takes no response_format", 0.0) from error
            fault = _judge_of_fault(error, settings.model)
            raise (UserError(clean(str(fault))) if isinstance(fault, UserError) else fault) from error
        except (
            openai.APIConnectionError,
            openai.APIResponseValidationError,
            json.JSONDecodeError,
            UnicodeDecodeError,
        ) as error:
            cause = f": {error.__cause__}" if error.__cause__ else ""
            raise _Again(f"{type(error).__name__}: {error}{cause}") from error

    def ask(question: Question, turns: Sequence[Turn]) -> Reply:
        begun, sent = time.monotonic(), 0

        def attempt() -> tuple[str, str, str, dict[str, int], str]:
            nonlocal sent
            sent += 1
            return request(question, turns)

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked = error.after if isinstance(error, _Again) else None
            jitter = (
                0.5 + seed_of(0, state.attempt_number, len(turns), question.digest()) / 2**64
            )  # 0.5 to 1, so that threads do not come back together
            return min(
                endpoint.longest_wait_s,
                asked if asked is not None else endpoint.wait_s * 2 ** (state.attempt_number - 1) * jitter,
            )

        def reply(
            status: str,
            text: str = "",
            error: str = "",
            model: str = "",
            finish: str = "",
            usage: dict[str, int] | None = None,
        ) -> Reply:
            return Reply(
                status,
                clean(text),
                model,
                finish,
                usage,
                sent,
                clean(error)[:LONGEST_ERROR],
                round(time.monotonic() - begun, 3),
            )

        tries = tenacity.stop_any(tenacity.stop_after_attempt(endpoint.tries), tenacity.stop_when_event_set(halt))
        try:
            text, refusal, finish, usage, model = tenacity.Retrying(
                stop=tries, wait=wait, retry=tenacity.retry_if_exception_type(_Again), sleep=sleep, reraise=True
            )(attempt)
        except _Again as error:
            return reply("api_error", error=f"{sent} tries, the last one: {error}")
        except _Final as error:
            return reply(error.status, error=str(error))
        refused = bool(refusal) or finish == "content_filter"
        return reply(
            "refused" if refused else "ok", text, refusal or ("content filter" if refused else ""), model, finish, usage
        )

    return ask
