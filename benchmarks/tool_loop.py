"""How long 64 answers with tool calls take: each going on by itself, against rounds in which all wait for the slowest.

One policy, one set of prompts, programs that take 100 ms each, the same draws. The round loop samples every answer to
the end of its turn, runs all programs side by side, and only then begins the next turn, which reads every answer again
from its first token: what a loop around a plain `generate` does, ToRL's released one among them. Programs are threads
that sleep: the loops are compared, not sandboxes. The policy is untrained and its output layer leans towards blocks of
code, so that turns differ in length. Both loops must return the same answers, or the benchmark fails.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from contextlib import nullcontext

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from core_torl.code_blocks import OUTPUT
from core_torl.model.tiny import TinyArchitecture, build_tiny
from core_torl.model.tiny_tokenizer import build_tokenizer
from core_torl.sampler.generate_session import GenerateSession
from core_torl.sampler.protocol import SampleRequest
from core_torl.sampler.transformers import TransformersSampler
from core_torl.sandbox.protocol import Execution
from core_torl.tool.observation import Observations
from core_torl.tool.tool_sampler import ToolSampler


class Sleeping:
    """Programs that take a fixed time on a clock of their own."""

    concurrency = 64

    def __init__(self, seconds: float, threads: int) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self.seconds, self.pool = seconds, ThreadPoolExecutor(threads)

    def start(self) -> None: ...

    def submit(self, code: str):
        return self.pool.submit(self._run)

    def _run(self) -> Execution:
        time.sleep(self.seconds)
        return Execution("17", "", "ok", self.seconds)

    def close(self) -> None:
        self.pool.shutdown()


class RoundLoop(ToolSampler):
    """Waits for all programs of a round before the next turn."""

    def _session(self, requests, sampling):
        return nullcontext(GenerateSession(self.sampler, requests, sampling))

    @staticmethod
    def _take(results, wait: bool) -> None:
        """``wait`` says that no answer is being generated: the round is over when its last program is."""
        if not wait:
            return
        held = [results.get()]
        while len(held) < len(held[0][0].waiting):
            held.append(results.get())
        for loop, row, future in held:
            loop.observe(row, future)


def policy(seed: int):
    tokenizer = build_tokenizer(["x", "is", "the", "number"], max_length=1024)
    model = build_tiny(tokenizer, TinyArchitecture(layers=3, width=128, heads=4, mlp=384), seed).eval()
    bias = torch.zeros(len(tokenizer))
    leaning = {"```python": 5.0, "\n": 7.0, "```": 5.5, OUTPUT: 4.2, " 1": 5.5, "x": 5.5, " the": 5.5, "</s>": 2.2}
    for word, weight in leaning.items():
        (i,) = tokenizer(word, add_special_tokens=False)["input_ids"]
        bias[i] = weight
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + bias)
    return model, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=int, default=64)
    parser.add_argument("--tool-s", type=float, default=0.1)
    parser.add_argument("--budget", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = policy(0)
    sampler = TransformersSampler(model, tokenizer, max_new_tokens=args.max_new_tokens)
    sandbox = Sleeping(args.tool_s, args.answers)
    made = {
        name: kind(sampler, sandbox, tokenizer, observation=Observations(), call_budget=args.budget)
        for name, kind in (("each by itself", ToolSampler), ("rounds", RoundLoop))
    }
    requests = [SampleRequest(tuple(range(300, 320 + i)), 8, i) for i in range(args.answers // 8)]
    seconds: dict[str, list[float]] = {name: [] for name in made}
    answers: dict[str, list] = {}
    for turn in range(args.rounds + 1):
        for name, tools in made.items():
            started = time.perf_counter()
            groups = tools.generate(requests)
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
            answers[name] = [(s.token_ids, s.finish, len(s.calls)) for group in groups for s in group]
    assert len({str(a) for a in answers.values()}) == 1, "the loops returned different answers"
    flat = answers["each by itself"]
    lengths = sorted(len(ids) for ids, _, _ in flat)
    calls = [n for _, _, n in flat]
    print(f"{len(flat)} answers, {sum(calls)} calls of {args.tool_s * 1000:.0f} ms, at most {max(calls)} in an answer")
    print(f"tokens of an answer: median {lengths[len(lengths) // 2]}, longest {lengths[-1]}; {args.rounds} rounds\n")
    print(f"{'loop':20} {'median s':>9} {'fastest':>9} {'slowest':>9} {'slower than each by itself':>28}")
    own = statistics.median(seconds["each by itself"])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:20} {median:9.2f} {min(times):9.2f} {max(times):9.2f} {median / own:27.2f}x")
    sandbox.close()
    print(f"\nratio tool_loop {statistics.median(seconds['rounds']) / own:.2f}")


if __name__ == "__main__":
    main()
