"""What do log-probs slice by slice cost, and what do they save? Ours beside the logits of all tokens at once.

Both forms start from the same random model (two narrow layers, so that the head is nearly all of it), go forward and
backward on the same batch, log-probs and entropies, and end with the same gradients. One case has the vocabulary of
Qwen's models, where the logits are what fills a GPU; one has the vocabulary of the shipped policy, where everything
fits into one slice and nothing should cost more.

    OMP_NUM_THREADS=1 python benchmarks/chunked_logprobs.py [--rows 8] [--tokens 128] [--hidden 256] [--rounds 5]

Time is the median over rounds in turns, in one process. Memory is counted, not sampled: a dispatch mode sees each
tensor that an operation makes and adds up the bytes of all storages that are alive; on CUDA it is
torch.cuda.max_memory_allocated. What stands before (weights, their gradients, the batch) is not counted. Ratios are
naive / ours: above 1, ours is better.
"""

from __future__ import annotations

import argparse
import statistics
import time
import weakref
from typing import Any

MIB = 2**20


def build(options: argparse.Namespace, vocabulary: int) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from core_torl.objective.token_batch import TokenBatch

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=options.hidden, intermediate_size=options.hidden, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=4096,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(options.device)
    prompts = torch.randint(1, vocabulary, (options.rows, 32)).tolist()
    answers = torch.randint(1, vocabulary, (options.rows, options.tokens)).tolist()
    zeros = [[0.0] * options.tokens] * options.rows
    masks = [[True] * options.tokens] * options.rows
    batch = TokenBatch.build(prompts, answers, zeros, masks, torch.randn(options.rows), 0, options.device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model, batch


def naive(model: Any, batch: Any) -> tuple[Any, Any]:
    logits = model(
        input_ids=batch.ids, attention_mask=batch.attention_mask, position_ids=batch.positions, use_cache=False,
        logits_to_keep=batch.answer_length + 1,
    ).logits[:, :-1]  # fmt: skip
    rows = logits.float().log_softmax(-1)
    return rows.gather(-1, batch.answer_ids[..., None]).squeeze(-1), -(rows.exp() * rows).sum(-1)


def ours(model: Any, batch: Any) -> tuple[Any, Any]:
    from core_torl.objective.logprobs import answer_logprobs

    return answer_logprobs(model, batch, entropy=True)


FORMS = {"naive": naive, "ours": ours}


def learn(form: str, model: Any, batch: Any) -> None:
    for parameter in model.parameters():
        parameter.grad.zero_()
    values, entropies = FORMS[form](model, batch)
    ((values + 0.1 * entropies) * batch.advantages[:, None]).sum().backward()


def peak(options: argparse.Namespace, form: str, model: Any, batch: Any) -> float:
    """MiB that are alive at once, over what stands before."""
    import torch

    if options.device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        learn(form, model, batch)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Alive(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.now = self.highest = 0
            self.known: set[int] = {p.untyped_storage()._cdata for p in model.parameters()}
            self.known |= {p.grad.untyped_storage()._cdata for p in model.parameters()}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self.see(leaf.untyped_storage())
            return out

        def see(self, storage: Any) -> None:
            key, size = storage._cdata, storage.nbytes()
            if key in self.known:
                return
            self.known.add(key)
            self.now += size
            self.highest = max(self.highest, self.now)
            weakref.finalize(storage, self.gone, key, size)

        def gone(self, key: int, size: int) -> None:
            self.known.discard(key)
            self.now -= size

    with Alive() as alive:
        learn(form, model, batch)
    return alive.highest / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="answer tokens of each row")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    import torch

    print(f"{options.rows} rows of {options.tokens} answer tokens, hidden size {options.hidden}, {options.device}")
    print(f"{'vocabulary':>10} {'form':<6}{'s':>9}{'peak MiB':>11}{'gradient gap':>14}")
    for name, vocabulary in (("large", 151_936), ("tiny", 700)):
        model, batch = build(options, vocabulary)
        seconds: dict[str, list[float]] = {form: [] for form in FORMS}
        gradients = {}
        for form in FORMS:  # kernels and code are loaded here
            learn(form, model, batch)
            gradients[form] = [p.grad.clone() for p in model.parameters()]
        scale = max(float(g.abs().max()) for g in gradients["naive"])
        gap = max(float((a - b).abs().max()) for a, b in zip(*gradients.values(), strict=True)) / scale
        del gradients
        for _ in range(options.rounds):
            for form in FORMS:
                start = time.perf_counter()
                learn(form, model, batch)
                if options.device != "cpu":
                    torch.cuda.synchronize()
                seconds[form].append(time.perf_counter() - start)
        peaks = {form: peak(options, form, model, batch) for form in FORMS}
        for form in FORMS:
            middle = statistics.median(seconds[form])
            print(f"{vocabulary:>10} {form:<6}{middle:>9.3f}{peaks[form]:>11.1f}{gap:>14.1e}")
        times = {form: statistics.median(values) for form, values in seconds.items()}
        print(f"ratio {name}_time {times['naive'] / times['ours']:.2f}")
        print(f"ratio {name}_memory {peaks['naive'] / peaks['ours']:.2f}")


if __name__ == "__main__":
    main()
