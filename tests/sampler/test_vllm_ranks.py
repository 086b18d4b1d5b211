"""Ranks that share vLLM servers: one hands the weights over, all sample under them, and all learn of a failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from core_torl.sampler.vllm_replicas import free_port
from tests.sampler.fake_vllm import replays
from tests.sampler.record_vllm import requests

pytestmark = [pytest.mark.ddp, pytest.mark.slow]

RANK = """
import json, os, sys
import torch.distributed as dist
from core_torl.config.errors import UserError
from tests.sampler.record_vllm import policy, requests, sampler_of

rank, urls = int(os.environ["LOCAL_RANK"]), json.loads(sys.argv[1])
weights = policy(0), policy(1)
sampler = sampler_of(weights[0], urls, backoff_s=0.01)
sampler.sync(weights[0], "0")  # before there is a group, as at the start of a run
dist.init_process_group("gloo", rank=rank, world_size=2)
told = {"answers": [sampler.generate(requests()[rank::2])]}
sampler.sync(weights[1], "1")
told["answers"].append(sampler.generate(requests()[rank::2]))
told["answers"] = [[[(s.weight_version, s.token_ids) for s in group] for group in a] for a in told["answers"]]
try:
    sampler.sync(weights[0], "2")
except UserError as error:
    told["said"] = str(error)
print(json.dumps(told), flush=True)
sampler.close()
"""


class Ranks:
    """Two ranks on one replayed server, whose cache cannot be emptied any more from the third version on."""

    def __init__(self) -> None:
        with replays("server") as (fake,):
            handle = fake.handle

            def last_fails(handler, method, path, body):
                if fake.calls.count("POST /reset_prefix_cache") == 2:
                    fake.broken["/reset_prefix_cache"] = (200, '{"success": false}')
                return handle(handler, method, path, body)

            fake.handle = last_fails
            self.told = self._run(fake.url)
            self.calls = fake.calls

    @staticmethod
    def _run(url: str) -> list[dict]:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, json.dumps([url])], cwd=Path(__file__).parents[2], text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**environment, "LOCAL_RANK": str(rank)},
            )
            for rank in range(2)
        ]  # fmt: skip
        try:
            outputs = [rank.communicate(timeout=120) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert all(out for out, _ in outputs), outputs
        return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@pytest.fixture(scope="module")
def ranks():
    return Ranks()


def test_the_first_rank_hands_weights_over_and_all_sample_under_them(ranks):
    for rank, told in enumerate(ranks.told):
        for version, answers in zip("01", told["answers"], strict=True):
            assert [len(group) for group in answers] == [r.n for r in requests()[rank::2]]
            assert {v for group in answers for v, _ in group} == {version}
    calls = ranks.calls[: [i for i, c in enumerate(ranks.calls) if c == "POST /reset_prefix_cache"][1]]
    assert calls.count("POST /pause?mode=wait") == 2 == calls.count("POST /update_weight_version")


def test_what_went_wrong_in_the_first_rank_is_told_in_all(ranks):
    said = [told.get("said", "nothing") for told in ranks.told]
    assert "no vLLM server is left" in said[0] and "the cache is in use" in said[0] and said[0] == said[1]
