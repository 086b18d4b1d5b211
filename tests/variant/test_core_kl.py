"""CORE-KL: the plain prompt's distribution is pulled towards the primed one's, once, by a gradient that exists."""

from __future__ import annotations

import pytest
import torch

from core_torl.model.load import load_policy
from core_torl.objective.grpo import GRPO
from core_torl.trigger.failure import Failure
from core_torl.variant.core_base import CoreBase
from core_torl.variant.core_kl import CoreKL

from .conftest import RIGHT, TEMPLATE, UNJUDGED, WRONG, Evenness, Rule, fit, make_policy, same, watched, weights

SEEN = watched(CoreKL)
STILL = {"weight_decay": 0.0}  # with no gradient the weights do not move


class Unprimed:
    """An intervention that changes nothing: its primed prompt is the plain one."""

    needs_primed_training = False

    def prime(self, problem, count, seed, encode, encode_answer):
        return [(encode(problem, None), count)]


def mixed(t, i):
    return RIGHT if i % 2 else WRONG


def probed(look, kind=CoreKL):
    """``kind`` that calls ``look(module, batch)`` in its first step, before anything has been learned."""

    class Probed(kind):  # type: ignore[misc, valid-type]
        looked = False

        def learn(self, batch):
            if not self.looked:
                look(self, batch)
                self.looked = True
                self.model.zero_grad()
            super().learn(batch)

    return Probed


def everything(module) -> torch.Tensor:
    return torch.arange(module.group_size * module.stream.per_step)


def total(module, rows=None) -> torch.Tensor:
    return sum(module.auxiliary_losses(everything(module) if rows is None else rows), torch.zeros(()))


def slowly(module, lesson, reduction: str = "token_mean", teacher=None) -> torch.Tensor:
    """One lesson's divergence through full logits, row by row without padding."""
    answer = lesson.answer.token_ids

    def distribution(model, prompt):
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        return (logits / module.temperature).log_softmax(-1)

    with torch.no_grad():
        p = distribution(teacher or module.model, lesson.answer.prompt_ids)
    q = distribution(module.model, lesson.plain_prompt)
    assert len(p) == len(q) == len(answer)
    per_token = (p.exp() * (p - q)).sum(-1)
    return per_token.mean() if reduction == "token_mean" else per_token.sum()


# --- a gradient that exists


def test_the_weights_move_through_this_term_alone(make):
    """Everybody is wrong, so the policy has no advantage to learn from."""
    module = fit(make(SEEN, rl_steps=1, **STILL))
    assert not module.batches[0].advantages.any()
    start = weights(make(SEEN))
    assert not same(weights(module), start)
    assert same(weights(fit(make(CoreBase, policy=make(CoreKL).policy, reward=Rule(), rl_steps=1, **STILL))), start)
    assert same(weights(fit(make(CoreKL, rl_steps=1, kl_lambda=0.0, **STILL))), start)
    found = module.last_metrics
    assert found["core/auxiliary_grad_norm"] > 1e-5 and found["core/auxiliary_grad_share"] == 1
    assert found["loss/auxiliary"] == found["loss/total"] > 0 and found["core/kl_per_token"] > 1e-3


def test_learning_brings_the_plain_prompt_nearer_to_the_primed_one(make, problems):
    class Note(CoreKL):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            self.found = [*getattr(self, "found", []), self.last_metrics["core/kl_per_token"]]

    settings = {"rl_steps": 25, "problems": problems[:4], "lr": 3e-3, "teacher": "reference", **STILL}
    pulled, idle = fit(make(Note, **settings)).found, fit(make(Note, **(settings | {"kl_lambda": 1e-30}))).found
    assert sum(pulled[-5:]) < 0.6 * sum(pulled[:5])
    assert sum(idle[-5:]) > 0.8 * sum(idle[:5]), "the control moves its weights by nothing that matters"


