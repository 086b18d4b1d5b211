"""What whole runs leave for people: rollouts, axes, artifacts, exit codes; and that the glossary says what is logged."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from core_torl.tracking.artifacts import RUN_FILES
from core_torl.tracking.metrics import AXES, KEPT, METRICS, find
from core_torl.tracking.mirror import read_jsonl
from core_torl.tracking.offline import OfflineRun, read_run
from core_torl.tracking.rollouts import COLUMNS, read_rollouts
from core_torl.tracking.samples import END, OBSERVATION
from core_torl.variant.checkpoint import found, read

from .conftest import SMALL

pytestmark = pytest.mark.slow
TABLES = [*SMALL, "callbacks.samples_every=1", "evaluation.max_problems=3", "export=false"]
TORL = [
    "experiment=torl/world", "variant.tool_call_budget=2", "rl_steps=2", "prompts_per_step=3", "group_size=4",
    "evaluation.max_problems=8", "evaluation.samples=2", "data.train=200", "callbacks.samples_every=1",
    "logger.system_metrics=false", "sandbox=locked_forkserver",
]  # fmt: skip


def table_rows(run: OfflineRun) -> list[dict]:
    """All rows of all tables of rollouts, as ``rollouts.jsonl`` would have them."""
    return [
        {"kind": kind, **dict(zip(table["columns"], row, strict=True))}
        for kind in COLUMNS
        if f"rollouts/{kind}" in run.media
        for table in run.tables(f"rollouts/{kind}")
        for row in table["data"]
    ]


def check_names_of(folder: Path) -> set[str]:
    """Every name of this run is in the glossary; the metrics' names, families as they stand there."""
    run, names = read_run(folder), {name for row in read_jsonl(folder / "metrics.jsonl") for name in row}
    assert names == {name for row in run.history for name in row}
    assert [name for name in names if find(name) is None] == []
    assert run.media.keys() <= {k.name for k in KEPT.values() if k.kind in ("table", "picture")}
    own = [a for a in run.artifacts if a.type != "run_table"]
    assert {a.name.replace(run.run_id, "{run}") for a in own} <= {k.name for k in KEPT.values() if k.kind == "artifact"}
    assert {f.name for a in own for f in a.files} <= {k.name for k in KEPT.values() if k.kind == "file"}
    return {metric.name for name in names if (metric := find(name))}


def test_a_coached_run(front_door, tmp_path):
    arguments = [*TABLES, "variant=core_cr", "rl_steps=3", "evaluate_every=1", f"hydra.run.dir={tmp_path}"]
    assert front_door("train", *arguments) == 0
    rows, run = read_rollouts(tmp_path / "rollouts.jsonl"), read_run(tmp_path)
    # The same rows in both places, in the order of steps here and of kinds there.
    assert sorted(map(json.dumps, rows)) == sorted(map(json.dumps, table_rows(run)))
    assert {row["rl_step"] for row in rows} == {1, 2, 3} and {"best", "worst", "even"} <= {row["kind"] for row in rows}

    coached = [row for row in rows if row["kind"] == "triggered"]
    history = read_jsonl(tmp_path / "metrics.jsonl")
    triggered = sum(round(4 * row["core/trigger_rate"]) for row in history if "core/trigger_rate" in row)
    assert len(coached) == triggered > 0
    for row in coached:
        assert row["shown"].startswith("Definition: ") and row["concept"] in row["shown"]
        assert row["plain_reward"] == 0.0 and row["plain_outcome"] != "correct" and row["plain_answer"]
        assert row["primed_reward"] in (0.0, 1.0)  # without the bonus that CORE-CR adds
    # A coach replaced two answers of each such group; the other tables still show what the policy wrote by itself.
    assert all(row["reward"] in (0.0, 1.0) for row in rows if "reward" in row)

    assert len([row for row in history if "reward/mean" not in row]) == 4  # evaluated at 0, 1, 2 and the end
    axes = [[row[axis] for axis in AXES] for row in history]
    assert axes == sorted(axes) and axes[0] == [0, 0, 0] and axes[-1][1] > 3 * 16
    assert [[row[axis] for axis in AXES] for row in run.history] == axes
    assert run.step_metrics == {"*": AXES[0]}

    (artifact,) = (a for a in run.artifacts if a.type == "results")
    assert {f.name for f in artifact.files} >= {"results.json", "metrics.jsonl", "rollouts.jsonl", "transcripts.md"}
    assert all(f.path.read_bytes() == (tmp_path / f.name).read_bytes() for f in artifact.files if f.name != "run.json")
    kept = run.path.parent / "files" / "results.json"
    assert json.loads(kept.read_text()) == json.loads((tmp_path / "results.json").read_text())
    assert {p.name for p in run.saved} >= {name for name in RUN_FILES if (tmp_path / name).exists()}


def test_a_resumed_run_has_the_rollouts_of_an_undisturbed_one(front_door, tmp_path):
    """Newly solved problems too: which were wrong before stands in the checkpoint."""
    quiet = [*TABLES, "variant=core_kl", "variant.lr=1e-3", "logger.mode=disabled", "data.train_per_concept=1",
             "data.train_tags=[gap]", "group_size=2", "model.max_new_tokens=40"]  # fmt: skip
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert front_door("train", *quiet, "rl_steps=14", f"hydra.run.dir={whole}") == 0
    assert front_door("train", *quiet, "rl_steps=10", f"hydra.run.dir={torn}") == 0
    state = read(found(torn / "checkpoints")[9])["callbacks"]["RolloutTables"]
    assert state["unsolved"] and all(isinstance(uid, str) for uid in [*state["solved"], *state["unsolved"]])
    with (torn / "rollouts.jsonl").open("a") as file:
        file.write('{"kind": "bes')
    resume = f"resume={torn / 'checkpoints' / 'step-000009.ckpt'}"
    assert front_door("train", *quiet, "rl_steps=14", resume, f"hydra.run.dir={torn}") == 0
    rows = read_rollouts(torn / "rollouts.jsonl")
    assert rows == read_rollouts(whole / "rollouts.jsonl")
    assert any(row["kind"] == "newly_solved" and row["rl_step"] > 9 for row in rows)


