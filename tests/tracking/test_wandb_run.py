"""Real offline runs, written by the tracker and read back from their files."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from pytorch_lightning.utilities import rank_zero_only

from core_torl.problem import Concept, Problem
from core_torl.tracking.metrics import AXES
from core_torl.tracking.mirror import read_jsonl
from core_torl.tracking.offline import read_run
from core_torl.tracking.rollouts import COLUMNS, read_rollouts
from core_torl.tracking.samples import answer_row
from core_torl.tracking.wandb_run import Tracker, flatten
from core_torl.trajectory import Sample, Score, Trajectory

CONFIG = {
    "seed": 3,
    "trainer": {"max_epochs": 1, "precision": None, "devices": [0, 1]},
    "objective": {"name": "grpo", "clip": {"low": 0.2, "high": 0.28}},
    "paths": {"data": Path("/somewhere")},
    "callbacks": {},
}


def run_folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*"))


def make_tracker(folder: Path, **kwargs) -> Tracker:
    return Tracker(**{"dir": str(folder), "system_metrics": False, **kwargs})


def trajectory(i: int, judged: bool = True) -> Trajectory:
    concept = Concept(f"c{i}", f"concept {i}", "1.1", "text") if i % 2 else None
    problem = Problem(f"q{i}", "2 + 2?", "B", options=("3", "4"), concept=concept)
    score = (
        Score(float(i % 2), bool(i % 2), "correct" if i % 2 else "wrong") if judged else Score(None, False, "timeout")
    )
    return Trajectory(
        problem, (1,), Sample((5,) * (i + 1), (0.0,) * (i + 1), "eos"), f"answer {i}", (True,) * (i + 1), score
    )


def answers(step: int, *numbers: int) -> dict[str, list[dict]]:
    return {"even": [answer_row(step, trajectory(i)) for i in numbers], "best": []}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """One full run: config, six steps, samples, a table, a picture, exit code 3."""
    from matplotlib.figure import Figure

    folder = tmp_path_factory.mktemp("run")
    picture = folder / "picture.png"
    Figure(figsize=(1, 1)).savefig(picture)
    tracker = make_tracker(
        folder, group="sweep-7", job_type="eval", tags=["cpu", "demo"], name="a name", project="some-project",
        jsonl_path=str(folder / "metrics.jsonl"), rollouts_path=str(folder / "rollouts.jsonl"),
    )  # fmt: skip
    tracker.log_config(CONFIG)
    rows = [{"train/rl_step": k, "reward/mean": k / 7, "reward/outcome/correct": 0.25} for k in range(1, 7)]
    for row in rows:
        tracker.log_metrics(row)
        tracker.log_rollouts(row["train/rl_step"], answers(row["train/rl_step"], 0, 2, 4))
    tracker.log_table("per_concept", ["set", "accuracy"], [["math", 0.5]])
    tracker.log_picture("results", picture)
    tracker.finish(exit_code=3)
    tracker.finish()  # the second call changes nothing
    return folder, rows, tracker


def test_config_comes_back_under_flat_keys(written):
    run = read_run(run_folders(written[0])[0])
    assert run.config == {
        "seed": 3,
        "trainer.max_epochs": 1,
        "trainer.precision": None,
        "trainer.devices": [0, 1],
        "objective.name": "grpo",
        "objective.clip.low": 0.2,
        "objective.clip.high": 0.28,
        "paths.data": "/somewhere",
        "callbacks": {},
    }


def test_history_and_summary_are_what_was_logged(written):
    folder, rows, _ = written
    run = read_run(run_folders(folder)[0])
    assert run.history == rows == read_jsonl(folder / "metrics.jsonl")
    assert {k: run.summary[k] for k in rows[-1]} == rows[-1]
    assert not any(key.startswith("rollouts") for key in run.summary)


def test_names_group_tags_and_exit_code(written):
    folder, _, tracker = written
    run = read_run(run_folders(folder)[0])
    assert (run.run_id, run.project, run.group, run.job_type) == (tracker.run_id, "some-project", "sweep-7", "eval")
    assert (run.name, run.tags, run.exit_code) == ("a name", ("cpu", "demo"), 3)
    assert not run.truncated and run.damage == ""


def test_tables_and_pictures_are_there(written):
    run = read_run(run_folders(written[0])[0])
    assert run.media == {"rollouts/even": "table-file", "per_concept": "table-file", "results": "image-file"}
    even = run.tables("rollouts/even")
    assert len(even) == 6 and all(len(t["data"]) == 3 for t in even)  # each step's own rows, no more
    assert even[1]["columns"] == list(COLUMNS["even"])
    assert even[1]["data"][1] == [2, "[q2] 2 + 2?\nA. 3\nB. 4", "", 0.0, "wrong", "eos", 3, "answer 2"]
    assert run.tables("per_concept")[0]["data"] == [["math", 0.5]]
    assert run.files["results"][0].read_bytes().startswith(b"\x89PNG")
    with pytest.raises(KeyError, match="nothing"):
        run.tables("nothing")


def test_the_plain_file_has_the_rows_of_the_tables(written):
    folder, rows, _ = written
    (run,) = map(read_run, run_folders(folder))
    tables = [dict(zip(t["columns"], row, strict=True)) for t in run.tables("rollouts/even") for row in t["data"]]
    assert read_rollouts(folder / "rollouts.jsonl") == [{"kind": "even", **row} for row in tables]
    assert [row["rl_step"] for row in tables] == [r["train/rl_step"] for r in rows for _ in range(3)]


def test_every_curve_is_drawn_against_the_rl_step(written):
    assert read_run(run_folders(written[0])[0]).step_metrics == {"*": "train/rl_step"}


def test_a_cut_file_gives_what_stands_before_the_cut(written, tmp_path):
    folder, rows, _ = written
    data = next(run_folders(folder)[0].glob("*.wandb")).read_bytes()
    seen = set()
    for cut in range(len(data) // 10, len(data), len(data) // 10):
        file = tmp_path / f"{cut}.wandb"
        file.write_bytes(data[:cut])
        run = read_run(file)
        assert run.history == rows[: len(run.history)] and run.exit_code is None
        seen.add((len(run.history) > 0, run.truncated))
    assert (True, True) in seen  # some cut fell into a record behind the first row
    spoilt = bytearray(data)
    spoilt[-3] ^= 0xFF
    file.write_bytes(spoilt)
    run = read_run(file)
    assert run.history == rows and run.truncated and "checksum" in run.damage


def test_a_finished_run_takes_nothing_more(written):
    with pytest.raises(RuntimeError, match="finished"):
        written[2].log_metrics({"reward/mean": 1.0})


def test_reader_says_what_it_was_not_given(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.wandb file"):
        read_run(tmp_path)
    (tmp_path / "x.wandb").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"no \.wandb file"):
        read_run(tmp_path)


@pytest.mark.slow
def test_a_killed_run_can_be_read(tmp_path):
    script = """
        import os, signal, sys
        from core_torl.tracking.wandb_run import Tracker
        tracker = Tracker(dir=sys.argv[1], system_metrics=False, jsonl_path=sys.argv[1] + "/metrics.jsonl")
        tracker.log_config({"seed": 5})
        for step in range(1, 41):
            tracker.log_metrics({"train/rl_step": step, "reward/mean": step / 2})
        import time; time.sleep(3.0)  # W&B's own process writes the file once a second
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 40  # the mirror has every row
    run = read_run(run_folders(tmp_path)[0])
    assert run.config == {"seed": 5} and run.exit_code != 0
    assert [r["reward/mean"] for r in run.history] == [k / 2 for k in range(1, 41)]


