"""CORE-Base: GRPO on concept quizzes, and nothing else (CORE, section 4; the row "Base" of its tables).

It sees the quiz and never the concept. What it adds to plain GRPO is only the promise that every training problem
belongs to a concept, so that CR and KL can be set beside it on the very same problems.
"""

from __future__ import annotations

from core_torl.variant.policy_gradient import PolicyGradient


class CoreBase(PolicyGradient):
    needs_concepts = True
