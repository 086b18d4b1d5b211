"""A policy whose weights are spread over ranks learns what a whole one learns, and its checkpoints are those of one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from core_torl.variant.checkpoint import RLCheckpoint

from .test_coached_processes import start
from .worker import CASES, module_of, result_of, train

pytestmark = [pytest.mark.ddp, pytest.mark.slow]
FSDP = ["sized", "sized_reference", "adapted"]


def largest(tensors) -> float:
    return max(float(t.abs().max()) for t in tensors.values())


def assert_close(one: dict, two: dict, tolerance: float) -> None:
    """Relative to the largest number of all: gradients near zero are rounding."""
    assert one.keys() == two.keys()
    scale = largest(one)
    assert scale > 0
    for name, tensor in one.items():
        assert float((tensor - two[name]).abs().max()) <= tolerance * scale, name


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One start of two processes serves every test here: each case under FSDP, one of them under DDP as well."""
    root = tmp_path_factory.mktemp("fsdp")
    cases = [f"fsdp:{case}" for case in FSDP] + ["ddp:sized"]
    done = start(",".join(cases), root, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.fixture(scope="module")
def alone():
    held = {}

    def run(case: str):
        if case not in held:
            held[case] = result_of(train(module_of(case, 3)))
        return held[case]

    return run


@pytest.mark.parametrize("what", ["fsdp:sized", "fsdp:sized_reference", "fsdp:adapted", "ddp:sized"])
def test_two_ranks_have_the_gradients_the_weights_and_the_metrics_of_one(folder, alone, what):
    strategy, case = what.split(":")
    one, two = alone(case), torch.load(folder / what.replace(":", "-") / "2.pt", weights_only=True)
    assert two["sharded"] is (strategy == "fsdp") and not one["sharded"]
    for first, second in zip(one["gradients"], two["gradients"], strict=True):
        assert_close(first, second, 1e-5)
    assert_close(one["weights"], two["weights"], 2e-5)
    assert_close(one["merged"], two["merged"], 2e-5)
    skipped = ("time/", "rollout/", "train/padding", "policy/sync_gap", "mismatch/", "policy/sampler_logprob_gap")
    names = [n for n in one["metrics"] if not n.startswith(skipped)]
    assert names and one["metrics"]["core/trigger_rate"] > 0
    for name in names:
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], abs=1e-4, rel=1e-3), name


def test_ranks_with_fewer_parts_kept_step_with_the_others(folder):
    """The control: without idle passes these runs would have hung, for the ranks had different numbers of rows."""
    for case in FSDP:
        first, second = torch.load(folder / f"fsdp-{case}" / "2.pt", weights_only=True)["passes"]
        assert first == second
    first, second = torch.load(folder / "ddp-sized" / "2.pt", weights_only=True)["passes"]
    assert first != second


@pytest.mark.parametrize("case", FSDP)
def test_a_checkpoint_of_shards_is_that_of_one_process(folder, tmp_path, case):
    train(module_of(case, 3), callbacks=[RLCheckpoint(tmp_path, 1, 9)])
    for step in (1, 3):
        one = torch.load(tmp_path / f"step-{step:06d}.ckpt", weights_only=True)
        two = torch.load(folder / f"fsdp-{case}" / f"step-{step:06d}.ckpt", weights_only=True)
        assert one.keys() == two.keys()
        assert_close(one["state_dict"], two["state_dict"], 2e-5)
        (first,), (second,) = one["optimizer_states"], two["optimizer_states"]
        assert first["param_groups"] == second["param_groups"] and first["state"].keys() == second["state"].keys()
        for kind, tolerance in (("exp_avg", 1e-4), ("exp_avg_sq", 1e-4), ("step", 0)):
            assert_close(*({str(k): s[kind] for k, s in x["state"].items()} for x in (first, second)), tolerance)


@pytest.mark.parametrize("what", ["fsdp-sized", "fsdp-adapted", "ddp-sized"])
def test_one_process_goes_on_from_a_checkpoint_of_two(folder, alone, what):
    case = what.split("-")[1]
    resumed = train(module_of(case, 3), ckpt=folder / what / "step-000001.ckpt")
    assert resumed.rl_step == 3 and len(resumed.gradients) == 2 * len(alone(case)["gradients"]) // 3
    assert_close(alone(case)["weights"], result_of(resumed)["weights"], 5e-5)


def test_two_processes_go_on_from_checkpoints_of_one_and_of_another_strategy(folder, alone, tmp_path):
    train(module_of("sized", 1), callbacks=[RLCheckpoint(tmp_path / "one", 1, 9)])
    sources = {"fsdp": tmp_path / "one/step-000001.ckpt", "ddp": folder / "fsdp-sized/step-000001.ckpt"}
    for strategy, source in sources.items():
        (tmp_path / f"{strategy}-sized").mkdir()
        shutil.copy(source, tmp_path / f"{strategy}-sized" / "resume.ckpt")
    done = start("fsdp:sized,ddp:sized", tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for strategy in sources:
        found = torch.load(tmp_path / f"{strategy}-sized" / "2.pt", weights_only=True)
        assert len(found["gradients"]) == 2 * len(alone("sized")["gradients"]) // 3, "it went on, not anew"
        assert_close(alone("sized")["weights"], found["weights"], 5e-5)


@pytest.mark.parametrize("case", ["sized", "adapted"])
def test_a_sharded_policy_is_exported_whole_and_merged(folder, case):
    exported = AutoModelForCausalLM.from_pretrained(folder / f"fsdp-{case}" / "policy")
    merged = torch.load(folder / f"fsdp-{case}" / "2.pt", weights_only=True)["merged"]
    found = dict(exported.named_parameters())
    assert found.keys() == merged.keys() and all(torch.equal(found[n], merged[n]) for n in merged)
    assert (folder / f"fsdp-{case}/policy/adapter/adapter_model.safetensors").is_file() is (case == "adapted")
    assert "FSDP" not in (folder / f"fsdp-{case}/policy/config.json").read_text()
    assert case in CASES