def test_a_primed_prompt_that_is_the_plain_one_teaches_nothing(make):
    same_prompt = fit(make(CoreKL, rl_steps=1, intervention=Unprimed()))
    found = same_prompt.last_metrics
    assert found["core/trigger_rate"] == 1 and found["core/primed_tokens"] > 0
    assert abs(found["core/kl_per_token"]) < 1e-6 and found["core/auxiliary_grad_norm"] < 1e-7
    assert abs(found["core/primed_logprob_gap"]) < 1e-6
    assert fit(make(CoreKL, rl_steps=1)).last_metrics["core/auxiliary_grad_norm"] > 1e-5


@pytest.mark.parametrize("reduction", ["token_mean", "sum"])
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_the_term_is_what_full_logits_say_and_so_is_its_gradient(make, reduction, temperature):
    def look(module, batch):
        lessons = module._lessons
        assert len(lessons) == 8 and {len(x.answer.token_ids) for x in lessons} != {6}, "lengths differ"
        expected = sum(x.weight * slowly(module, x, reduction) for x in lessons) / 8
        module.model.zero_grad()
        expected.backward()
        right = [p.grad.clone() for p in module.model.parameters()]
        module.model.zero_grad()
        found = total(module)
        found.backward()
        assert found.item() == pytest.approx(expected.item(), rel=1e-4)
        for parameter, grad in zip(module.model.parameters(), right, strict=True):
            assert torch.allclose(parameter.grad, grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()))
        assert max(float(g.abs().max()) for g in right) > 1e-6

    module = make(probed(look), rl_steps=1, reward=Rule(mixed), reduction=reduction, temperature=temperature,
                  eos_ids=list(range(0, 640, 5)), first_step_gap=None)  # fmt: skip
    assert fit(module).looked


def test_the_gap_in_the_metrics_is_that_of_the_answers_own_tokens(make):
    expected = []

    def look(module, batch):
        for lesson in module._lessons:
            answer = torch.tensor(lesson.answer.token_ids)
            rows = []
            for prompt in (lesson.answer.prompt_ids, lesson.plain_prompt):
                ids = torch.tensor([[*prompt, *answer]])
                logits = module.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].detach()
                rows.append(logits.log_softmax(-1).gather(-1, answer[:, None]).squeeze(-1))
            expected.extend((rows[0] - rows[1]).tolist())

    found = fit(make(probed(look), rl_steps=1)).last_metrics["core/primed_logprob_gap"]
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-3) and abs(found) > 1e-3


# --- lambda


def test_right_and_wrong_primed_answers_have_weights_of_their_own(make):
    module = fit(make(CoreKL, rl_steps=1, reward=Rule(mixed)))
    weighed = sorted((x.answer.score.correct, x.weight) for x in module._lessons)
    assert weighed == [(False, pytest.approx(0.005))] * 4 + [(True, pytest.approx(0.03))] * 4
    other = fit(make(CoreKL, rl_steps=1, reward=Rule(mixed), kl_lambda=0.5, lambda_right=2.0, lambda_wrong=0.0))
    assert [(x.answer.score.correct, x.weight) for x in other._lessons] == [(True, 1.0)] * 4, "weight 0 costs nothing"


def test_only_right_teachers_if_asked(make):
    module = fit(make(CoreKL, rl_steps=1, reward=Rule(mixed), only_correct_teacher=True))
    assert [(x.answer.score.correct, x.weight) for x in module._lessons] == [(True, pytest.approx(0.03))] * 4
    start = weights(make(CoreKL))
    wrong = fit(make(CoreKL, rl_steps=1, only_correct_teacher=True, **STILL))
    assert wrong._lessons == [] and same(weights(wrong), start)


def test_an_unjudged_primed_answer_teaches_nothing(make):
    module = fit(make(CoreKL, rl_steps=1, reward=Rule(lambda t, i: UNJUDGED if i % 2 else WRONG)))
    assert len(module._lessons) == 4 and all(x.answer.score.value is not None for x in module._lessons)


