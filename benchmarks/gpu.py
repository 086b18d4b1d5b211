"""What one GPU does: tokens per second of rollout and training, MFU, memory of the chunked losses, waits for tools.

    python benchmarks/gpu.py [--size 1.5b] [--device cuda]        # on a machine with a CUDA card
    python benchmarks/gpu.py --tiny --device cpu                  # does the code still run? no figures of a GPU

The model is a Qwen2 of 0.5 or 1.5 billion parameters with random weights, made on the spot: nothing is downloaded, and
speed does not depend on what weights say. It is the trainer's own setting: float32 weights, bfloat16 arithmetic
(autocast), gradient checkpointing, AdamW. Measured, after one warm-up each, medians of --rounds:

- rollout: --prompts prompts of --prompt-tokens, --group answers of --answer-tokens each, end tokens held back; with the
  embedded sampler, and with vLLM where it is installed (its weights in bfloat16), whose sync is timed too.
- training: one optimizer step on those answers with GRPO; tokens are prompt and answer, each answer's prompt counted.
- MFU: FLOPs that the step needs (6 for each weight and token, the head on answers only, plus causal attention; what
  checkpointing computes again is not counted) over the card's dense bfloat16 peak, by its data sheet.
- memory: peak over what stands before, of a forward and backward pass of one microbatch: our log-probs, and those of
  whole float32 logits; and of CORE-KL's divergence (benchmarks/kl_memory.py has that by itself).
- tool waits: the share of a rollout with tools in which nothing is sampled because every answer waits for its program.
  Programs sleep for --tool-s: the loop is measured, not a sandbox.

The table is printed; on CUDA it is also written to docs/results/gpu/CARD.json.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from kl_memory import RUN as DIVERGENCES
from kl_memory import make as divergence_case
from transformers import Qwen2Config, Qwen2ForCausalLM

from core_torl.code_blocks import OUTPUT
from core_torl.model.load import Policy
from core_torl.model.memory import GIB, Architecture
from core_torl.model.tiny_tokenizer import build_tokenizer
from core_torl.objective.grpo import GRPO
from core_torl.objective.logprobs import answer_logprobs
from core_torl.objective.token_batch import TokenBatch
from core_torl.sampler.protocol import SampleRequest
from core_torl.sampler.transformers import TransformersSampler
from core_torl.sandbox.protocol import Execution
from core_torl.tool.observation import Observations
from core_torl.tool.tool_sampler import ToolSampler

ROOT = Path(__file__).resolve().parents[1]
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 128},
    "0.5b": {"num_hidden_layers": 24, "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2,
             "intermediate_size": 4864, "vocab_size": 151_936},
    "1.5b": {"num_hidden_layers": 28, "hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 2,
             "intermediate_size": 8960, "vocab_size": 151_936},
}  # fmt: skip
# Dense bfloat16 TFLOP/s from NVIDIA's data sheets; the first pattern that fits the card's name.
PEAKS = (
    (r"\bB200\b", 2250.0), (r"\bH100\b.*PCIe", 756.0), (r"\b(GH200|H200|H100|H800)\b", 989.0), (r"\bA100\b", 312.0),
    (r"\bL40S\b", 362.0), (r"\bL4\b", 121.0), (r"\bA10\b", 125.0), (r"\bRTX A6000\b", 155.0), (r"\bRTX 4090\b", 165.0),
    (r"\bRTX 3090\b", 71.0),
)  # fmt: skip


def peak_flops(card: str) -> float | None:
    """FLOP/s of a card by its name; None for one that is not in the table."""
    return next((tera * 1e12 for pattern, tera in PEAKS if re.search(pattern, card)), None)


def needed_flops(model: Architecture, rows: int, prompt: int, answer: int) -> float:
    """Of a forward and backward pass: 6 for each weight and token, and 6 * tokens * width * layers of attention."""
    tokens = rows * (prompt + answer)
    linear = tokens * model.layers * model.layer_parameters + rows * answer * model.embedding_parameters
    attention = tokens * model.layers * model.heads * model.head_size * (prompt + answer)
    return 6.0 * (linear + attention)


def make_policy(options: argparse.Namespace) -> Policy:
    tokenizer = build_tokenizer(["x", "is", "the", "number"], max_length=4096)
    shape = {"vocab_size": len(tokenizer), **SIZES[options.size]}
    config = Qwen2Config(
        **shape, max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(options.device):
        model = Qwen2ForCausalLM(config)
    model.gradient_checkpointing_enable()
    return Policy(model, tokenizer, adapted=False)


def arithmetic(options: argparse.Namespace) -> AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if options.device == "cuda" else nullcontext()


def finished(options: argparse.Namespace) -> float:
    """The time, once everything asked of the device is done."""
    if options.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(work: Callable[[], Any], options: argparse.Namespace) -> float:
    times = []
    for turn in range(options.rounds + 1):
        started = finished(options)
        work()
        if turn:  # the first one warms up
            times.append(finished(options) - started)
    return statistics.median(times)


def extra_memory(work: Callable[[], Any], options: argparse.Namespace) -> float | None:
    """GiB at the peak over what stands before; None on the CPU, where memory has to be measured process by process."""
    work()
    if options.device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB


# ---- rollout -----------------------------------------------------------------------------------------------------


def random_ids(count: int, generator: torch.Generator) -> list[int]:
    """Ids that every tokenizer here has, special tokens aside."""
    return torch.randint(5, 250, (count,), generator=generator).tolist()


def requests_of(options: argparse.Namespace) -> list[SampleRequest]:
    generator = torch.Generator().manual_seed(1)
    prompts = [tuple(random_ids(options.prompt_tokens, generator)) for _ in range(options.prompts)]
    return [SampleRequest(prompt, options.group, i) for i, prompt in enumerate(prompts)]


def rollout(sampler: Any, options: argparse.Namespace) -> float:
    """Tokens per second."""
    sampling = replace(sampler.sampling, min_new_tokens=options.answer_tokens)
    requests = requests_of(options)

    def work() -> None:
        with arithmetic(options):
            answers = sampler.generate(requests, sampling)
        drawn = sum(s.drawn for group in answers for s in group)
        assert drawn == options.prompts * options.group * options.answer_tokens, "an answer ended early"

    return options.prompts * options.group * options.answer_tokens / seconds_of(work, options)


def vllm_rollout(policy: Policy, options: argparse.Namespace) -> dict[str, float | None]:
    from core_torl.sampler.vllm import VllmSampler

    sampler = VllmSampler(
        policy.model, policy.tokenizer, max_new_tokens=options.answer_tokens, max_rows=options.prompts * options.group,
        dtype="bfloat16", max_model_len=options.prompt_tokens + options.answer_tokens,
    )  # fmt: skip
    try:
        sync = seconds_of(lambda: sampler.sync(policy, "0"), options)
        return {"tokens_per_s": rollout(sampler, options), "sync_s": sync}
    finally:
        sampler.close()


# ---- training ----------------------------------------------------------------------------------------------------


def batch_of(policy: Policy, options: argparse.Namespace, rows: int) -> TokenBatch:
    generator = torch.Generator().manual_seed(2)
    length = options.answer_tokens
    return TokenBatch.build(
        [random_ids(options.prompt_tokens, generator) for _ in range(rows)],
        [random_ids(length, generator) for _ in range(rows)], [[-6.0] * length] * rows, [[True] * length] * rows,
        torch.randn(rows, generator=generator), policy.pad_id, options.device,
    )  # fmt: skip


def training(policy: Policy, options: argparse.Namespace) -> float:
    """Seconds of one optimizer step on all answers of the rollout."""
    model, objective = policy.model.train(), GRPO()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    batch = batch_of(policy, options, options.prompts * options.group)
    denominator = objective.denominator(batch.train_mask)

    def work() -> None:
        for start in range(0, batch.rows, options.microbatch):
            part = batch.select(slice(start, start + options.microbatch))
            with arithmetic(options):
                logprobs, entropies = answer_logprobs(model, part)
            objective.loss(logprobs, entropies, part, denominator).total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return seconds_of(work, options)


def whole_logprobs(model: Any, part: TokenBatch) -> torch.Tensor:
    """The obvious way: the float32 log-softmax of all logits, of which one in 150,000 is taken."""
    logits = model(
        input_ids=part.ids, attention_mask=part.attention_mask, position_ids=part.positions, use_cache=False,
        logits_to_keep=part.answer_length + 1,
    ).logits[:, :-1]  # fmt: skip
    return logits.float().log_softmax(dim=-1).gather(-1, part.answer_ids.unsqueeze(-1)).squeeze(-1)


def loss_memory(policy: Policy, options: argparse.Namespace) -> dict[str, float | None]:
    model = policy.model.train()
    part = batch_of(policy, options, options.microbatch)
    losses: dict[str, float] = {}

    def run(name: str) -> Callable[[], None]:
        def work() -> None:
            with arithmetic(options):
                found = whole_logprobs(model, part) if name == "whole" else answer_logprobs(model, part)[0]
            loss = -found.mean()
            loss.backward()
            model.zero_grad(set_to_none=False)
            losses[name] = float(loss.detach())

        return work

    result = {f"logprobs_{name}_gib": extra_memory(run(name), options) for name in ("ours", "whole")}
    assert math.isclose(losses["ours"], losses["whole"], rel_tol=1e-2), f"the two losses differ: {losses}"
    case = argparse.Namespace(tokens=options.kl_tokens, hidden=model.config.hidden_size, device=options.device)
    for name, form in DIVERGENCES.items():
        inputs = divergence_case(case, "bfloat16", vocabulary=model.config.vocab_size)
        result[f"divergence_{name}_gib"] = extra_memory(lambda form=form, inputs=inputs: form(**inputs), options)
    return result


# ---- tools -------------------------------------------------------------------------------------------------------


class Sleeping:
    """Programs that take a fixed time on a clock of their own."""

    concurrency = 256

    def __init__(self, seconds: float) -> None:
        self.seconds, self.pool, self.runs = seconds, ThreadPoolExecutor(self.concurrency), 0

    def start(self) -> None: ...

    def submit(self, code: str) -> Future[Execution]:
        self.runs += 1
        return self.pool.submit(self._run)

    def _run(self) -> Execution:
        time.sleep(self.seconds)
        return Execution("17", "", "ok", self.seconds)

    def close(self) -> None:
        self.pool.shutdown()


class Waiting(ToolSampler):
    """Adds up how long it waits for programs while nothing is sampled."""

    waited = 0.0

    def _take(self, results: Any, wait: bool) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        started = time.perf_counter()
        ToolSampler._take(results, wait)
        if wait:
            self.waited += time.perf_counter() - started


def tool_waits(policy: Policy, options: argparse.Namespace) -> dict[str, float]:
    """One rollout of a policy whose output layer leans towards blocks of code."""
    bias = torch.full((policy.model.config.vocab_size,), -20.0)
    bias[: len(policy.tokenizer)] = 0.0
    leaning = {"```python": 5.0, "\n": 7.0, "```": 5.5, OUTPUT: 4.2, " 1": 5.5, "x": 5.5, " the": 5.5, "</s>": 2.2}
    for word, weight in leaning.items():
        (i,) = policy.tokenizer(word, add_special_tokens=False)["input_ids"]
        bias[i] = weight
    bias = bias.to(options.device)
    handle = policy.model.lm_head.register_forward_hook(lambda module, args, logits: logits + bias)
    sandbox = Sleeping(options.tool_s)
    try:
        sampler = TransformersSampler(policy.model, policy.tokenizer, max_new_tokens=options.tool_tokens)
        tools = Waiting(sampler, sandbox, policy.tokenizer, observation=Observations(), call_budget=2)
        started = finished(options)
        with arithmetic(options):
            tools.generate(requests_of(options))
        seconds = finished(options) - started
        assert sandbox.runs, "no answer had a program run, so there is no wait to measure"
        return {"programs": sandbox.runs, "seconds": seconds, "wait_share": tools.waited / seconds}
    finally:
        handle.remove()
        sandbox.close()


# ---- all of it ---------------------------------------------------------------------------------------------------


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def measure(options: argparse.Namespace) -> dict[str, Any]:
    card = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    policy = make_policy(options)
    architecture = Architecture.of(policy.model.config)
    assert architecture is not None
    rows = options.prompts * options.group
    found: dict[str, Any] = {
        "card": card, "python": sys.version.split()[0], "torch": torch.__version__, "vllm": installed("vllm"),
        "transformers": installed("transformers"), "options": vars(options), "parameters": architecture.parameters,
    }  # fmt: skip
    embedded = TransformersSampler(policy.model, policy.tokenizer, max_new_tokens=options.answer_tokens, max_rows=rows)
    found["rollout"] = {"embedded": {"tokens_per_s": rollout(embedded, options)}}
    if options.device == "cuda" and find_spec("vllm") is not None:
        found["rollout"]["vllm"] = vllm_rollout(policy, options)
    seconds = training(policy, options)
    tokens = rows * (options.prompt_tokens + options.answer_tokens)
    done = needed_flops(architecture, rows, options.prompt_tokens, options.answer_tokens) / seconds
    peak = peak_flops(card)
    found["training"] = {
        "tokens_per_s": tokens / seconds, "step_s": seconds, "tflops": done / 1e12,
        "mfu": done / peak if peak else "unknown",
    }  # fmt: skip
    found["memory"] = loss_memory(policy, options)
    found["tools"] = tool_waits(policy, options)
    return found


def show(found: dict[str, Any]) -> None:
    print(f"{found['card']}, Qwen2 of {found['parameters'] / 1e9:.4f} billion parameters with random weights")
    for part in ("rollout", "training", "memory", "tools"):
        for name, value in found[part].items():
            for key, number in (value if isinstance(value, dict) else {"": value}).items():
                text = f"{number:,.3f}" if isinstance(number, int | float) else number or "not measured here"
                print(f"  {' '.join(filter(None, (part, name, key))):<36}{text:>18}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[s for s in SIZES if s != "tiny"], default="1.5b")
    parser.add_argument("--tiny", action="store_true", help="a model of no size, to try the code")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--answer-tokens", type=int, default=512)
    parser.add_argument("--microbatch", type=int, default=16)
    parser.add_argument("--kl-tokens", type=int, default=4096)
    parser.add_argument("--tool-s", type=float, default=0.1)
    parser.add_argument("--tool-tokens", type=int, default=512, help="longest answer of the rollout with tools")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA card here, so nothing was measured; --tiny --device cpu tries the code")
    if options.device == "cpu" and not options.tiny:
        raise SystemExit("--device cpu goes with --tiny only: these figures are about GPUs")
    if options.tiny:
        small = {"size": "tiny", "prompts": 2, "group": 2, "prompt_tokens": 8, "answer_tokens": 24, "microbatch": 2,
                 "kl_tokens": 32, "tool_s": 0.02, "tool_tokens": 400, "rounds": 1}  # fmt: skip
        vars(options).update(small)
    found = measure(options)
    show(found)
    if options.tiny or options.device != "cuda":
        print("these are no figures of a GPU: a tiny model tried the code; nothing was written")
        return
    folder = ROOT / "docs/results/gpu"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{re.sub(r'[^a-z0-9]+', '_', found['card'].lower()).strip('_')}_{options.size}.json"
    path.write_text(json.dumps(found, indent=2) + "\n")
    print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
