"""A running sweep in the terminal: one line a job, how far it is, what it learns, and when all will be done.

The table is drawn anew every second or two from the files of the sweep (``view_state``). Where the output is no
terminal, one plain line is printed whenever a job changes its state. States are words; colour (blue and orange, which
colour-blind readers can tell apart) only repeats them.
"""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from omegaconf import DictConfig
from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from core_torl.config.checks import check_watch
from core_torl.launch.view_jobs import BAD, COMPLETED, DONE, PENDING, RUNNING, UNKNOWN, JobView, duration
from core_torl.launch.view_state import SweepView, newest_sweep, read_sweep

STYLES = {RUNNING: "bold", COMPLETED: "#56b4e9", **dict.fromkeys(BAD, "bold #e69f00"), UNKNOWN: "#e69f00"}
WIDE = 120  # columns from which on everything is shown
NONE = "–"
RATIOS = {"core/trigger_rate": "trigger", "tool/code_ratio": "code"}
INTERRUPTED = 130  # exit code of a command that ended with Ctrl-C


# ---- drawing -----------------------------------------------------------------------------------------------------


def summary(view: SweepView) -> str:
    """``smoke: 4 of 12 done, 1 failed, 2 running, 5 pending, ETA 12 min; of former commands: 3 done``."""
    parts = [f"{view.count(*DONE)} of {len(view.own) + view.to_come} done"]
    counts = {state: view.count(state) for state in (*BAD, UNKNOWN, RUNNING, PENDING)}
    counts[PENDING] += view.to_come
    parts += [f"{n} {state}" for state, n in counts.items() if n]
    parts += [f"ETA {duration(view.eta_s)}"] if view.eta_s is not None else []
    former = {"done": view.count(*DONE, former=True)} | {state: view.count(state, former=True) for state in BAD}
    before = ", ".join(f"{n} {state}" for state, n in former.items() if n)
    return (
        f"{view.name}: {', '.join(parts)}"
        + (f"; of former commands: {before}" if before else "")
        + (f" ({view.note})" if view.note else "")
    )


@dataclass(frozen=True)
class _Picture:
    view: SweepView
    rows: int | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        # The summary comes first: where the terminal is too low, it is the end that is cut off.
        yield Text(summary(self.view), style="bold")
        shown = chosen(self.view.jobs, self.rows)
        yield _table(shown, wide=options.max_width >= WIDE)
        for job in shown:
            if job.note:
                yield Text(f"job {job.number} {job.state}: {job.note}", style=STYLES.get(job.state, ""))
        if left_out := len(self.view.jobs) - len(shown):
            yield Text(f"and {left_out} more jobs", style="dim")


def render(view: SweepView, rows: int | None = None) -> RenderableType:
    """Summary and table for the width at hand; ``rows`` limits the lines that jobs take, see ``chosen``."""
    return _Picture(view, rows)


def chosen(jobs: Sequence[JobView], rows: int | None) -> list[JobView]:
    """As many as fit ``rows`` lines, in their order: what runs, then what went wrong, what ended last, what is next.

    Jobs of former commands come last.
    """
    first = {RUNNING: 0, **dict.fromkeys(BAD, 1), UNKNOWN: 1, **dict.fromkeys(DONE, 2), PENDING: 3}
    places = range(len(jobs))
    ranked = sorted(
        places,
        key=lambda k: (
            jobs[k].former, first[jobs[k].state], jobs[k].number if jobs[k].state == PENDING else -jobs[k].number
        ),
    )  # fmt: skip
    # A note takes a line of its own.
    lines = itertools.accumulate(1 + bool(jobs[k].note) for k in ranked)
    kept = {k for k, line in zip(ranked, lines, strict=True) if rows is None or line <= rows}
    return [jobs[k] for k in places if k in kept]


def _table(jobs: Sequence[JobView], wide: bool) -> Table:
    """Eight columns that fit 80 characters; where there is room, seconds a step as well.

    Where no step passes, the phase (starting, evaluating) stands in their place, or in that of the state.
    """
    ratios = {job.ratio[0] for job in jobs if job.ratio is not None}
    names = "/".join(RATIOS[name] for name in sorted(ratios)) or "trigger"
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("job", justify="right", no_wrap=True)
    table.add_column("overrides", min_width=8)  # the only one that gives way
    table.add_column("state", no_wrap=True)
    for head in ("step", "reward", "right", names, *(["s/step"] if wide else []), "left"):
        table.add_column(head, justify="right", no_wrap=True)
    for job in jobs:
        cells = [
            Text(str(job.number)), Text(job.label, no_wrap=True, overflow="ellipsis"),
            Text(job.state if wide else job.phase or job.state, style=STYLES.get(job.state, "dim")), Text(_steps(job)),
            Text(_number(job.reward, ".3f")), Text(_number(job.accuracy, ".1%")),
            Text(_number(job.ratio[1] if job.ratio else None, ".0%")),
            *([Text(job.phase or _number(job.step_s, ".2f"))] if wide else []),
            Text("" if job.eta_s is None else duration(job.eta_s)),
        ]  # fmt: skip
        table.add_row(*cells)
    return table


