"""How much memory does a KL over a whole large vocabulary take? Ours slice by slice, beside the obvious way.

CORE-KL compares two next-token distributions over the whole vocabulary, 151,936 tokens for Qwen's models. The naive
form makes both [tokens, vocabulary] log-softmaxes in float32 at once; ours makes them slice by slice and again in the
backward pass. Both start from random hidden states of 1,024 tokens and go forward and backward, down to the gradients
of the student's hidden states and of the head that both sides share.

    OMP_NUM_THREADS=1 python benchmarks/kl_memory.py [--hidden 896] [--tokens 1024] [--rounds 3] [--device cpu]

What is printed is the **extra** memory at the peak, over what stands before: hidden states, the head's weight, and the
gradients of both. Every training needs the latter and keeps them from step to step, so they are made beforehand, in
both forms; every buffer is written to, so that it is really there. On the CPU each measurement is the growth of the
peak resident memory in a fresh process; on CUDA it is torch.cuda.max_memory_allocated, also in fresh processes.
Gradients are compared in a further process; those of --exact tokens also with float64.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

VOCABULARY, BAR = 151_936, 2.0  # GiB
FORMS, DTYPES = ("naive", "ours"), ("bfloat16", "float32")
GIB = 2**30


def make(options: argparse.Namespace, dtype: str, vocabulary: int = VOCABULARY, tokens: int = 0) -> dict[str, Any]:
    """Hidden states, head and their gradients; nothing larger than them is ever made on the way."""
    import torch

    tokens = tokens or options.tokens
    torch.manual_seed(0)
    kind = {"dtype": getattr(torch, dtype), "device": options.device}
    weight = torch.empty(vocabulary, options.hidden, **kind).normal_(std=2 / options.hidden**0.5)
    student, teacher = (torch.empty(tokens, options.hidden, **kind).normal_() for _ in range(2))
    for leaf in (weight, student):
        leaf.requires_grad_().grad = torch.empty_like(leaf).fill_(0.0)  # zeros() would not touch its pages
    ids = torch.randint(vocabulary, (tokens,), device=options.device)
    weights = torch.full((tokens,), 1 / tokens, device=options.device)
    return {"weight": weight, "student": student, "teacher": teacher, "ids": ids, "weights": weights}


def naive(weight: Any, student: Any, teacher: Any, ids: Any, weights: Any) -> float:
    """The loss as one writes it down: float32, all tokens at once."""
    import torch

    with torch.no_grad():
        target = torch.nn.functional.linear(teacher, weight).float().log_softmax(dim=-1)
    own = torch.nn.functional.linear(student, weight).float().log_softmax(dim=-1)
    loss = ((target.exp() * (target - own)).sum(dim=-1) * weights).sum()
    loss.backward()
    return float(loss.detach())


def ours(weight: Any, student: Any, teacher: Any, ids: Any, weights: Any) -> float:
    import torch

    from core_torl.objective.distillation import divergence

    def head(states: Any) -> Any:
        return torch.nn.functional.linear(states, weight)

    loss = divergence(student, teacher, ids, weights, head, head).total
    loss.backward()
    return float(loss.detach())


RUN = {"naive": naive, "ours": ours}


def resident() -> int:
    """Bytes that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def highest() -> int:
    """Bytes that it ever held at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(options: argparse.Namespace, form: str, dtype: str) -> dict[str, Any]:
    """One form, forward and backward, in this fresh process."""
    import torch

    torch.set_num_threads(options.threads)
    cuda = options.device.startswith("cuda")
    RUN[form](**make(options, dtype, vocabulary=512, tokens=64))  # loads kernels and code: not what is asked
    case = make(options, dtype)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = highest()
        if before > resident() * 1.02 + 2**25:
            raise SystemExit(f"the peak before, {before}, is above what is held, {resident()}: nothing can be said")
    start = time.perf_counter()
    loss = RUN[form](**case)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    after = torch.cuda.max_memory_allocated() if cuda else highest()
    return {"extra": (after - before) / GIB, "seconds": seconds, "loss": loss, "before": before / GIB}


def compare(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Largest gradient difference of ours and naive, as a share of the largest gradient."""
    import torch

    torch.set_num_threads(options.threads)

    def gradients(form: str, tokens: int, exact: bool = False) -> list[Any]:
        case = make(options, dtype, tokens=tokens)
        if exact:
            for name in ("weight", "student", "teacher"):
                case[name] = case[name].detach().double().requires_grad_(name != "teacher")
            loss = exact_loss(**case)
            loss.backward()
        else:
            RUN[form](**case)
        return [case["student"].grad.double(), case["weight"].grad.double()]

    def apart(one: list[Any], two: list[Any]) -> list[float]:
        return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(one, two, strict=True)]

    found = {"ours, naive": apart(gradients("ours", options.tokens), gradients("naive", options.tokens))}
    if options.exact:
        truth = gradients("", options.exact, exact=True)
        for form in FORMS:
            found[f"{form}, float64"] = apart(gradients(form, options.exact), truth)
    return found


