"""When does a group of answers show that the policy lacks a concept?

CORE calls it a conceptual failure when **all** N answers are wrong. Its critics ask for more: a rate below a threshold
instead of zero, controls that never or always intervene, and gates, because a group that was only cut off by the token
limit has not failed at a concept, and a concept text that belongs to another theorem teaches nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from core_torl.trajectory import Group

WHEN = ("all_wrong", "pass_rate", "never", "always")


@dataclass(frozen=True)
class Failure:
    """Decides group by group; it looks at whether answers are right, never at what a reward paid for them.

    Args:
        when: ``all_wrong`` (CORE, section 3: no judged answer is right), ``pass_rate`` (the share of right ones is
            below ``pass_rate``), ``never`` or ``always``.
        pass_rate: threshold in (0, 1], read by ``pass_rate`` only.
        min_finished: judged answers that must have ended by themselves; 0 lets a group fail by truncation alone.
        skip_suspect: leave problems alone whose concept text is marked as suspect.

    Raises:
        ValueError: a value is out of range; the message names its config key and the fix.
    """

    when: str = "all_wrong"
    pass_rate: float = 0.25
    min_finished: int = 1
    skip_suspect: bool = True

    def __post_init__(self) -> None:
        if self.when not in WHEN:
            raise ValueError(f"trigger.when={self.when!r}: use one of {', '.join(WHEN)}")
        if not 0 < self.pass_rate <= 1:
            raise ValueError(f"trigger.pass_rate={self.pass_rate}: a share in (0, 1]")
        if self.min_finished < 0:
            raise ValueError(f"trigger.min_finished={self.min_finished}: must be 0 (gate off) or larger")

    def failed(self, group: Group) -> bool:
        """Whether the answers are a failure, before any gate."""
        judged = [t.score for t in group.trajectories if t.score is not None and t.score.value is not None]
        if self.when == "never" or not judged:
            return False
        if self.when == "always":
            return True
        right = sum(s.correct for s in judged)
        return right == 0 if self.when == "all_wrong" else right / len(judged) < self.pass_rate

    def open(self, group: Group) -> bool:
        """Whether the gates let an intervention through."""
        concept = group.problem.concept
        if self.skip_suspect and concept is not None and concept.suspect:
            return False
        finished = sum(not t.truncated for t in group.trajectories if t.score is not None and t.score.value is not None)
        return finished >= self.min_finished

    def fires(self, group: Group) -> bool:
        """Whether this group gets an intervention."""
        return self.failed(group) and self.open(group)
