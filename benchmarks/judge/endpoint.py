"""A judge behind an OpenAI-compatible endpoint: a hosted model, or a server of the user (vLLM and others speak the same
protocol).

The number of tries, the wait between them and the time for each are bounded. What the server answers after that is the
reply's status. The key comes from an environment variable and is struck out of every text that is kept."""

from __future__ import annotations

import base64
import email.utils
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import openai
import tenacity

from benchmarks.judge.protocol import FORMS, Ask, JudgeSettings, Question, Reply, Turn, out_of_range
from data.bounds import Above, Count, NotNegative, Positive
from data.errors import UserError, UserErrors
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
UNREADABLE = (openai.APIConnectionError, openai.APIResponseValidationError, json.JSONDecodeError, UnicodeDecodeError)
REJECTED = (openai.BadRequestError, openai.UnprocessableEntityError)
LONGEST_ERROR = 500  # characters kept of an error's text
LONGEST_CHECK_S = 20.0  # seconds that a try to reach the server may take


@dataclass(frozen=True)
class Endpoint:
    """How a server is reached; none of it changes a score, so none of it is part of the judge's identity. A failed
    request is tried again after exponential waits, or what the server's Retry-After says. Raises UserErrors for values
    out of range."""

    base_url: str
    key_variable: str  # the environment variable that holds the key; "" for a server that asks for none
    timeout_s: Above
    tries: Positive
    wait_s: NotNegative  # before the second try
    longest_wait_s: NotNegative
    per_minute: Count  # requests that begin in a minute; 0: no limit

    def __post_init__(self) -> None:
        faults = out_of_range(self)
        if not self.base_url.startswith(("http://", "https://")):
            faults.append(f"base_url = {self.base_url!r}: expected http://... or https://...")
        if faults:
            raise UserErrors("the judge's server:", faults)


class _Failed(Exception):
    """A request without an answer. `status` is what the reply gets, unless the fault may pass (`again`); `after` is
    the wait in seconds that the server asks for, None where it names none."""

    def __init__(self, text: str, status: str = "api_error", again: bool = False, after: float | None = None) -> None:
        self.status, self.again, self.after = status, again, after
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
    None where it says nothing usable."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        try:
            seconds = float(value) * unit
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
            except (TypeError, ValueError, IndexError):
                continue
        if abs(seconds) < 1e9:  # neither NaN nor infinite
            return max(0.0, seconds)
    return None


# --- requests and answers ---------------------------------------------------------------------------------------------


def _codes(error: openai.APIStatusError) -> set[str]:
    """Every code and type that an error's body names, in lower case."""
    body = error.body if isinstance(error.body, dict) else {}
    inner = body.get("innererror")
    inner_code = inner.get("code") if isinstance(inner, dict) else None
    values = (error.code, error.type, body.get("code"), body.get("type"), inner_code)
    return {str(value).lower() for value in values if value}


def _with_cause(error: Exception) -> str:
    return f": {error.__cause__}" if error.__cause__ else ""


def _fault(error: Exception, model: str) -> Exception:
    """What a failed request means for the question: tried again, a status, or (a UserError) the end of the run."""
    if not isinstance(error, openai.APIStatusError):
        return _Failed(f"{type(error).__name__}: {error}{_with_cause(error)}", again=True)
    codes, status, text = _codes(error), error.status_code, error.message
    if codes & FILTERED:
        return _Failed(text, "refused")
    if codes & OUT_OF_CREDIT:
        advice = "what was judged is kept: run the same command again once it has"
        return UserError(f"judge {model}: the account has no credit left ({text}); {advice}")
    if status in (401, 403):
        advice = "check the environment variable that holds it"
        return UserError(f"judge {model}: HTTP {status}, the key is refused ({text}); {advice}")
    if status == 404 or "model_not_found" in codes:
        advice = "check the model's name and the base URL"
        return UserError(f"judge {model!r}: HTTP {status}, the server does not know it ({text}); {advice}")
    if status in RETRIED or status >= 500:
        after = retry_after(error.response.headers, time.time())
        return _Failed(f"HTTP {status}: {text}", again=True, after=after)
    return _Failed(f"HTTP {status}: {text}")


def _messages(question: Question, turns: Sequence[Turn], text_first: bool) -> list[dict[str, Any]]:
    urls = [f"data:{question.media_type};base64,{base64.b64encode(image).decode()}" for image in question.images]
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    text = {"type": "text", "text": question.text}
    messages: list[dict[str, Any]] = [{"role": "user", "content": [text, *images] if text_first else [*images, text]}]
    for reply, answer in turns:
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": answer}]
    return messages


def _read(completion: Any) -> Reply:
    """The reply that a completion holds. Raises _Failed for none: servers report their faults under HTTP 200, too."""
    choices = getattr(completion, "choices", None)
    if not isinstance(choices, list) or not choices or getattr(choices[0], "message", None) is None:
        rest = getattr(completion, "model_extra", completion)
        raise _Failed(f"the server's answer holds no choice ({rest})", again=True)
    message, usage = choices[0].message, getattr(completion, "usage", None)
    if not isinstance(message.content, str | None):
        raise _Failed("the server's answer holds no text", again=True)
    names = ("prompt_tokens", "completion_tokens") if usage else ()
    counts = {name: int(getattr(usage, name, 0) or 0) for name in names}
    model, finish = str(getattr(completion, "model", "") or ""), str(choices[0].finish_reason or "")
    refusal = str(getattr(message, "refusal", None) or ("content filter" if finish == "content_filter" else ""))
    return Reply("refused" if refusal else "ok", message.content or "", model, finish, counts, error=refusal)


