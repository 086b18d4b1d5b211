"""ToRL: reinforcement learning straight from a base model that may have Python run for it (ToRL, section 2).

The algorithm is the base one. The tools are in the sampler (``core_torl.tool``): their observations stand in the
answers and are left out of the loss token by token, for every budget. What this variant adds is the budget itself, the
measures of tool use, and a filter of void turns.
"""

from __future__ import annotations

from typing import Any

from core_torl.config.tool_checks import check_choice
from core_torl.tool.usage import has_void_turn, latencies, usage
from core_torl.trajectory import Group
from core_torl.variant.policy_gradient import PolicyGradient


class ToRL(PolicyGradient):
    """GRPO with tools. ``tool_call_budget`` is C, the programs that one answer may have run; 0 is plain generation.

    ``void_turns`` "mask" leaves answers with a turn that holds neither a whole program nor a box out of the loss; they
    still count in the statistics of their groups (SimpleTIR, arXiv 2509.02479).

    Raises:
        ValueError: a value is out of range; the message names its config key and the fix.
    """

    def __init__(self, *, tool_call_budget: int = 1, void_turns: str = "keep", **rest: Any) -> None:
        if tool_call_budget < 0:
            raise ValueError(f"variant.tool_call_budget={tool_call_budget}: must be 0 (no tools) or larger")
        check_choice("variant.void_turns", void_turns)
        super().__init__(**rest)
        self.tool_call_budget, self.void_turns = tool_call_budget, void_turns

    def intervene(self, groups: list[Group]) -> list[Group]:
        flat = [t for g in groups for t in g.trajectories]
        self._now.add_ratios(usage(flat, self.tool_call_budget))
        self._now.update(latencies(flat))
        if self.void_turns == "mask":
            for trajectory in flat:
                if has_void_turn(trajectory):
                    trajectory.train_mask = (False,) * len(trajectory.train_mask)
        return groups
