"""A dry run reads, measures and counts, loads no weights, needs no GPU and no network, and names what it could not check."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from rich.console import Console

import core_torl.runs.dry_run as module
from core_torl.config import UserError
from core_torl.config.checks import check_train
from core_torl.config.paths import conf_dir
from core_torl.config.schema import register
from core_torl.model.load import shipped_folder
from core_torl.runs.dry_run import dry_run, plan_of

RECIPES = sorted(
    p.stem for p in Path(conf_dir(), "experiment").glob("*.yaml") if p.stem.startswith(("core_", "torl_1", "torl_7"))
)
# By a part of the recipe's name.
SIZES = {
    "qwen2_math_7b": 7_615_616_512, "torl_7b": 7_615_616_512, "qwen2_5_math_1_5b": 1_543_714_304,
    "torl_1_5b": 1_543_714_304, "deepseek": 1_777_088_000, "llama": 8_030_261_248,
}  # fmt: skip


def config(*overrides: str) -> DictConfig:
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(conf_dir(), version_base=None):
        cfg = compose("train", overrides=["paths.output_dir=somewhere", "dry_run=true", *overrides])
    check_train(cfg)
    return cfg


@pytest.fixture
def run(monkeypatch):
    """``run("key=value", ...)`` returns what a dry run prints; loading weights fails it."""
    import transformers

    monkeypatch.setattr(
        transformers.PreTrainedModel, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded")
    )
    monkeypatch.setattr(module, "print_config_tree", lambda *a: None)

    def call(*overrides: str) -> str:
        printed = io.StringIO()
        monkeypatch.setattr(module, "console", Console(file=printed, width=200))
        dry_run(config(*overrides))
        return printed.getvalue()

    return call


@pytest.fixture(scope="module")
def quizzes(tmp_path_factory) -> str:
    """150 quizzes in the published form, of 50 concepts."""
    rows = [
        {
            "concept_title": f"Section {c}: Concept {c}", "question_id": n + 1, "answer": "A. yes", "options": ["A. yes", "B. no"],
            "original_question": f"Is ${c} + {n}$ a sum?", "explanation": "It is.", "related_concept": f"Sum {c}.",
        }
        for c in range(50) for n in range(3)
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("q") / "quizzes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> str:
    """180 problems in verl's form, so that a step's 128 are there when some are held out."""
    rows = [
        {"data_source": "math", "prompt": [{"role": "user", "content": f"What is ${i} + 1$?"}], "reward_model": {"ground_truth": str(i + 1)}}
        for i in range(180)
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("p") / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_of_a_real_model_runs_dry_without_its_model(recipe, run, quizzes, problems):
    """Nothing but data.path has to be given; on this machine there is neither the model nor perhaps a GPU."""
    printed = run(f"experiment={recipe}", f"data.path={problems if 'torl' in recipe else quizzes}")
    size = next(size for part, size in SIZES.items() if part in recipe)
    assert f"model: {size:,} weights (the built-in table)" in printed
    assert "tokenizer, chat template and prompt lengths; licence" in printed
    assert "peak in GiB with devices" in printed and "dry run: nothing was loaded" in printed


def test_the_papers_numbers_of_steps_come_out(run, quizzes):
    """CORE: 92 optimizer steps for Base and KL, 100 for CR; its three passes are over all 1,110 quizzes."""
    for recipe, steps, updates in (("base", 23, 92), ("kl", 23, 92), ("cr", 50, 100)):
        printed = run(f"experiment=core_{recipe}_qwen2_math_7b", f"data.path={quizzes}")
        assert f"run: {steps} RL steps, {updates} optimizer steps" in printed
    assert "64 problems x 4 answers = 256 trajectories, 2 optimizer step(s) of 128" in printed


def test_a_local_model_is_measured(run):
    printed = run("model=tiny", "prompts_per_step=4", "data.train_per_concept=4")
    config_ = json.loads((shipped_folder("tiny") / "config.json").read_text())
    assert f"{config_['num_hidden_layers']} layers of {config_['hidden_size']}" in printed
    assert "(its folder)" in printed and "median" in printed and "0 longer than model.max_prompt_tokens=768" in printed
    assert "  | " in printed and "Question:" in printed and "an answer ends with <" in printed
    assert "tokenizer" not in printed.split("not checked")[-1] and "not here" not in printed


def test_primed_prompts_and_long_ones_are_counted(run):
    arguments = ("variant=core_cr", "prompts_per_step=4", "data.train_per_concept=4")
    printed = run(*arguments)
    assert "with the concept" in printed and "never coached" in printed
    limit = int(printed.split("prompt: style plain, ")[1].split(" to ")[1].split(",")[0]) - 1
    assert " 0 longer than model.max_prompt_tokens" not in run(*arguments, f"model.max_prompt_tokens={limit}")
    with pytest.raises(UserError, match="every training prompt is longer"):
        run(*arguments, "model.max_prompt_tokens=3")


def test_a_text_longer_than_the_model_is_refused(run, quizzes):
    with pytest.raises(
        UserError, match=r"together 5024, and the model has 4096 positions; lower model.max_new"
    ) as error:
        run("experiment=core_kl_qwen2_math_7b", f"data.path={quizzes}", "model.max_new_tokens=4000")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="the longest prompt has"):
        run("prompts_per_step=4", "data.train_per_concept=4", "model.max_new_tokens=4000")


def test_a_chat_without_a_template_is_refused_before_weights(run):
    with pytest.raises(UserError, match="no chat template; use another model/prompt") as error:
        run("model/prompt=boxed_chat", "prompts_per_step=4", "data.train_per_concept=4")
    assert "\n" not in str(error.value)


def test_a_folder_without_a_tokenizer_is_refused_in_one_line(run, tmp_path):
    shutil.copy(shipped_folder("tiny") / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"model\.path") as error:
        run(f"model.path={tmp_path}", "prompts_per_step=4")
    assert "\n" not in str(error.value)


def test_an_unknown_model_of_the_hub_is_named_as_unchecked(run):
    printed = run("model=hf", "model.path=nobody/nothing", "prompts_per_step=4", "data.train_per_concept=4")
    assert "architecture and memory; tokenizer" in printed and "memory on each" not in printed


def test_leakage_and_duplicates_are_said(run, tmp_path):
    def write(name: str, *questions: str) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in questions))
        return str(path)

    train, test = write("train.jsonl", "One?", "Two?", "two ?", "Three?", "{"), write("t.jsonl", "ONE?")
    given = ("data=math", "variant=grpo", f"data.path={train}", f"data.test_path={test}", "prompts_per_step=2")
    printed = run(*given)
    assert "1 training rows are asked in a test set too (t 1), left out" in printed
    assert "1 training rows ask what another one asks (kept; data.deduplicate_train=true folds them)" in printed
    printed = run(*given, "data.on_leakage=report", "data.deduplicate_train=true")
    assert "KEPT: data.on_leakage=drop" in printed and "(folded)" in printed
    with pytest.raises(UserError, match=r"data\.on_leakage=drop to leave them out"):
        run(*given, "data.on_leakage=error")
    assert "no training question is asked in a test set" in run(*given[:-2], f"data.test_path={write('u.jsonl', 'Four?')}", "prompts_per_step=2")  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "field", "value"),
    [
        ((), "copies", 1),
        (("objective.kl_coef=0",), "copies", 0),
        (("objective.kl_coef=0", "variant.teacher=reference"), "copies", 1),
        (("variant.teacher=old",), "copies", 1),
        (("variant.teacher=old",), "shadows", 1),
        (("variant.teacher=old", "variant.minibatch_size=512"), "shadows", 0),
        (("variant.teacher=old", "model.lora.rank=8", "model.dtype=bfloat16"), "shadows", 1),
        (("variant.teacher=reference",), "copy_teaches", True),
        (("variant.teacher=old",), "copy_teaches", False),
        (("sampler=vllm",), "sampler_sleeps", True),
        (("sampler=vllm", "trainer=cpu", "sampler.dtype=null"), "sampler_sleeps", False),
        (("model.lora.rank=8", "model.dtype=bfloat16"), "copies", 0),
        (("model.lora.rank=8",), "rank", 8),
        (("trainer.devices=2", "trainer.strategy=ddp"), "ranks", 2),
        (("trainer.precision=32-true",), "mixed", False),
        (("sampler=transformers", "sampler.copy_weights=true"), "sampler_weights", 4),
        (("sampler=transformers",), "sampler_weights", 0),
        # 512 answers of 1,024 tokens to 128 prompts of as many
        (("sampler=transformers",), "cache_tokens", 512 * 1024 + 128 * 1024),
        (("sampler=transformers", "sampler.max_rows=16"), "cache_tokens", 16 * 1024 + 4 * 1024),
        (("trainer.devices=4", "trainer.strategy=ddp", "sampler=transformers"), "cache_tokens", 128 * 1024 + 32 * 1024),
    ],
)
def test_the_config_decides_what_is_counted(overrides, field, value):
    plan = plan_of(config("experiment=core_kl_qwen2_math_7b", "data.path=x", "sampler=transformers", *overrides))
    assert getattr(plan, field) == value


def test_what_vllm_may_take_of_a_card_is_what_the_trainer_leaves(run, problems):
    """ToRL-1.5B: 16 bytes for each of 1.54 billion weights are 23 of 78 GiB."""
    full = run("experiment=torl_1_5b", f"data.path={problems}", "sampler.dtype=float32")
    refused = "does not fit on a GPU of 40 GB as configured: set sampler.gpu_memory_utilization=0.39 (it is 0.4, which"
    assert f"{refused} fits on one of 80 GB)" in full
    lower = run("experiment=torl_1_5b", f"data.path={problems}", "sampler.gpu_memory_utilization=0.39")
    assert "fits on a GPU of 40 GB with sampler.gpu_memory_utilization=0.39 (there is room up to 0.39)" in lower
    stays = run("experiment=torl_1_5b", f"data.path={problems}", "sampler.gpu_memory_utilization=0.39", "sampler.sleep_level=0")  # fmt: skip
    assert "40 GB as configured: set sampler.gpu_memory_utilization=0.22 (it is 0.39, which" in stays, "learning too"
    assert "sampler.dtype=bfloat16 halves" in full
    assert "sampler.dtype" not in run("experiment=torl_1_5b", f"data.path={problems}")
    served = run("experiment=torl_1_5b", f"data.path={problems}", "sampler=vllm_server", "sampler.urls=[http://a:8000]", "sampler.sync_dir=.")  # fmt: skip
    assert "sampler's weights" not in served and "gpu_memory_utilization" not in served.split("memory on each")[1]
    assert "sampler.sync_dir (.) gets 2.9 GiB after each RL step (sampler.weights=merged) and needs 5.8 GiB" in served
    assert "sync_dir" not in full


def test_all_weights_on_each_rank_before_they_are_spread_are_the_peak(run, quizzes):
    """7.6 billion float32 weights and the copy that is the reference: 2 x 28.4 GiB on each of 8 ranks."""
    recipe = ("experiment=core_kl_qwen2_math_7b", f"data.path={quizzes}", "trainer.devices=8", "sampler=transformers", "sampler.copy_weights=true")  # fmt: skip
    sharded = run(*recipe, "trainer=fsdp")
    assert "starting, not yet sharded: all weights 28.4 GiB, whole frozen copies 28.4 GiB" in sharded
    assert "starting" not in run(*recipe, "trainer=ddp_gpu")


@pytest.mark.parametrize("sampler", ["vllm", "vllm_server"])
def test_an_unknown_number_format_of_the_sampler_is_one_line(sampler):
    cfg = config(f"sampler={sampler}")
    cfg.sampler.dtype = "half"
    with pytest.raises(UserError, match=r"sampler\.dtype=half: use float32, bfloat16, float16, or null") as error:
        plan_of(cfg)
    assert "\n" not in str(error.value)


def test_how_many_questions_are_held_out_is_said(run, problems):
    printed = run("experiment=torl_1_5b", f"data.path={problems}")
    assert " of 180 questions are held out, each by a hash of its text and data.seed\n" in printed
    none = run("experiment=torl_1_5b", f"data.path={problems}", "data.test_fraction=0")
    assert "0 of 180 questions are held out" in none and "raise data.test_fraction" in none


def test_questions_are_shown_as_they_stand(run, tmp_path):
    """Brackets of formulas are no markup."""
    path = tmp_path / "x.jsonl"
    path.write_text(
        "".join(json.dumps({"question": rf"Solve \[x = {i}\] or [bold]?", "answer": "1"}) + "\n" for i in range(3))
    )
    printed = run("data=math", "variant=grpo", f"data.path={path}", "prompts_per_step=1")
    assert r"Solve \[x = " in printed or r"\[ x =" in printed


def test_supervised_fine_tuning_samples_nothing(run, quizzes):
    printed = run("experiment=core_sft_qwen2_math_7b", f"data.path={quizzes}")
    assert "at most 0 sampled tokens" in printed and "LoRA adapters" in printed
    assert plan_of(config("experiment=core_sft_qwen2_math_7b", "data.path=x")).cache_tokens == 0