def _client(settings: JudgeSettings, endpoint: Endpoint, timeout: float, retries: int) -> openai.OpenAI:
    """The server's client. Raises UserError for a key variable that is not set."""
    key = os.environ.get(endpoint.key_variable, "") if endpoint.key_variable else "none"
    if not key:
        hint = 'export it, name another variable, or "" for a server that needs no key'
        raise UserError(f"judge {settings.model}: the environment variable {endpoint.key_variable} is not set; {hint}")
    return openai.OpenAI(base_url=endpoint.base_url, api_key=key, max_retries=retries, timeout=timeout)


def check_reachable(settings: JudgeSettings, endpoint: Endpoint) -> None:
    """Asks the server for its models, which costs nothing. Any answer but a refused key will do: not every server lists
    its models. Raises UserError for a key variable that is not set, a refused key, or a server that is not there."""
    client = _client(settings, endpoint, min(endpoint.timeout_s, LONGEST_CHECK_S), min(2, endpoint.tries - 1))
    try:
        client.models.list()
    except openai.AuthenticationError as error:
        text, variable = error.message.replace(client.api_key, "[key]"), endpoint.key_variable or "no variable"
        raise UserError(f"judge {settings.model}: the key in {variable} is refused ({text})") from error
    except openai.APIConnectionError as error:
        place = f"{endpoint.base_url} ({type(error).__name__}{_with_cause(error)})"
        advice = "start it or correct the base URL; nothing was asked or drawn"
        raise UserError(f"judge {settings.model}: no server answers at {place}; {advice}") from error
    except (openai.OpenAIError, ValueError):
        return


def _send(
    client: openai.OpenAI, settings: JudgeSettings, question: Question, turns: Sequence[Turn], schema: bool
) -> Reply:
    """One HTTP request, with the reply's schema or without. Raises _Failed or UserError."""
    optional: dict[str, Any] = {} if settings.seed is None else {"seed": settings.seed + question.repeat}
    if schema:
        form = FORMS[question.kind]
        enforced = {"name": form.name, "strict": True, "schema": form.schema}
        optional |= {"response_format": {"type": "json_schema", "json_schema": enforced}}
    messages: Any = _messages(question, turns, settings.text_first)
    try:
        completion = client.chat.completions.create(
            model=settings.model,
            messages=messages,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            extra_body=settings.extra or None,
            **optional,
        )
        return _read(completion)
    except (openai.APIStatusError, *UNREADABLE) as error:
        raise _fault(error, settings.model) from error


def _waits(endpoint: Endpoint, address: str, turn: int) -> Callable[[tenacity.RetryCallState], float]:
    """Seconds before the next try: what the server asks for, or a growing wait with a jitter that follows from
    `address` and `turn`, so that threads do not come back together."""

    def wait(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, _Failed) and error.after is not None:
            return min(endpoint.longest_wait_s, error.after)
        jitter = 0.5 + seed_of(0, state.attempt_number, turn, address) / 2**64  # 0.5 to 1
        return min(endpoint.longest_wait_s, endpoint.wait_s * 2 ** (state.attempt_number - 1) * jitter)

    return wait


def endpoint_judge(
    settings: JudgeSettings,
    endpoint: Endpoint,
    halt: threading.Event | None = None,
    sleep: Callable[[float], None] | None = None,
) -> Ask:
    """A judge that asks a server. Threads may share it. Once `halt` is set no request is tried again; `sleep` is what
    it waits with (default: for `halt`). A server that rejects the reply's schema, but takes the same question without
    it, is asked without one from then on.

    Raises UserError at once for a key variable that is not set; while asking, for a refused key, an unknown model and
    an account without credit, because no further request could succeed. Every other fault ends as a reply's status."""
    client, pace = _client(settings, endpoint, endpoint.timeout_s, 0), _Pace(endpoint.per_minute)
    halt, no_schema = halt or threading.Event(), threading.Event()
    sleep = sleep or tenacity.sleep_using_event(halt)
    stop = tenacity.stop_any(tenacity.stop_after_attempt(endpoint.tries), tenacity.stop_when_event_set(halt))
    again = tenacity.retry_if_exception(lambda error: isinstance(error, _Failed) and error.again)

    def clean(text: str) -> str:
        return text.replace(client.api_key, "[key]") if endpoint.key_variable else text

    def ask(question: Question, turns: Sequence[Turn]) -> Reply:
        begun, sent, schema = time.monotonic(), 0, settings.json_schema and not no_schema.is_set()

        def send() -> Reply:
            nonlocal sent
            sent += 1
            pace.wait(sleep)
            return _send(client, settings, question, turns, schema)

        def attempt() -> Reply:
            nonlocal schema
            try:
                return send()
            except _Failed as error:
                if not schema or error.status == "refused" or not isinstance(error.__cause__, REJECTED):
                    raise
            schema = False
            reply = send()
            no_schema.set()
            return reply

        wait = _waits(endpoint, question.digest(), len(turns))
        try:
            reply = tenacity.Retrying(stop=stop, wait=wait, retry=again, sleep=sleep, reraise=True)(attempt)
        except _Failed as error:
            reply = Reply(error.status, "", error=f"{sent} tries, the last one: {error}" if error.again else str(error))
        except UserError as error:
            raise UserError(clean(str(error))) from error
        seconds, fault = round(time.monotonic() - begun, 3), clean(reply.error)[:LONGEST_ERROR]
        return replace(reply, text=clean(reply.text), error=fault, attempts=sent, seconds=seconds)

    return ask
