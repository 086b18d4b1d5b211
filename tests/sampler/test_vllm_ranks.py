"""Ranks that share vLLM servers: one hands the weights over, all sample under them, and all learn of a failure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from core_torl.sampler.vllm_replicas import free_port
from tests.sampler.fake_vllm import replays
from tests.sampler.record_vllm import requests

pytestmark = [pytest.mark.ddp, pytest.mark.slow]

# Importing is nearly all that this takes, so the second rank is split off behind it.
RANKS = """
import json, os, sys
from pathlib import Path
import torch.distributed as dist
from core_torl.config.errors import UserError
from tests.sampler.record_vllm import policy, requests, sampler_of

urls, folder = [sys.argv[1]], Path(sys.argv[2])
other = os.fork()
rank = 0 if other else 1
os.environ["LOCAL_RANK"] = str(rank)
weights = policy(0), policy(1)
sampler = sampler_of(weights[0], urls, backoff_s=0.01)
sampler.sync(weights[0], "0")  # before there is a group, as at the start of a run
dist.init_process_group("gloo", rank=rank, world_size=2)
assert rank == 0 or (sampler.generate([]) == [] and sampler._joined)  # nothing to ask: it joins all the same
told = {"answers": [sampler.generate(requests()[rank::2])]}
sampler.sync(weights[1], "1")
told["answers"].append(sampler.generate(requests()[rank::2]))
told["answers"] = [[[(s.weight_version, s.token_ids) for s in group] for group in a] for a in told["answers"]]
try:
    sampler.sync(weights[0], "2")
except UserError as error:
    told["said"] = str(error)
sampler.close()
(folder / f"{rank}.json").write_text(json.dumps(told))
if other:
    assert os.waitpid(other, 0)[1] == 0
"""


@dataclass
class Ranks:
    """What two ranks say, and what their server, whose cache cannot be emptied from the third version on, was asked."""

    told: list[dict]
    calls: list[str]


def run(url: str, folder: Path) -> list[dict]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = subprocess.Popen(
        [sys.executable, "-c", RANKS, url, str(folder)], cwd=Path(__file__).parents[2], env=environment,
        text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        errors = ranks.communicate(timeout=120)[1]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(ranks.pid, signal.SIGKILL)
    assert ranks.returncode == 0, errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with replays("server") as (fake,):
        handle = fake.handle

        def last_fails(handler, method, path, body):
            if fake.calls.count("POST /reset_prefix_cache") == 2:
                fake.broken["/reset_prefix_cache"] = (200, '{"success": false}')
            return handle(handler, method, path, body)

        fake.handle = last_fails
        return Ranks(run(fake.url, tmp_path_factory.mktemp("ranks")), fake.calls)


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
