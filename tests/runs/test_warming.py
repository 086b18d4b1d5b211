"""A short warm start makes a policy that loads, with a card that says how it was made; the shipped one keeps its promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import core_torl.model.load as load

SHIPPED = Path(load.__file__).parent / "shipped" / "tiny"
SHIPPED_TOOL = SHIPPED.parent / "tiny_tool"


@pytest.mark.slow
def test_a_short_warm_start_learns_something_and_is_reproducible(front_door, tmp_path):
    arguments = [
        "drill_steps=60",
        "steps=60",
        "layers=2",
        "width=32",
        "heads=2",
        "mlp=64",
        "evaluate_per_concept=1",
        "threads=1",
    ]
    for name in "ab":
        assert front_door("warm_start", *arguments, f"hydra.run.dir={tmp_path / name}") == 0
    one, two = tmp_path / "a" / "policy", tmp_path / "b" / "policy"
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert (one / "tokenizer.json").read_bytes() == (two / "tokenizer.json").read_bytes()
    card = (one / "README.md").read_text()
    assert "induced on purpose" in card and "recites its definitions" in card
    policy = load.load_policy(path=str(one))
    assert policy.model.config.num_hidden_layers == 2


@pytest.mark.slow
def test_the_loss_of_a_warm_start_falls():
    import itertools

    from core_torl.data.concept_world.corpus import Corpus
    from core_torl.data.prompt import PromptTemplate
    from core_torl.model.tiny import TinyArchitecture, build_tiny, warm_start
    from core_torl.model.tiny_tokenizer import build_tokenizer
    from core_torl.runs.warming_concept import vocabulary, weigh

    template = PromptTemplate(
        "plain",
        "{concept}Question: {question}\n{options}Answer:",
        "{concept}{question}",
        "{text}\n",
        "{letter}. {text}\n",
    )
    tokenizer = build_tokenizer(vocabulary(template.user_text))
    model = build_tiny(tokenizer, TinyArchitecture(2, 32, 2, 64), seed=0)
    losses: list[float] = []
    texts = weigh(Corpus(template.user_text, 0, 0.01).stream(), tokenizer, 3.0)
    steps = warm_start(
        model, itertools.islice(texts, 100_000), steps=80, lr=4e-3, batch_size=16, warmup_steps=10, decay=True,
        on_step=lambda step, loss, seconds: losses.append(loss),
    )  # fmt: skip
    assert steps == len(losses) == 80
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_the_shipped_policy_has_the_gap_that_its_card_claims():
    """Recites, applies what stands in the prompt, and fails on gap concepts without it: measured when it was made."""
    figures = json.loads((SHIPPED / "figures.json").read_text())
    assert figures["recites its definitions, greedy"][0] > 0.95
    assert figures["mastered, plain, greedy/accuracy"][0] > 0.95
    # Nearly all are right with the definition in the prompt, and hardly any without it.
    assert figures["gap, primed, greedy/accuracy"][0] > 0.9
    assert figures["gap, primed, greedy/accuracy"][1] > 2 * figures["gap, plain, greedy/accuracy"][2]
    assert figures["mastered, primed, greedy/accuracy"][0] > 0.9
    assert figures["gap, plain, greedy/accuracy"][2] < 0.25  # the whole interval below chance
    card = (SHIPPED / "README.md").read_text()
    assert "induced on purpose" in card and all(f"{100 * v[0]:.1f} %" in card for v in figures.values())
    assert sum(f.stat().st_size for f in SHIPPED.iterdir()) < 8e6


@pytest.mark.slow
def test_the_shipped_weights_are_the_ones_that_the_card_measured(front_door, tmp_path):
    """A few of the card's figures, measured again on the shipped files."""
    assert (
        front_door(
            "evaluate",
            "evaluation.permutations=0",
            "evaluation.samples=0",
            "logger.mode=disabled",
            f"hydra.run.dir={tmp_path}",
        )
        == 0
    )
    figures = json.loads((SHIPPED / "figures.json").read_text())
    measured = json.loads((tmp_path / "results.json").read_text())["estimates"]
    for name in ("gap", "mastered"):
        assert measured[f"{name}/greedy/accuracy"]["value"] == pytest.approx(
            figures[f"{name}, plain, greedy/accuracy"][0], abs=0.02
        )