def test_the_average_is_over_what_failed_or_over_what_could_have(make):
    def two_problems_of_four(t, i):
        return RIGHT if i < 8 else WRONG

    found = {}
    for average_over in ("triggered", "batch"):

        def look(module, batch, name=average_over):
            assert len(module._lessons) == 2 * module.references
            found[name] = total(module).item()

        fit(make(probed(look), rl_steps=1, reward=Rule(plain=two_problems_of_four), average_over=average_over))
    assert found["batch"] == pytest.approx(found["triggered"] / 2, rel=1e-5) and found["batch"] > 0


# --- once, however the step is cut


@pytest.mark.parametrize("average_over", ["triggered", "batch"])
def test_the_cuts_average_to_the_whole_and_every_lesson_is_in_one_of_them(make, average_over):
    sizes = []

    def look(module, batch):
        def value(minibatch: int) -> float:
            seen, divergence = [], module._divergence
            module.minibatch_size = minibatch
            module._divergence = lambda lessons: (seen.extend(map(id, lessons)), divergence(lessons))[1]
            cuts = [everything(module)[s : s + minibatch] for s in range(0, 16, minibatch)]
            result = sum(total(module, rows).item() for rows in cuts) / len(cuts)
            del module._divergence
            assert sorted(seen) == sorted(map(id, module._lessons)), f"each once, in cuts of {minibatch}"
            return result

        whole = value(16)
        assert whole > 0
        for minibatch in (8, 4, 2, 1):
            assert value(minibatch) == pytest.approx(whole, rel=1e-4)
        module.minibatch_size = 16
        for size in (1, 3, 64):
            module.microbatch_size = size
            parts = [x.item() for x in module.auxiliary_losses(everything(module))]
            sizes.append(len(parts))
            assert sum(parts) == pytest.approx(whole, rel=1e-4)

    def some_fail(t, i):
        return RIGHT if 4 <= i < 8 else WRONG

    reward = Rule(mixed, some_fail)
    fit(make(probed(look), rl_steps=1, reward=reward, average_over=average_over))
    assert sizes == [6, 2, 1]


def test_memory_sized_parts_do_not_change_what_is_learned(make):
    one, two = (weights(fit(make(CoreKL, rl_steps=1, reward=Rule(mixed), microbatch_size=n))) for n in (64, 3))
    assert max((one[k] - two[k]).abs().max() for k in one) < 1e-4
    assert not same(one, weights(make(CoreKL)))


# --- the teacher


def old(**changes):
    return {"rl_steps": 2, "reward": Rule(mixed), **changes}


def test_the_old_teacher_is_the_current_one_until_there_is_a_second_optimizer_step(make):
    one = [fit(make(CoreKL, **old(teacher=t))) for t in ("current", "old")]
    assert same(*map(weights, one)) and one[1]._shadow is None
    for changes in ({"minibatch_size": 8}, {"update_epochs": 2}):
        several = [fit(make(CoreKL, **old(teacher=t, **changes))) for t in ("current", "old")]
        assert not same(*map(weights, several)) and several[1]._shadow is not None


def test_the_old_teacher_is_the_policy_of_the_steps_start(make):
    class Each(CoreKL):
        """Compares at every step, and after it."""

        def learn(self, batch):
            start = weights(self)
            super().learn(batch)
            teacher = {k: v.clone() for k, v in self._shadow.state_dict().items()}
            assert same(teacher, start) and not same(teacher, weights(self))
            self.checked = getattr(self, "checked", 0) + 1

    assert fit(make(Each, rl_steps=3, teacher="old", minibatch_size=8)).checked == 3


def adapted(problems, folder):
    plain = make_policy(problems, scale=10.0)
    plain.export(folder)
    lora = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear"}
    return load_policy(path=str(folder), lora=lora), plain


