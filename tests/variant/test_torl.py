"""ToRL's training step: only what the policy wrote is learned from, and a failing sandbox harms nobody."""

from __future__ import annotations

import dataclasses
import zlib
from concurrent.futures import Future

import pytest
import torch

from core_torl.code_blocks import OUTPUT
from core_torl.config.errors import UserError
from core_torl.sandbox.protocol import Execution
from core_torl.tool.observation import Observations
from core_torl.tool.tool_sampler import ToolSampler
from core_torl.trajectory import Score
from core_torl.variant.torl import ToRL
from tests.variant.conftest import fit, make_policy, watched, weights


class Sandbox:
    """Runs nothing: the ending depends on the program alone; every ``fails``-th call fails with the sandbox."""

    concurrency = 8

    def __init__(self, fails: int = 0) -> None:
        self.fails, self.calls, self.closed = fails, 0, False

    def start(self) -> None: ...

    def submit(self, code: str) -> Future[Execution]:
        self.calls += 1
        future: Future[Execution] = Future()
        kind = zlib.crc32(code.encode()) % 3
        endings = [
            Execution("17 3 5\n", "", "ok", 0.1),
            Execution("", "", "ok", 0.2),
            Execution("", "x\nE: y", "error"),
        ]
        lost = Execution("", "", "infrastructure", detail="gone")
        future.set_result(lost if self.fails and self.calls % self.fails == 0 else endings[kind])
        return future

    def close(self) -> None:
        self.closed = True


class ByLength:
    """A reward that differs inside a group."""

    def score(self, trajectories):
        assert not any(t.aborted for t in trajectories), "an aborted answer was scored"
        return [Score(len(t.text) % 7 / 7, len(t.text) % 2 == 0, "correct") for t in trajectories]

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def module_of(problems):
    """``module_of(C, ...)``: a policy that loves blocks, its tools and its trainer."""
    from tests.variant.conftest import build

    def make(budget: int, kind=ToRL, sandbox=None, meddle=None, **changes):
        policy = make_policy(problems, scale=6.0)
        bias = torch.zeros(len(policy.tokenizer))
        for word, weight in {"```python": 9.0, "\n": 11.0, "```": 9.0, OUTPUT: 9.5, " 1": 8.0, "x": 8.0}.items():
            (i,) = policy.tokenizer(word, add_special_tokens=False)["input_ids"]
            bias[i] = weight
        policy.model.lm_head.register_forward_hook(lambda module, args, logits: logits + bias)
        changes = {"rl_steps": 1, "max_new_tokens": 60, "reward": ByLength(), **changes}
        module = build(problems, kind, policy, tool_call_budget=budget, **changes)
        if budget:
            tools = ToolSampler(
                module.sampler, sandbox or Sandbox(), policy.tokenizer, observation=Observations(), call_budget=budget
            )
            if meddle:
                generate = tools.generate
                tools.generate = lambda *a: [[meddle(s) for s in group] for group in generate(*a)]  # type: ignore[method-assign]
            module._parts["sampler"] = tools
        return module

    return make


@pytest.mark.parametrize("budget", [0, 1, 2, 3, 4])
def test_trained_positions_are_the_sampled_positions(module_of, budget):
    module = fit(module_of(budget, watched(ToRL)))
    (batch,) = module.batches
    flat = [t for g in module.weighed[0] for t in g.trajectories]
    assert batch.rows == len(flat) == 16
    for row, trajectory in enumerate(flat):
        sampled = list(trajectory.sample.sampled)
        assert batch.train_mask[row, : len(sampled)].tolist() == sampled
        assert not batch.train_mask[row, len(sampled) :].any()
    calls = [c for t in flat for c in t.sample.calls]
    assert bool(calls) == bool(budget) and max(len(t.sample.calls) for t in flat) <= budget
    assert module.tokens_seen == int(batch.train_mask.sum())
    if budget:
        assert module.tokens_seen < sum(len(t.token_ids) for t in flat)


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_the_gradient_is_that_of_the_policys_own_tokens(module_of, budget):
    """Against the loss written out over plain forward passes, with observations in the context and nowhere else."""
    module = module_of(budget, watched(ToRL), grad_clip=0.0)
    gradients: dict[str, torch.Tensor] = {}
    clip = module._clip

    def keep():
        gradients.update({n: p.grad.clone() for n, p in module.model.named_parameters()})
        return clip()

    module._clip = keep  # type: ignore[method-assign]
    reference = module_of(budget)
    fit(module)
    (batch,) = module.batches
    model, total, tokens = reference.model, 0.0, 0
    for row, trajectory in enumerate(t for g in module.weighed[0] for t in g.trajectories):
        ids = torch.tensor([[*trajectory.prompt_ids, *trajectory.token_ids]])
        logprobs = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        for place, (i, mine) in enumerate(zip(trajectory.token_ids, trajectory.sample.sampled, strict=True)):
            if mine:
                total = total - batch.advantages[row] * logprobs[len(trajectory.prompt_ids) + place - 1, i]
                tokens += 1
    (total / tokens).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, atol=1e-5, rtol=1e-3), name


