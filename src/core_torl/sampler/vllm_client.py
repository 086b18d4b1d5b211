"""One vLLM server over HTTP: token ids in, token ids out, and the calls that change its weights.

Answers come from ``/v1/completions``, one request an answer, because every answer has a seed of its own. They are asked
for in an event loop, so that a thousand of them may be under way; everything else is rare and blocks. Failures are
told apart, because only some are worth another attempt: ``ServerFailed`` is the server's (gone, overloaded, timed out),
a UserError is ours or the user's. This module needs httpx alone: a trainer's machine need not have vLLM.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from core_torl.config.errors import UserError
from core_torl.sampler.vllm_worker import NAME as WORKER
from core_torl.trajectory import Finish

logging.getLogger("httpx").setLevel(logging.WARNING)  # else a line for every answer
# Penalties of a model's generation_config.json would otherwise bend what is drawn from.
_NO_PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
_QUICK_S = 30.0  # for calls that answer at once
_FIRST_S = 120.0  # for the first calls to a new server, which looks around and warms up
START_COMMAND = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --generation-config vllm --port 8000"
)


class ServerFailed(RuntimeError):
    """The server's failure: another attempt, or another server, may give the answer."""


@dataclass(frozen=True)
class Answer:
    """What a server sampled. ``logprobs`` has the length of ``token_ids``."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish
    stop: str | int | None


@dataclass(frozen=True)
class Expected:
    """What the trainer's model is, for a server to be held against."""

    vocabulary: int
    width: int
    layers: int
    tied: bool  # the output layer is the embedding
    lora: bool  # adapters will be loaded into the server

    @classmethod
    def of(cls, config: Any, lora: bool) -> Expected:
        """``config``: of a transformers model."""
        tied = bool(getattr(config, "tie_word_embeddings", False))
        return cls(int(config.vocab_size), int(config.hidden_size), int(config.num_hidden_layers), tied, lora)


