"""Sampling from a transformers model in the trainer's own process: the embedded engine.

The weights are the trainer's own, so there is nothing to copy after an optimizer step. ``engine: cascade`` reads every
prompt once and keeps its keys and values once for all its answers (see cascade.py); finished answers leave the batch.
``engine: generate`` is transformers' own ``generate`` with the same draws, for architectures that the cascade does not
know; ``auto`` tries the cascade against a plain forward on a probe and falls back to it, saying so.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from core_torl.sampler.cascade_session import CascadeSession
from core_torl.sampler.checks import check_requests
from core_torl.sampler.draw import draw
from core_torl.sampler.generate_session import GenerateSession
from core_torl.sampler.protocol import SampleRequest, SamplingConfig, Session, Weights
from core_torl.sampler.rows import Rows
from core_torl.sampler.stops import StopFinder
from core_torl.trajectory import Sample

log = logging.getLogger(__name__)


class TransformersSampler:
    """See core_torl.sampler.protocol for what a sampler promises.

    ``max_rows`` bounds how many answers grow side by side (memory). ``eos_ids`` end an answer; None takes them from the
    model's generation config and the tokenizer. ``copy_weights`` keeps a twin of the model, which takes the trainer's
    weights in ``sync`` only: for a trainer that works while answers are sampled, or whose weights are sharded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        engine: str = "auto",
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        max_new_tokens: int = 64,
        max_rows: int = 512,
        stop: Sequence[str] = (),
        eos_ids: Sequence[int] | None = None,
        copy_weights: bool = False,
    ) -> None:
        if engine not in ("auto", "cascade", "generate"):
            raise ValueError(f"sampler.engine={engine!r}: use auto, cascade or generate")
        if max_rows < 1:
            raise ValueError(f"sampler.max_rows={max_rows}: must be at least 1")
        self.own_weights = copy_weights
        self.model, self.tokenizer, self.max_rows = _twin(model) if copy_weights else model, tokenizer, max_rows
        self.sampling = SamplingConfig(max_new_tokens, temperature, top_p, top_k, min_p, stop=tuple(stop))
        self.eos_ids = sorted(set(eos_ids) if eos_ids is not None else find_eos_ids(model, tokenizer))
        self.finder = StopFinder(tokenizer)
        self.version = "0"
        self._engine = engine
        self._proved: str | None = None if engine == "auto" else engine

    @property
    def engine(self) -> str:
        """The engine in use: ``cascade`` or ``generate``; probes the model on first use if set to auto."""
        if self._proved is None:
            problem = self._probe()
            self._proved = "generate" if problem else "cascade"
            if problem:
                log.warning("sampler: the cascade does not fit this model (%s); using transformers' generate", problem)
        return self._proved

    def generate(self, requests: Sequence[SampleRequest], sampling: SamplingConfig | None = None) -> list[list[Sample]]:
        sampling = sampling or self.sampling
        self._check(requests, sampling)
        run = self._cascade if self.engine == "cascade" else self._generate
        samples: list[list[Sample]] = []
        with self._evaluating():
            for part in self.parts(requests):
                samples += run(part, sampling)
        return samples

    def _check(self, requests: Sequence[SampleRequest], sampling: SamplingConfig) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        check_requests(requests, sampling, limit)

    def parts(self, requests: Sequence[SampleRequest]) -> Iterator[list[SampleRequest]]:
        """Cut the requests so that no part has more than ``max_rows`` rows, if a single request does not have more."""
        part: list[SampleRequest] = []
        for request in requests:
            if part and sum(r.n for r in part) + request.n > self.max_rows:
                yield part
                part = []
            part.append(request)
        if part:
            yield part

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Dropout off and no graph, whatever the trainer has set; put back afterwards."""
        training = [(module, module.training) for module in self.model.modules()]  # parts may be frozen in eval mode
        self.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            for module, mode in training:
                module.training = mode

    @contextmanager
    def _plain_generation(self) -> Iterator[Any]:
        """The model without its own generation settings: a repetition penalty, say, would bend what we draw from."""
        wrapped: Any = self.model  # perhaps by adapters
        model: Any = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped
        before, model.generation_config = model.generation_config, GenerationConfig()
        try:
            yield model
        finally:
            model.generation_config = before

    def _prompts(self, requests: Sequence[SampleRequest]) -> tuple[Tensor, Tensor, Tensor]:
        """Left-padded prompts, their mask and their positions, each [requests, longest prompt]."""
        device, longest = self.model.device, max(len(r.prompt_ids) for r in requests)
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor(
            [[pad] * (longest - len(r.prompt_ids)) + list(r.prompt_ids) for r in requests], device=device
        )
        length = torch.tensor([len(r.prompt_ids) for r in requests], device=device)[:, None]
        mask = torch.arange(longest, device=device)[None, :] >= longest - length
        return ids, mask, (mask.long().cumsum(-1) - 1).clamp_(min=0)

    @contextmanager
    def session(self, requests: Sequence[SampleRequest], sampling: SamplingConfig | None = None) -> Iterator[Session]:
        """Answers that can be interrupted and resumed; the weights must not change before the block is left."""
        sampling = sampling or self.sampling
        self._check(requests, sampling)
        if self.engine != "cascade":
            yield GenerateSession(self, requests, sampling)
            return
        with self._evaluating():
            yield self._cascade_session(requests, sampling)

    def _cascade_session(self, requests: Sequence[SampleRequest], sampling: SamplingConfig) -> CascadeSession:
        rows = Rows(requests, sampling, self.finder, self.eos_ids)
        lengths = torch.tensor([len(r.prompt_ids) for r in requests])
        return CascadeSession(self.model, rows, self._prompts(requests), lengths, self.version)

    def _cascade(self, requests: Sequence[SampleRequest], sampling: SamplingConfig) -> list[list[Sample]]:
        session = self._cascade_session(requests, sampling)
        while session.running:
            for row in session.advance():
                session.release(row)
        return session.rows.samples(requests, self.version)

    def _generate(self, requests: Sequence[SampleRequest], sampling: SamplingConfig) -> list[list[Sample]]:
        rows = Rows(requests, sampling, self.finder, self.eos_ids)
        ids, mask, _ = self._prompts(requests)
        index = rows.request_of_row.to(ids.device)
        picker = _Picker(rows)
        with self._plain_generation() as model:
            model.generate(
                input_ids=ids[index], attention_mask=mask[index].long(), max_new_tokens=int(rows.limit.max()),
                do_sample=False, eos_token_id=None, pad_token_id=self.tokenizer.pad_token_id or 0,
                logits_processor=LogitsProcessorList([picker]),
                stopping_criteria=StoppingCriteriaList([_AllDone(rows)]),
            )  # fmt: skip
        return rows.samples(requests, self.version)

    def _probe(self) -> str | None:
        """Why the cascade does not fit this model, or None if it gives the logits of a plain forward."""
        config = self.model.config
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            return f"its layers are {sorted(kinds)}"
        vocabulary = int(config.vocab_size)
        prompts = [tuple((7 * i + 3 * j) % vocabulary for i in range(5 + j)) for j in range(2)]
        greedy = SamplingConfig(max_new_tokens=3, temperature=0.0, min_new_tokens=3)
        with self._evaluating():
            try:
                samples = self._cascade([SampleRequest(p, 2, 0) for p in prompts], greedy)
            except (NotImplementedError, TypeError, AttributeError, KeyError, RuntimeError, AssertionError) as error:
                return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            tolerance = 1e-3 if self.model.dtype == torch.float32 else 0.1
            for prompt, group in zip(prompts, samples, strict=True):
                for sample in group:
                    ids = torch.tensor([prompt + sample.token_ids], device=self.model.device)
                    logits = self.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
                    logits[:, self.eos_ids] = -torch.inf  # min_new_tokens forbade them in the probe as well
                    logprobs = logits.log_softmax(-1)
                    expected = logprobs.gather(-1, ids[0, len(prompt) :, None]).squeeze(-1).cpu()
                    gap = float((expected - torch.tensor(sample.logprobs)).abs().max())
                    if not gap < tolerance:
                        return f"its log-probs differ from a plain forward by {gap:.2g}"
        return None

    @torch.no_grad()
    def sync(self, weights: Weights, version: str) -> None:
        """No cache outlives a call. The trainer's own weights are those of now already; a twin takes a copy of them."""
        if self.own_weights:
            twin = dict(self.model.named_parameters(remove_duplicate=False))
            for name, tensor in weights.merged():
                twin[name].copy_(tensor)
        self.version = version

    def sleep(self) -> None:
        """Nothing is held between calls."""

    def wake(self) -> None:
        """Nothing is held between calls."""

    def close(self) -> None:
        """Nothing is held between calls."""


