"""vLLM servers that a run starts itself, on this machine: started side by side, watched, and ended with the run.

They listen on 127.0.0.1 alone, because the calls that change weights ask for no password. Their output goes to a file
each, which errors name.
"""

from __future__ import annotations

import logging
import re
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core_torl.config.errors import UserError
from core_torl.launch.processes import JobProcess
from core_torl.sampler.vllm_client import Server, ServerFailed
from core_torl.sampler.vllm_worker import NAME as WORKER

log = logging.getLogger(__name__)

NAME = "core-torl"  # what the servers call the model
_POLL_S = 0.3
_STOP_S = 10.0  # for a server to end by itself
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # LoRA ranks that vLLM makes room for


@dataclass(frozen=True)
class Launch:
    """How servers are started. ``gpus``: CUDA_VISIBLE_DEVICES of each; empty: all see what this process sees.

    ``port`` None takes free ones, otherwise server i listens on ``port + i``. ``lora_rank`` 0 takes no adapters.
    ``kv_cache_mb`` None lets vLLM fill ``gpu_memory_utilization`` of the memory.
    """

    dtype: str
    max_model_len: int
    gpus: tuple[str, ...] = ()
    port: int | None = None
    tensor_parallel: int = 1
    data_parallel: int = 1
    block_size: int | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_mb: int | None = None
    enforce_eager: bool = False
    sleep_mode: bool = False
    lora_rank: int = 0
    extra_args: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    log_dir: Path = Path("vllm")
    start_timeout_s: float = 900.0

    def command(self, folder: Path, port: int) -> list[str]:
        """The command that serves the model in ``folder``."""
        # The module, and not the `vllm` program, which only a distribution of that very name can run.
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
            "--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port), "--dtype", self.dtype,
            "--max-model-len", str(self.max_model_len), "--generation-config", "vllm",
            "--logprobs-mode", "processed_logprobs", "--enable-prefix-caching", "--disable-uvicorn-access-log",
            "--worker-extension-cls", WORKER,
            "--gpu-memory-utilization", str(self.gpu_memory_utilization),
            "--tensor-parallel-size", str(self.tensor_parallel), "--data-parallel-size", str(self.data_parallel),
        ]  # fmt: skip
        import torch  # here, because nothing else of this module needs it

        if not torch.cuda.is_available():
            # vLLM's CPU worker dies when a prompt with a seed is read in parts: it winds a generator back, which the
            # CPU's cannot do (0.32, gpu_model_runner.py: set_offset). So prompts are read whole.
            whole = max(2048, self.max_model_len)
            command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(whole)]
        if self.block_size is not None:
            command += ["--block-size", str(self.block_size)]
        if self.kv_cache_mb is not None:
            command += ["--kv-cache-memory-bytes", str(self.kv_cache_mb << 20)]
        command += ["--enforce-eager"] if self.enforce_eager else []
        command += ["--enable-sleep-mode"] if self.sleep_mode else []
        if self.lora_rank:
            room = next((r for r in _RANKS if r >= self.lora_rank), self.lora_rank)
            command += ["--enable-lora", "--max-lora-rank", str(room), "--max-loras", "1", "--max-cpu-loras", "2"]
        return [*command, *self.extra_args]

    def variables(self, number: int) -> dict[str, str]:
        """What is added to server ``number``'s environment."""
        devices = {"CUDA_VISIBLE_DEVICES": self.gpus[number]} if self.gpus else {}
        return {
            "VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1",
            "VLLM_MAX_STOP_STRINGS": "64", **devices, **self.environment,
        }  # fmt: skip


