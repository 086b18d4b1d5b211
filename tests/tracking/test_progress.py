"""Steps as they pass: live on a terminal, plain lines in a log, nothing on other ranks."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from core_torl.tracking.progress import StepProgress


def drive(
    console: Console, steps: range, total: float = 20, every: int = 5, rank_zero: bool = True, start: int = 0
) -> str:
    callback = StepProgress(plain_every=every, console=console)
    trainer = SimpleNamespace(num_training_batches=total, is_global_zero=rank_zero)
    module = SimpleNamespace(rl_step=start, last_metrics={})
    callback.on_train_start(trainer, module)
    for step in steps:
        module.rl_step = step
        module.last_metrics = {"reward/mean": step / 10, "group/all_wrong": 0.25, "rollout/tokens_per_s": 1234.5}
        callback.on_train_batch_end(trainer, module, None, None, step - 1)
    callback.on_train_end(trainer, module)
    return console.file.getvalue()


def test_a_log_gets_a_line_every_few_steps():
    text = drive(Console(file=io.StringIO(), width=20), range(1, 21))
    lines = text.splitlines()
    assert [line.split()[2] for line in lines] == ["1/20", "5/20", "10/20", "15/20", "20/20"]
    assert lines[1].startswith("RL step 5/20  reward 0.500  all wrong 25.0%  tok/s 1,23")
    assert lines[-1].endswith("left 0:00:00")
    assert "right" not in text  # a metric that is missing is left out


def test_after_a_resume_the_first_step_is_shown_and_an_endless_loader_has_no_total():
    text = drive(Console(file=io.StringIO()), range(13, 16), total=float("inf"), start=12)
    assert [line.split()[2] for line in text.splitlines()] == ["13", "15"]
    assert "left" not in text


def test_a_terminal_gets_a_live_bar():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    text = drive(console, range(1, 21))
    assert "20/20" in text and "reward 2.000" in text and "━" in text


def test_other_ranks_are_silent():
    assert drive(Console(file=io.StringIO()), range(1, 21), rank_zero=False) == ""


def test_a_failure_stops_the_live_bar():
    console = Console(file=io.StringIO(), force_terminal=True)
    callback = StepProgress(console=console)
    trainer = SimpleNamespace(num_training_batches=5, is_global_zero=True)
    module = SimpleNamespace(rl_step=0, last_metrics={})
    callback.on_train_start(trainer, module)
    assert callback._progress is not None and callback._progress.live.is_started
    live = callback._progress.live
    callback.on_exception(trainer, module, KeyboardInterrupt())
    assert not live.is_started


def test_no_steps_between_lines_is_refused():
    with pytest.raises(ValueError, match="plain_every"):
        StepProgress(plain_every=0)