def exact_loss(weight: Any, student: Any, teacher: Any, ids: Any, weights: Any) -> Any:
    import torch

    with torch.no_grad():
        target = torch.nn.functional.linear(teacher, weight).log_softmax(dim=-1)
    own = torch.nn.functional.linear(student, weight).log_softmax(dim=-1)
    return ((target.exp() * (target - own)).sum(dim=-1) * weights).sum()


def child(job: list[str]) -> dict[str, Any]:
    """Run ``job`` in a fresh process, with the options of this one."""
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--job", *job], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the measurement of {' '.join(job)} ended with code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=896, help="hidden size (896: Qwen2.5-0.5B, 1536: 1.5B)")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds; medians are printed")
    parser.add_argument("--exact", type=int, default=256, help="tokens of the comparison with float64; 0 leaves it out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)  # what a child is asked to do
    options = parser.parse_args()
    if options.job:
        what, *rest = options.job
        print(json.dumps(compare(options, *rest) if what == "compare" else measure(options, *rest)))
        return
    found: dict[tuple[str, str], list[dict[str, Any]]] = {(d, f): [] for d in DTYPES for f in FORMS}
    for _ in range(options.rounds):
        for dtype, form in found:
            found[dtype, form].append(child(["measure", form, dtype]))
    gaps = {dtype: child(["compare", dtype]) for dtype in DTYPES}

    def median(dtype: str, form: str, key: str) -> float:
        return statistics.median(run[key] for run in found[dtype, form])

    print(
        f"forward KL, {options.tokens} tokens x {VOCABULARY} vocabulary, hidden size {options.hidden}, "
        f"{options.device}, {options.threads} thread(s), {options.rounds} rounds"
    )
    print("extra: peak memory over hidden states, head weight and the gradients of both, which stand before")
    print(f"{'head':<10}{'form':<7}{'before GiB':>11}{'extra GiB':>11}{'min':>7}{'max':>7}{'s':>8}{'loss':>12}")
    for (dtype, form), runs in found.items():
        extras = [run["extra"] for run in runs]
        print(
            f"{dtype:<10}{form:<7}{median(dtype, form, 'before'):>11.2f}{median(dtype, form, 'extra'):>11.2f}"
            f"{min(extras):>7.2f}{max(extras):>7.2f}{median(dtype, form, 'seconds'):>8.2f}"
            f"{median(dtype, form, 'loss'):>12.6f}"
        )
    print(f"{'largest gradient difference / largest gradient':<48}{'hidden states':>14}{'head':>10}")
    for dtype, pairs in gaps.items():
        for pair, (states, head) in pairs.items():
            tokens = options.exact if "float64" in pair else options.tokens
            print(f"{f'{dtype}, {tokens} tokens: {pair}':<48}{states:>14.1e}{head:>10.1e}")
    worst = max(DTYPES, key=lambda d: median(d, "ours", "extra"))
    extra = median(worst, "ours", "extra")
    print(f"ours below {BAR:.0f} GiB extra: {'yes' if extra < BAR else 'NO'} ({extra:.2f} GiB with a {worst} head)")
    for dtype in DTYPES:
        print(f"{dtype}: {median(dtype, 'naive', 'extra') / median(dtype, 'ours', 'extra'):.1f} times less memory")
    print(f"ratio kl_memory {median(worst, 'naive', 'extra') / extra:.2f}")


if __name__ == "__main__":
    main()
