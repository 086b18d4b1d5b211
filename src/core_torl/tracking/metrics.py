"""Every logged number, table and file, with its meaning: the one place where what is logged gets its name.

A misspelt name opens a second, empty curve and nobody notices, so names are checked where they are logged. A name may
hold ``{fields}``: one field stands for one segment between slashes, ``reward/outcome/{outcome}`` covers
``reward/outcome/correct``. Shares run from 0 to 1; log-probs are natural logarithms, so their unit is the nat.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

STEP = "train/rl_step"  # the horizontal axis of every curve, unless another is chosen
SAMPLES, TOKENS = "train/samples", "train/sampled_tokens"
AXES = (STEP, SAMPLES, TOKENS)  # what a curve may be drawn against: they stand in every row
SHARE, COUNT, NAT, SECOND = "share", "count", "nat", "s"


@dataclass(frozen=True, slots=True)
class Metric:
    """One logged number: its name (perhaps with ``{fields}``), its unit, and what it says."""

    name: str
    unit: str
    meaning: str

    def matches(self, name: str) -> bool:
        """True if ``name`` is this metric or a member of its family."""
        pattern = re.sub(r"\\\{\w+\\\}", r"[^/]+", re.escape(self.name))
        return re.fullmatch(pattern, name) is not None

    def nearest(self, name: str) -> str:
        """This metric's name with its fields filled from the segments of ``name``, where the two have equally many."""
        own, other = self.name.split("/"), name.split("/")
        if len(own) != len(other):
            return self.name
        return "/".join(b if a.startswith("{") and b else a for a, b in zip(own, other, strict=True))