@pytest.mark.parametrize("kl_coef", [0.0, 0.01])
@pytest.mark.parametrize("lora", [False, True])
def test_the_reference_teacher_stays_the_starting_policy(make, problems, tmp_path, lora, kl_coef):
    policy, plain = adapted(problems, tmp_path) if lora else (None, make(CoreKL).policy)
    ids, seen = torch.arange(5, 40)[None], []

    class Note(CoreKL):
        def auxiliary_losses(self, rows):
            if self.rl_step == 2:  # what the term is made of, against the starting policy's full logits
                for lesson in self._lessons[:1]:
                    right = lesson.weight * slowly(self, lesson, teacher=plain.model)
                    seen.append((self._divergence([lesson]).item(), right.item()))
            yield from super().auxiliary_losses(rows)

    module = fit(make(Note, policy=policy, teacher="reference", objective=GRPO(kl_coef=kl_coef), rl_steps=4))
    with torch.no_grad():
        start, now = (m(input_ids=ids).logits for m in (plain.model, module.model))
        with module._teaching() as coach:
            teacher = coach(input_ids=ids).logits
    assert torch.allclose(start, teacher, atol=1e-5) and not torch.allclose(start, now, atol=1e-2)
    assert seen and all(a == pytest.approx(b, rel=1e-3) for a, b in seen)
    # It is no part of what is trained or stored.
    assert not any("shadow" in name for name in module.state_dict())
    # With adapters it is the policy itself without them: no copy at all.
    assert (module._shadow is None) is lora
    assert lora or not any(p.requires_grad for p in module._shadow.parameters())


@pytest.mark.parametrize("teacher", ["current", "old"])
def test_through_adapters_the_term_reaches_the_adapters_only(make, problems, tmp_path, teacher):
    policy, _ = adapted(problems, tmp_path)
    module = make(CoreKL, policy=policy, teacher=teacher, minibatch_size=8, rl_steps=2, **STILL)
    before = weights(module)
    fit(module)
    moved = {name for name, tensor in weights(module).items() if not torch.equal(tensor, before[name])}
    assert moved and all("lora_" in name for name in moved)
    if teacher == "old":
        shared = {id(p) for p in module.model.parameters()} & {id(p) for p in module._shadow.parameters()}
        assert len(shared) == sum(not p.requires_grad for p in module.model.parameters()), "the base is not copied"


def test_the_teacher_gets_no_gradient_in_the_real_step_either(make):
    """Before the first update the reference is the current policy, as a copy that cannot be trained."""
    one, two = (fit(make(CoreKL, rl_steps=1, teacher=t, **STILL)) for t in ("current", "reference"))
    assert same(weights(one), weights(two)) and not same(weights(one), weights(make(CoreKL)))


# --- and nothing else


def test_nothing_is_replaced(make):
    module = fit(make(SEEN, rl_steps=3, reward=Rule(mixed)))
    for sampled, groups, batch in zip(module.sampled, module.weighed, module.batches, strict=True):
        for before, group in zip(sampled, groups, strict=True):
            assert len(group.trajectories) == 4
            assert all(a is b for a, b in zip(group.trajectories, before, strict=True))
        assert batch.rows == 16 and not batch.foreign.any()
    found = module.last_metrics
    assert found["core/replaced_tokens"] == 0 and "core/replaced_ratio_mean" not in found


def test_the_student_never_sees_the_concept(make):
    prompts = {"student": [], "teacher": []}

    class Look(CoreKL):
        def _divergence(self, lessons):
            kinds = iter(prompts)
            build = self._batch

            def noted(texts, lessons):
                name = next(kinds)
                decode = self.policy.tokenizer.decode
                prompts[name] += [(decode(list(p)), x.answer.problem, p) for p, x in zip(texts, lessons, strict=True)]
                return build(texts, lessons)

            self._batch = noted
            result = super()._divergence(lessons)
            del self._batch
            return result

    module = fit(make(Look, rl_steps=2))
    assert len(prompts["student"]) == len(prompts["teacher"]) == 16
    for text, problem, ids in prompts["student"]:
        assert problem.concept.text not in text and ids == TEMPLATE.encode(module.policy.tokenizer, problem)
    for text, problem, _ in prompts["teacher"]:
        assert problem.concept.text in text


