"""What the published CORE code does in effect when it says CORE-CR: random positive credit on failed groups.

There the primed answers overwrite the responses but not the ids that the loss reads, so their text is never trained on.
What remains: in every failed group K randomly chosen **wrong** answers are paid what the primed answers earned, bonus
included, on as many of their own tokens as the primed answer was long. A baseline, to see what of the paper's effect
that alone could make; nothing here is CORE.
"""

from __future__ import annotations

from dataclasses import replace

from core_torl.trajectory import Trajectory
from core_torl.variant.core_cr import CoreCR


class CompatReleasedCR(CoreCR):
    def _row(self, failed: Trajectory, answer: Trajectory) -> Trajectory:
        """The failed answer's own tokens, cut to the primed answer's length, with the primed answer's reward."""
        length = len(answer.token_ids)
        mask = tuple(m and i < length for i, m in enumerate(failed.train_mask))
        return replace(failed, score=super()._row(failed, answer).score, train_mask=mask)
