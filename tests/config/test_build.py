"""What a refused part says, one part inside another, and that no error is its own cause."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from core_torl.config.build import build
from core_torl.config.errors import UserError, causes
from core_torl.config.tool_checks import CHOICES, check_choices, check_tool, check_tool_variant


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"_target_": "core_torl.sandbox.bubblewrap.Bubblewrap", "memory_mb": 100}, "sandbox.memory_mb"),
        ({"_target_": "core_torl.sandbox.bubblewrap.Bubblewrap", "timeout_s": 0}, "sandbox.timeout_s"),
        ({"_target_": "core_torl.sandbox.sandbox_fusion.SandboxFusion", "url": None}, "sandbox.url has no value"),
        ({"_target_": "core_torl.tool.observation.Observations", "max_chars": 3}, "tool.observation.max_chars=3"),
        (
            {
                "_target_": "core_torl.tool.tool_sampler.ToolSampler",
                "call_budget": 1,
                "observation": {"_target_": "core_torl.tool.observation.Observations", "error": "lastline"},
            },
            "tool.observation.error='lastline'",
        ),
    ],
)
def test_a_refusal_names_the_key_and_ends(node, words):
    with pytest.raises(UserError, match=words) as caught:
        build(OmegaConf.create(node), *([None] * 3 if "observation" in node else []))
    assert len(list(causes(caught.value))) < 10  # an error raised from itself would go on for ever


def test_a_circle_of_causes_ends():
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    assert list(causes(one)) == [one, two]
    one.__cause__ = one
    assert list(causes(one)) == [one]


def config(budget=1, tool=1, sandbox="bubblewrap.Bubblewrap", **changes):
    variant = {"max_aborted": 0.1, **({} if budget is None else {"tool_call_budget": budget, "void_turns": "keep"})}
    tree = {
        "variant": variant,
        "tool": {"call_budget": tool, "block_policy": "last", "budget_notice": "none"},
        "sandbox": {"_target_": f"core_torl.sandbox.{sandbox}"},
    }
    made = OmegaConf.create(tree)
    for key, value in changes.items():
        OmegaConf.update(made, key.replace("__", "."), value)
    return made


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sandbox": "none.NoSandbox"}, "sandbox=none with a call budget of 1.*variant.tool_call_budget=0"),
        ({"budget": -1, "tool": -1}, "tool_call_budget=-1|call_budget=-1"),
        ({"budget": None, "tool": 1}, "tool.call_budget=1 in training: the variant decides; use variant=torl"),
        ({"budget": 2, "tool": 1}, "set variant.tool_call_budget instead"),
        ({"variant__max_aborted": 1.5}, "variant.max_aborted=1.5"),
        ({"variant__void_turns": "maks"}, "variant.void_turns='maks'.*Did you mean 'mask'"),
        ({"tool__block_policy": "frist"}, "tool.block_policy='frist'.*Did you mean 'first'"),
    ],
)
def test_what_does_not_go_together_is_refused(change, words):
    made = config(**change)
    with pytest.raises(UserError, match=words):
        check_tool_variant(made)
        check_tool(made)


def test_what_goes_together_passes():
    for made in (config(), config(0, 0, "none.NoSandbox"), config(None, 0, "none.NoSandbox")):
        check_tool_variant(made)
        check_tool(made)
    assert all(len(values) > 1 for values in CHOICES.values())
    check_choices(OmegaConf.create({"other": 1}))
