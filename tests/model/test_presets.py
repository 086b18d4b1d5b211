"""Each preset of a real model, with a tiny random model of its architecture: prompt, ends of answers, one RL step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from core_torl.config.checks import check_train
from core_torl.config.paths import conf_dir
from core_torl.config.schema import register
from core_torl.model.memory import KNOWN
from core_torl.runs.assemble import Parts, assemble, prepare
from core_torl.runs.training import coach_of, make_module, quiet

from .presets import PRESETS, save


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return {name: save(name, tmp_path_factory.mktemp(name)) for name in PRESETS}


@pytest.fixture(scope="module")
def quizzes(tmp_path_factory) -> str:
    """A file in the form of the published quizzes: four concepts of three quizzes each."""
    rows = []
    for concept in range(4):
        for number in range(3):
            options = [f"{letter}. {concept + number + i}" for i, letter in enumerate("ABCD")]
            rows.append(
                {
                    "concept_title": f"Section {concept}: Concept {concept}", "question_id": number + 1,
                    "original_question": f"What is ${concept} + {number}$?", "options": options, "answer": options[0],
                    "explanation": f"It is {concept + number}.", "related_concept": f"Adding {concept} counts on.",
                }
            )  # fmt: skip
    path = tmp_path_factory.mktemp("quizzes") / "quizzes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(*overrides: str) -> DictConfig:
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(conf_dir(), version_base=None):
        cfg = compose("train", overrides=["paths.output_dir=somewhere", *overrides])
    check_train(cfg)
    return cfg


def small(name: str, folders: dict[str, str], quizzes: str, variant: str, *overrides: str) -> DictConfig:
    """A recipe of the model, in its own settings but for sizes. Random answers are cut off: that counts as failing."""
    recipe = name if name != "qwen2_5_math_7b" else "qwen2_5_math_1_5b"  # CORE has no row of it
    return config(
        f"experiment={variant}_{recipe}", f"model={name}", "model/prompt=core", f"model.path={folders[name]}",
        f"data.path={quizzes}", "trainer=cpu", "sampler=transformers", "rl_steps=1", "group_size=4",
        "prompts_per_step=2", "variant.minibatch_size=null", "model.max_prompt_tokens=1024", "model.max_new_tokens=6",
        "variant.first_step_gap=1e-3", *overrides,
    )  # fmt: skip


def assembled(cfg: DictConfig) -> tuple[Parts, Any]:
    quiet()
    prepared = prepare(cfg)
    coach = coach_of(cfg, prepared.problems)
    parts = assemble(cfg, prepared)
    return parts, make_module(cfg, parts, coach, {}, None)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_of_a_model_whose_architecture_is_known(name, folders):
    cfg = config(f"model={name}")
    known = KNOWN[cfg.model.path]
    assert cfg.model.max_prompt_tokens + cfg.model.max_new_tokens <= known.positions
    written = json.loads((Path(folders[name]) / "config.json").read_text())
    assert bool(written["tie_word_embeddings"]) == known.tied
    assert (written["model_type"] == "qwen2") == known.qkv_bias
    assert written["max_position_embeddings"] == known.positions


@pytest.mark.parametrize("name", PRESETS)
def test_a_chat_prompt_is_the_models_own(name, folders, quizzes):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders[name], local_files_only=True)
    assert type(tokenizer).__name__ == ("TokenizersBackend" if name.startswith("llama") else "Qwen2Tokenizer")
    cfg = config(f"model={name}", "model/prompt=core", "data=core_quizzes", f"data.path={quizzes}")
    prepared = prepare(cfg)
    problem = prepared.problems.train[0]
    text = tokenizer.decode(prepared.template.encode(tokenizer, problem))
    body = prepared.template.user_text(problem)
    assert text.count(body) == 1 and text.count(cfg.model.prompt.system) == 1
    assert text.endswith(PRESETS[name].last) and text.startswith(PRESETS[name].first)
    starts = prepared.template.encode(tokenizer, problem).count(tokenizer.bos_token_id or -1)
    assert starts == (0 if PRESETS[name].family == "qwen2" else 1), (
        "one start token, and only where the template has it"
    )


@pytest.mark.parametrize("name", PRESETS)
def test_answers_end_where_the_model_or_its_template_ends_them(name, folders, quizzes):
    parts, _ = assembled(small(name, folders, quizzes, "core_base"))
    tokenizer = parts.policy.tokenizer
    assert {tokenizer.convert_ids_to_tokens(i) for i in parts.sampler.eos_ids} == set(PRESETS[name].ends)
    turn = {"qwen2": "<|im_end|>", "llama": "<|eot_id|>", "deepseek": "<｜end▁of▁sentence｜>"}[PRESETS[name].family]
    assert tokenizer.convert_ids_to_tokens(parts.policy.eos_id) == turn, "given answers end as the template ends them"
    parts.close()


def test_a_base_prompt_leaves_the_ends_as_they_are(folders, quizzes):
    cfg = small("qwen2_5_math_1_5b", folders, quizzes, "core_base", "model/prompt=torl_0309")
    parts, _ = assembled(cfg)
    assert [parts.policy.tokenizer.convert_ids_to_tokens(i) for i in parts.sampler.eos_ids] == ["<|endoftext|>"]
    parts.close()


def test_an_exported_policy_ends_its_turns_too(folders, quizzes, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parts, _ = assembled(small("qwen2_math_7b", folders, quizzes, "core_base", "model.lora.rank=2"))
    parts.policy.export(tmp_path)
    parts.close()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    ends = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True).generation_config.eos_token_id
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert {tokenizer.convert_ids_to_tokens(i) for i in ends} == {"<|endoftext|>", "<|im_end|>"}


LORA = ("model.lora.rank=2", "model.lora.alpha=4")


@pytest.mark.parametrize("adapters", [(), LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", PRESETS)
def test_one_step_of_reinforcement_learning(name, adapters, folders, quizzes, tmp_path):
    """CORE-CR or CORE-KL on groups that all fail: sampled, coached and learned from, with a gap below 1e-3."""
    variant = "core_kl" if bool(adapters) == (list(PRESETS).index(name) % 2 == 0) else "core_cr"
    parts, module = assembled(
        small(name, folders, quizzes, variant, "trigger.min_finished=0", "variant.lr=1e-2", *adapters)
    )
    before = {n: p.detach().clone() for n, p in module.model.named_parameters()}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(tmp_path),
    )  # fmt: skip
    trainer.fit(module)
    metrics = module.last_metrics
    assert module.rl_step == 1 and metrics["core/trigger_rate"] == 1 and metrics["policy/grad_norm"] > 0
    assert metrics["core/kl_per_token" if variant == "core_kl" else "core/replaced_tokens"] > 0
    changed = {n for n, p in module.model.named_parameters() if not torch.equal(before[n], p)}
    assert changed and all(("lora_" in n) == bool(adapters) for n in changed)
    parts.close()
