"""Sampling on vLLM servers over HTTP: started by the user anywhere, or by the run itself on this machine.

After each RL step the trainer's weights go to a folder that the servers read too, whole or as LoRA adapters, and every
server loads them between two answers, then forgets its keys and values of the old ones. Every answer's weight version
is the one that its server reports: before and after a call the servers are asked, and what a server with other weights
has said is thrown away and asked for again elsewhere. See vllm_fleet for how prompts are spread and what happens when a
server dies.

Under DDP or FSDP the ranks share the servers: the first rank writes the weights and hands them over, the others wait.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from core_torl.config.errors import UserError
from core_torl.config.vllm_server_checks import check_servers
from core_torl.launch.record import is_main_process
from core_torl.sampler.checks import check_served
from core_torl.sampler.protocol import SampleRequest, SamplingConfig, Session, Weights
from core_torl.sampler.transformers import find_eos_ids
from core_torl.sampler.vllm_client import Answer, Expected, Server, ServerFailed, not_there
from core_torl.sampler.vllm_fleet import Fleet, Group, Job, none_left
from core_torl.sampler.vllm_install import check_vllm
from core_torl.sampler.vllm_params import sample_seeds, sampling_parameters
from core_torl.sampler.vllm_replicas import Launch, OwnServers
from core_torl.sampler.vllm_session import ServerSession
from core_torl.sampler.vllm_weights import WeightFolders, base_tensors
from core_torl.trajectory import Sample

log = logging.getLogger(__name__)


class VllmServerSampler:
    """See core_torl.sampler.protocol for what a sampler promises.

    ``urls``: servers that run; empty: ``replicas`` of them are started here, by the first ``sync``, with the settings
    of core_torl.sampler.vllm_replicas.Launch. ``weights``: "merged" or "lora". ``sync_dir``: where the weights are
    handed over; None: a temporary folder, which only servers on this machine can read. ``dtype``: number format of
    weights that are written and of servers that are started, None: the model's. ``colocated``: the servers share the
    trainer's GPUs and sleep while it learns. ``retried`` and ``sync_seconds`` are for metrics.

    Raises:
        UserError: an argument is wrong, or a server at ``urls`` is down or of another model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        max_new_tokens: int = 64,
        stop: Sequence[str] = (),
        eos_ids: Sequence[int] | None = None,
        urls: Sequence[str] = (),
        replicas: int = 1,
        weights: str = "merged",
        dtype: str | None = None,
        sync_dir: str | None = None,
        concurrency: int = 256,
        timeout_s: float = 1800.0,
        retries: int = 3,
        backoff_s: float = 0.5,
        gpus: Sequence[str] = (),
        port: int | None = None,
        tensor_parallel: int = 1,
        data_parallel: int = 1,
        max_model_len: int | None = None,
        block_size: int | None = None,
        gpu_memory_utilization: float = 0.9,
        kv_cache_mb: int | None = None,
        enforce_eager: bool = False,
        colocated: bool = False,
        extra_args: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        log_dir: str = "vllm",
        start_timeout_s: float = 900.0,
    ) -> None:
        check_servers(urls=urls, replicas=replicas, gpus=gpus, weights=weights, dtype=dtype, sync_dir=sync_dir)
        self.model, self.tokenizer, self.weights, self.colocated = model, tokenizer, weights, colocated
        self.sampling = SamplingConfig(max_new_tokens, temperature, top_p, top_k, min_p, stop=tuple(stop))
        self.eos_ids = sorted(set(eos_ids) if eos_ids is not None else find_eos_ids(model, tokenizer))
        self.version: str | None = None  # of the last sync
        self.sync_seconds = 0.0
        self._expected = Expected.of(model.config, weights == "lora")
        self._positions = int(getattr(model.config, "max_position_embeddings", None) or 1 << 30)
        self._adapter = (f"core-torl-{time.time_ns():x}", 0)  # never used before, on servers that outlive runs
        self._asleep = self._joined = False
        self._options: dict[str, Any] = {"timeout_s": timeout_s, "connections": concurrency}
        self._retrying = {"concurrency": concurrency, "retries": retries, "backoff_s": backoff_s}
        self._folders: WeightFolders | None = WeightFolders(sync_dir, dtype) if is_main_process() else None
        self.fleet = Fleet([Server(url, **self._options) for url in urls], **self._retrying)
        launch = Launch(
            dtype=dtype or str(model.dtype).removeprefix("torch."),
            max_model_len=max_model_len or min(self._positions, 1 << 15),
            gpus=tuple(gpus), port=port, tensor_parallel=tensor_parallel, data_parallel=data_parallel,
            block_size=block_size, gpu_memory_utilization=gpu_memory_utilization, kv_cache_mb=kv_cache_mb,
            enforce_eager=enforce_eager, sleep_mode=colocated, extra_args=tuple(extra_args),
            environment=dict(environment or {}), log_dir=Path(log_dir), start_timeout_s=start_timeout_s,
            lora_rank=_lora_rank(model) if weights == "lora" else 0,
        )  # fmt: skip
        self._least = max_model_len or max_new_tokens + 1
        self.own = OwnServers(launch, 0 if urls else replicas, **self._options)
        try:
            if self.own.count:
                check_vllm()
            for server in self.fleet.servers:
                try:
                    self._check(server)
                except ServerFailed as error:
                    raise not_there(server, error) from error
        except BaseException:
            self.close()
            raise

    @property
    def retried(self) -> int:
        """Answers that were asked for again because their server failed, so far."""
        return self.fleet.retried

    @property
    def max_model_len(self) -> int:
        """Tokens that prompt and answer may take together."""
        served = [s.max_model_len for s in self.fleet.servers if s.max_model_len]
        if self.own.count and not served:
            served = [self.own.launch.max_model_len]
        return min([self._positions, *served])

    # ---- answers

    def generate(self, requests: Sequence[SampleRequest], sampling: SamplingConfig | None = None) -> list[list[Sample]]:
        sampling = sampling or self.sampling
        self._join()  # a rank without requests, too
        if not requests:
            return []
        version = self._ready(requests, sampling)
        jobs = [job for r in requests for job in self._jobs(r, sampling)]
        answers: dict[int, tuple[Server, Answer]] = {}
        while len(answers) < len(jobs):
            self._others()
            futures = {i: self.fleet.submit(job) for i, job in enumerate(jobs) if i not in answers}
            answers |= {i: future.result() for i, future in futures.items()}
            others = self._others()
            self.fleet.retried += sum(a[0] in others for a in answers.values())
            answers = {i: a for i, a in answers.items() if a[0] not in others}
        flat = (self._sample(answers[i][1], version) for i in range(len(jobs)))
        return [[next(flat) for _ in range(r.n)] for r in requests]

    @contextmanager
    def session(self, requests: Sequence[SampleRequest], sampling: SamplingConfig | None = None) -> Iterator[Session]:
        """Answers that can be interrupted and resumed; the weights must not change before the block is left."""
        sampling = sampling or self.sampling
        version = self._ready(requests, sampling)
        self._others()
        session = ServerSession(self._ask, requests, sampling, version)
        try:
            yield session
            if session.servers & self._others():
                raise UserError(
                    f"sampler: {self.fleet.last_failure}; its answers are of no use: go on with resume=auto"
                )
        finally:
            session.close()

    def _jobs(self, request: SampleRequest, sampling: SamplingConfig) -> Iterator[Job]:
        group, parameters = Group(), sampling_parameters(request, sampling, self.eos_ids)
        for seed in sample_seeds(request):
            yield Job(group, request.prompt_ids, {**parameters, "seed": seed})

    def _ask(self, group: Group, request: SampleRequest, sampling: SamplingConfig) -> Future[tuple[Server, Answer]]:
        (job,) = self._jobs(request, sampling)
        return self.fleet.submit(Job(group, job.prompt_ids, job.parameters))

    @staticmethod
    def _sample(answer: Answer, version: str) -> Sample:
        return Sample(answer.token_ids, answer.logprobs, answer.finish, answer.stop, version)

    def _ready(self, requests: Sequence[SampleRequest], sampling: SamplingConfig) -> str:
        """Check requests and be awake; returns the weights' version."""
        self._join()
        if self.version is None:
            raise RuntimeError("sampler: the servers have no weights yet; call sync first")
        stops = min(s.max_stops for s in self.fleet.servers)
        check_served(requests, sampling, self.max_model_len, stops)
        self.wake()
        return self.version

    def _others(self) -> set[Server]:
        """The servers that say that they hold other weights than those of the last sync. They are taken out.

        Raises UserError if no server is left.
        """
        others: set[Server] = set()

        def ask(server: Server) -> None:
            try:
                version = server.weight_version()
            except ServerFailed as error:
                return self.fleet.lose(server, error)
            if version not in (None, self.version):
                others.add(server)
                self.fleet.lose(server, f"it holds the weights {version!r} and not {self.version!r}")
            return None

        self._on_each(ask, self.fleet.alive)
        if not self.fleet.alive:
            raise none_left(self.fleet)
        return others

    @staticmethod
    def _on_each(work: Callable[[Any], None], things: Sequence[Any]) -> None:
        """Do something for all of ``things`` side by side."""
        if len(things) == 1:
            return work(things[0])
        with ThreadPoolExecutor(max(1, len(things))) as threads:
            list(threads.map(work, things))
        return None

    # ---- weights

    def sync(self, weights: Weights, version: str) -> None:
        """Hand the trainer's weights to every server; one that was lost gets them too, if it is there again.

        A lost server of this run's own is started again, once. Raises UserError if no server has the weights then.
        """
        began = time.monotonic()
        if self.weights == "lora" and not weights.adapted:
            raise UserError("sampler.weights=lora with model.lora.rank=0: there are no adapters; use merged")
        if _ranks() > 1:
            torch.distributed.barrier()  # another rank's answers may be under way
        self.wake()
        if self._folders is None:  # a further rank: gathering needs it, writing does not
            self._go_through(weights)
            self._join(version)
            return
        error: BaseException | None = None
        try:
            self._hand_over(weights, version, self._folders)
        except BaseException as failure:
            error = failure
            raise
        finally:
            self._join(version, error)
        self.sync_seconds = time.monotonic() - began

    def _hand_over(self, weights: Weights, version: str, folders: WeightFolders) -> None:
        merged = self.weights == "merged"
        folder = folders.write_merged(weights, version) if merged else folders.write_adapter(weights, version)
        if self.own.count and not self.own.replicas:
            self.fleet.servers = self.own.start(self._startable(folder, folders))
            for server in self.fleet.servers:
                self._check(server)
        self._adapter = self._adapter[0], self._adapter[1] + 1
        name = "{}-{}".format(*self._adapter)

        def load(server: Server) -> None:
            if merged:
                server.take_weights(folder, version)
            else:
                server.take_adapter(name, folder, version)

        def give(server: Server) -> None:
            if server.alive:
                try:
                    return load(server)
                except (ServerFailed, UserError) as error:
                    self.fleet.lose(server, error)
            try:
                self._revive(server, folder, folders)
                load(server)
            except (ServerFailed, UserError) as error:
                server.alive = True  # so that it is said that it is lost, each time anew
                self.fleet.lose(server, error)

        self._on_each(give, self.fleet.servers)
        if not self.fleet.alive:
            raise none_left(self.fleet)
        self.version = version
        folders.keep_only(folder)

    def _startable(self, folder: Path, folders: WeightFolders) -> Path:
        """A checkpoint for servers to start from: that of this sync, or what adapters stand on."""
        config = self.model.config
        if self.weights == "merged":
            folders.describe(folder, config, self.tokenizer)
            return folder
        if not (folders.root / "base").is_dir():
            folders.write_model("base", base_tensors(self.model), config, self.tokenizer)
        return folders.root / "base"

    def _revive(self, server: Server, folder: Path, folders: WeightFolders) -> None:
        """Have a lost server ready for weights again. Raises ServerFailed or UserError."""
        if self.own.down(server):
            self.own.restart(server, self._startable(folder, folders))
        self._check(server)

    def _check(self, server: Server) -> None:
        server.check(self._expected, self._least)
        server.alive = True

    def _go_through(self, weights: Weights) -> None:
        if self.weights == "merged":
            for _ in weights.merged():
                pass
        else:
            folders = WeightFolders(None)
            weights.save_adapter(folders.root)
            folders.close()

    def _join(self, version: str | None = None, error: BaseException | None = None) -> None:
        """Where there are ranks: take over from the first one how the servers stand. Every rank has to call it.

        Raises UserError in the other ranks when the first one failed.
        """
        if _ranks() == 1 or (self._joined and version is None):
            return
        first = torch.distributed.get_rank() == 0
        urls = [s.url for s in self.fleet.servers]
        state: list[Any] = [(str(error) if error else None, self.version, urls, [s.model for s in self.fleet.servers])]
        torch.distributed.broadcast_object_list(state, src=0)
        self._joined = True
        if first:
            return
        failed, self.version, urls, models = state[0]
        if failed:
            raise UserError(failed)
        if [s.url for s in self.fleet.servers] != urls:
            self.fleet.servers = [Server(url, **self._options) for url in urls]
        for server, model in zip(self.fleet.servers, models, strict=True):
            server.model, server.alive = model, True
            self._check_reachable(server, model)

    def _check_reachable(self, server: Server, model: str) -> None:
        try:
            if not server.max_model_len:
                self._check(server)
                server.model = model
        except ServerFailed as error:
            self.fleet.lose(server, error)

    # ---- memory

    def sleep(self) -> None:
        """Servers that share the trainer's GPUs give their memory back. Where there are ranks, each has to call it."""
        if not self.colocated:
            return
        if _ranks() > 1:
            torch.distributed.barrier()  # another rank's answers may be under way
        if not self._asleep and self._folders is not None:
            self._on_each(self._unless_lost(Server.sleep), self.fleet.alive)
        self._asleep = True

    def wake(self) -> None:
        """The first rank that needs the servers wakes them."""
        if self._asleep:
            self._on_each(self._unless_lost(Server.wake), self.fleet.alive)
            self._asleep = False

    def _unless_lost(self, work: Callable[[Server], None]) -> Callable[[Server], None]:
        def attempt(server: Server) -> None:
            try:
                work(server)
            except (ServerFailed, UserError) as error:
                self.fleet.lose(server, error)

        return attempt

    def close(self) -> None:
        """Stop the servers of this run's own, close connections, remove the weights' folders. May be called twice."""
        self.fleet.close()
        self.own.stop()
        if self._folders is not None:
            self._folders.close()


def _ranks() -> int:
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def _lora_rank(model: Any) -> int:
    """The largest rank among a peft model's adapters; 0 for a plain model."""
    return max((int(c.r) for c in getattr(model, "peft_config", {}).values()), default=0)
