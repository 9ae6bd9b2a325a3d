"""A judge on loopback that plays whatever a test names: good replies in many dresses, refusals, and the ways in which a
server can fail.
"""

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
}


class Server:
    """What the server has seen: `calls` counts requests by script name ("quality" for questions without an
    instruction).
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.scripts: dict[str, list[str]] = {}
        self.model = MODEL
        self.before: Callable[[], None] = lambda: None
        self.lock = threading.Lock()
        self.url = ""


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def send(
            self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body) if length is None else length))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def error(
            self, status: int, code: str, text: str = "no", headers: dict[str, str] | None = None, **more: Any
        ) -> None:
            self.send(
                status,
                json.dumps({"error": {"message": text, "code": code, "type": "error", **more}}).encode(),
                headers,
            )

        def completion(self, text: str | None, finish: str = "stop", **message: Any) -> None:
            choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
            usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
            body = {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": server.model,
                "choices": [choice],
                "usage": usage,
            }
            self.send(200, json.dumps(body).encode())

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = request["messages"][0]["content"]
            text = next(part["text"] for part in content if part["type"] == "text")
            name = match.group(1) if (match := MARK.search(text)) else "quality"
            with server.lock:
                turn = server.calls[name]
                server.calls[name] += 1
                server.requests.append(request)
                server.keys.add(self.headers.get("Authorization", ""))
            server.before()
            script = server.scripts.get(name, ["good"])
            self.play(script[min(turn, len(script) - 1)], request)
            with server.lock:
                server.answered[name] += 1

        def play(self, action: str, request: dict[str, Any]) -> None:
            if action in TEXTS:
                self.completion(TEXTS[action], "length" if action == "cut" else "stop")
            elif action == "limit":
                self.error(429, "rate_limit_exceeded", headers={"Retry-After": "0.05"})
            elif action == "quota":
                self.error(429, "insufficient_quota")
            elif action == "broken_inside":
                self.error(500, "server_error", text=f"trace: {self.headers.get('Authorization')}")
            elif action == "filtered":
                self.error(400, "content_filter", innererror={"code": "ResponsibleAIPolicyViolation"})
            elif action == "bad_request":
                self.error(400, "invalid_value")
            elif action == "no_key":
                self.error(
                    401, "invalid_api_key", text=f"Incorrect API key provided: {self.headers.get('Authorization')}"
                )
            elif action == "unknown_model":
                self.error(404, "model_not_found")
            elif action == "no_schema":
                if "response_format" in request:
                    self.error(400, "invalid_value", text="response_format is not supported")
                else:
                    self.completion(GOOD)
            elif action == "filter_finish":
                self.completion("", "content_filter")
            elif action == "refusal_field":
                self.completion(None, refusal="I will not grade this.")
            elif action == "no_choice":
                self.send(200, b'{"error": {"message": "upstream overloaded"}}')
            elif action == "not_json":
                self.send(200, b'{"choices": [')
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

    return Handler


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a reset connection is what some scripts are for


@contextmanager
def judge_server(scripts: dict[str, list[str]]) -> Iterator[Server]:
    """Serves on a free port of loopback; `scripts` maps a name to the actions of its first, second, ... request, the
    last of which is repeated.
    """
    server = Server()
    server.scripts = scripts
    http = _Quiet(("127.0.0.1", 0), _handler(server))
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join(5)