@pytest.mark.parametrize("start,end", [(1, 1), (-1, 0), (1, 0), (0, -1), (0, 1)])
def test_a_mask_that_is_off_by_one_stops_the_run_at_its_first_step(module_of, start, end):
    """A token of an observation has no log-prob of its own: taken for a sampled one, it cannot agree with the trainer."""

    def shift(sample):
        calls = tuple(
            dataclasses.replace(c, start=c.start + start, end=min(c.end + end, len(sample.token_ids)))
            for c in sample.calls
        )
        return dataclasses.replace(sample, calls=calls)

    fit(module_of(2))
    if (start, end) in ((-1, 0), (0, 1)):  # too wide: nothing foreign is trained, but the policy's own tokens are lost
        wide, exact = fit(module_of(2, meddle=shift)), fit(module_of(2))
        assert wide.tokens_seen < exact.tokens_seen
    else:
        with pytest.raises(UserError, match="first_step_gap"):
            fit(module_of(2, meddle=shift))


def test_answers_that_a_failing_sandbox_lost_are_in_no_statistics(module_of):
    module = fit(module_of(2, watched(ToRL), Sandbox(fails=7), max_aborted=0.9, rl_steps=2))
    groups, batch = module.weighed[0], module.batches[0]
    flat = [t for g in groups for t in g.trajectories]
    lost = [t.aborted for t in flat]
    assert 0 < sum(lost) < len(lost)
    for row, trajectory in enumerate(flat):
        assert (trajectory.score is None) == trajectory.aborted
        assert batch.train_mask[row].any().item() == (not trajectory.aborted)
    for g, group in enumerate(groups):
        values = torch.tensor([t.score.value for t in group.trajectories if not t.aborted])
        mine = batch.advantages[4 * g : 4 * g + 4][[not t.aborted for t in group.trajectories]]
        if len(values) > 1:
            assert torch.allclose(mine, (values - values.mean()) / (values.std() + 1e-6), atol=1e-4)
    metrics = module.last_metrics
    assert 0 < metrics["tool/aborted_ratio"] < 1 and 0 < metrics["tool/infrastructure_ratio"] < 1
    assert metrics["reward/excluded"] > 0  # they leave the loss


def test_too_many_lost_answers_stop_the_run_and_say_so(module_of):
    with pytest.raises(RuntimeError, match=r"lost because the sandbox failed \(variant.max_aborted=0.1\)"):
        fit(module_of(2, sandbox=Sandbox(fails=2)))


def test_void_turns_can_be_left_out_of_the_loss_and_still_count_in_their_group(module_of):
    kept, masked = (fit(module_of(1, watched(ToRL), void_turns=v)) for v in ("keep", "mask"))
    one, other = kept.batches[0], masked.batches[0]
    assert torch.equal(one.advantages, other.advantages)
    gone = one.train_mask.any(1) & ~other.train_mask.any(1)
    assert gone.any() and other.train_mask.any()
    assert torch.equal(one.train_mask[~gone], other.train_mask[~gone])


def test_tool_use_is_measured(module_of):
    with_tools, without = fit(module_of(2)).last_metrics, fit(module_of(0)).last_metrics
    assert with_tools["tool/calls_per_response"] > 0 and with_tools["tool/trainable_fraction"] < 1
    assert 0 < with_tools["tool/pass_ratio"] < 1 and with_tools["tool/latency_p95_s"] > 0
    assert without["tool/calls_per_response"] == 0 and without["tool/trainable_fraction"] == 1
    assert without["tool/code_ratio"] > 0 and "tool/pass_ratio" not in without and "tool/latency_p95_s" not in without


def test_without_a_budget_it_is_plain_generation(module_of, make):
    from core_torl.variant.core_base import CoreBase

    base = module_of(0)
    plain = make(CoreBase, policy=base.policy, rl_steps=1, max_new_tokens=60, reward=ByLength())
    start = weights(plain)
    fit(plain)
    after = weights(plain)
    plain.policy.model.load_state_dict(start)
    fit(base)
    assert all(torch.equal(after[n], w) for n, w in weights(base).items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"budget": -1}, "variant.tool_call_budget=-1"),
        ({"budget": 0, "void_turns": "drop"}, "variant.void_turns='drop'"),
    ],
)
def test_wrong_settings_are_one_line_errors(module_of, change, words):
    with pytest.raises(ValueError, match=words):
        module_of(**change)
