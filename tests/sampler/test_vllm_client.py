"""One vLLM server: what of its answers counts, and which servers are none of the kind that is needed."""

from __future__ import annotations

import re

import pytest

from core_torl.config.errors import UserError
from core_torl.sampler.vllm_client import ServerFailed, check_reachable, read_answer
from tests.sampler.fake_vllm import replays


def test_answers_that_were_not_sampled_to_their_end_are_no_answers():
    good = {"token_ids": [5, 6], "logprobs": {"token_logprobs": [-1.0, -2.0]}, "finish_reason": "length"}
    assert read_answer(good, {"max_tokens": 2}).finish == "length"
    with pytest.raises(UserError, match=r"cuts answers at 2 tokens where 9 were asked for"):
        read_answer(good, {"max_tokens": 9})
    with pytest.raises(ServerFailed, match=r"ended with abort"):
        read_answer({**good, "finish_reason": "abort"}, {"max_tokens": 2})
    with pytest.raises(ServerFailed, match=r"1 tokens and 2 log-probs"):
        read_answer({**good, "token_ids": [5]}, {"max_tokens": 2})


@pytest.mark.parametrize(
    ("path", "answer", "said"),
    [
        ("/v1/models", (404, '{"detail":"Not Found"}'), "HTTP status 404"),
        ("/v1/models", (200, "<html>It works!</html>"), "is no vLLM server"),
        ("/v1/models", (200, '{"data": []}'), "is no vLLM server"),
        ("/server_info", (404, '{"detail":"Not Found"}'), "start it with VLLM_SERVER_DEV_MODE=1"),
    ],
    ids=["no models", "another thing", "nothing served", "no calls for weights"],
)
def test_a_server_of_another_kind_is_refused_before_a_model_is_loaded(path, answer, said):
    with replays("server") as (fake,):
        check_reachable([fake.url], lora=True, max_model_len=512)
        fake.broken[path] = answer
        with pytest.raises(UserError, match=re.escape(said)) as error:
            check_reachable([fake.url], lora=False, max_model_len=512)
        assert "\n" not in str(error.value) and fake.url in str(error.value)
