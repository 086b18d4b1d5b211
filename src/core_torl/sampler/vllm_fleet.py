"""Spreading prompts over several servers, and carrying on when one of them fails.

All answers to a prompt go to one server, which then reads the prompt once; the next prompt goes to the server with the
fewest answers under way. An answer whose server fails is asked for again with the same seed, elsewhere where there is
an elsewhere, so a failure changes nothing in what is sampled. A server that is found dead stays out until the next
sync of weights.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from core_torl.config.errors import UserError
from core_torl.sampler.vllm_client import Answer, Server, ServerFailed

log = logging.getLogger(__name__)


class Group:
    """The answers to one prompt: they keep together."""

    def __init__(self) -> None:
        self.server: Server | None = None
        self.choosing = asyncio.Lock()


@dataclass(frozen=True)
class Job:
    """One answer to be asked for. ``parameters`` include the seed."""

    group: Group
    prompt_ids: tuple[int, ...]
    parameters: dict[str, Any]


class Fleet:
    """``servers`` that hold the same weights.

    ``retries``: attempts beyond the first for an answer whose server goes on working; ``backoff_s``: the first pause
    between them, doubled each time. ``retried`` counts answers that were asked for again, over the whole run.
    """

    def __init__(self, servers: Sequence[Server], *, concurrency: int, retries: int, backoff_s: float) -> None:
        self.servers = list(servers)
        self.concurrency, self.retries, self.backoff_s = concurrency, retries, backoff_s
        self.retried = 0
        self.last_failure = ""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._changed: asyncio.Condition | None = None

    @property
    def alive(self) -> list[Server]:
        return [s for s in self.servers if s.alive]

    def lose(self, server: Server, reason: object) -> None:
        """Take a server out until the next sync."""
        if server.alive:
            server.alive = False
            self.last_failure = f"{server}: {reason}"
            left = len(self.alive)
            log.warning("sampler: a vLLM server is lost, %d left (%s: %s)", left, server, reason)

    def submit(self, job: Job) -> Future[tuple[Server, Answer]]:
        """The answer and the server that gave it. The future raises UserError if no server is left."""
        return self._run(self._answer(job))

    def _run(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._changed = asyncio.Condition()
            self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-requests", daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _answer(self, job: Job) -> tuple[Server, Answer]:
        failures = 0
        while True:
            server = await self._place(job.group)
            server.under_way += 1
            try:
                return server, await server.complete(job.prompt_ids, job.parameters)
            except ServerFailed as error:
                reason = error
            finally:
                server.under_way -= 1
                await self._tell()
            failures += 1
            if server.alive and (failures > self.retries or not await server.still_healthy()):
                self.lose(server, reason)
                await self._tell(everyone=True)
            if server.alive:
                await asyncio.sleep(self.backoff_s * 2 ** (failures - 1))
            else:
                failures = 0  # they were that server's
            if job.group.server is server:
                job.group.server = min((s for s in self.alive if s is not server), key=_load, default=None)
            self.retried += 1
            log.info("sampler: asking again for an answer (%s: %s)", server.url, reason)

    async def _tell(self, everyone: bool = False) -> None:
        assert self._changed is not None
        async with self._changed:
            if everyone:
                self._changed.notify_all()
            else:
                self._changed.notify()

    async def _place(self, group: Group) -> Server:
        """The group's server; for a new group, or one whose server is lost, the one with the least to do."""
        assert self._changed is not None
        async with group.choosing:
            async with self._changed:
                while group.server is None or not group.server.alive:
                    if not self.alive:
                        raise none_left(self)
                    free = [s for s in self.alive if s.under_way < self.concurrency]
                    if free:
                        group.server = min(free, key=_load)
                    else:
                        await self._changed.wait()
            return group.server

    def close(self) -> None:
        """Stop the requests under way and close the connections. May be called twice."""
        if self._loop is not None and self._thread is not None:
            self._run(self._close()).result(timeout=30)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=30)
            self._loop.close()
            self._loop = self._thread = self._changed = None
        for server in self.servers:
            server.close()

    async def _close(self) -> None:
        own = asyncio.current_task()
        tasks = [t for t in asyncio.all_tasks() if t is not own]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in self.servers:
            await server.close_async()


def _load(server: Server) -> int:
    return server.under_way


def none_left(fleet: Fleet) -> UserError:
    return UserError(
        f"sampler: no vLLM server is left; the last one was {fleet.last_failure or 'never there'}. Start it again and "
        "go on with resume=auto"
    )