def _twin(model: Any) -> Any:
    """A copy of the model that is never trained, adapters merged into it."""
    twin = copy.deepcopy(model)
    if hasattr(twin, "merge_and_unload"):
        twin = twin.merge_and_unload()
    return twin.eval().requires_grad_(False)


class _Picker(LogitsProcessor):
    """Makes ``generate`` take the very token that our own draw chooses, and records it."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = self.rows.running.nonzero().flatten()
        logits = self.rows.hold_back(scores[rows.to(scores.device)], rows)
        ids, logprobs = draw(logits, self.rows.sampling, self.rows.numbers[rows, self.rows.length[rows]])
        self.rows.record(rows, ids.cpu(), logprobs.cpu())
        token = torch.zeros(len(scores), dtype=torch.long, device=scores.device)  # rows that have ended get any token
        token[rows.to(scores.device)] = ids.to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(-1, token[:, None], 0.0)


class _AllDone(StoppingCriteria):
    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), not bool(self.rows.running.any()), device=input_ids.device)


def find_eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every id that ends an answer, as the model's generation config and the tokenizer name them."""
    generation = getattr(model, "generation_config", None)
    named = getattr(generation, "eos_token_id", None)
    ids = set(named if isinstance(named, list) else [] if named is None else [named])
    eos: Any = tokenizer.eos_token_id
    if eos is not None:
        ids.add(int(eos))
    if not ids:
        raise ValueError("model: neither the generation config nor the tokenizer names an end-of-sequence token")
    return ids
