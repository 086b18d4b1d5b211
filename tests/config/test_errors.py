"""A mistake of a user is one line that names the key and what would be right, with exit code 2, before torch is there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton

from core_torl.config.errors import UserError, nearest, one_line

from .conftest import run_batch

RUN = "hydra.run.dir=run"
SWEEPS = Path(__file__).parents[2] / "sweeps"
# id -> (front door, arguments, what the line must hold)
EARLY: dict[str, tuple[str, list[str], list[str]]] = {
    "option": ("train", ["variant=core_bse"], ["variant=core_bse", "Did you mean 'core_base'?", "Available: "]),
    "option of a nested group": ("train", ["model/prompt=tyny"], ["model/prompt=tyny", "Did you mean 'tiny'?"]),
    "experiment": ("train", ["experiment=dmo"], ["experiment=dmo", "Did you mean 'demo'?"]),
    "experiment unlike any": (
        "train", ["experiment=zzz"], ["experiment=zzz: no such option", "Available: demo, core/cr, core/kl, ", " more, see --help"],
    ),
    "experiment in a folder": ("train", ["experiment=core/crr"], ["experiment=core/crr", "Did you mean 'core/cr'?"]),
    "group": ("train", ["varient=core_base"], ["'varient'", "Did you mean 'variant'?"]),
    "key": ("train", ["variant.lrr=1"], ["'variant.lrr'", "Did you mean 'variant.lr'?"]),
    "key at the top": ("train", ["rl_step=1"], ["'rl_step'", "Did you mean 'rl_steps'?"]),
    "key without its group": ("train", ["checkpoint_evry=1"], ["Did you mean 'callbacks.checkpoint_every'?"]),
    "key two levels down": ("train", ["model.lora.rnk=1"], ["Did you mean 'model.lora.rank'?"]),
    "key of an option that is not the default": (
        "train", ["data=core_quizzes", "data.pth=x"], ["'data.pth'", "Did you mean 'data.path'?"],
    ),
    "key of Hydra's": ("train", ["hydra.run.dri=x"], ["'hydra.run.dri'", "Did you mean 'hydra.run.dir'?"]),
    "added key at the top": ("train", ["+unknown=1"], ["'unknown'", "nothing reads it"]),
    "added key in a group": ("train", ["+variant.lrr=1"], ["'variant.lrr'", "Did you mean 'variant.lr'?"]),
    "removed key": ("train", ["~rl_steps"], ["rl_steps", "give it a value"]),
    "removed key of a group": ("train", ["~variant.lr"], ["~variant.lr", "cannot be removed"]),
    "removed group": ("train", ["~variant"], ["variant has no value"]),
    "no number": ("train", ["variant.lr=abc"], ["variant.lr: ", "'abc'", "Float"]),
    "no whole number": ("train", ["group_size=1.5"], ["group_size: ", "1.5", "Integer"]),
    "no truth value": ("train", ["export=maybe"], ["export: ", "'maybe'", "bool"]),
    "no list": ("train", ["variant.betas=3"], ["variant.betas: needs a list", "variant.betas=[a,b]"]),
    "a value where keys are": ("train", ["model.lora=3"], ["model.lora: holds keys of its own"]),
    "null for a group": ("train", ["variant=null"], ["name of an option"]),
    "two options": ("train", ["variant=[grpo,core_base]"], ["variant takes one option", "--multirun"]),
    "open bracket": ("train", ["variant.lr=[1"], ["'variant.lr=[1'", "quotes", "'variant.lr=\"[1\"'"]),
    "brace": ("train", ["logger.name=a}"], ["'logger.name=a}'", "quotes"]),
    "no value": ("train", ["variant.lr"], ["'variant.lr'", "write key=value"]),
    "interpolation": ("train", ["trainer.devices=${nope}"], ["trainer.devices: ", "nope"]),
    "sweep's name": ("train", ["-cd", str(SWEEPS), "-cn", "smok"], ["--config-name smok", "Did you mean 'smoke'?"]),
    "config name": ("train", ["-cn", "trian"], ["--config-name trian", "Did you mean 'train'?"]),
    "config folder": ("train", ["-cd", "nowhere"], ["--config-dir ", "nowhere: no such folder"]),
    "no data path": ("train", ["data=core_quizzes"], ["data.path has no value: set data.path=..."]),
    "minibatch": (
        "train", ["variant.minibatch_size=30"], ["variant.minibatch_size=30", "8 * 16 = 128", "use 32", "null"],
    ),
    "ranks": ("train", ["trainer=ddp", "prompts_per_step=3"], ["prompts_per_step=3", "multiple of the 2 processes"]),
    "top_p": ("train", ["sampler.top_p=0.9"], ["sampler.top_p=0.9", "set sampler.top_p=1.0"]),
    "greedy": ("train", ["sampler.temperature=0"], ["sampler.temperature=0", "positive temperature"]),
    "lonely answer": ("train", ["group_size=1"], ["group_size=1", "at least 2"]),
    "token budget": ("train", ["token_budget=0"], ["token_budget=0: must be at least 1, or null for none"]),
    "K": ("train", ["variant=core_cr", "variant.replaced=8"], ["variant.replaced=8 (K)", "1..7", "group_size=8 (N)"]),
    "a coach that nobody asks": ("train", ["intervention=filler"], ["intervention=filler", "take variant=core_cr"]),
    "a coach without a text": ("train", ["variant=core_kl", "intervention=none"], ["take intervention=true_concept"]),
    "a choice of a variant": (
        "train", ["variant=core_kl", "variant.teacher=currnt"], ["variant.teacher='currnt'", "Did you mean 'current'?"],
    ),
    "sft without its objective": ("train", ["variant=sft"], ["objective=likelihood group_size=1", "ablation=sft"]),
    "removed trigger": ("train", ["variant=core_cr", "~trigger"], ["trigger has no value"]),
    "intervention": ("train", ["intervention=true_concpt"], ["Did you mean 'true_concept'?"]),
    "no steps": ("train", ["rl_steps=0"], ["rl_steps=0: must be larger than 0"]),
    "devices": ("train", ["trainer.devices=2"], ["trainer.devices=2", "trainer.strategy=ddp"]),
    "device": ("train", ["trainer.accelerator=tpu"], ["trainer.accelerator='tpu'", "cpu or cuda"]),
    "logger mode": ("train", ["logger.mode=of"], ["logger.mode='of'", "offline"]),
    "folder below a file": ("train", ["hydra.run.dir=file/x"], ["file", "Not a directory", "paths.root=..."]),
    "evaluate: key": ("evaluate", ["evaluation.sample=1"], ["Did you mean 'evaluation.samples'?"]),
    "evaluate: key of training": ("evaluate", ["group_size=4"], ["unknown key 'group_size'"]),
    "report: key": ("report", ["runs=x", "basline=y"], ["'basline'", "Did you mean 'baseline'?"]),
    "report: no runs": ("report", [], ["runs has no value: set runs=..."]),
    "warm start: key": ("warm_start", ["drill_step=1"], ["Did you mean 'drill_steps'?"]),
    "warm start: width": ("warm_start", ["width=10", "heads=4"], ["width=10, heads=4", "even number"]),
    "warm start: mixture": ("warm_start", ["+mixture.nonse=1"], ["'nonse'", "Did you mean 'nonce'?"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("errors")
    (folder / "file").write_text("not a folder")
    asked = []
    for door, arguments, _ in EARLY.values():
        placed = any("run.d" in a for a in arguments)
        asked.append((door, arguments if placed else [RUN, *arguments]))
    # `paths.root` decides the folder of a run only where the run's own folder is not given.
    asked.append(("train", ["paths.root=file/x"]))
    # The same in a batch of runs.
    asked.append(("train", ["--multirun", "hydra.sweep.dir=runs", "sampler.top_p=0.9,0.8"]))
    found = run_batch(asked, folder)
    return {**found, "results": dict(zip([*EARLY, "root", "multirun"], found["results"], strict=True))}


def test_none_of_these_mistakes_costs_the_import_of_torch(early):
    assert early["heavy"] == []


def only_line(answer: dict[str, Any]) -> str:
    assert answer["code"] == 2, answer
    assert answer["out"] == "", "an error goes to stderr alone"
    lines = answer["err"].splitlines()
    assert len(lines) == 1 and lines[0].startswith("core-torl: "), answer["err"]
    return lines[0]


@pytest.mark.parametrize("case", EARLY)
def test_the_line_names_the_key_and_the_fix(early, case: str):
    line = only_line(early["results"][case])
    for part in EARLY[case][2]:
        assert part in line
    assert len(line) < 600 and "hydra.cc" not in line and "full_key" not in line


def test_outputs_below_a_file(early):
    line = only_line(early["results"]["root"])
    assert "Not a directory" in line and "paths.root=..." in line and "file/x" in line


def test_in_a_multirun_the_job_is_named_before_any_job_starts(early):
    line = only_line(early["results"]["multirun"])
    assert line.startswith("core-torl: job 0 (sampler.top_p=0.9): sampler.top_p=0.9")


def test_the_traceback_is_there_for_those_who_ask(tmp_path: Path):
    asked = [("train", [RUN, "variant.lrr=1"]), ("train", [RUN, "sampler.top_p=0.9"])]
    for answer in run_batch(asked, tmp_path, HYDRA_FULL_ERROR="1")["results"]:
        assert answer["code"] == 1 and "Traceback" in answer["err"]


# ---- mistakes that are found once files are read --------------------------------------------------------------------


@pytest.fixture
def front_door(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """``front_door("train", ...)`` returns the one line that the command fails with. In this process: torch is here."""
    pytest.importorskip("torch")
    import logging
    from importlib import import_module

    state, handlers, level = Singleton.get_state(), logging.root.handlers[:], logging.root.level

    def run(door: str, *arguments: str) -> str:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["core-torl", f"hydra.run.dir={tmp_path / 'run'}", *arguments])
        with pytest.raises(SystemExit) as end:
            import_module(f"core_torl.{door}").main()
        printed = capsys.readouterr()
        return only_line({"code": end.value.code, "out": printed.out, "err": printed.err})

    yield run
    Singleton.set_state(state)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def test_a_missing_data_file(front_door, tmp_path: Path):
    path = tmp_path / "quizes.jsonl"
    line = front_door("train", "data=core_quizzes", f"data.path={path}", "dry_run=true")
    assert "data.path" in line and str(path) in line


def test_a_data_file_with_a_broken_row(front_door, tmp_path: Path):
    path = tmp_path / "quizzes.jsonl"
    path.write_text('{"question": "fine"}\n{"question": \n')
    line = front_door("train", "data=core_quizzes", f"data.path={path}", "data.on_bad_row=error", "dry_run=true")
    assert f"data.path={path}" in line and "line 2: not valid JSON" in line


def test_an_unknown_section(front_door):
    line = front_door("train", "data.hold_out_sections=[matrixes]", "dry_run=true")
    assert "data.hold_out_sections" in line and "'matrixes'" in line and "Did you mean 'matrices'?" in line


QUIZ = dict.fromkeys(("concept_title", "original_question", "explanation", "related_concept"), "x") | {
    "answer": "A", "question_id": 1, "options": ["A. 1", "B. 2"],
}  # fmt: skip
FEW = ("data=core_quizzes", "data.test_fraction=0", "prompts_per_step=1", "group_size=4")


@pytest.fixture
def quizzes(tmp_path: Path):
    """``quizzes(row, ...)`` writes a file of the published format and returns what chooses it."""

    def write(*rows: dict[str, Any]) -> tuple[str, ...]:
        path = tmp_path / "quizzes.jsonl"
        path.write_text("".join(json.dumps(QUIZ | row) + "\n" for row in rows))
        return (*FEW, f"data.path={path}")

    return write


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gets as far as loading a policy fails."""
    from core_torl.runs import training

    monkeypatch.setattr(training, "assemble", lambda *_: pytest.fail("weights were loaded"))


