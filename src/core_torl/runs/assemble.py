"""Putting the parts of a run together from its config. The only module that knows which part needs which.

Order matters: what can fail cheaply (data, prompts, rewards) is built before what is expensive (weights).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from core_torl.config import UserError, build
from core_torl.config.build import trust
from core_torl.data.base import ProblemSets
from core_torl.data.prompt import PromptTemplate
from core_torl.evaluation.distractors import check_distractors
from core_torl.launch.record import local_rank
from core_torl.model.ends import end_turns
from core_torl.model.load import Policy, check_model
from core_torl.problem import Concept, Problem

Encode = Callable[[Problem, Concept | None], tuple[int, ...]]


@dataclass
class Prepared:
    """What can be built without weights: everything a mistake in a config or a file is found in."""

    problems: ProblemSets
    template: PromptTemplate
    reward: Any
    evaluation: Any
    sandbox: Any | None  # not started yet; None where the policy has no calls

    def close(self) -> None:
        """Give back processes. May be called twice."""
        self.reward.close()
        if self.sandbox is not None:
            self.sandbox.close()


@dataclass
class Parts(Prepared):
    """What training and evaluation have in common."""

    policy: Policy
    sampler: Any
    encode: Encode
    encode_answer: Callable[[str], tuple[int, ...]]

    def close(self) -> None:
        self.sampler.close()
        super().close()


def check_model_group(cfg: DictConfig) -> PromptTemplate:
    """Checks that need no weights; returns the prompt template. Raises UserError."""
    trust(list(cfg.trusted_targets))
    try:
        check_model(path=cfg.model.path, dtype=cfg.model.dtype, attention=cfg.model.attention)
        prompt: Any = OmegaConf.to_container(cfg.model.prompt, resolve=True)
        return PromptTemplate(**prompt)
    except ValueError as error:
        raise UserError(str(error)) from error


def load_problems(cfg: DictConfig) -> ProblemSets:
    """The problems of the ``data`` group. Raises UserError."""
    try:
        return build(cfg.data).load()
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error


def device_of(cfg: DictConfig) -> str:
    """Where this process keeps the model. Raises UserError if the machine has no such device."""
    import torch

    if cfg.trainer.accelerator == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise UserError("trainer.accelerator=cuda: this machine has no CUDA device; use trainer=cpu")
    return f"cuda:{local_rank()}"


def check_sampler_servers(cfg: DictConfig) -> None:
    """Ask the servers of ``sampler.urls``, where there are any, whether they can serve this run. Raises UserError."""
    sampler = cfg.sampler
    if not sampler.get("urls"):
        return
    from core_torl.sampler.vllm_client import check_reachable

    check_reachable(
        sampler.urls, lora=sampler.weights == "lora", max_model_len=sampler.max_model_len or sampler.max_new_tokens + 1
    )


def prepare(cfg: DictConfig, with_device: bool = True) -> Prepared:
    """Build what needs no weights. Raises UserError for whatever is wrong with it.

    ``with_device=False``: on a machine without the device and the servers that the run needs, too.
    """
    template = check_model_group(cfg)
    if with_device:
        device_of(cfg)
        check_sampler_servers(cfg)
    sandbox = None
    if cfg.tool.call_budget:
        build(cfg.tool.observation)  # refused here, not after a minute of loading
        sandbox = build(cfg.sandbox)
    problems = load_problems(cfg)
    if cfg.evaluation.distractors:
        check_distractors(list(cfg.evaluation.distractors), problems.test)
    return Prepared(problems, template, build(cfg.reward), build(cfg.evaluation), sandbox)


def assemble(cfg: DictConfig, prepared: Prepared) -> Parts:
    """Start the sandbox, load the policy and build what needs it. Raises UserError; nothing is left running then."""
    import torch

    torch.set_num_threads(cfg.trainer.threads)
    try:
        if prepared.sandbox is not None:
            # Before the weights, because it fails sooner: the sandbox proves itself when it starts.
            prepared.sandbox.start()
        return _with_policy(cfg, prepared)
    except BaseException:
        prepared.close()
        raise


def _with_policy(cfg: DictConfig, prepared: Prepared) -> Parts:
    policy: Policy = build(cfg.model, device=device_of(cfg))
    end_turns(policy, prepared.template.end_of_turn(policy.tokenizer))
    sampler = build(cfg.sampler, policy.model, policy.tokenizer)
    try:
        sampler.sync(policy, "0")  # an engine with weights of its own has none yet
    except BaseException:
        sampler.close()
        raise
    if prepared.sandbox is not None:
        sampler = build(cfg.tool, sampler, prepared.sandbox, policy.tokenizer)

    def encode(problem: Problem, concept: Concept | None = None) -> tuple[int, ...]:
        return prepared.template.encode(policy.tokenizer, problem, concept)

    def encode_answer(text: str) -> tuple[int, ...]:
        return prepared.template.encode_answer(policy.tokenizer, text)

    kept = drop_long(prepared.problems, encode, cfg.model.max_prompt_tokens)
    return Parts(
        kept, prepared.template, prepared.reward, prepared.evaluation, prepared.sandbox, policy, sampler, encode,
        encode_answer,
    )  # fmt: skip


def drop_long(problems: ProblemSets, encode: Encode, limit: int) -> ProblemSets:
    """Problems whose plain prompt has at most ``limit`` tokens; what was dropped is counted in the report."""

    def short(part: list[Problem]) -> list[Problem]:
        return [p for p in part if len(encode(p, None)) <= limit]

    train, test = short(problems.train), {name: short(part) for name, part in problems.test.items()}
    dropped = len(problems.train) - len(train) + sum(len(problems.test[n]) - len(test[n]) for n in test)
    if problems.train and not train:
        raise UserError(f"model.max_prompt_tokens={limit}: every training prompt is longer; raise it")
    emptied = [n for n in test if problems.test[n] and not test[n]]
    if emptied:
        raise UserError(
            f"model.max_prompt_tokens={limit}: every prompt of the test set {emptied[0]!r} is longer; raise it"
        )
    return ProblemSets(train, test, {**problems.report, "dropped_long_prompts": dropped}, problems.redraw)