def _steps(job: JobView) -> str:
    """``37/120``, and ``37/120 80%`` where a token budget brings the end nearer than the steps say."""
    if job.step is None:
        return NONE
    if job.rl_steps is None or job.state in DONE:
        return str(job.step)
    nearer = job.state == RUNNING and job.progress is not None and job.progress > job.step / job.rl_steps + 0.005
    return f"{job.step}/{job.rl_steps}" + (f" {job.progress:.0%}" if nearer else "")


def _number(value: float | None, style: str) -> str:
    return NONE if value is None else f"{value:{style}}"


# ---- keeping it up to date ---------------------------------------------------------------------------------------


class _Screen:
    """Shows one view after another: in place on a terminal, elsewhere as a line a change. Use it as a context."""

    def __init__(self, console: Console):
        self.console = console
        self._live: Live | None = None
        self._states: dict[tuple[int, Path], str] | None = None

    def __enter__(self) -> _Screen:
        if self.console.is_terminal:
            # Drawn when there is something new only: a thread of rich's own would draw between two looks.
            self._live = Live(console=self.console, auto_refresh=False, vertical_overflow="crop")
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, view: SweepView) -> None:
        if self._live is not None:
            # A line each for summary, head, what is left out, and the cursor.
            self._live.update(render(view, rows=max(1, self.console.height - 4)), refresh=True)
            return
        # Jobs of two commands may have the same number, and two equal jobs of one command share a folder.
        states = {(job.number, job.folder): job.state for job in view.jobs}
        if states != self._states:
            before, self._states = self._states or {}, states
            news = [job for job in view.own if job.state in BAD and before.get((job.number, job.folder)) != job.state]
            line = "; ".join([summary(view), *(f"job {job.number} {job.state}: {job.note}" for job in news)])
            self.console.print(Text(line), soft_wrap=True)  # a line of a log is never folded


class LiveView:
    """Shows the sweep in ``folder`` while the body of a ``with`` runs, which starts and awaits its jobs.

    A thread reads and draws, about every ``every_s`` seconds. Nothing that goes wrong with the view reaches the body:
    the view ends with one line that says why, the sweep goes on. At the end the last state is shown once more.
    """

    def __init__(self, folder: str | Path, console: Console | None = None, every_s: float = 1.0):
        self.folder, self.every_s = Path(folder), every_s
        self.console = console or Console()
        self._screen = _Screen(self.console)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweep view", daemon=True)

    def __enter__(self) -> LiveView:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            with self._screen:
                while not self._end.wait(self.every_s):
                    self._look()
                self._look()
        except Exception as error:  # noqa: BLE001 - a table is no reason to lose a sweep; the reader is told
            self.console.print(Text(f"The view of the sweep ended ({type(error).__name__}: {error}); its jobs go on."))

    def _look(self) -> None:
        if (self.folder / "sweep.json").exists():  # else it has not begun
            self._screen.show(read_sweep(self.folder))


def watch(cfg: DictConfig) -> int:
    """``core-torl-watch``: show a sweep until all its jobs have ended, or once. Its exit code: 0, or 1 if a job failed.

    Ctrl-C ends the view and leaves the sweep alone. UserError: no such folder, or no sweep in it.
    """
    check_watch(cfg)
    folder = newest_sweep(cfg.paths.root) if cfg.runs is None else Path(cfg.runs)
    view = read_sweep(folder)
    console = Console()
    if cfg.once:
        console.print(render(view))
        return exit_code(view)
    asked = threading.Event()
    # Not as an exception, which could come while a line is printed and be swallowed there.
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.set())
    try:
        with _Screen(console) as screen:
            screen.show(view)
            while not view.ended:
                if _asked_within(cfg.every_s, asked):
                    return INTERRUPTED
                view = read_sweep(folder)
                screen.show(view)
    finally:
        signal.signal(signal.SIGINT, before)
    return exit_code(view)


def _asked_within(seconds: float, asked: threading.Event) -> bool:
    return asked.wait(seconds)


def exit_code(view: SweepView) -> int:
    """1 if a job of the last command went wrong, or if the sweep is over and not all of it is done; else 0."""
    return int(view.count(*BAD) > 0 or (view.ended and view.count(*DONE) < len(view.own) + view.to_come))