_TRAIN = (
    Metric(STEP, COUNT, "finished RL steps; one step samples, rewards and learns once"),
    Metric(SAMPLES, COUNT, "trajectories sampled since the start of the run, all ranks"),
    Metric(TOKENS, "tokens", "tokens sampled by the policy since the start of the run, all ranks"),
    Metric("train/optimizer_steps", COUNT, "optimizer steps since the start of the run"),
    Metric(
        "train/padding",
        SHARE,
        "of the places that passes with a gradient read, those that are padding; lower it "
        "with variant.microbatch_tokens",
    ),
    Metric("train/epoch", "passes", "passes over the training prompts, with a fraction"),
)
_REWARD = (
    Metric("reward/mean", "reward", "mean reward of the trajectories that could be judged"),
    Metric("reward/accuracy", SHARE, "judged trajectories whose answer is right"),
    Metric("reward/excluded", SHARE, "trajectories that could not be judged and so leave the loss"),
    Metric("reward/outcome/{outcome}", SHARE, "trajectories that ended with this outcome"),
    Metric("group/all_wrong", SHARE, "groups in which every judged trajectory is wrong"),
    Metric("group/all_right", SHARE, "groups in which every judged trajectory is right"),
    Metric("group/zero_variance", SHARE, "groups whose rewards are all equal: they teach nothing"),
)
_ROLLOUT = (
    Metric("rollout/length_mean", "tokens", "mean length of an answer, observations of tools left out"),
    Metric("rollout/length_max", "tokens", "longest answer of the step, observations of tools left out"),
    Metric("rollout/truncated", SHARE, "answers cut by the token limit"),
    Metric("rollout/staleness", "RL steps", "age of the policy that answered: 0, or 1 with variant.overlap"),
    Metric("rollout/retried", COUNT, "answers asked for again since the start, as their server failed; servers only"),
    Metric("rollout/tokens_per_s", "tokens/s", "sampled tokens over the wall time of sampling, all ranks"),
)
_LOSS = (
    Metric("loss/policy", NAT, "policy loss, its sign turned so that lower is better"),
    Metric("loss/total", NAT, "what the optimizer descends: policy, reference and auxiliary terms together"),
    Metric("loss/reference_kl", NAT, "estimated KL to the reference policy, before its weight objective.kl_coef"),
    Metric("loss/auxiliary", NAT, "what the variant adds, weight included"),
)
_POLICY = (
    Metric(
        "policy/entropy",
        "nat/token",
        "mean entropy of the next-token distribution over trained tokens; only with an entropy bonus",
    ),
    Metric("policy/ratio_mean", "ratio", "mean importance ratio, current over old policy; guided rows aside"),
    Metric("policy/ratio_max", "ratio", "largest importance ratio of the step"),
    Metric("policy/clip_fraction", SHARE, "trained tokens whose gradient the clip removes; guided rows aside"),
    Metric("policy/old_kl", "nat/token", "KL of the old from the current policy, k3 estimate; guided rows aside"),
    Metric("policy/sampler_logprob_gap_max", NAT, "largest |log-prob of sampler - log-prob of trainer| at one weight"),
    Metric("policy/sampler_logprob_gap_mean", NAT, "mean |log-prob of sampler - log-prob of trainer| at one weight"),
    Metric("policy/sync_gap", NAT, "mean of it on a fixed probe after the hand-over of weights; own weights only"),
    Metric("policy/grad_norm", "norm", "L2 norm of the gradient before it is clipped"),
    Metric("policy/lr", "1", "learning rate of the last optimizer step"),
)
_MISMATCH = (
    Metric(
        "mismatch/kl",
        "nat/token",
        "KL(sampler, trainer) before the step's first update, k3 estimate; over trained tokens that both saw behind "
        "one prompt, like all of mismatch",
    ),
    Metric("mismatch/ratio_mean", "ratio", "mean of p_trainer / p_sampler; 1 for an exact sampler"),
    Metric("mismatch/ratio_max", "ratio", "the largest of these ratios in the step"),
    Metric("mismatch/outside", SHARE, "tokens whose ratio lies outside [0.9, 1.1]"),
    Metric("mismatch/sequence_ratio_max", "ratio", "largest geometric mean of an answer's ratios"),
    Metric("mismatch/sequence_ratio_min", "ratio", "smallest geometric mean of an answer's ratios"),
    Metric("mismatch/weight_mean", "ratio", "mean weight that objective.correction gave; only with a correction"),
    Metric(
        "mismatch/bounded",
        SHARE,
        "tokens whose weight was cut, or that were dropped, by the bounds of objective.correction; only with one",
    ),
)
_CORE = (
    Metric("core/trigger_rate", SHARE, "groups that got an intervention"),
    Metric("core/gated", SHARE, "groups that failed and were left alone by a gate (truncation, suspect text, length)"),
    Metric("core/primed_accuracy", SHARE, "primed answers that are right; no value in a step without any"),
    Metric("core/primed_tokens", "tokens", "tokens of primed answers sampled in the step, all ranks"),
    Metric("core/replaced_tokens", "tokens", "tokens of primed answers that took the place of failed ones, all ranks"),
    Metric(
        "core/primed_logprob_gap",
        "nat/token",
        "mean of log p(token | primed prompt) - log p(token | plain prompt) over primed answers that are learned from",
    ),
    Metric(
        "core/replaced_ratio_mean",
        "ratio",
        "mean of p(token | plain) / p_sampled(token | primed) over trained replaced rows, whatever the loss uses",
    ),
    Metric("core/replaced_ratio_max", "ratio", "the largest of these ratios in the step"),
    Metric("core/replaced_clip_fraction", SHARE, "tokens of replaced rows whose gradient the clip removes"),
    Metric("core/kl_per_token", "nat/token", "mean divergence of the primed and the plain next-token distributions"),
    Metric("core/auxiliary_grad_norm", "norm", "L2 norm of the gradient of the variant's own loss, lambda included"),
    Metric(
        "core/auxiliary_grad_share",
        SHARE,
        "that norm over the sum of itself and that of the policy loss's gradient",
    ),
)
_TOOL = (
    Metric("tool/code_ratio", SHARE, "answers with a closed python block"),
    Metric("tool/call_ratio", SHARE, "answers that had a program run"),
    Metric("tool/calls_per_response", "runs/answer", "programs run for an answer, on average"),
    Metric("tool/pass_ratio", SHARE, "programs run that ended without an error"),
    Metric("tool/pass_ratio_correct", SHARE, "programs run that ended without an error, in right answers"),
    Metric("tool/pass_ratio_incorrect", SHARE, "programs run that ended without an error, in answers not right"),
    Metric("tool/executed_ratio", "runs/block", "programs run over python blocks written"),
    Metric("tool/before_answer_ratio", SHARE, "python blocks before the box that counts, in answers that have both"),
    Metric("tool/effective_ratio", SHARE, "right answers whose box stands in the output of their last good run"),
    Metric("tool/hallucinated_output_ratio", SHARE, "answers with an output block that no run has answered"),
    Metric("tool/budget_exhausted_ratio", SHARE, "answers that used every call of their budget"),
    Metric("tool/time_limit_ratio", SHARE, "programs run that were stopped at their time limit"),
    Metric("tool/other_limit_ratio", SHARE, "programs run that were stopped at their memory or output limit"),
    Metric(
        "tool/lost_name_ratio",
        SHARE,
        "programs run that failed for a name which an earlier program of the answer had bound",
    ),
    Metric("tool/infrastructure_ratio", SHARE, "calls that failed with the sandbox, after its retries"),
    Metric("tool/aborted_ratio", SHARE, "answers given up for that reason: not shown, not scored, not trained"),
    Metric("tool/observation_tokens", "tokens", "tokens of observations in an answer, on average"),
    Metric("tool/trainable_fraction", SHARE, "tokens of answers that the policy drew itself"),
    Metric("tool/void_turn_ratio", SHARE, "turns with neither a closed python block nor a box"),
    Metric(
        "tool/void_answer_ratio", SHARE, "answers with such a turn: those that variant.void_turns=mask does not train"
    ),
    Metric("tool/self_correction_ratio", SHARE, "answers that are right after a failed run and a later good one"),
    Metric("tool/cross_check_ratio", SHARE, "answers with a box before a good run"),
    Metric("tool/revision_ratio", SHARE, "answers whose last box differs from one before an observation"),
    Metric("tool/latency_p50_s", SECOND, "median time of a program on the clock; of ranks, the largest"),
    Metric("tool/latency_p95_s", SECOND, "95th percentile of a program's time on the clock; of ranks, the largest"),
)
_TIME = (
    Metric("time/step_s", SECOND, "wall time of the whole RL step, logging and callbacks aside"),
    Metric("time/sample_s", SECOND, "wall time of sampling, tools included"),
    Metric("time/reward_s", SECOND, "wall time of rewarding"),
    Metric("time/intervene_s", SECOND, "wall time of the intervention: priming, sampling and scoring once more"),
    Metric("time/learn_s", SECOND, "wall time of the forward, backward and optimizer passes"),
    Metric("time/wait_s", SECOND, "wait for the next step's answers behind that; only with variant.overlap"),
    Metric("time/sync_s", SECOND, "wall time of handing the new weights to the sampler and checking them"),
)
_EVAL_MEASURES = (
    ("accuracy", SHARE, "answers that are right; one that could not be judged counts as not right"),
    ("robust_accuracy", SHARE, "quizzes answered rightly in every order of their options"),
    ("mean_over_orders", SHARE, "right answers, averaged over the orders of the options"),
    (
        "independence_reference",
        SHARE,
        "robust accuracy to expect if orders were answered independently, each at its concept's own rate",
    ),
    ("consistency", SHARE, "quizzes whose chosen option text is the same in every order"),
    ("accuracy_low", SHARE, "lower end of the interval of accuracy"),
    ("accuracy_high", SHARE, "upper end of the interval of accuracy"),
    ("robust_accuracy_low", SHARE, "lower end of the interval of robust accuracy"),
    ("robust_accuracy_high", SHARE, "upper end of the interval of robust accuracy"),
    ("n", COUNT, "problems evaluated"),
    ("unparsed", SHARE, "answers from which nothing could be read"),
    ("truncated", SHARE, "answers cut by the token limit"),
    ("excluded", SHARE, "answers that could not be judged (timeouts, errors)"),
    ("retained", SHARE, "of the problems solved without distractors, those solved with them; NAME_distractorsK only"),
    ("retained_low", SHARE, "lower end of the interval of that share"),
    ("retained_high", SHARE, "upper end of the interval of that share"),
    ("left_out", COUNT, "problems left out because they have no concept or their prompt with distractors is too long"),
    ("code_ratio", SHARE, "answers with a closed python block; this and the next four with tools only"),
    ("pass_ratio", SHARE, "programs run that ended without an error"),
    ("executed_ratio", "runs/block", "programs run over python blocks written"),
    ("calls_per_response", "runs/answer", "programs run for an answer, on average"),
    ("hallucinated_output_ratio", SHARE, "answers with an output block that no run has answered"),
)
_EVAL = tuple(Metric(f"eval/{{set}}/{{protocol}}/{measure}", unit, text) for measure, unit, text in _EVAL_MEASURES)

