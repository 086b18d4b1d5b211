"""Seconds per RL step: TRL's GRPOTrainer and ours, on the same policy, prompts, group size, lengths and optimizer.

Both sides start each round from the shipped tiny policy, sample with their own transformers engine, grade with the same
letter check, and take one AdamW step a batch without a KL term. Rounds alternate, so a busy machine slows both alike;
the first step of a round is warm-up and not counted. Ours is timed twice: as shipped, where rows with advantage 0 skip
the forward pass (the gradient is the same), and with that switched off.

    python benchmarks/vs_trl.py --threads 1 --steps 12 --rounds 3        # needs the extra `bench`
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
import warnings
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore")

import pytorch_lightning as pl
import torch

from core_torl.data.concept_world.source import ConceptWorld
from core_torl.data.prompt import PromptTemplate
from core_torl.model.load import load_policy
from core_torl.objective.grpo import GRPO
from core_torl.reward.answers import option_letter
from core_torl.reward.correctness import Correctness
from core_torl.sampler.transformers import TransformersSampler
from core_torl.variant.policy_gradient import PolicyGradient

TEMPLATE = PromptTemplate(
    "plain",
    "{concept}Question: {question}\n{options}Answer:",
    "{concept}Question: {question}\nAnswer:",
    "Definition: {text} .\n",
    "{letter}. {text}\n",
)


def ours(args: argparse.Namespace, problems: list[Any], skip: bool) -> list[float]:
    policy = load_policy(path="shipped:tiny")
    sampler = TransformersSampler(policy.model, policy.tokenizer, max_new_tokens=args.max_new_tokens)
    module = PolicyGradient(
        policy=policy, sampler=sampler, reward_function=Correctness(), objective=GRPO(), problems=problems,
        encode=lambda p, c: TEMPLATE.encode(policy.tokenizer, p, c), rl_steps=args.steps + 1,
        group_size=args.group_size, prompts_per_step=args.prompts, seed=0,
        temperature=1.0, fingerprint={}, lr=args.lr, weight_decay=0.0,
        microbatch_size=args.prompts * args.group_size, skip_zero_advantage=skip,
    )  # fmt: skip
    clock = OurClock()
    pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[clock],
    ).fit(module)  # fmt: skip
    return clock.seconds[1:]


class OurClock(pl.Callback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def trl(args: argparse.Namespace, problems: list[Any]) -> list[float]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *a: Any, **k: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *a: Any, **k: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)

    by_text = {TEMPLATE.user_text(p): p for p in problems}

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        pairs = ((by_text[prompt], text) for prompt, text in zip(prompts, completions, strict=True))
        return [float(option_letter(text, p.options, p.letters) == p.answer) for p, text in pairs]

    policy = load_policy(path="shipped:tiny")
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=args.prompts * args.group_size,
            gradient_accumulation_steps=1, num_generations=args.group_size,
            max_completion_length=args.max_new_tokens, max_steps=args.steps + 1,
            learning_rate=args.lr, lr_scheduler_type="constant", weight_decay=0.0, adam_beta2=0.999, max_grad_norm=1.0,
            beta=0.0, temperature=1.0, top_k=0, num_iterations=1, loss_type="dapo", report_to="none",
            save_strategy="no", logging_strategy="no", use_cpu=True, bf16=False, fp16=False,
            gradient_checkpointing=False, disable_tqdm=True,
            seed=0, dataloader_num_workers=0,
        )  # fmt: skip
        GRPOTrainer(
            model=policy.model, processing_class=policy.tokenizer, reward_funcs=reward, args=config,
            train_dataset=Dataset.from_dict({"prompt": list(by_text)}), callbacks=[clock],
        ).train()  # fmt: skip
    return clock.seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1e-4)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    problems = ConceptWorld(train_tags=("gap",), train_per_concept=20).load().train
    times: dict[str, list[float]] = {"TRL GRPOTrainer": [], "core-torl": [], "core-torl, no skipping": []}
    for number in range(args.rounds):
        times["TRL GRPOTrainer"] += trl(args, problems)
        times["core-torl"] += ours(args, problems, skip=True)
        times["core-torl, no skipping"] += ours(args, problems, skip=False)
        print(
            f"round {number + 1}: "
            + ", ".join(f"{k} {statistics.median(v[-args.steps :]):.3f} s" for k, v in times.items()),
            flush=True,
        )
    medians = {k: statistics.median(v) for k, v in times.items()}
    base = medians["TRL GRPOTrainer"]
    print(
        f"\n{args.prompts} prompts x {args.group_size} answers, at most {args.max_new_tokens} tokens, "
        f"{args.threads} thread(s)"
    )
    print(f"{'':26s}{'s/step':>9s}{'min':>9s}{'max':>9s}{'ratio':>8s}")
    for name, value in medians.items():
        print(f"{name:26s}{value:9.3f}{min(times[name]):9.3f}{max(times[name]):9.3f}{base / value:8.2f}")
    print(f"ratio vs_trl_no_skipping {base / medians['core-torl, no skipping']:.2f}")
    print(f"ratio vs_trl {base / medians['core-torl']:.2f}")


if __name__ == "__main__":
    main()