def test_data_without_solutions_for_a_coach_that_needs_them(front_door, quizzes, no_weights):
    data = quizzes({}, {"explanation": "", "question_id": 2})
    for more, what in (
        (["variant=core_cr", "intervention=worked_solution"], "intervention=worked_solution"),
        (["ablation=bread", "prompts_per_step=1"], "intervention=expert_prefix"),
        (["ablation=sft"], "variant=sft"),
    ):
        if what == "variant=sft":
            data = tuple(d for d in data if d != "group_size=4")
        for dry in (["dry_run=true"], []):
            line = front_door("train", *data, *more, *dry)
            assert f"{what}: 1 of 2 training problems have no worked solution (the first is row-0001)" in line


def test_data_with_a_single_concept_for_a_coach_that_needs_others(front_door, quizzes, no_weights):
    data = quizzes({}, {"question_id": 2})
    for intervention in ("random_concept", "same_section_concept"):
        line = front_door("train", *data, "variant=core_cr", f"intervention={intervention}")
        assert f"intervention={intervention}: " in line and "one concept only; use more data" in line


def test_a_coach_that_nothing_can_build(front_door, no_weights):
    for target, says in (
        ("nowhere", "trusted_targets"),
        ("core_torl.intervention.filer.Filler", "filer"),
    ):
        assert says in front_door("train", "variant=core_cr", f"intervention._target_={target}")
    for target in ("core_torl.variant.core_cx.CoreCR", "core_torl.variant.core_cr.CoreCX"):
        assert f"_target_ '{target}'" in front_door("train", f"variant._target_={target}")
    assert "intervention.words is empty" in front_door(
        "train", "variant=core_cr", "intervention=filler", "intervention.words=' '"
    )
    assert "trigger.when='sometimes'" in front_door("train", "variant=core_cr", "trigger.when=sometimes")