def test_two_runs_of_one_process_stay_two(tmp_path):
    one, two = (make_tracker(tmp_path, name=n) for n in ("one", "two"))
    one.log_metrics({"reward/mean": 1.0}, step=1)
    two.log_metrics({"reward/mean": 2.0}, step=1)  # the first is still open
    one.log_metrics({"reward/mean": 1.5}, step=2)
    one.finish()
    two.finish()
    runs = {r.name: r for r in map(read_run, run_folders(tmp_path))}
    assert [r["reward/mean"] for r in runs["one"].history] == [1.0, 1.5]
    assert [r["reward/mean"] for r in runs["two"].history] == [2.0]
    assert runs["one"].run_id != runs["two"].run_id


def test_a_resumed_run_keeps_its_id_and_rewinds_the_mirror(tmp_path):
    mirror, texts = str(tmp_path / "metrics.jsonl"), str(tmp_path / "rollouts.jsonl")
    first = make_tracker(tmp_path, jsonl_path=mirror, rollouts_path=texts)
    for step in (1, 2, 3, 4):
        first.log_metrics({"reward/mean": 0.0}, step=step)
        first.log_rollouts(step, answers(step, 0))
    first.finish(exit_code=1)
    time.sleep(1.1)  # W&B names the folder after the second
    with open(texts, "a") as file:
        file.write('{"kind": "even", "rl_st')
    second = make_tracker(tmp_path, jsonl_path=mirror, rollouts_path=texts, run_id=first.run_id)
    second.rewind(2)
    second.log_metrics({"train/rl_step": 3, "reward/mean": 1.0})
    second.log_rollouts(3, answers(3, 1))
    second.finish()
    folders = run_folders(tmp_path)
    assert [read_run(f).run_id for f in folders] == [first.run_id] * 2
    assert [(r["train/rl_step"], r["reward/mean"]) for r in read_jsonl(mirror)] == [(1, 0.0), (2, 0.0), (3, 1.0)]
    assert [(r["rl_step"], r["answer"]) for r in read_rollouts(texts)] == [
        (1, "answer 0"), (2, "answer 0"), (3, "answer 1"),
    ]  # fmt: skip