_ALL = (*_TRAIN, *_REWARD, *_ROLLOUT, *_LOSS, *_POLICY, *_MISMATCH, *_CORE, *_TOOL, *_TIME, *_EVAL)
METRICS: dict[str, Metric] = {m.name: m for m in _ALL}


@dataclass(frozen=True, slots=True)
class Kept:
    """Something logged that is no number: a table or picture in W&B, an artifact, a file of the run's folder."""

    name: str
    kind: str
    meaning: str


_ONE_ANSWER = "a row has one answer with its problem, reward and outcome, as the policy wrote it before any coach"
KEPT: dict[str, Kept] = {
    k.name: k
    for k in (
        Kept(
            "rollouts/best",
            "table",
            f"answers with the highest rewards, one a problem; none where all earned the same; {_ONE_ANSWER}",
        ),
        Kept(
            "rollouts/worst", "table", "answers with the lowest rewards, one a problem; none where all earned the same"
        ),
        Kept(
            "rollouts/newly_solved",
            "table",
            "right answers to problems all of whose answers were wrong each time they came before",
        ),
        Kept(
            "rollouts/triggered",
            "table",
            "groups that got an intervention: what the coach showed, the first failed plain answer and the first "
            "primed one side by side, rewards without a bonus, and how many primed answers are right",
        ),
        Kept(
            "rollouts/tools",
            "table",
            "answers that had programs run: calls numbered, observations between marks; a line of the text itself that "
            "looks like a mark has a backslash before it",
        ),
        Kept("rollouts/even", "table", "answers at even distances through the step, whatever they earned"),
        Kept("per_concept", "table", "accuracy of each concept in an evaluation (core-torl-evaluate)"),
        Kept("results", "picture", "learning curves, and accuracy before and after training"),
        Kept(
            "results-{run}",
            "artifact",
            "of type results: results.json, metrics.jsonl, rollouts.jsonl, transcripts.md, run.json; those that exist",
        ),
        Kept("checkpoint-{run}", "artifact", "of type checkpoint: the newest checkpoint (logger.artifacts)"),
        Kept("policy-{run}", "artifact", "of type policy: the exported policy (logger.artifacts)"),
        Kept("results.json", "file", "what was measured; also among the files of the W&B run"),
        Kept(
            "run.json",
            "file",
            "command, state and origin of the run; what W&B has of it is from before the end, so it says running",
        ),
        Kept("metrics.jsonl", "file", "every logged row of numbers, one JSON object a line"),
        Kept(
            "rollouts.jsonl", "file", "the rows of the tables rollouts/*, with kind and rl_step, one JSON object a line"
        ),
        Kept("transcripts.md", "file", "answers to test problems before and after training"),
    )
}