def test_tools_are_shown_with_their_observations_marked(front_door, tmp_path):
    assert front_door("train", *TORL, f"hydra.run.dir={tmp_path}") == 0
    shown = [row for row in read_rollouts(tmp_path / "rollouts.jsonl") if row["kind"] == "tools"]
    assert shown
    for row in shown:
        lines = row["answer"].split("\n")
        assert row["calls"] == sum(line.startswith(">>> call ") for line in lines)
        assert lines.count(OBSERVATION) == lines.count(END) <= row["calls"]


def test_the_glossary_is_what_runs_log(front_door, tmp_path):
    """Both ways: no name that it has not, and no metric in it that no run has."""
    runs = {
        "cr": ["variant=core_cr"],
        "all": [
            "variant=core_hybrid", "objective.kl_coef=0.001", "objective.entropy_coef=0.001",
            "evaluation.distractors=[1]",
        ],
        "ahead": [
            "variant.overlap=true", "sampler.copy_weights=true", "objective.correction=truncate",
            "variant.skip_zero_advantage=false",
        ],
    }  # fmt: skip
    logged: set[str] = set()
    for name, more in runs.items():
        assert front_door("train", *TABLES, *more, f"hydra.run.dir={tmp_path / name}") == 0
        logged |= check_names_of(tmp_path / name)
    assert front_door("train", *TORL, f"hydra.run.dir={tmp_path / 'torl'}") == 0
    logged |= check_names_of(tmp_path / "torl")
    # An evaluation logs a table that training does not.
    checkpoint = f"checkpoint={tmp_path / 'cr'}"
    small = [a for a in SMALL if a.startswith(("evaluation.", "data.", "trainer.", "logger.", "model."))]
    assert (
        front_door(
            "evaluate", checkpoint, *small, "evaluation.distractors=[1]", f"hydra.run.dir={tmp_path / 'evaluated'}"
        )
        == 0
    )
    assert check_names_of(tmp_path / "evaluated") <= logged
    # Servers can fail: logged in tests/sampler/test_vllm_server_live.py, where there are some.
    assert METRICS.keys() - logged == {"rollout/retried"}
    evaluated = read_run(tmp_path / "evaluated")
    assert "per_concept" in evaluated.media and evaluated.exit_code == 0
    assert [evaluated.history[0][axis] for axis in AXES] == [
        read_jsonl(tmp_path / "cr" / "metrics.jsonl")[-1][axis] for axis in AXES
    ]  # fmt: skip
    assert (evaluated.path.parent / "files" / "results.json").is_file()


@pytest.mark.parametrize("error", [RuntimeError("the power went"), KeyboardInterrupt()])
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_run_that_breaks_off_says_so_in_its_file(front_door, tmp_path, monkeypatch, command, error):
    from core_torl.evaluation.protocol import Evaluation
    from core_torl.variant.policy_gradient import PolicyGradient

    def broken(*_, **__):
        raise error

    monkeypatch.setattr(*((PolicyGradient, "weigh") if command == "train" else (Evaluation, "estimates")), broken)
    small = SMALL if command == "train" else [a for a in SMALL if a.startswith(("evaluation.", "data.", "logger."))]
    with contextlib.suppress(RuntimeError, KeyboardInterrupt):  # how the command itself ends is not what is tested
        assert front_door(command, *small, "evaluation.max_problems=1", f"hydra.run.dir={tmp_path}") != 0
    run = read_run(tmp_path)
    assert run.exit_code == 1 and not run.truncated
    assert not [a for a in run.artifacts if a.type == "results"]


def test_a_sandbox_that_cannot_be_closed_does_not_leave_the_run_open(front_door, tmp_path, monkeypatch):
    from core_torl.runs.assemble import Parts

    real = Parts.close

    def close(self):
        real(self)
        raise OSError("cannot close")

    monkeypatch.setattr(Parts, "close", close)
    quiet = [*SMALL, "rl_steps=1", "evaluation.max_problems=1", "export=false", f"hydra.run.dir={tmp_path}"]
    with pytest.raises((OSError, SystemExit)):
        assert front_door("train", *quiet) == 0
        raise SystemExit(1)
    assert read_run(tmp_path).exit_code is not None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("logger.artifacts=[policy]", "policy needs export=true"),
        ("logger.artifacts=[weights]", "'weights' is none of results, checkpoint, policy"),
        ("logger.system_every_s=0", "must be at least 0.1"),
    ],
)
def test_a_wrong_setting_is_one_line_and_loads_nothing(front_door, tmp_path, monkeypatch, capsys, wrong, said):
    import core_torl.runs.training as training

    monkeypatch.setattr(training, "prepare", lambda *_: pytest.fail("data was loaded"))
    assert front_door("train", *SMALL, "export=false", wrong, f"hydra.run.dir={tmp_path}") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