class Server:
    """A server at ``url``. ``log``: the file its output goes to, where it was started by this run.

    ``timeout_s`` bounds an answer and a call that moves weights; ``connections`` the answers under way at once.
    """

    def __init__(self, url: str, *, timeout_s: float, connections: int, log: Path | None = None) -> None:
        self.url, self.log, self.timeout_s, self.connections = url.rstrip("/"), log, timeout_s, connections
        self.model = ""  # what requests name: the served model, or an adapter of it
        self.max_model_len = 0
        self.max_stops = 4  # vLLM's own default
        self.alive = False
        self.under_way = 0
        self._extended = False  # whether its workers have core_torl.sampler.vllm_worker
        # The environment's proxies are not for a server that one runs oneself.
        limits = httpx.Limits(keepalive_expiry=2.0)
        self._client = httpx.Client(trust_env=False, timeout=httpx.Timeout(_QUICK_S, connect=10.0), limits=limits)
        self._async: httpx.AsyncClient | None = None

    def __str__(self) -> str:
        return f"{self.url} (its output: {self.log})" if self.log else self.url

    # ---- calls that block

    def call(self, method: str, path: str, body: Any = None, timeout_s: float = _QUICK_S) -> Any:
        """The JSON that a call answers with; None where it answers with nothing.

        Raises:
            ServerFailed: no answer, or a status of 500 and above.
            UserError: a status of 400 to 499.
        """
        try:
            answer = self._client.request(method, self.url + path, json=body, timeout=timeout_s)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerFailed(f"{path.split('?')[0]}: {_said(error)}") from error
        return _content(answer, f"sampler.urls: {self.url}{path.split('?')[0]}")

    def healthy(self) -> bool:
        """Whether the server and its engine run."""
        try:
            self.call("GET", "/health", timeout_s=5.0)
        except (ServerFailed, UserError):
            return False
        return True

    def check(self, expected: Expected, max_model_len: int) -> None:
        """Hold the server against the trainer's model and against what this client needs.

        ``max_model_len`` is the least length that will be asked for. Raises UserError, or ServerFailed if it is down.
        """
        info = self.check_kind(expected.lora, max_model_len)
        self._check_model(expected)
        on_cpu = "cpu" in str(info["vllm_config"].get("device_config"))
        if expected.tied and on_cpu and not (self._extended or expected.lora):
            raise self.refused(
                "would keep its first output layer, which is tied to the embedding, on the CPU: start it with "
                f"--worker-extension-cls {WORKER}"
            )

    def check_kind(self, lora: bool, max_model_len: int) -> Any:
        """``check`` without a model to compare with: what a server is and can do; returns what it says of itself."""
        models = self.call("GET", "/v1/models")
        try:
            served = next(m for m in models["data"] if m.get("parent") is None)
            self.model, self.max_model_len = str(served["id"]), int(served["max_model_len"])
        except (KeyError, TypeError, StopIteration) as error:
            raise self.refused("is no vLLM server: its /v1/models names no model and its length") from error
        if self.max_model_len < max_model_len:
            raise self.refused(
                f"takes {self.max_model_len} tokens (--max-model-len) and {max_model_len} are needed: start it with "
                "more, or lower model.max_prompt_tokens or sampler.max_new_tokens"
            )
        info = self._info()
        self.max_stops = int(info["vllm_env"].get("VLLM_MAX_STOP_STRINGS", self.max_stops))
        mode = info["vllm_config"]["model_config"].get("logprobs_mode")
        processed = self._logprobs_are_processed()  # what it does counts, and not only what it says
        if mode != "processed_logprobs" or not processed:
            raise self.refused(
                f"reports log-probs from before temperature and truncation (--logprobs-mode {mode}): start it with "
                "--logprobs-mode processed_logprobs"
            )
        self._extended = info["vllm_config"]["parallel_config"].get("worker_extension_cls") == WORKER
        if lora:
            updating = info["vllm_env"].get("VLLM_ALLOW_RUNTIME_LORA_UPDATING")
            if not info["vllm_config"].get("lora_config") or not updating:
                raise self.refused(
                    "takes no adapters: start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora "
                    "--max-lora-rank R, or set sampler.weights=merged"
                )
        return info

    def _info(self) -> Any:
        try:
            return self.call("GET", "/server_info?config_format=json", timeout_s=_FIRST_S)
        except UserError as error:
            raise self.refused(
                f"has no calls that change weights: start it with VLLM_SERVER_DEV_MODE=1 ({START_COMMAND})"
            ) from error

    def _check_model(self, expected: Expected) -> None:
        answer = self.call("POST", "/collective_rpc", {"method": "get_model_inspection"}, timeout_s=_FIRST_S)
        text = str(answer["results"][0])
        for what, pattern, own in (
            ("a vocabulary of", r"org_vocab_size=(\d+)", expected.vocabulary),
            ("a width of", r"Embedding\([^)]*embedding_dim=(\d+)", expected.width),
            ("layers:", r"\(0-\d+\): (\d+) x \w*DecoderLayer", expected.layers),
        ):
            found = re.search(pattern, text)
            if found and int(found[1]) != own:
                raise self.refused(
                    f"serves another model than model.path: {self.model} has {what} {found[1]}, the trainer's {own}"
                )

    def _logprobs_are_processed(self) -> bool:
        """Drawn from one token alone (top_k 1), every log-prob is 0 after truncation, and below it before."""
        body = {
            "model": self.model, "prompt": [[3, 4, 5]], "max_tokens": 4, "min_tokens": 4, "temperature": 1.0,
            "top_k": 1, "logprobs": 0, "seed": 0, "return_token_ids": True, **_NO_PENALTIES,
        }  # fmt: skip
        try:
            choice = self.call("POST", "/v1/completions", body, timeout_s=_FIRST_S)["choices"][0]
        except ServerFailed as error:
            if isinstance(error.__cause__, httpx.ReadTimeout):
                raise self.refused(
                    f"gives no answer within {_FIRST_S:g} s: if a run that was killed has left it paused, "
                    f"curl -X POST {self.url}/resume"
                ) from error
            raise
        return max(abs(x) for x in choice["logprobs"]["token_logprobs"]) < 1e-6

    def refused(self, reason: str) -> UserError:
        return UserError(f"sampler.urls: the server at {self} {reason}")

    # ---- weights

    def weight_version(self) -> str | None:
        """The version that the server's weights were last given; None where it keeps none."""
        try:
            return str(self.call("GET", "/weight_info")["weight_version"])
        except UserError:
            return None

    def take_weights(self, folder: Path, version: str) -> None:
        """Load whole weights from ``folder``, with no answer under way, and forget what was read under the old ones."""
        if self._extended:
            body: dict[str, Any] = {"method": "core_torl_reload", "args": [str(folder)]}
        else:
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        try:
            self.call("POST", "/pause?mode=wait", timeout_s=self.timeout_s)
            self.call("POST", "/collective_rpc", body, timeout_s=self.timeout_s)
            self.name_version(version)
            self.forget()
        except (ServerFailed, UserError):
            with suppress(ServerFailed, UserError):  # what failed first is told
                self.call("POST", "/resume")  # else it would answer nobody ever again
            raise
        self.call("POST", "/resume")

    def take_adapter(self, name: str, folder: Path, version: str) -> None:
        """Load an adapter under a name that was never used: a name that was is served from old keys and values."""
        before = self.model
        body = {"lora_name": name, "lora_path": str(folder)}
        self.call("POST", "/v1/load_lora_adapter", body, timeout_s=self.timeout_s)
        self.name_version(version)
        self.forget()
        self.model = name
        if before.startswith(ADAPTER):
            self.call("POST", "/v1/unload_lora_adapter", {"lora_name": before}, timeout_s=self.timeout_s)

    def name_version(self, version: str) -> None:
        """Have the server report ``version``; one that keeps none is left alone."""
        if self.weight_version() is not None:
            self.call("POST", "/update_weight_version", {"new_version": version})

    def forget(self) -> None:
        """Empty the prefix cache: it holds keys and values of the old weights. Raises ServerFailed."""
        if not self.call("POST", "/reset_prefix_cache")["success"]:
            raise ServerFailed("/reset_prefix_cache: the cache is in use")

    def sleep(self) -> None:
        """Give GPU memory back: weights go to the host, keys and values are dropped."""
        self.call("POST", "/sleep?level=1&mode=wait", timeout_s=self.timeout_s)

    def wake(self) -> None:
        """Undo ``sleep``; nothing for a server that is awake."""
        self.call("POST", "/wake_up", timeout_s=self.timeout_s)

    # ---- answers

    async def complete(self, prompt_ids: tuple[int, ...], parameters: dict[str, Any]) -> Answer:
        """One answer. ``parameters``: of core_torl.sampler.vllm_params, and the seed. Raises as ``call`` does."""
        if self._async is None:
            # A server closes connections that were idle for 5 s: do not use one that it may be closing.
            limits = httpx.Limits(max_connections=self.connections, keepalive_expiry=2.0)
            timeout = httpx.Timeout(self.timeout_s, connect=10.0, pool=None)
            self._async = httpx.AsyncClient(trust_env=False, timeout=timeout, limits=limits)
        body = {
            "model": self.model, "prompt": [list(prompt_ids)], "n": 1, "return_token_ids": True,
            "return_tokens_as_token_ids": True, **_NO_PENALTIES, **parameters,
        }  # fmt: skip
        try:
            answer = await self._async.post(f"{self.url}/v1/completions", json=body)
        except httpx.HTTPError as error:
            raise ServerFailed(_said(error)) from error
        if answer.status_code == 404:  # it was started anew since, and has lost our adapter
            raise ServerFailed(_message(answer))
        content = _content(answer, f"sampler: {self.url} refuses a request")
        try:
            return read_answer(content["choices"][0], parameters)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ServerFailed("an answer that is not of vLLM's form") from error

    async def still_healthy(self) -> bool:
        """``healthy`` in the event loop."""
        assert self._async is not None
        try:
            answer = await self._async.get(f"{self.url}/health", timeout=httpx.Timeout(5.0))
        except httpx.HTTPError:
            return False
        return answer.status_code == 200

    async def close_async(self) -> None:
        if self._async is not None:
            await self._async.aclose()
        self._async = None

    def close(self) -> None:
        self._client.close()


