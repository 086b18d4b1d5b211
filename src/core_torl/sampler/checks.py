"""What every sampler refuses before it samples anything."""

from __future__ import annotations

from collections.abc import Sequence

from core_torl.sampler.protocol import SampleRequest, SamplingConfig, token_limit


def check_requests(requests: Sequence[SampleRequest], sampling: SamplingConfig, limit: int | None) -> None:
    """Raises ValueError, on one line, for an empty prompt, no samples, or no room within ``limit`` positions."""
    for i, request in enumerate(requests):
        if not request.prompt_ids or request.n < 1:
            raise ValueError(f"sampler: request {i} has an empty prompt or n < 1")
        if token_limit(request, sampling) < 1:
            raise ValueError(f"sampler: request {i} asks for {request.max_new_tokens} tokens; ask for one at least")
        if limit and len(request.prompt_ids) + token_limit(request, sampling) > limit:
            raise ValueError(
                f"sampler: prompt {i} has {len(request.prompt_ids)} tokens; with max_new_tokens="
                f"{token_limit(request, sampling)} it exceeds the model's {limit} positions: lower "
                "sampler.max_new_tokens or drop long prompts"
            )


def check_served(requests: Sequence[SampleRequest], sampling: SamplingConfig, limit: int, stops: int) -> None:
    """The same for vLLM servers, which take ``limit`` tokens, prompt and answer, and ``stops`` texts that end one."""
    check_requests(requests, sampling, None)
    for i, request in enumerate(requests):
        tokens = token_limit(request, sampling)
        if len(sampling.stop if request.stop is None else request.stop) > stops:
            raise ValueError(
                f"sampler.stop: the servers take {stops} texts for an answer; start them with a larger "
                "VLLM_MAX_STOP_STRINGS"
            )
        if len(request.prompt_ids) + tokens > limit:
            raise ValueError(
                f"sampler: prompt {i} has {len(request.prompt_ids)} tokens; with max_new_tokens={tokens} it exceeds "
                f"the servers' {limit}: lower sampler.max_new_tokens, drop long prompts, or serve with a larger "
                "--max-model-len (sampler.max_model_len)"
            )
