"""A whole run through the front door: what it writes can be read back, resumed, evaluated and loaded elsewhere."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from core_torl.tracking.mirror import read_jsonl
from core_torl.tracking.offline import read_run
from core_torl.variant.checkpoint import found, read

from .conftest import SMALL

pytestmark = pytest.mark.slow


def weights(folder: Path) -> dict[str, torch.Tensor]:
    steps = found(folder / "checkpoints")
    return read(steps[max(steps)])["state_dict"]


def test_a_run_leaves_results_a_picture_a_policy_and_a_tracked_run(front_door, tmp_path, capsys):
    assert front_door("train", *SMALL, "logger.tags=[mine]", f"hydra.run.dir={tmp_path}") == 0
    printed = capsys.readouterr().out
    assert "robust_accuracy" in printed and "gap" in printed

    results = json.loads((tmp_path / "results.json").read_text())
    assert results["after"]["gap/greedy/robust_accuracy"]["n"] == 6
    assert {"torch", "transformers", "core-torl"} <= results["environment"].keys()
    assert (tmp_path / "results.png").stat().st_size > 10_000
    assert (tmp_path / ".hydra" / "config.yaml").exists()
    history = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["train/rl_step"] for row in history] == [0, 1, 2, 2]

    run = read_run(tmp_path)
    assert run.exit_code == 0 and not run.truncated and run.job_type == "train"
    assert run.config["variant.lr"] == 1e-4 and run.config["group_size"] == 4
    assert {"mine", "group_size=4"} <= set(run.tags) and run.group == "core_base-concept_world"
    logged = {row["train/rl_step"]: row["reward/mean"] for row in run.history if "reward/mean" in row}
    assert logged == {row["train/rl_step"]: row["reward/mean"] for row in history if "reward/mean" in row}
    assert run.tables("rollouts/even")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    trained = weights(tmp_path)
    assert all(torch.equal(trained[f"model.{n}"], t) for n, t in model.state_dict().items())
    assert model.generate(**tokenizer(" a + b", return_tensors="pt"), max_new_tokens=2).shape[1] > 2

    assert front_door("evaluate", f"checkpoint={tmp_path}", "evaluation.max_problems=6", "evaluation.samples=1", "data.test_per_concept=1", "logger.system_metrics=false", "model.max_new_tokens=24", f"hydra.run.dir={tmp_path / 'eval'}") == 0  # fmt: skip
    again = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert again["estimates"] == results["after"]
    assert read_run(tmp_path / "eval").job_type == "evaluate"


def test_a_longer_run_resumed_equals_one_in_a_single_piece_and_keeps_its_wandb_run(front_door, tmp_path):
    quiet = [*SMALL, "evaluation.max_problems=2"]
    assert front_door("train", *quiet, f"hydra.run.dir={tmp_path / 'a'}") == 0
    first = read(found(tmp_path / "a" / "checkpoints")[2])["core_torl"]["run_id"]
    assert front_door("train", *quiet, "rl_steps=4", "resume=auto", f"hydra.run.dir={tmp_path / 'a'}") == 0
    assert front_door("train", *quiet, "rl_steps=4", "logger.mode=disabled", f"hydra.run.dir={tmp_path / 'b'}") == 0
    one, two = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(one[k], two[k]) for k in two)
    assert read(found(tmp_path / "a" / "checkpoints")[4])["core_torl"]["run_id"] == first
    steps = [row["train/rl_step"] for row in read_jsonl(tmp_path / "a" / "metrics.jsonl") if "reward/mean" in row]
    assert steps == [1, 2, 3, 4]


def test_a_checkpoint_of_another_config_is_refused_in_one_line(front_door, tmp_path, capsys):
    quiet = [*SMALL, "rl_steps=1", "evaluation.max_problems=1", "logger.mode=disabled", "export=false"]
    assert front_door("train", *quiet, f"hydra.run.dir={tmp_path}") == 0
    capsys.readouterr()
    assert (
        front_door(
            "train", *quiet, "rl_steps=2", "variant.lr=1e-3", f"resume={tmp_path}", f"hydra.run.dir={tmp_path / 'b'}"
        )
        == 2
    )
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "variant.lr was 0.0001 and is 0.001" in error
    assert front_door("train", *quiet, "resume=auto", f"hydra.run.dir={tmp_path}") == 2
    assert "raise rl_steps to go on" in capsys.readouterr().err


def test_ctrl_c_leaves_a_usable_checkpoint_and_exit_code_130(front_door, tmp_path, monkeypatch):
    from core_torl.variant.policy_gradient import PolicyGradient

    real = PolicyGradient.weigh

    def weigh(self, groups):
        if self.rl_step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, groups)

    monkeypatch.setattr(PolicyGradient, "weigh", weigh)
    quiet = [
        *SMALL,
        "rl_steps=5",
        "evaluation.max_problems=1",
        "callbacks.checkpoint_every=0",
        f"hydra.run.dir={tmp_path}",
    ]
    assert front_door("train", *quiet) == 130
    assert found(tmp_path / "checkpoints").keys() == {2}
    assert read_run(tmp_path).exit_code == 1
    monkeypatch.undo()
    assert front_door("train", *quiet, "resume=auto", "rl_steps=3") == 0


def test_lora_is_one_key(front_door, tmp_path):
    assert front_door("train", *SMALL, "rl_steps=1", "evaluation.max_problems=1", "model.lora.rank=4", "logger.mode=disabled", f"hydra.run.dir={tmp_path}") == 0  # fmt: skip
    assert all("lora_" in name for name in weights(tmp_path))
    assert (tmp_path / "policy" / "adapter" / "adapter_config.json").exists()


def test_published_quizzes_train_the_tiny_policy(front_door, tmp_path):
    shared = Path(os.environ.get("CORE_TORL_SHARED", Path(__file__).resolve().parents[3] / "shared"))
    file = shared / "data" / "core" / "concept_quizzes.jsonl"
    if not file.exists():
        pytest.skip(f"the published quizzes are not at {file}; set CORE_TORL_SHARED to the folder that holds data/core")
    small = [a for a in SMALL if not a.startswith("data.")]
    assert front_door("train", *small, "rl_steps=1", "data=core_quizzes", f"data.path={file}", "logger.mode=disabled", f"hydra.run.dir={tmp_path}") == 0  # fmt: skip
    report = json.loads((tmp_path / "results.json").read_text())["data"]
    assert report["dropped_long_prompts"] < 50


def test_a_dry_run_counts_and_loads_nothing(front_door, tmp_path, capsys, monkeypatch):
    from core_torl.model import load

    monkeypatch.setattr(
        load.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded")
    )
    assert front_door("train", "dry_run=true", "prompts_per_step=8", f"hydra.run.dir={tmp_path}") == 0
    assert "8 problems x 8 answers = 64 trajectories" in capsys.readouterr().out


def test_control_rewards_and_varied_data_run_through_the_front_door(front_door, tmp_path):
    for ablation in ("random_reward", "shuffled_reward", "data_augmentation"):
        small = [*SMALL, "evaluation.max_problems=2", "export=false", "logger.mode=disabled", f"ablation={ablation}"]
        assert front_door("train", *small, f"hydra.run.dir={tmp_path / ablation}") == 0
        assert (tmp_path / ablation / "results.json").exists()


def test_a_shipped_sweep_runs_each_seed_in_its_own_folder_and_its_own_tracked_run(front_door, tmp_path):
    sweeps = Path(__file__).parents[2] / "sweeps"
    small = [*SMALL, "evaluation.max_problems=1", "rl_steps=1", "seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    assert front_door("train", "-cd", str(sweeps), "-cn", "seeds", *small) == 0
    one, two = (read_run(tmp_path / "sweep" / job) for job in "01")
    assert (one.config["seed"], two.config["seed"]) == (0, 1)
    assert one.run_id != two.run_id and one.group == two.group == "seeds"


def test_a_run_stopped_before_its_results_can_be_finished(front_door, tmp_path):
    quiet = [*SMALL, "evaluation.max_problems=2", "logger.mode=disabled", f"hydra.run.dir={tmp_path}"]
    assert front_door("train", *quiet) == 0
    before = json.loads((tmp_path / "results.json").read_text())["after"]
    (tmp_path / "results.json").unlink()
    assert front_door("train", *quiet, "resume=auto") == 0
    assert json.loads((tmp_path / "results.json").read_text())["after"] == before


def test_other_training_problems_are_another_run(front_door, tmp_path, capsys):
    quiet = [*SMALL, "rl_steps=1", "evaluation.max_problems=1", "logger.mode=disabled", "export=false"]
    assert front_door("train", *quiet, f"hydra.run.dir={tmp_path}") == 0
    capsys.readouterr()
    assert front_door("train", *quiet, "data.train_per_concept=5", "rl_steps=2", f"resume={tmp_path}", f"hydra.run.dir={tmp_path / 'b'}") == 2  # fmt: skip
    assert "training problems was" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [None, 3])
def test_only_sets_that_are_called_primed_show_the_concept(limit):
    """``evaluation.primed`` asks the same quizzes again with the concept; the plain sets stay without it."""
    from dataclasses import replace

    from core_torl.data.concept_world.source import ConceptWorld
    from core_torl.evaluation.protocol import Evaluation
    from core_torl.runs.assemble import Parts
    from core_torl.runs.training import evaluate_now
    from core_torl.sampler.protocol import SamplingConfig
    from core_torl.trajectory import Sample, Score

    asked = []

    class Recorder:
        sampling = SamplingConfig(8)

        def generate(self, requests, sampling):
            asked.append(requests)
            return [[Sample((7,), (-1.0,), "eos")] * r.n for r in requests]

    class Reward:
        def score(self, trajectories):
            return [Score(0.0, False, "wrong") for _ in trajectories]

    class Words:
        def decode(self, ids, skip_special_tokens):
            return ""

    problems = ConceptWorld(train_per_concept=1, test_per_concept=1).load()
    problems.test["bare"] = [replace(p, concept=None) for p in problems.test["gap"]]

    def encode(problem, concept):
        return tuple(f"{problem.uid}\n{concept.text if concept else ''}".encode())

    def results(primed):
        asked.clear()
        evaluation = Evaluation(permutations=1, primed=primed, max_problems=limit)
        found = evaluate_now(Parts(problems, None, Reward(), evaluation, None, type("P", (), {"tokenizer": Words()}), Recorder(), encode, None))  # fmt: skip
        return {r.name: [i.uid for i in r.items] for r in found}, [
            [bytes(r.prompt_ids).decode() for r in requests] for requests in asked
        ]

    names, (plain,) = results(False)
    assert names.keys() == {"gap", "mastered", "bare"} and all(text.endswith("\n") for text in plain)
    both, (first, second) = results(True)
    assert first == plain and both == names | {f"{n}_primed": names[n] for n in ("gap", "mastered")}
    texts = {p.uid: p.concept.text for name in ("gap", "mastered") for p in problems.test[name]}
    assert second and all(texts[uid.split("#")[0]] == text for uid, _, text in (x.partition("\n") for x in second))