def test_values_that_a_constructor_refuses(front_door):
    assert "objective.normalize='tokens'" in front_door("train", "objective.normalize=tokens", "dry_run=true")
    assert "reward.exclude" in front_door("train", "reward.exclude=[sometimes]", "dry_run=true")


def test_more_problems_in_a_step_than_there_are(front_door):
    small = ["data.train_per_concept=1", "prompts_per_step=4096", "dry_run=true"]
    assert "prompts_per_step=4096 is more than the" in front_door("train", *small)


def test_an_augmentation_that_the_data_cannot_have(front_door, quizzes):
    line = front_door("train", *quizzes({}), "dry_run=true", "augmentation=variations")
    assert "augmentation.redraw_operands=true" in line and "set it to false" in line


def test_a_bad_model_path(front_door, tmp_path: Path):
    line = front_door("train", "model.path=shipped:tyny", "dry_run=true")
    assert "model.path=shipped:tyny" in line and "known: tiny" in line
    line = front_door("evaluate", f"model.path={tmp_path}/nothing")
    assert f"model.path={tmp_path}/nothing" in line and "config.json" in line


def test_a_target_outside_the_package(front_door):
    line = front_door("train", "reward._target_=os.path.join", "dry_run=true")
    assert "'os.path.join'" in line and "trusted_targets" in line


def test_a_checkpoint_that_is_not_there(front_door, tmp_path: Path):
    assert "checkpoint=" in front_door("evaluate", f"checkpoint={tmp_path}/none.ckpt")


# ---- the pieces -----------------------------------------------------------------------------------------------------


def test_nearest_name():
    assert nearest("lrr", ["lr", "betas"]) == " Did you mean 'lr'?"
    assert nearest("checkpoint_evry", ["callbacks.checkpoint_every"]) == " Did you mean 'callbacks.checkpoint_every'?"
    assert nearest("xyzzy", ["lr", "betas"]) == ""


def test_an_unknown_error_is_passed_on_without_line_breaks():
    assert one_line(RuntimeError("first\n   second")) == "first second"
    assert one_line(UserError("what  is\nwrong")) == "what is wrong"
