"""Guards the place of the head: nobody ever makes the logits of all tokens, and the numbers are those of the logits."""

from __future__ import annotations

import warnings
from copy import deepcopy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, Qwen2Config

from core_torl.objective import logprobs as logprobs_module
from core_torl.objective.head import HeadIsNotLast, head_of, run_with, through_head
from core_torl.objective.logprobs import answer_logprobs
from core_torl.objective.token_batch import TokenBatch

SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
VOCABULARY, SLICE_TOKENS = 20_000, 16


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation inside returns, backward passes included."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


def random_model(config_of=Qwen2Config, vocabulary: int = VOCABULARY, **changes):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config_of(vocab_size=vocabulary, **(SMALL | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model.eval()


def batch_of(vocabulary: int, groups: int = 4, answers: int = 4, prompt: int = 30, length: int = 12) -> TokenBatch:
    generator = torch.Generator().manual_seed(1)
    prompts, rows = [], []
    for _ in range(groups):
        ids = torch.randint(1, vocabulary, (prompt,), generator=generator).tolist()
        for k in range(answers):
            prompts.append(ids)
            rows.append(torch.randint(1, vocabulary, (length - k,), generator=generator).tolist())
    zeros = [[0.0] * len(a) for a in rows]
    weights = torch.randn(len(rows), generator=generator)
    return TokenBatch.build(prompts, rows, zeros, [[True] * len(a) for a in rows], weights, 0)


def naive(model, batch, temperature, entropy=True, share_prompts=False):
    """As one writes it down: all logits of all answer places at once."""
    logits = model(
        input_ids=batch.ids, attention_mask=batch.attention_mask, position_ids=batch.positions,
        logits_to_keep=batch.answer_length + 1,
    ).logits[:, :-1]  # fmt: skip
    logits = logits if logits.dtype == torch.float64 else logits.float()
    rows = (logits / temperature).log_softmax(-1)
    return rows.gather(-1, batch.answer_ids[..., None]).squeeze(-1), -(rows.exp() * rows).sum(-1)


def learned(model, batch, how, **settings):
    """Log-probs, entropies and gradients of a sum of both."""
    model.zero_grad()
    values, entropies = how(model, batch, 0.8, entropy=True, **settings)
    ((values + 0.3 * entropies) * batch.train_mask * batch.advantages[:, None]).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return values.detach() * batch.train_mask, entropies.detach() * batch.train_mask, gradients


def assert_same(one, two, tolerance: float) -> None:
    for a, b in zip(one[:2], two[:2], strict=True):
        assert (a - b).abs().max() < tolerance
    assert one[2].keys() == two[2].keys()
    scale = max(float(g.abs().max()) for g in two[2].values())
    for name, gradient in one[2].items():
        assert (gradient - two[2][name]).abs().max() < tolerance * max(1.0, scale), name
    assert scale > 0


@pytest.fixture
def sliced(monkeypatch):
    """Slices so small that a small test needs many of them; the number of slices made is counted."""
    calls = []
    checkpoint = logprobs_module.checkpoint
    monkeypatch.setattr(logprobs_module, "checkpoint", lambda *a, **kw: calls.append(1) or checkpoint(*a, **kw))
    monkeypatch.setattr(logprobs_module, "_SLICE_ELEMENTS", SLICE_TOKENS * VOCABULARY)
    return calls


@pytest.fixture(scope="module")
def models():
    from peft import LoraConfig, get_peft_model

    def adapted(targets):
        settings = LoraConfig(r=2, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
        return get_peft_model(random_model(vocabulary=700), settings).eval()

    return {
        "plain": random_model(vocabulary=700),
        "tied": random_model(vocabulary=700, tie_word_embeddings=True),
        "lora": adapted("all-linear"),
        "lora on the head": adapted(["q_proj", "lm_head"]),
    }


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", ["plain", "tied", "lora", "lora on the head"])
def test_values_and_gradients_are_those_of_all_logits_at_once(models, name, share, monkeypatch):
    """In float64, so that only a fault could tell them apart."""
    model, batch = deepcopy(models[name]).double(), batch_of(700)
    monkeypatch.setattr(logprobs_module, "_SLICE_ELEMENTS", 7 * 700)  # slices that end within rows
    found = learned(model, batch, answer_logprobs, share_prompts=share)
    # Some layers of transformers compute in float32 all the same, which shows where rows are laid out otherwise.
    assert_same(found, learned(model, batch, naive), 1e-6 if share else 1e-9)


@pytest.mark.parametrize("share", [False, True])
def test_no_tensor_of_the_full_size_is_ever_made(sliced, share):
    model, batch = random_model(), batch_of(VOCABULARY)
    full = batch.train_mask.numel() * VOCABULARY
    with Largest() as ours:
        found = learned(model, batch, answer_logprobs, share_prompts=share)
    with Largest() as control:
        right = learned(model, batch, naive)
    assert len(sliced) == batch.train_mask.numel() / SLICE_TOKENS
    assert control.elements >= full, "the mode sees what it is to see"
    assert ours.elements <= max(SLICE_TOKENS * VOCABULARY, head_of(model).weight.numel()) < full / 8
    assert_same(found, right, 2e-4)


def test_one_slice_computes_nothing_twice(models, sliced):
    seen = []
    model = models["plain"]
    handle = model.model.register_forward_hook(lambda *_: seen.append(1))
    learned(model, batch_of(700), answer_logprobs)
    handle.remove()
    assert not sliced and seen == [1]


def test_under_autocast_the_head_is_in_bfloat16_and_the_softmax_in_float32(models, sliced, monkeypatch):
    monkeypatch.setattr(logprobs_module, "_SLICE_ELEMENTS", SLICE_TOKENS * 700)
    model, batch, kinds = models["plain"], batch_of(700), set()
    head = type(model.lm_head).forward
    monkeypatch.setattr(
        type(model.lm_head), "forward", lambda self, x: (lambda y: (kinds.add(y.dtype), y)[1])(head(self, x))
    )
    exact = learned(model, batch, answer_logprobs)
    kinds.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        values, entropies, gradients = learned(model, batch, answer_logprobs)
        naively = learned(model, batch, naive)
    assert sliced and kinds == {torch.bfloat16} and values.dtype == entropies.dtype == torch.float32
    assert (values - naively[0]).abs().max() < 1e-5, "the same precision as through the model's own logits"
    assert (values - exact[0]).abs().max() < 0.3
    assert gradients["lm_head.weight"].dtype == torch.float32 and gradients["lm_head.weight"].abs().max() > 0


@pytest.mark.parametrize(
    ("config_of", "changes"),
    [(GraniteConfig, {"logits_scaling": 8.0}), (Gemma2Config, {"final_logit_softcapping": 3.0})],
    ids=["granite scales", "gemma2 caps"],
)
def test_a_model_that_does_more_to_its_logits_is_asked_for_them_and_that_is_said_once(config_of, changes, monkeypatch):
    monkeypatch.setattr(logprobs_module, "_SLICE_ELEMENTS", 7 * 700)
    model, batch = random_model(config_of, 700, **changes).double(), batch_of(700)
    with pytest.warns(UserWarning, match="caps or scales") as told:
        found = learned(model, batch, answer_logprobs)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(learned(model, batch, answer_logprobs), found, 1e-12)
    assert_same(found, learned(model, batch, naive), 1e-9)


def test_a_model_that_scales_without_its_config_saying_so_is_noticed(models):
    model, batch = deepcopy(models["plain"]), batch_of(700)
    forward = model.forward

    def doubled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    model.forward = doubled
    with pytest.warns(UserWarning, match="changes what its head returns"):
        found = learned(model, batch, answer_logprobs)
    assert_same(found, learned(model, batch, naive), 1e-4)


def test_the_head_is_put_back_also_after_an_error(models):
    model, batch = models["plain"], batch_of(700)

    def broken(states, head):
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        through_head(model, broken, input_ids=batch.ids)
    assert "forward" not in vars(model.lm_head)
    assert model(input_ids=batch.ids).logits.shape[-1] == 700


def test_a_forward_that_somebody_put_on_the_head_is_used_and_put_back(models):
    model, batch = deepcopy(models["plain"]), batch_of(700)
    own = model.lm_head.forward
    model.lm_head.forward = patched = lambda states: own(states) + 1
    returned, read = run_with(model, lambda states, head: head(states), input_ids=batch.ids)
    assert returned is read and torch.equal(read, model(input_ids=batch.ids).logits)
    assert model.lm_head.forward is patched


def test_a_model_that_does_not_call_its_head_is_refused(models):
    model, batch = deepcopy(models["plain"]), batch_of(700)
    whole = model.forward
    other = torch.nn.Linear(16, 700)
    model.get_output_embeddings = lambda: other
    assert whole is not None
    with pytest.raises(HeadIsNotLast, match="0 times"):
        through_head(model, lambda states, head: head(states), input_ids=batch.ids)
