"""Does the sampler run the weights that the trainer has? Asked after each hand-over, and answered by numbers.

An engine with weights of its own can go on with old ones, or with old keys and values of a prompt that it has seen
before, and nothing would fail: the curves would only be worse. So it samples from a fixed probe, and the trainer
computes the log-probs of the same tokens. The probe is longer than a block of an engine's prefix cache and is the same
each time, so that keys and values left from the weights before show as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from core_torl.config.errors import UserError
from core_torl.objective.logprobs import answer_logprobs
from core_torl.objective.token_batch import TokenBatch
from core_torl.sampler.protocol import Sampler, SampleRequest, SamplingConfig

PROBE_TOKENS = 200  # more than the largest usual block (128)
_SAMPLING = SamplingConfig(max_new_tokens=8)
_SEED, _ANSWERS = 20_260_921, 4


def probe_of(prompts: Sequence[Sequence[int]], limit: int | None) -> tuple[int, ...]:
    """The probe: prompts one behind the other, repeated to ``PROBE_TOKENS``, or to what ``limit`` positions hold."""
    length = PROBE_TOKENS if limit is None else min(PROBE_TOKENS, limit - _SAMPLING.max_new_tokens)
    ids = [i for prompt in prompts for i in prompt]
    return tuple((ids * (1 + length // len(ids)))[:length])


def plain(sampler: Any) -> Any:
    """The sampler inside one with tools, or the sampler itself."""
    return getattr(sampler, "sampler", sampler)


def room(sampler: Any, config: Any) -> int | None:
    """How many tokens prompt and answer may have together; None: nobody says."""
    said = getattr(config, "max_position_embeddings", None), getattr(plain(sampler), "max_model_len", None)
    return min((limit for limit in said if limit), default=None)


def retries(sampler: Any) -> dict[str, float]:
    """Answers that were asked for again so far, as a metric, of a sampler whose servers can fail."""
    count = getattr(plain(sampler), "retried", None)
    return {} if count is None else {"rollout/retried": float(count)}


def has_own_weights(sampler: Any) -> bool:
    """Whether a sampler (perhaps inside one with tools) can be out of date. One that does not say so is asked."""
    return bool(getattr(plain(sampler), "own_weights", True))


def check_sync(sampler: Sampler, model: Any, probe: Sequence[int], version: str, limit: float | None) -> float:
    """The mean log-prob gap over the probe's answers, trainer against sampler, untempered.

    The mean: in bfloat16 one unlikely token may be far off at any time, and over a run some will be.

    Raises:
        UserError: it is above ``limit`` (None: no bound), is no number, or an answer carries another ``version``.
    """
    (answers,) = plain(sampler).generate([SampleRequest(tuple(probe), _ANSWERS, _SEED)], _SAMPLING)
    stale = sorted({a.weight_version for a in answers} - {version})
    if stale:
        raise UserError(
            f"sync check: the sampler answers with weights {stale[0]}, the trainer has {version}: its weights were not "
            "taken over"
        )
    rows = TokenBatch.build(
        [probe] * len(answers), [a.token_ids for a in answers], [a.logprobs for a in answers],
        [(True,) * len(a.token_ids) for a in answers], torch.zeros(len(answers)), 0, model.device,
    )  # fmt: skip
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            logprobs, _ = answer_logprobs(model, rows)
    finally:
        for module, mode in modes:
            module.training = mode
    gap = float((logprobs - rows.sampled_logprobs).abs()[rows.train_mask].mean())
    if limit is not None and not gap <= limit:
        raise UserError(
            f"sync check: after the weights of update {version} were handed over, sampler and trainer disagree by "
            f"{gap:.2e} in the mean log-prob of a token (limit variant.sync_gap={limit}): the sampler runs old weights "
            "or old keys and values, or works in another precision"
        )
    return gap
