"""A judge on loopback that plays whatever a test names: good replies in many dresses, refusals, and the ways in which a
server can fail."""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "judge-2026-01-01"
MARK = re.compile(r"play ([a-z_0-9]+)")  # in the instruction: which script the semantic question gets
GOOD = '{"score": [8, 6], "reasoning": "the {hat} is red"}'
TEXTS = {  # action -> the text of an HTTP 200 completion
    "good": GOOD,
    "bad": '{"score": [0, 0], "reasoning": "nothing was done"}',
    "fenced": f"```json\n{GOOD}\n```",
    "prose": f"Let me look closely. {GOOD} I hope that helps.",
    "wrong_length": '{"score": [8], "reasoning": "one number"}',
    "out_of_range": '{"score": [85, 60], "reasoning": "in percent"}',
    "declines": "I'm sorry, but I can't assist with that.",
    "empty": "",
    "cut": '{"score": [8, 6], "reasoning": "the ha',
    "first": '{"winner": "A", "reasoning": "the {hat} is red"}',
    "second": '{"winner": "B", "reasoning": "the {hat} is red"}',
    "tie": '{"winner": "tie", "reasoning": "no difference"}',
}


ERRORS: dict[str, tuple[int, dict[str, Any]]] = {  # action -> HTTP status and error; {key} is the key as it was sent
    "limit": (429, {"code": "rate_limit_exceeded"}),
    "quota": (429, {"code": "insufficient_quota"}),
    "broken_inside": (500, {"code": "server_error", "message": "trace: {key}"}),
    "filtered": (400, {"code": "content_filter", "innererror": {"code": "ResponsibleAIPolicyViolation"}}),
    "bad_request": (400, {"code": "invalid_value"}),
    "no_key": (401, {"code": "invalid_api_key", "message": "Incorrect API key provided: {key}"}),
    "unknown_model": (404, {"code": "model_not_found"}),
    "no_schema": (400, {"code": "invalid_value"}),  # only where the request has a schema
}
BODIES = {"no_choice": b'{"error": {"message": "upstream overloaded"}}', "not_json": b'{"choices": ['}


class Server:
    """What the server has seen: `calls` counts requests by script name ("quality" for questions without an
    instruction)."""

    def __init__(self, scripts: dict[str, list[str]]) -> None:
        self.calls: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.scripts = scripts
        self.model = MODEL
        self.before: Callable[[], None] = lambda: None
        self.lock = threading.Lock()
        self.url = ""


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    judge: Server

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a reset connection is what some scripts are for


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Http

    def log_message(self, *args: Any) -> None:
        pass

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        self.send_response(status)
        sent = {"Content-Type": "application/json", "Content-Length": str(length or len(body)), **(headers or {})}
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def error(self, action: str) -> None:
        status, error = ERRORS[action]
        text = error.get("message", "no").replace("{key}", str(self.headers.get("Authorization")))
        headers = {"Retry-After": "0.05"} if action == "limit" else {}
        self.send(status, json.dumps({"error": {"type": "error", **error, "message": text}}).encode(), headers)

    def completion(self, text: str | None, finish: str = "stop", **message: Any) -> None:
        choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        about = {"id": "1", "object": "chat.completion", "created": 0, "model": self.server.judge.model}
        self.send(200, json.dumps({**about, "choices": [choice], "usage": usage}).encode())

    def do_POST(self) -> None:
        judge, request = self.server.judge, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = next(part["text"] for part in request["messages"][0]["content"] if part["type"] == "text")
        name = match.group(1) if (match := MARK.search(text)) else "quality"
        with judge.lock:
            turn = judge.calls[name]
            judge.calls[name] += 1
            judge.requests.append(request)
            judge.keys.add(self.headers.get("Authorization", ""))
        judge.before()
        script = judge.scripts.get(name, ["good"])
        action = script[min(turn, len(script) - 1)]
        self.play("good" if action == "no_schema" and "response_format" not in request else action)
        with judge.lock:
            judge.answered[name] += 1

    def play(self, action: str) -> None:
        if action in TEXTS:
            self.completion(TEXTS[action], "length" if action == "cut" else "stop")
        elif action in ERRORS:
            self.error(action)
        elif action in BODIES:
            self.send(200, BODIES[action])
        elif action == "filter_finish":
            self.completion("", "content_filter")
        elif action == "refusal_field":
            self.completion(None, refusal="I will not grade this.")
        elif action == "truncated":
            self.send(200, b'{"choices": [{"index": 0', length=4000)
            self.close_connection = True
        elif action == "slow":
            time.sleep(3.0)
            self.close_connection = True
        elif action == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        else:
            raise AssertionError(action)


@contextmanager
def judge_server(scripts: dict[str, list[str]]) -> Iterator[Server]:
    """Serves on a free port of loopback; `scripts` maps a name to the actions of its first, second, ... request, the
    last of which is repeated."""
    server = Server(scripts)
    http = _Http(("127.0.0.1", 0), _Handler)
    http.judge = server
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join(5)
