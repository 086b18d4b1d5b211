"""Tiny random models of the presets' architectures, with the template and the special tokens that their files have.

The vocabulary is that of single bytes; what matters here is the class of the tokenizer, its special tokens, the chat
template, biases, tied embeddings, rotation and the tokens that end an answer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n' + DEFAULT + '<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN2_CHAT = CHATML.replace("DEFAULT", "'You are a helpful assistant.'")
QWEN25_CHAT = CHATML.replace("DEFAULT", "'Please reason step by step, and put your final answer within \\\\boxed{}.'")
LLAMA3_CHAT = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + "
    "m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
DEEPSEEK_CHAT = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set ns.system = m['content'] %}{% endif %}{% endfor %}{{ bos_token }}{{ ns.system }}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{% set content = m['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Preset:
    """``ends``: what ends an answer in a chat; ``first``: how a chat prompt begins, ``last``: how it ends."""

    family: str
    template: str
    ends: tuple[str, ...]
    first: str
    last: str
    tied: bool = False
    positions: int = 4096
    theta: float = 10_000.0


_IM = ("<|endoftext|>", "<|im_end|>")
_QWEN = {"ends": _IM, "first": "<|im_start|>system\n", "last": "<|im_end|>\n<|im_start|>assistant\n"}
PRESETS = {
    "qwen2_math_7b": Preset("qwen2", QWEN2_CHAT, **_QWEN),
    "qwen2_5_math_1_5b": Preset("qwen2", QWEN25_CHAT, **_QWEN, tied=True),
    "qwen2_5_math_7b": Preset("qwen2", QWEN25_CHAT, **_QWEN),
    "deepseek_r1_distill_qwen_1_5b": Preset(
        "deepseek", DEEPSEEK_CHAT, ("<｜end▁of▁sentence｜>",), "<｜begin▁of▁sentence｜>", "<｜Assistant｜><think>\n",
        positions=131_072,
    ),
    "llama_3_8b_instruct": Preset(
        "llama", LLAMA3_CHAT, ("<|end_of_text|>", "<|eot_id|>"),
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", positions=8192, theta=500_000.0,
    ),
}  # fmt: skip
SPECIAL = {
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "deepseek": ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"],
    "llama": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
}


def tokenizer_of(preset: Preset) -> Any:
    """Qwen2Tokenizer for Qwen's own models, PreTrainedTokenizerFast for the others, each over single bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    vocabulary = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    special = [AddedToken(name, special=True, normalized=False) for name in SPECIAL[preset.family]]
    if preset.family == "qwen2":
        tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
        tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    else:
        core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens(special)
        if preset.family == "deepseek":  # not special in the published file, but one token each
            core.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
        end = preset.ends[0] if preset.family == "deepseek" else "<|eot_id|>"
        pad = {"pad_token": end} if preset.family == "deepseek" else {}  # Llama-3 names none
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core, bos_token=SPECIAL[preset.family][0], eos_token=end, **pad
        )
    tokenizer.chat_template = preset.template
    return tokenizer


def save(name: str, folder: Path) -> str:
    """A folder as ``save_pretrained`` writes it; returns its path."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    preset = PRESETS[name]
    tokenizer = tokenizer_of(preset)
    config, kind = (LlamaConfig, LlamaForCausalLM) if preset.family == "llama" else (Qwen2Config, Qwen2ForCausalLM)
    ends = [tokenizer.convert_tokens_to_ids(end) for end in preset.ends if end != "<|im_end|>"]
    settings = config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=-(-len(tokenizer) // 16) * 16, max_position_embeddings=preset.positions,
        tie_word_embeddings=preset.tied, rope_parameters={"rope_type": "default", "rope_theta": preset.theta},
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends[0], pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(settings)
    model.generation_config = GenerationConfig(eos_token_id=ends if len(ends) > 1 else ends[0])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if preset.family == "deepseek":  # what the published file says of itself
        said = folder / "tokenizer_config.json"
        said.write_text(json.dumps(json.loads(said.read_text()) | {"tokenizer_class": "LlamaTokenizerFast"}))
    return str(folder)
