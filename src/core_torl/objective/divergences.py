"""How far two policies are apart, estimated from the log-probs of the tokens that were sampled.

With ``r = p_reference / p_policy`` on a sampled token (J. Schulman, "Approximating KL divergence"): k1 = -log r is
unbiased and noisy, k2 = (log r)^2 / 2 is biased and calm, k3 = r - 1 - log r is unbiased, calm and never negative.
"""

from __future__ import annotations

import torch
from torch import Tensor

ESTIMATORS = ("k1", "k2", "k3")
# exp() of a larger gap would overflow before any clipping downstream could see it.
_MAX_LOG_RATIO = 20.0


def kl_estimate(logprobs: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) at sampled tokens. Inputs and result are [rows, tokens]."""
    log_ratio = (reference - logprobs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        return torch.expm1(log_ratio) - log_ratio
    raise ValueError(f"objective.kl_estimator={estimator!r}: use one of {', '.join(ESTIMATORS)}")
