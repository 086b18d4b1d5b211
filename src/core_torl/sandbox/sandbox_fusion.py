"""Programs on a SandboxFusion server, over its HTTP interface (``POST URL/run_code``).

It guards against a server that is down, slow, overloaded or silently broken: calls are bounded in number, retried with
growing pauses, and end as "infrastructure" if the server failed and not the program. One failure looks like a
program's own: a broken server answers that every program ran out of time and printed nothing. So ``start`` runs a
canary, and such an answer is held back until another canary has shown that the server still runs programs.

How well programs are locked in is the server's doing. In its default mode they run as the server's user, with its
files and its network: run the server in a container that holds nothing else.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
from tenacity import (
    RetryError,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_attempt,
    stop_when_event_set,
    wait_random_exponential,
)

from core_torl.config.errors import UserError
from core_torl.sandbox.protocol import Execution

GRACE_S = 20.0  # for the way there and back, and a queue at the server
PROVEN_S = 5.0  # for so long at most a canary vouches for empty time-outs that come after it
_START = "docker run -p 8080:8080 volcengine/sandbox-fusion:server-20250609"


class _ServerFailed(RuntimeError):
    """The server's failure, not the program's."""


class SandboxFusion:
    """``url``: where the server listens, e.g. http://localhost:8080. ``concurrency``: calls under way at once.

    ``timeout_s`` and ``memory_mb`` are sent with each program; ``output_bytes`` is applied here. ``suspicion`` is the
    number of empty time-outs in a row for which a canary vouches; the next one calls for another.

    Raises:
        UserError: an argument is out of range or ``url`` is missing.
    """

    def __init__(
        self,
        url: str | None = None,
        concurrency: int = 32,
        timeout_s: float = 10.0,
        memory_mb: int = 1024,
        output_bytes: int = 100_000,
        retries: int = 4,
        backoff_s: float = 0.5,
        suspicion: int = 8,
    ) -> None:
        if not url:
            raise UserError(f"sandbox.url has no value: start a server ({_START}) and set sandbox.url=http://HOST:8080")
        for key, value, least in (
            ("concurrency", concurrency, 1),
            ("timeout_s", timeout_s, 0.1),
            ("memory_mb", memory_mb, 1),
            ("output_bytes", output_bytes, 1),
            ("retries", retries, 0),
            ("backoff_s", backoff_s, 0),
            ("suspicion", suspicion, 1),
        ):
            if not least <= value < float("inf"):
                raise UserError(f"sandbox.{key} is {value}; set it to {least} or more")
        self.url, self.concurrency = url.rstrip("/"), concurrency
        self.timeout_s, self.memory_mb, self.output_bytes = timeout_s, memory_mb, output_bytes
        self.retries, self.backoff_s, self.suspicion = retries, backoff_s, suspicion
        self._lock = threading.Lock()
        self._canary = threading.Lock()  # held while a canary runs, so that one answers for all who wait
        self._vouched = 0  # empty time-outs in a row since the last canary
        self._proven = self._refuted = -math.inf  # when a canary last passed, and last failed
        self._closing = threading.Event()
        self._threads: ThreadPoolExecutor | None = None
        self._client: httpx.Client | None = None

    def start(self) -> None:
        """Prove the server with a canary. May be called twice.

        Raises UserError if it cannot be reached or does not run programs.
        """
        with self._lock:
            if self._client is not None:
                return
            # The environment's proxies are not for a server that one runs oneself.
            client = httpx.Client(
                timeout=httpx.Timeout(self.timeout_s + GRACE_S, connect=10.0),
                limits=httpx.Limits(max_connections=self.concurrency),
                trust_env=False,
            )
            try:
                self._prove(client)
            except _ServerFailed as error:
                client.close()
                raise UserError(
                    f"sandbox.url={self.url}: no working SandboxFusion server there ({error}); start one: {_START}"
                ) from error
            except BaseException:
                client.close()
                raise
            # That canary vouches for nothing: a server that breaks next must not get a single answer through.
            self._proven = self._refuted = -math.inf
            self._client, self._closing = client, threading.Event()
            self._threads = ThreadPoolExecutor(self.concurrency, thread_name_prefix="sandbox-fusion")

    def _prove(self, client: httpx.Client) -> None:
        token = secrets.token_hex(8)
        result = self._post(client, f"print({token!r})")
        if result.status != "ok" or result.stdout.strip() != token:
            raise _ServerFailed(f"a program that prints a word ended with {result.status} and printed nothing of it")

    def _post(self, client: httpx.Client, code: str) -> Execution:
        """One call. Raises _ServerFailed."""
        body = {
            # JSON has no way to write half a surrogate pair that every server reads back; Python refuses such code.
            "code": code.encode("utf-8", "replace").decode(),
            "language": "python",
            "run_timeout": self.timeout_s,
            "memory_limit_MB": self.memory_mb,
        }
        try:
            answer = client.post(f"{self.url}/run_code", json=body)
            answer.raise_for_status()
            return self._read(answer.json())
        except httpx.HTTPStatusError as error:
            raise _ServerFailed(f"HTTP status {error.response.status_code}") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _ServerFailed(f"{type(error).__name__}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _ServerFailed("an answer that is not of SandboxFusion's form") from error

    def _read(self, answer: dict[str, Any]) -> Execution:
        if answer["status"] not in ("Success", "Failed"):
            raise _ServerFailed(f"{answer['status']}: {str(answer.get('message', ''))[:200]}")
        result = answer["run_result"]
        out, err = (str(result.get(name) or "").encode("utf-8", "replace") for name in ("stdout", "stderr"))
        most, seconds = self.output_bytes, float(result.get("execution_time") or 0.0)
        texts = [part.decode("utf-8", "replace") for part in (out[:most], err[: max(0, most - len(out))])]
        if result["status"] == "TimeLimitExceeded":
            return Execution(texts[0], texts[1], "time_limit", seconds, f"more than {self.timeout_s:g} s on the clock")
        if result["status"] != "Finished":
            raise _ServerFailed(f"run status {result['status']}")
        if len(out) + len(err) > most:
            return Execution(texts[0], texts[1], "output_limit", seconds, f"more than {most} bytes of output")
        code = int(result["return_code"])
        last = err.rstrip().rpartition(b"\n")[2]
        # The server tells no more than this text; at least it must be that of a traceback.
        traced = code == 1 and b"Traceback (most recent call last):" in err
        if traced and (last.startswith(b"MemoryError") or b"_ArrayMemoryError:" in last):
            return Execution(texts[0], texts[1], "memory_limit", seconds, f"more than {self.memory_mb} MiB of memory")
        return Execution(texts[0], texts[1], "error" if code else "ok", seconds, f"exit status {code}" if code else "")

    def _call(self, client: httpx.Client, closing: threading.Event, code: str) -> Execution:
        """One call; a time-out that may be the server's is checked with a canary. Raises _ServerFailed."""
        if closing.is_set():
            raise _ServerFailed("the sandbox was closed")
        result = self._post(client, code)
        if result.status == "time_limit" and not result.stdout and not result.stderr:
            self._vouch(client, closing)
        else:
            self._vouched = 0
        return result

    def _vouch(self, client: httpx.Client, closing: threading.Event) -> None:
        """Returns if the server runs programs now, or did a moment ago. Raises _ServerFailed."""
        arrived = time.monotonic()
        with self._canary:
            if arrived <= self._proven:  # another call's canary passed while this one waited
                return
            if arrived <= self._refuted:
                raise _ServerFailed("time-outs without output, and a program that prints a word failed, too")
            self._vouched += 1
            if self._vouched <= self.suspicion and arrived - self._proven <= PROVEN_S:
                return
            if closing.is_set():
                raise _ServerFailed("the sandbox was closed")
            try:
                self._prove(client)
            except _ServerFailed:
                self._proven, self._refuted = -math.inf, time.monotonic()
                raise
            self._proven, self._vouched = time.monotonic(), 0

    def _run(self, client: httpx.Client, closing: threading.Event, code: str) -> Execution:
        attempts = Retrying(
            retry=retry_if_exception_type(_ServerFailed),
            stop=stop_after_attempt(self.retries + 1) | stop_when_event_set(closing),
            wait=wait_random_exponential(multiplier=self.backoff_s, max=30),
            sleep=sleep_using_event(closing),
        )
        try:
            return attempts(self._call, client, closing, code)
        except RetryError as error:
            return Execution("", "", "infrastructure", detail=str(error.last_attempt.exception()))

    def submit(self, code: str) -> Future[Execution]:
        """Run ``code`` as soon as fewer than ``concurrency`` calls are under way; starts if ``start`` was not called.

        Raises UserError as ``start`` does.
        """
        self.start()
        with self._lock:
            if self._threads is not None and self._client is not None:
                return self._threads.submit(self._run, self._client, self._closing, code)
        future: Future[Execution] = Future()  # closed meanwhile by another thread
        future.set_result(Execution("", "", "infrastructure", detail="the sandbox was closed"))
        return future

    def close(self) -> None:
        """Wait for the requests under way and close the connections. May be called twice.

        Calls that are in the queue or about to be repeated end as infrastructure failures, without another request.
        """
        with self._lock:
            threads, client = self._threads, self._client
            self._threads = self._client = None
            self._closing.set()
        if threads is not None and client is not None:
            threads.shutdown(wait=True)
            client.close()