def test_a_row_without_samples_and_tokens_gets_those_of_the_row_before(tmp_path):
    """An evaluation's row can be drawn against all three axes, in a resumed run too."""
    path = tmp_path / "metrics.jsonl"
    tracker = make_tracker(tmp_path, mode="disabled", jsonl_path=str(path))
    tracker.rewind(-1)
    tracker.log_metrics({"eval/math/greedy/accuracy": 0.1}, step=0)
    tracker.log_metrics(dict(zip(AXES, (1, 64, 900), strict=True)) | {"reward/mean": 0.5})
    tracker.log_metrics({"eval/math/greedy/accuracy": 0.2}, step=1)
    resumed = make_tracker(tmp_path, mode="disabled", jsonl_path=str(path))
    resumed.rewind(1, samples=64, tokens=900)
    resumed.log_metrics({"eval/math/greedy/accuracy": 0.3}, step=1)
    assert [[row[axis] for axis in AXES] for row in read_jsonl(path)] == [[0, 0, 0], *[[1, 64, 900]] * 3]


def test_disabled_mode_writes_the_plain_files_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it now would raise
    paths = {"jsonl_path": str(tmp_path / "metrics.jsonl"), "rollouts_path": str(tmp_path / "rollouts.jsonl")}
    tracker = make_tracker(tmp_path, mode="disabled", artifacts=["results"], **paths)
    tracker.log_config(CONFIG)
    tracker.log_metrics({"reward/mean": 0.5}, step=2)
    tracker.log_metrics({"reward/accuracy": 0.5, "epoch": 0})  # Lightning's own key; the step is the one before
    tracker.log_rollouts(2, answers(2, 1))
    tracker.log_files(tmp_path)
    tracker.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "rollouts.jsonl"]
    assert [row["answer"] for row in read_rollouts(tmp_path / "rollouts.jsonl")] == ["answer 1"]
    assert read_jsonl(tmp_path / "metrics.jsonl") == [
        {"train/rl_step": 2, "reward/mean": 0.5},
        {"train/rl_step": 2, "reward/accuracy": 0.5},
    ]


def test_only_rank_zero_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    tracker = make_tracker(tmp_path, jsonl_path=str(tmp_path / "metrics.jsonl"))
    tracker.log_config(CONFIG)
    tracker.log_metrics({"reward/mean": 0.5}, step=1)
    tracker.finish()
    assert list(tmp_path.iterdir()) == []


def test_nothing_logged_is_no_run(tmp_path):
    make_tracker(tmp_path).finish()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_is_refused_before_anything_is_written(tmp_path):
    tracker = make_tracker(tmp_path, jsonl_path=str(tmp_path / "metrics.jsonl"))
    with pytest.raises(ValueError, match="'reward/mean'"):
        tracker.log_metrics({"reward/maen": 0.5}, step=1)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_mode_names_its_key(tmp_path):
    with pytest.raises(ValueError, match=r"logger\.mode .*offline, online, disabled"):
        make_tracker(tmp_path, mode="dryrun")


def test_online_without_login_says_what_to_do(tmp_path):
    tracker = make_tracker(tmp_path, mode="online", jsonl_path=str(tmp_path / "metrics.jsonl"))
    with pytest.raises(RuntimeError, match=r"run `wandb login`, or set logger\.mode=offline") as caught:
        tracker.log_metrics({"reward/mean": 0.5}, step=1)
    assert "\n" not in str(caught.value)