# --- the calculation world


@pytest.mark.slow
@pytest.mark.sandbox
def test_a_short_warm_start_of_the_calculation_world_makes_a_policy_and_is_reproducible(front_door, tmp_path):
    arguments = [
        "world=calculation", "drill_steps=8", "steps=8", "layers=2", "width=32", "heads=2", "mlp=64",
        "evaluate_per_concept=1", "threads=1",
    ]  # fmt: skip
    for name in "ab":
        assert front_door("warm_start", *arguments, f"hydra.run.dir={tmp_path / name}") == 0
    one, two = tmp_path / "a" / "policy", tmp_path / "b" / "policy"
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert (one / "tokenizer.json").read_bytes() == (two / "tokenizer.json").read_bytes()
    card = (one / "README.md").read_text()
    assert "induced on purpose" in card and "world=calculation" in card and "two_stage, C = 2, accuracy" in card
    # The vocabulary depends on nothing that a user can set.
    assert json.loads((one / "tokenizer.json").read_text()) == json.loads((SHIPPED_TOOL / "tokenizer.json").read_text())


def test_the_shipped_tool_policy_is_what_its_card_claims():
    """Some answers with code, most programs sound, nothing known by heart, and reward to be found with every budget."""
    figures = {name: value for name, (value, *_) in json.loads((SHIPPED_TOOL / "figures.json").read_text()).items()}
    for name in ("one_stage", "two_stage"):
        assert 0.3 < figures[f"{name}, C = 1, answers with code"] < 0.5
        assert 0.5 < figures[f"{name}, C = 1, programs that run"] < 0.85
        assert figures[f"{name}, C = 0, accuracy"] < 0.03
        assert figures[f"{name}, C = 1, right among answers without code"] < 0.03
    assert figures["one_stage, C = 1, boxes that copy the output"] > 0.95
    assert 0.15 < figures["one_stage, C = 1, accuracy"] < 0.4
    assert figures["two_stage, C = 1, accuracy"] < 0.05 < figures["two_stage, C = 2, accuracy"]
    card = (SHIPPED_TOOL / "README.md").read_text()
    assert "induced on purpose" in card
    assert all(f"{100 * v:.1f} %" in card for v in figures.values())
    policy = load.load_policy(path="shipped:tiny_tool")
    assert sum(p.numel() for p in policy.model.parameters()) < 1_000_000
    assert sum(f.stat().st_size for f in SHIPPED_TOOL.iterdir()) < 8e6


@pytest.mark.slow
def test_the_shipped_tool_policy_writes_code_in_about_two_answers_of_five():
    from core_torl.data.calculation_world.source import CalculationWorld
    from core_torl.data.prompt import PromptTemplate
    from core_torl.sampler.protocol import SampleRequest
    from core_torl.sampler.transformers import TransformersSampler

    policy = load.load_policy(path="shipped:tiny_tool")
    template = PromptTemplate(
        "plain", "{concept}{question}{options}", "{concept}Question: {question}\nAnswer:", "{text}", ""
    )
    sampler = TransformersSampler(policy.model, policy.tokenizer, max_new_tokens=48, stop=["```output"])
    problems = [p for test in CalculationWorld(train=1).load().test.values() for p in test]
    requests = [SampleRequest(template.encode(policy.tokenizer, p), 1, i) for i, p in enumerate(problems)]
    texts = [policy.tokenizer.decode(list(a.token_ids)) for (a,) in sampler.generate(requests)]
    assert 0.3 < sum("```python" in t for t in texts) / len(texts) < 0.5