def test_what_is_reported(make):
    found = fit(make(CoreKL, rl_steps=2, reward=Rule(mixed))).last_metrics
    assert {n for n in found if n.startswith("core/")} == {
        "core/trigger_rate", "core/gated", "core/primed_accuracy", "core/primed_tokens", "core/replaced_tokens",
        "core/primed_logprob_gap", "core/kl_per_token", "core/auxiliary_grad_norm", "core/auxiliary_grad_share",
    }  # fmt: skip
    assert (found["core/trigger_rate"], found["core/gated"], found["core/primed_accuracy"]) == (1, 0, 0.5)
    assert found["core/primed_tokens"] == pytest.approx(48, abs=6)
    base = fit(make(CoreBase, rl_steps=1)).last_metrics
    assert not any(n.startswith("core/") or n == "time/intervene_s" for n in base)


def test_a_coach_that_never_comes_is_core_base_bit_for_bit(make):
    for changes in ({}, {"minibatch_size": 8, "teacher": "old"}):
        settings = {"reward": Evenness(), "objective": GRPO(kl_coef=0.01), "rl_steps": 3}
        never = fit(make(CoreKL, trigger=Failure("never"), **settings, **changes))
        changes.pop("teacher", None)
        base = fit(make(CoreBase, policy=make(CoreKL).policy, **settings, **changes))
        assert same(weights(base), weights(never))
        assert "core/kl_per_token" not in never.last_metrics


def test_lessons_of_one_step_are_not_learned_again_in_the_next(make):
    """Only the first step fails; a second one in which nobody does has no such term."""

    class Late(Rule):
        calls = 0

        def score(self, trajectories):
            self.calls += 1
            return super().score(trajectories)

    reward = Late(plain=lambda t, i: RIGHT if reward.calls > 2 else WRONG)
    module = fit(make(CoreKL, rl_steps=2, reward=reward))
    assert module._lessons == [] and module.last_metrics["loss/auxiliary"] == 0
    assert module.last_metrics["core/auxiliary_grad_norm"] == 0


def test_an_unknown_choice_names_the_key(make):
    for key in ("teacher", "direction", "reduction", "average_over"):
        with pytest.raises(ValueError, match=rf"variant\.{key}='none': use one of"):
            make(CoreKL, **{key: "none"})


def test_a_model_that_scales_its_logits_is_refused(make, problems):
    policy = make_policy(problems)
    forward = policy.model.forward

    def scaled(*args, **settings):
        output = forward(*args, **settings)
        output.logits = output.logits * 0.5
        return output

    policy.model.forward = scaled
    with pytest.raises(ValueError, match="caps or scales them"):
        make(CoreKL, policy=policy)


def test_a_teacher_that_rests_on_the_cpu_teaches_the_same(make, monkeypatch):
    """Its weights travel for the passes, backward ones included; while it rests it could not be read at all."""
    from core_torl.model import load as module

    def run(offload: bool):
        policy = make(CoreKL).policy
        policy.offload = offload
        return fit(
            make(CoreKL, policy=policy, teacher="reference", kl_lambda=1.0, objective=GRPO(kl_coef=0.1), rl_steps=2)
        )

    at_home = run(offload=False)
    # A resting tensor keeps its numbers out of reach: one place more in front of them, which only travelling takes off.
    monkeypatch.setattr(
        module, "placed", lambda t, device: torch.stack([t, t]) if isinstance(device, str) else t[0].clone()
    )
    offloaded = run(offload=True)
    assert same(weights(at_home), weights(offloaded))
    assert all(len(p) == 2 for p in offloaded._frozen.parameters()), "it rests again"