def check_reachable(urls: Sequence[str], *, lora: bool, max_model_len: int) -> None:
    """Find every server at ``urls`` up, with the calls for weights and the log-probs that this client needs.

    Needs no model, so it can stand before one is loaded. Raises UserError for the first server that is down or wrong.
    """
    for url in urls:
        server = Server(url, timeout_s=_FIRST_S, connections=1)
        try:
            server.check_kind(lora, max_model_len)
        except ServerFailed as error:
            raise not_there(server, error) from error
        finally:
            server.close()


def not_there(server: Server, error: ServerFailed) -> UserError:
    return UserError(
        f"sampler.urls: no vLLM server answers at {server.url} ({error}); start one there: {START_COMMAND}"
    )


ADAPTER = "core-torl-"  # how our adapters' names begin


def read_answer(choice: dict[str, Any], parameters: dict[str, Any]) -> Answer:
    """A choice of ``/v1/completions`` as an answer. Raises ServerFailed if it was not sampled to its end."""
    ids = tuple(int(i) for i in choice["token_ids"])
    logprobs = tuple(float(x) for x in choice["logprobs"]["token_logprobs"])
    reason, stop = choice["finish_reason"], choice.get("stop_reason")
    if len(ids) != len(logprobs) or not ids:
        raise ServerFailed(f"an answer with {len(ids)} tokens and {len(logprobs)} log-probs")
    if reason == "length":
        if len(ids) < parameters["max_tokens"]:
            raise UserError(
                f"sampler.urls: the server cuts answers at {len(ids)} tokens where {parameters['max_tokens']} were "
                "asked for: start it with --generation-config vllm and without a limit of its own"
            )
        return Answer(ids, logprobs, "length", None)
    if reason != "stop":
        raise ServerFailed(f"an answer that ended with {reason}")
    if isinstance(stop, str):
        return Answer(ids, logprobs, "stop", stop)
    return Answer(ids, logprobs, "eos", ids[-1])


def _content(answer: httpx.Response, where: str) -> Any:
    if answer.status_code >= 500 or answer.status_code == 429:
        raise ServerFailed(f"HTTP status {answer.status_code} ({_message(answer)})")
    if answer.status_code >= 400:
        raise UserError(f"{where} (HTTP status {answer.status_code}: {_message(answer)})")
    try:
        return answer.json() if answer.content else None
    except ValueError:
        return None  # some calls confirm with a plain sentence


def _message(answer: httpx.Response) -> str:
    try:
        found = answer.json()
        error = found.get("error", found)
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        text = answer.text
    return " ".join(text.split())[:200]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
