"""Defends: a reply is a score only if it plainly is one; every other ends in the right status within a bounded number
of requests; no key leaks."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest

from benchmarks.judge.endpoint import Endpoint, endpoint_judge, retry_after
from benchmarks.judge.protocol import Question, Reply, ask_once_or_twice, fake_judge, outcome, replay_judge
from benchmarks.judge.wording import OWN_QUALITY, OWN_SEMANTIC, PLACEHOLDER, QUALITY, SEMANTIC, load_wording
from data.errors import UserError
from data.files import sha256_bytes
from tests.gedit_sets import png, settings
from tests.judge_server import MODEL, Server, judge_server

KEY = "sk-test-6d1f"

OBJECT = '{"score": [6, 7.5], "reasoning": "fine"}'

# --- asking -----------------------------------------------------------------------------------------------------------


def test_an_unusable_reply_is_asked_for_once_more_and_no_more() -> None:
    def judge_of(*texts: str):
        told = []

        def ask(question, turns):
            told.append(list(turns))
            return Reply("ok", texts[len(told) - 1])

        return ask, told

    question = Question(SEMANTIC, "?", (), "image/png", 0)
    ask, told = judge_of("6 and 7", OBJECT)
    assert outcome(ask_once_or_twice(ask, question)).scores == (6.0, 7.5)
    assert told[0] == [] and told[1][0][0] == "6 and 7" and "no complete JSON object" in told[1][0][1]
    ask, told = judge_of("7", "8")
    assert outcome(ask_once_or_twice(ask, question)).status == "unparseable" and len(told) == 2
    ask, told = judge_of("I'm sorry, I can't assist with that.")
    assert outcome(ask_once_or_twice(ask, question)).status == "refused" and len(told) == 1


# --- wording ----------------------------------------------------------------------------------------------------------


def test_our_wording_names_the_instruction_once_and_the_quality_text_never() -> None:
    wording = load_wording(None)
    assert wording.name == "own" and OWN_SEMANTIC.count(PLACEHOLDER) == 1 and PLACEHOLDER not in OWN_QUALITY
    semantic, quality = (wording.text(kind, "remove the {zebra}") for kind in (SEMANTIC, QUALITY))
    assert "remove the {zebra}" in semantic and "zebra" not in quality


def test_other_texts_are_read_at_run_time_and_are_another_judge(tmp_path) -> None:
    (tmp_path / "semantic.txt").write_text(f"Grade: {PLACEHOLDER}", encoding="utf-8")
    (tmp_path / "quality.txt").write_text("Grade it.", encoding="utf-8")
    custom = load_wording(tmp_path)
    assert (custom.name, custom.text(SEMANTIC, "x"), custom.quality) == ("custom", "Grade: x", "Grade it.")
    assert settings(wording=custom).identity() != settings().identity()
    upstream = tmp_path / "upstream"
    upstream.mkdir()
    constants = {
        "_context_no_delimit": "A",
        "_prompts_0shot_two_image_edit_rule": "B",
        "_prompts_0shot_tie_rule_SC": f"C {PLACEHOLDER}",
        "_prompts_0shot_rule_PQ": "D",
    }
    lines = ["raise SystemExit('never run')", *(f"{name} = {text!r}" for name, text in constants.items())]
    (upstream / "vie_prompts.py").write_text("\n".join(lines), encoding="utf-8")
    found = load_wording(upstream)
    assert (found.semantic, found.quality, found.name) == (f"A\nB\nC {PLACEHOLDER}", "A\nD", "custom")


def test_texts_with_the_upstream_s_digests_are_official(tmp_path, monkeypatch) -> None:
    (tmp_path / "semantic.txt").write_text(f"S {PLACEHOLDER}", encoding="utf-8")
    (tmp_path / "quality.txt").write_text("Q", encoding="utf-8")
    digests = {SEMANTIC: sha256_bytes(f"S {PLACEHOLDER}".encode()), QUALITY: sha256_bytes(b"Q")}
    monkeypatch.setattr("benchmarks.judge.wording.OFFICIAL", digests)
    assert load_wording(tmp_path).name == "official"


def test_faulty_wording_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match=r"semantic\.txt: no such file"):
        load_wording(tmp_path)
    (tmp_path / "semantic.txt").write_text("Grade it.", encoding="utf-8")
    (tmp_path / "quality.txt").write_text("Grade it.", encoding="utf-8")
    with pytest.raises(UserError, match="has no <instruction>"):
        load_wording(tmp_path)
    (tmp_path / "vie_prompts.py").write_text("_context_no_delimit = 'A'\n", encoding="utf-8")
    with pytest.raises(UserError, match="_prompts_0shot_rule_PQ"):
        load_wording(tmp_path)


# --- judges that ask nobody -------------------------------------------------------------------------------------------


def test_the_fake_judge_is_a_function_of_what_it_is_shown() -> None:
    one, other = (Question(SEMANTIC, "?", (png(name),), "image/png", 0) for name in "ab")
    assert fake_judge()(one, ()) == fake_judge()(one, ()) != fake_judge()(other, ())
    assert outcome([fake_judge()(one, ())]).status == "ok"


def test_a_replay_gives_the_recorded_replies_and_makes_up_nothing() -> None:
    one, other = (Question(SEMANTIC, "?", (png(name),), "image/png", 0) for name in "ab")
    replies = [Reply("ok", "7"), Reply("ok", OBJECT)]
    replay = replay_judge({"key": {"question": one.digest(), "replies": [asdict(reply) for reply in replies]}})
    assert ask_once_or_twice(replay, one) == replies
    assert outcome(ask_once_or_twice(replay, other)).status == "api_error"


# --- the endpoint -----------------------------------------------------------------------------------------------------

TRIES = 3
# script -> (status, requests that it takes); one question can cost 2 * TRIES requests at the very most
SCRIPTS: dict[str, tuple[list[str], str, int]] = {
    "good": (["good"], "ok", 1),
    "fenced": (["fenced"], "ok", 1),
    "prose": (["prose"], "ok", 1),
    "wrong_length": (["wrong_length"], "unparseable", 2),
    "out_of_range": (["out_of_range"], "unparseable", 2),
    "cut": (["cut"], "unparseable", 2),
    "empty": (["empty"], "unparseable", 2),
    "repaired": (["wrong_length", "good"], "ok", 2),
    "declines": (["declines"], "refused", 1),
    "refusal_field": (["refusal_field"], "refused", 1),
    "filter_finish": (["filter_finish"], "refused", 1),
    "filtered": (["filtered"], "refused", 1),
    "limit": (["limit"], "api_error", TRIES),
    "limit_then_good": (["limit", "limit", "good"], "ok", 3),
    "broken_inside": (["broken_inside"], "api_error", TRIES),
    "broken_then_good": (["broken_inside", "good"], "ok", 2),
    "slow": (["slow"], "api_error", TRIES),
    "slow_then_good": (["slow", "good"], "ok", 2),
    "reset": (["reset"], "api_error", TRIES),
    "reset_then_good": (["reset", "good"], "ok", 2),
    "truncated": (["truncated"], "api_error", TRIES),
    "truncated_then_good": (["truncated", "good"], "ok", 2),
    "not_json": (["not_json"], "api_error", TRIES),
    "no_choice": (["no_choice"], "api_error", TRIES),
    "bad_request": (["bad_request"], "api_error", 1),
    "worst": (["wrong_length", "limit", "broken_inside", "reset"], "api_error", 1 + TRIES),
}


def endpoint(server: Server, **changes) -> Endpoint:
    values = {
        "base_url": server.url,
        "key_variable": "JUDGE_KEY",
        "timeout_s": 30.0,
        "tries": TRIES,
        "wait_s": 0.01,
        "longest_wait_s": 0.2,
        "per_minute": 0,
    }
    return Endpoint(**{**values, **changes})


def semantic(script: str) -> Question:
    return Question(SEMANTIC, f"Grade: play {script}", (png("source"), png("edited")), "image/png", 0)


@pytest.fixture
def key(monkeypatch) -> str:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    return KEY


def test_every_fault_ends_in_its_status_within_its_requests(key: str) -> None:
    with judge_server({name: script for name, (script, _, _) in SCRIPTS.items()}) as server:
        patience = {"slow": 0.5, "slow_then_good": 2.0}  # s; the server sleeps for three

        def ask(name: str) -> list[Reply]:
            server_of = endpoint(server, timeout_s=patience.get(name, 30.0))
            return ask_once_or_twice(endpoint_judge(settings(), server_of), semantic(name))

        with ThreadPoolExecutor(8) as pool:
            replies = dict(zip(SCRIPTS, pool.map(ask, SCRIPTS), strict=True))
    for name, (_, status, requests) in SCRIPTS.items():
        found = outcome(replies[name])
        assert (name, found.status, server.calls[name]) == (name, status, requests)
        assert sum(reply.attempts for reply in replies[name]) == requests
        assert found.scores == ((8.0, 6.0) if status == "ok" else ())
        assert status == "ok" or found.fault
    kept = json.dumps([asdict(reply) for pair in replies.values() for reply in pair])
    assert server.keys == {f"Bearer {KEY}"} and KEY not in kept and "[key]" in kept
    assert {reply.model for pair in replies.values() for reply in pair if reply.status == "ok"} == {MODEL}


def test_a_request_says_what_the_settings_say(key: str) -> None:
    with judge_server({}) as server:
        changed = settings(text_first=False, temperature=0.5, seed=7, max_tokens=9, extra={"top_k": 1})
        ask = endpoint_judge(changed, endpoint(server))
        question = Question(SEMANTIC, "Grade: play good", (png("a"), png("b")), "image/png", 2)
        reply = ask(question, [("bad", "again")])
        endpoint_judge(settings(seed=None), endpoint(server))(question, ())
    first, second = server.requests
    assert [part["type"] for part in first["messages"][0]["content"]] == ["image_url", "image_url", "text"]
    assert first["messages"][1:] == [{"role": "assistant", "content": "bad"}, {"role": "user", "content": "again"}]
    assert {"temperature": 0.5, "seed": 9, "max_tokens": 9, "top_k": 1, "model": "judge"}.items() <= first.items()
    assert first["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    kinds = [part["type"] for part in second["messages"][0]["content"]]
    assert "seed" not in second and kinds == ["text", "image_url", "image_url"]
    assert reply.usage == {"prompt_tokens": 100, "completion_tokens": 10}


def test_a_server_without_schemas_is_asked_without_one(key: str) -> None:
    with judge_server({"no_schema": ["no_schema"]}) as server:
        ask = endpoint_judge(settings(json_schema=True), endpoint(server))
        assert [outcome(ask_once_or_twice(ask, semantic("no_schema"))).status for _ in range(2)] == ["ok", "ok"]
    assert ["response_format" in request for request in server.requests] == [True, False, False]


def test_a_request_that_fails_without_the_schema_too_does_not_switch_it_off(key: str) -> None:
    scripts = {name: [name] for name in ("bad_request", "filtered", "no_schema")}
    with judge_server(scripts) as server:
        ask = endpoint_judge(settings(json_schema=True), endpoint(server, tries=1))
        statuses = [ask(semantic(name), ()).status for name in ("bad_request", "filtered", "good", "no_schema")]
        attempts = ask(semantic("no_schema"), ()).attempts
    assert statuses == ["api_error", "refused", "ok", "ok"] and attempts == 1
    assert (server.calls["bad_request"], server.calls["filtered"], server.calls["no_schema"]) == (2, 1, 3)
    with_schema = ["response_format" in request for request in server.requests]
    assert with_schema == [True, False, True, True, True, False, False]


@pytest.mark.parametrize(
    ("action", "words"),
    [("no_key", "the key is refused"), ("unknown_model", "does not know it"), ("quota", "no credit left")],
)
def test_what_no_further_request_can_mend_ends_the_run(key: str, action: str, words: str) -> None:
    with judge_server({action: [action]}) as server:
        with pytest.raises(UserError, match=words) as caught:
            endpoint_judge(settings(), endpoint(server))(semantic(action), ())
    assert server.calls[action] == 1 and KEY not in str(caught.value)


def test_a_key_that_is_not_there_is_named_before_anything_is_asked(monkeypatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with judge_server({}) as server:
        with pytest.raises(UserError, match="JUDGE_KEY is not set"):
            endpoint_judge(settings(), endpoint(server))
        assert endpoint_judge(settings(), endpoint(server, key_variable=""))(semantic("good"), ()).status == "ok"
    assert server.calls.total() == 1


def test_waits_are_the_server_s_or_grow_and_have_a_bound(key: str) -> None:
    waits: list[float] = []
    with judge_server({"broken_inside": ["broken_inside"], "limit": ["limit"]}) as server:
        patient = endpoint(server, tries=6, wait_s=1.0, longest_wait_s=6.0)
        ask = endpoint_judge(settings(), patient, sleep=waits.append)
        ask(semantic("broken_inside"), ())
        assert len(waits) == 5 and all(min(2**n / 2, 6.0) <= wait <= min(2**n, 6.0) for n, wait in enumerate(waits))
        again: list[float] = []
        endpoint_judge(settings(), patient, sleep=again.append)(semantic("broken_inside"), ())
        assert again == waits  # the jitter has an address like every other draw
        waits.clear()
        ask(semantic("limit"), ())
        assert waits == [0.05] * 5


def test_a_server_s_wish_to_wait_is_read_in_every_form() -> None:
    assert retry_after({"retry-after": "2.5"}, 0.0) == 2.5
    assert retry_after({"retry-after-ms": "40", "retry-after": "9"}, 0.0) == 0.04
    assert retry_after({"retry-after": "Thu, 01 Jan 1970 00:01:00 GMT"}, 50.0) == 10.0
    assert retry_after({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 50.0) == 0.0
    assert [retry_after({"retry-after": text}, 0.0) for text in ("", "soon", "nan", "inf")] == [None] * 4


def test_requests_begin_no_faster_than_allowed(key: str) -> None:
    with judge_server({}) as server:
        ask = endpoint_judge(settings(), endpoint(server, per_minute=600))
        begun, lock = [], threading.Lock()

        def note() -> None:
            with lock:
                begun.append(time.monotonic())

        server.before = note
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: ask(semantic("good"), ()), range(5)))
    assert max(begun) - min(begun) > 0.3  # five requests, a tenth of a second apart
