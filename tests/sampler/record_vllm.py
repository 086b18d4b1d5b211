"""Records what a real vLLM server says to our client, for the tests that run without vLLM.

To be run where vLLM is installed, after any change of what the client asks: ``python -m tests.sampler.record_vllm``.
The tests run the same ``scenario`` against the recording, so it must depend on nothing but its arguments.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from core_torl.model.load import Policy
from core_torl.model.tiny import TinyArchitecture, build_tiny
from core_torl.model.tiny_tokenizer import build_tokenizer
from core_torl.sampler.protocol import SampleRequest, SamplingConfig
from core_torl.sampler.vllm_install import check_vllm
from core_torl.sampler.vllm_replicas import Launch, Replica, start_all
from core_torl.sampler.vllm_server import VllmServerSampler
from core_torl.sampler.vllm_weights import WeightFolders, write_shards
from tests.conftest import WORDS
from tests.sampler.fake_vllm import RECORDED, Proxy

EOS = list(range(2, 600, 20))  # one token in twenty ends an answer, so that lengths differ
STOP = SamplingConfig(24, stop=("never said", "1"))
HOW = {
    "plain": SamplingConfig(24),
    "warm": SamplingConfig(24, temperature=0.7, top_p=0.9, top_k=40, min_p=0.01),
    "greedy": SamplingConfig(24, temperature=0.0),
    "late": SamplingConfig(24, min_new_tokens=9),
    "stop": STOP,
}


def tokenizer() -> Any:
    return build_tokenizer(WORDS, max_length=512)


def model(seed: int = 0, lora: bool = False) -> Any:
    """A tiny Llama with heads of a size that vLLM's CPU kernels know, far from uniform.

    ``lora``: the model of seed 0 with adapters of ``seed``.
    """
    arch = TinyArchitecture(layers=2, width=128, heads=4, mlp=128, max_length=512)
    with torch.random.fork_rng():
        made: Any = build_tiny(tokenizer(), arch, 0 if lora else seed)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4.0)
        if lora:
            from peft import LoraConfig, get_peft_model

            torch.manual_seed(seed)
            made = get_peft_model(made, LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj", "o_proj"]))
            with torch.no_grad():
                for name, parameter in made.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(std=0.3)
    return made.eval()


def policy(seed: int = 0, lora: bool = False) -> Policy:
    return Policy(model(seed, lora), tokenizer(), lora)


def requests() -> list[SampleRequest]:
    """Prompts of 1 to 90 tokens, groups of 1 to 4; the longest fill more than a block of the prefix cache."""
    lengths = [1, 30, 9, 90, 70]
    return [
        SampleRequest(tuple(3 + (7 * i * i + 11 * j * j + 5 * j) % 590 for j in range(n)), size, 100 + i)
        for i, (n, size) in enumerate(zip(lengths, (1, 4, 2, 3, 1), strict=True))
    ]


def sampler_of(policy: Policy, urls: list[str], **settings: Any) -> VllmServerSampler:
    return VllmServerSampler(policy.model, policy.tokenizer, max_new_tokens=24, eos_ids=EOS, urls=urls, **settings)


def scenario(url: str) -> None:
    """Everything that the tests ask."""
    first, second = policy(0), policy(1)
    sampler = sampler_of(first, [url])
    sampler.sync(first, "0")
    for sampling in HOW.values():
        sampler.generate(requests(), sampling)
    sampler.generate([SampleRequest((5, 6, 7), 64, 9)])
    sampler.generate([SampleRequest((3 + i, 4, 5), 2, i) for i in range(12)])
    run_session(sampler)
    sampler.sync(second, "1")
    sampler.generate(requests())
    sampler.sync(first, "2")  # adapters stand on these
    sampler.close()
    both = [policy(0, lora=True), policy(1, lora=True)]
    sampler = sampler_of(both[0], [url], weights="lora")
    for version, adapted in enumerate(both):
        sampler.sync(adapted, f"adapter {version}")
        sampler.generate(requests())
    sampler.close()


def run_session(sampler: VllmServerSampler, on_resume: Callable[[int], None] = lambda row: None) -> list[Any]:
    """Every row that stops is sent on once, behind three given tokens; the answers in order."""
    resumed: set[int] = set()
    asked = requests()
    with sampler.session(asked, STOP) as session:
        while session.running:
            for row in session.advance():
                answer = session.answer(row)
                if answer.finish == "stop" and row not in resumed and len(answer.token_ids) < 20:
                    resumed.add(row)
                    session.resume(row, (31, 7, 120), ())
                    on_resume(row)
                else:
                    session.release(row)
        return [session.answer(row) for row in range(sum(r.n for r in asked))]


def launch(**changes: Any) -> Launch:
    """The smallest server on the CPU."""
    settings: dict[str, Any] = {
        "dtype": "float32", "max_model_len": 512, "block_size": 32, "gpu_memory_utilization": 0.1, "kv_cache_mb": 64,
        "enforce_eager": True, "environment": {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"},
        "log_dir": Path(tempfile.mkdtemp(prefix="vllm-log-")), "start_timeout_s": 280.0,
    }  # fmt: skip
    return Launch(**{**settings, **changes})


def served_folder(folder: Path, seed: int = 5) -> Path:
    """A model on disk, whose weights are those of no version in the scenario."""
    folder.mkdir(parents=True, exist_ok=True)
    made = policy(seed)
    write_shards(made.merged(), folder)
    WeightFolders.describe(folder, made.model.config, made.tokenizer)
    return folder


def record(name: str, proxy: Proxy, vllm: str) -> None:
    RECORDED.mkdir(exist_ok=True)
    content = {"vllm": vllm, "exchanges": dict(sorted(proxy.exchanges.items()))}
    (RECORDED / f"{name}.json").write_text(json.dumps(content, indent=0) + "\n")
    print(f"{name}: {len(proxy.exchanges)} exchanges")


def main() -> None:
    vllm = check_vllm()
    folder = served_folder(Path(tempfile.mkdtemp()) / "model")
    raw = ("--logprobs-mode", "raw_logprobs")
    # Two servers at most: each takes a minute to start.
    kinds = {"server": launch(lora_rank=8), "raw": launch(extra_args=raw, lora_rank=8)}
    chosen = sys.argv[1:] or list(kinds)
    replicas = [Replica(kinds[name], 0, timeout_s=120, connections=64) for name in chosen]
    try:
        start_all(replicas, folder)
        proxies = {name: Proxy(r.server.url) for name, r in zip(chosen, replicas, strict=True)}
        if "server" in chosen:
            scenario(proxies["server"].url)
        if "raw" in chosen:
            try:
                sampler_of(policy(), [proxies["raw"].url])
            except ValueError as refused:
                print("raw ->", refused)
        for name, proxy in proxies.items():
            record(name, proxy, vllm)
    finally:
        for replica in replicas:
            replica.stop()


if __name__ == "__main__":
    main()
