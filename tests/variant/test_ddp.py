"""Two ranks learn what one would: the summed gradient over a shared denominator does not depend on the ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import pytorch_lightning as pl, torch
from core_torl.data.concept_world.source import ConceptWorld
from core_torl.objective.grpo import GRPO
from core_torl.sampler.transformers import TransformersSampler
from core_torl.variant.core_base import CoreBase
from tests.variant.conftest import TEMPLATE, Evenness, make_policy

folder, ranks = Path(sys.argv[1]), int(sys.argv[2])

problems = ConceptWorld(train_per_concept=2, test_per_concept=1).load().train[:20]
policy = make_policy(problems)
module = CoreBase(
    policy=policy, sampler=TransformersSampler(policy.model, policy.tokenizer, max_new_tokens=6), reward_function=Evenness(),
    objective=GRPO(kl_coef=0.01), problems=problems, encode=lambda p, c: TEMPLATE.encode(policy.tokenizer, p, c), rl_steps=3,
    group_size=4, prompts_per_step=4, seed=0, temperature=1.0, fingerprint={{}}, lr=1e-2,
)
trainer = pl.Trainer(accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_epochs=1, logger=False,
                     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False)
trainer.fit(module)
if trainer.is_global_zero:
    torch.save({{"weights": module.model.state_dict(), "metrics": module.last_metrics}}, folder / f"{{ranks}}.pt")
"""


@pytest.mark.ddp
@pytest.mark.slow
def test_two_ranks_end_with_the_weights_and_the_metrics_of_one(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(Path(__file__).parents[2])))
    for ranks in (1, 2):
        command = [sys.executable, str(script), str(tmp_path), str(ranks)]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240
        )
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (torch.load(tmp_path / f"{ranks}.pt", weights_only=True) for ranks in (1, 2))
    for name, tensor in one["weights"].items():
        assert torch.allclose(tensor, two["weights"][name], atol=2e-5), name
    for name in (
        "train/samples",
        "train/sampled_tokens",
        "reward/mean",
        "loss/policy",
        "loss/reference_kl",
        "policy/ratio_mean",
        "policy/grad_norm",
    ):
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], abs=1e-4, rel=1e-3), name