def test_ids_differ_unless_given(tmp_path, monkeypatch):
    assert make_tracker(tmp_path).run_id != make_tracker(tmp_path).run_id
    assert make_tracker(tmp_path, run_id="abc").run_id == "abc"
    monkeypatch.setitem(os.environ, "WANDB_RUN_ID", "from-agent")
    assert make_tracker(tmp_path).version == "from-agent"


def test_flatten_refuses_two_values_for_one_key():
    assert flatten({"a": {"b": {"c": 1}}, "d": []}) == {"a.b.c": 1, "d": []}
    with pytest.raises(ValueError, match=r"'a\.b'"):
        flatten({"a": {"b": 1}, "a.b": 2})


def test_what_is_not_in_the_glossary_is_refused(tmp_path):
    tracker = make_tracker(tmp_path, mode="disabled")
    with pytest.raises(ValueError, match="has not 2 cells"):
        tracker.log_table("per_concept", ["a", "b"], [[1]])
    with pytest.raises(ValueError, match=r"unknown table 'per_concepts'.*'per_concept'"):
        tracker.log_table("per_concepts", ["a"], [[1]])
    with pytest.raises(ValueError, match="unknown picture 'curves'"):
        tracker.log_picture("curves", __file__)
    with pytest.raises(KeyError, match="bad"):
        tracker.log_rollouts(1, {"bad": [{"a": 1}]})
    with pytest.raises(ValueError, match=r"rollouts/even: a row has rl_step, problem; its columns"):
        tracker.log_rollouts(1, {"even": [{"rl_step": 1, "problem": "p"}]})


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"artifacts": ["results", "weights"]}, r"logger\.artifacts: 'weights' is none of results, checkpoint, policy"),
        ({"artifacts": ["policy", "policy"]}, "twice"),
        ({"system_every_s": 0.01}, r"logger\.system_every_s=0\.01: must be at least 0\.1"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_at_once(tmp_path, setting, said):
    with pytest.raises(ValueError, match=said) as caught:
        make_tracker(tmp_path, **setting)
    assert "\n" not in str(caught.value)


def test_an_unjudged_answer_has_an_empty_reward(tmp_path):
    tracker = make_tracker(tmp_path)
    rows = [answer_row(1, t) for t in (trajectory(1), trajectory(2, judged=False), trajectory(3))]
    tracker.log_rollouts(1, {"even": rows})
    tracker.finish()
    (table,) = read_run(run_folders(tmp_path)[0]).tables("rollouts/even")
    assert [row[3] for row in table["data"]] == [1.0, None, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("watched", [True, False])
def test_an_offline_run_holds_records_of_the_machine(tmp_path, watched):
    tracker = make_tracker(tmp_path, system_metrics=watched, system_every_s=0.2)
    before = time.time()
    tracker.log_metrics({"reward/mean": 0.5}, step=1)
    time.sleep(2.0)
    tracker.finish()
    system = read_run(run_folders(tmp_path)[0]).system
    if not watched:
        assert system == []
        return
    assert len(system) >= 4 and any("cpu" in record for record in system)
    assert all(0 < record["memory_percent"] < 100 for record in system if "memory_percent" in record)
    times = [record["time"] for record in system]
    assert times == sorted(times) and before - 5 < times[0] and times[-1] < time.time() + 1


@pytest.mark.slow
def test_lightning_takes_it_as_its_logger(tmp_path):
    """A module logs through the trainer; the run is still open after fit, and the trainer's own keys do no harm."""
    import torch
    from pytorch_lightning import LightningModule, Trainer

    class Toy(LightningModule):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"variant": {"name": "toy"}})
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch, index):
            self.log("train/rl_step", float(index + 1))
            self.log("reward/mean", torch.tensor(float(index)))
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    tracker = make_tracker(tmp_path)
    trainer = Trainer(
        max_epochs=1, logger=tracker, accelerator="cpu", log_every_n_steps=1, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Toy(), torch.utils.data.DataLoader(torch.ones(3, 1)))
    tracker.log_metrics({"eval/math/standard/accuracy": 0.5})
    tracker.finish()
    run = read_run(run_folders(tmp_path)[0])
    assert run.config["variant.name"] == "toy"
    assert run.history == [
        {"train/rl_step": 1, "reward/mean": 0.0},
        {"train/rl_step": 2, "reward/mean": 1.0},
        {"train/rl_step": 3, "reward/mean": 2.0},
        {"train/rl_step": 3, "eval/math/standard/accuracy": 0.5},
    ]