class Replica:
    """One server of this run's own. ``server`` is how it is spoken to."""

    def __init__(self, launch: Launch, number: int, *, timeout_s: float, connections: int) -> None:
        self.launch, self.number = launch, number
        self.restarts = 0
        self.port = launch.port + number if launch.port is not None else free_port()
        log = launch.log_dir / f"server-{number}.log"
        self.server = Server(f"http://127.0.0.1:{self.port}", timeout_s=timeout_s, connections=connections, log=log)
        self._process: JobProcess | None = None

    def start(self, folder: Path) -> None:
        """Start serving the model in ``folder``, in the background; see ``wait``."""
        log = self.server.log
        assert log is not None
        check_free(self.port)
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "core_torl.sampler.vllm_watch", *self.launch.command(folder, self.port)]
        self._process = JobProcess(command, log, self.launch.variables(self.number))

    def wait(self) -> None:
        """Until the server answers. Raises UserError if it ends before, or takes too long."""
        assert self._process is not None
        give_up = time.monotonic() + self.launch.start_timeout_s
        while not (self._process.poll() is None and self.server.healthy()):
            if self._process.poll() is not None:
                raise UserError(
                    f"sampler: a vLLM server did not start ({last_error(self.server.log)}); its output is in "
                    f"{self.server.log}"
                )
            if time.monotonic() > give_up:
                self.stop()
                raise UserError(
                    f"sampler.start_timeout_s={self.launch.start_timeout_s:g}: a vLLM server was not ready by "
                    f"then; its output is in {self.server.log}"
                )
            time.sleep(_POLL_S)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End the server and all that it started. May be called twice."""
        if self._process is None:
            return
        self._process.ask_to_stop()
        give_up = time.monotonic() + _STOP_S
        while self._process.poll() is None and time.monotonic() < give_up:
            time.sleep(0.05)
        self._process.kill()
        self._process.clean_up()
        self._process = None


class OwnServers:
    """The servers of a run's own. ``replicas`` is empty until ``start``; ``options`` are those of Replica.

    ``folder`` below is a checkpoint that they can start from.
    """

    def __init__(self, launch: Launch, count: int, **options: Any) -> None:
        self.launch, self.count, self.options = launch, count, options
        self.replicas: list[Replica] = []

    def start(self, folder: Path) -> list[Server]:
        """Start all of them and wait. Raises UserError, and leaves none running, if one does not start."""
        self.replicas = [Replica(self.launch, i, **self.options) for i in range(self.count)]
        start_all(self.replicas, folder)
        return [r.server for r in self.replicas]

    def down(self, server: Server) -> bool:
        """Whether ``server`` is one of these and does not run."""
        replica = self._of(server)
        return replica is not None and not (replica.running and server.healthy())

    def restart(self, server: Server, folder: Path) -> None:
        """Start one that is down again, once. Raises ServerFailed if it was before, UserError if it does not start."""
        replica = self._of(server)
        assert replica is not None
        replica.stop()
        if replica.restarts:
            raise ServerFailed("it was started again before")
        replica.restarts += 1
        log.warning("sampler: starting the vLLM server %s again", server)
        replica.start(folder)
        replica.wait()

    def _of(self, server: Server) -> Replica | None:
        return next((r for r in self.replicas if r.server is server), None)

    def stop(self) -> None:
        for replica in self.replicas:
            replica.stop()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_free(port: int) -> None:
    """Raises UserError for a port that somebody listens on: whoever that is would be taken for our server."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what an ended server leaves behind is no listener
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(
                f"sampler.port: something listens on 127.0.0.1:{port} already, another run's server perhaps; "
                "take another port, or null for a free one"
            ) from error


def last_error(log: Path | None) -> str:
    """What a server's output says that went wrong: the first exception of the last traceback, or its last line."""
    lines = log.read_text(errors="replace").splitlines() if log is not None and log.is_file() else []
    lines = [re.sub(r"^\([^)]*\) (?:[A-Z]+ [\d-]+ [\d:]+ \[[^\]]*\] ?)?", "", line).strip() for line in lines]
    lines = [line for line in lines if line and not line.startswith("core-torl:")]
    errors = [line for line in lines if re.match(r"[\w.]*(?:Error|Exception)\b.*: ?\S", line) or ": error: " in line]
    vague = ("Engine core initialization failed", "WorkerProc initialization failed")
    told = [line for line in errors if not any(v in line for v in vague)] or errors or lines
    return told[-1][:300] if told else "it said nothing"


def start_all(replicas: Sequence[Replica], folder: Path) -> None:
    """Start servers side by side and wait for all of them; none is left running if one does not start."""
    try:
        for replica in replicas:
            replica.start(folder)
        for replica in replicas:
            replica.wait()
    except BaseException:
        for replica in replicas:
            replica.stop()
        raise
