"""A server that repeats what a real vLLM server said once, and one that listens in on a real server.

``Replay`` answers from tests/sampler/recorded/*.json: it knows what was asked while the recording was made and nothing
else, keeps the weight version that it was given, and fails on request. So tests with it hold our client against vLLM's
recorded behaviour; whether vLLM still behaves so is what test_vllm_server_live.py asks.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

RECORDED = Path(__file__).parent / "recorded"


def normal(text: str) -> str:
    """A request's text without what differs from run to run: folders and adapters' names."""
    text = re.sub(r'"[^"]*/0*(\d+)-[^"/]*"', r'"FOLDER \1"', text)
    return re.sub(r"core-torl-[0-9a-f]+-(\d+)", r"ADAPTER \1", text)


def key_of(version: str, method: str, path: str, body: Any) -> str:
    """What was asked, and for an answer under which weights; the probe of a new server is the same under all."""
    probe = body is not None and body.get("prompt") == [[3, 4, 5]] and body.get("top_k") == 1
    under = version if path == "/v1/completions" and not probe else "any"
    return normal(json.dumps([under, method, path, body], sort_keys=True))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: the second would wait 40 ms
    server: _Server

    def _handle(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.owner.handle(self, self.command, self.path, json.loads(raw) if raw else None)

    do_GET = do_POST = _handle

    def answer(self, status: int, text: str) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def hang_up(self) -> None:
        """Close the connection without an answer, as a process that is killed does."""
        self.close_connection = True
        self.connection.close()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    owner: Any

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""


class _Listening:
    """Something that answers HTTP requests on a free port of this machine."""

    def __init__(self) -> None:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.owner = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def handle(self, handler: _Handler, method: str, path: str, body: Any) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Proxy(_Listening):
    """Passes everything on to the server at ``target`` and keeps what both sides said."""

    def __init__(self, target: str) -> None:
        self.target, self.version = target, "none"
        self.exchanges: dict[str, list[Any]] = {}
        self._client = httpx.Client(trust_env=False, timeout=300)
        super().__init__()

    def handle(self, handler: _Handler, method: str, path: str, body: Any) -> None:
        answer = self._client.request(method, self.target + path, json=body)
        text = answer.text
        if path.startswith("/server_info"):  # the machine's environment is nobody's business
            full = json.loads(text)
            text = json.dumps({"vllm_config": _facts(full["vllm_config"]), "vllm_env": _facts(full["vllm_env"])})
        self.exchanges[key_of(self.version, method, path, body)] = [answer.status_code, text]
        if path == "/update_weight_version":
            self.version = body["new_version"]
        handler.answer(answer.status_code, text)


def _facts(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a server's settings that our client reads."""
    names = ("model_config", "lora_config", "parallel_config", "device_config", "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
             "VLLM_MAX_STOP_STRINGS")  # fmt: skip
    inner = ("device", "device_type", "logprobs_mode", "worker_extension_cls", "max_lora_rank")
    kept = {n: config[n] for n in names if n in config}
    return {n: {k: v for k, v in x.items() if k in inner} if isinstance(x, dict) else x for n, x in kept.items()}


class Replay(_Listening):
    """Answers as recorded. ``calls`` is what was asked, as "METHOD /path", health checks left out.

    ``drop``: how many of the next completions end in a hang-up; ``healthy``: what /health says; ``delay_s``: how long a
    completion takes, which also waits for ``gate``; ``restart`` forgets the weights, as a server that was started anew has.
    """

    def __init__(self, name: str = "server") -> None:
        recorded = json.loads((RECORDED / f"{name}.json").read_text())
        self.vllm, self.exchanges = recorded["vllm"], recorded["exchanges"]
        self.calls: list[str] = []
        self.bodies: list[dict[str, Any]] = []  # of completions
        self.unknown: list[str] = []
        self.version = "none"
        self.drop = 0
        self.broken: dict[str, tuple[int, str]] = {}  # path -> another answer
        self.healthy = True
        self.delay_s = 0.0
        self.gate = threading.Event()
        self.gate.set()
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        super().__init__()

    def restart(self) -> None:
        self.version, self.healthy = "none", True

    def handle(self, handler: _Handler, method: str, path: str, body: Any) -> None:
        plain = path.split("?")[0]
        if plain == "/health":
            return handler.answer(200, "") if self.healthy else handler.hang_up()
        with self._lock:
            self.calls.append(f"{method} {path}")
            asked = key_of(self.version, method, path, body)
            drop = False
            if plain == "/v1/completions":
                self.bodies.append(body)
                drop, self.drop = self.drop > 0, max(0, self.drop - 1)
        if drop or not self.healthy:
            return handler.hang_up()
        if plain in self.broken:
            return handler.answer(*self.broken[plain])
        if plain == "/weight_info":
            return handler.answer(200, json.dumps({"weight_version": self.version}))
        status, text = self.exchanges.get(asked, (0, ""))
        if not status:
            self.unknown.append(asked)
            return handler.answer(418, json.dumps({"error": {"message": f"not recorded: {asked[:300]}"}}))
        if plain == "/update_weight_version":
            self.version = body["new_version"]
        if plain == "/v1/completions" and self.delay_s:
            with self._lock:
                self._at_once += 1
                self.most_at_once = max(self.most_at_once, self._at_once)
            time.sleep(self.delay_s)
            with self._lock:
                self._at_once -= 1
        if plain == "/v1/completions":
            self.gate.wait(60)
        return handler.answer(status, text)


@contextmanager
def replays(*names: str) -> Iterator[list[Replay]]:
    """Servers that are closed at the end, and must have been asked only what was recorded."""
    servers = [Replay(name) for name in names]
    try:
        yield servers
        assert not [u for s in servers for u in s.unknown], "asked what was never recorded: run record_vllm.py again"
    finally:
        for server in servers:
            server.gate.set()
            server.close()
