"""Supervised fine-tuning: the worked solution with its box and its end, behind the plain quiz and nothing else."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from core_torl.objective.grpo import GRPO
from core_torl.objective.likelihood import Likelihood
from core_torl.variant.sft import SupervisedFineTuning, expert_text

from .conftest import TEMPLATE, Evenness, Rule, fit, same, watched, weights

SEEN = watched(SupervisedFineTuning)


def sft(make, kind=SEEN, **changes):
    return make(kind, **({"objective": Likelihood(), "group_size": 1} | changes))


def test_the_solutions_become_likelier(make, problems):
    class Note(SupervisedFineTuning):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            self.losses = [*getattr(self, "losses", []), self.last_metrics["loss/policy"]]

    losses = fit(sft(make, Note, rl_steps=12, problems=problems[:4], lr=2e-2)).losses
    assert all(later < sooner for sooner, later in pairwise(losses))
    assert losses[-1] < 0.6 * losses[0]


def test_what_is_learned_is_prompt_solution_box_and_end(make, problems):
    # Some solutions say their answer themselves, some do not.
    bare = [replace(p, solution=p.solution.split(" \\boxed")[0]) if i % 2 else p for i, p in enumerate(problems)]
    module = fit(sft(make, problems=bare, rl_steps=2))
    tokenizer = module.policy.tokenizer
    for groups, batch in zip(module.weighed, module.batches, strict=True):
        for row, group in enumerate(groups):
            (trajectory,), problem = group.trajectories, group.problem
            ids = batch.ids[row][batch.attention_mask[row].bool()].tolist()
            text = tokenizer.decode(ids, skip_special_tokens=True)
            answer = problem.solution.split(" \\boxed")[0] + " \\boxed{" + problem.answer + "}"
            assert expert_text(problem) == answer and text.count("\\boxed{") == 1
            assert ids == [*TEMPLATE.encode(tokenizer, problem), *TEMPLATE.encode_answer(tokenizer, answer), 2]
            assert tokenizer.eos_token_id == 2 and problem.concept.text not in text
            assert batch.ids[row][-batch.answer_length :][batch.train_mask[row]].tolist() == list(trajectory.token_ids)
            assert trajectory.token_ids[-1] == 2 and text.endswith(answer)
            assert batch.advantages[row] == 1


def test_what_a_reward_says_changes_nothing(make):
    paid = [fit(sft(make, rl_steps=2, reward=r)) for r in (Evenness(), Rule())]
    assert same(*map(weights, paid))


def test_nothing_is_sampled_and_nothing_is_compared_with_a_sampler(make):
    module = sft(make, rl_steps=2)
    module.sampler.generate = None  # type: ignore[assignment]
    fit(module)
    assert module.last_metrics["policy/sampler_logprob_gap_max"] == 0
    assert module.tokens_seen == 0


@pytest.mark.parametrize("changes", [{"minibatch_size": 2}, {"update_epochs": 3}])
def test_minibatches_and_epochs_are_no_fault_although_ratios_move(make, changes):
    """The check before the first update must not take the later ones of the same step for it."""
    module = fit(sft(make, rl_steps=2, **changes))
    assert module.updates > 2 and module.last_metrics["policy/old_kl"] > 0


def test_it_refuses_what_it_cannot_learn_from(make, problems):
    with pytest.raises(ValueError, match=r"variant=sft: 1 of 20 training problems have no worked solution"):
        sft(make, problems=[replace(problems[0], solution=None), *problems[1:]])
    with pytest.raises(ValueError, match="group_size=4: variant=sft has one answer"):
        sft(make, group_size=4)
    with pytest.raises(ValueError, match="needs objective=likelihood"):
        sft(make, objective=GRPO())