def find(name: str) -> Metric | None:
    """The metric or family that ``name`` belongs to; None if there is none."""
    exact = METRICS.get(name) if "{" not in name else None
    return exact or next((m for m in METRICS.values() if "{" in m.name and m.matches(name)), None)


def check_names(metrics: Mapping[str, object]) -> None:
    """Raise a one-line ValueError for the first name that is no metric; it names the nearest one that is."""
    for name in metrics:
        if find(name) is None:
            near = difflib.get_close_matches(name, [m.nearest(name) for m in METRICS.values()], n=1, cutoff=0.0)
            raise ValueError(
                f"unknown metric {name!r}; the nearest known name is {near[0]!r} (see tracking/metrics.py)"
            )


def check_kept(name: str, kind: str) -> None:
    """Raise a one-line ValueError if no table, picture, artifact or file of this ``kind`` has this name."""
    known = [k.name for k in KEPT.values() if k.kind == kind]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise ValueError(f"unknown {kind} {name!r}; the nearest known one is {near[0]!r} (see tracking/metrics.py)")


def glossary_markdown() -> str:
    """All metrics as a Markdown table with the columns metric, unit, meaning."""
    # A bare bar would open a new column.
    rows = [f"| `{m.name}` | {m.unit} | {m.meaning.replace('|', chr(92) + '|')} |" for m in METRICS.values()]
    return "\n".join(["| metric | unit | meaning |", "|---|---|---|", *rows]) + "\n"


def kept_markdown() -> str:
    """All tables, pictures, artifacts and files as a Markdown table with the columns name, kind, meaning."""
    rows = [f"| `{k.name}` | {k.kind} | {k.meaning} |" for k in KEPT.values()]
    return "\n".join(["| name | kind | meaning |", "|---|---|---|", *rows]) + "\n"
