"""One run in Weights & Biases, as a Lightning logger.

The run starts at the first thing logged and on rank zero only, so that composing a config costs no run. The config is
logged as flat dotted leaf keys (``trainer.max_epochs``): the same keys that a sweep sets, so the two cannot disagree.
Every curve is drawn against ``train/rl_step``, whatever the optimizer counts; each row also has the samples and tokens
so far, so that it can be drawn against those. Offline is the default and needs no account; ``wandb sync`` sends later.
Each number and each row of text also goes to a JSON-lines file of our own (``mirror.py``), which is the record that
survives any mode.

Why not Lightning's own W&B logger: it shares one run between jobs of one process, counts its own step, and lets any
name through.
"""

from __future__ import annotations

import os
import secrets
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from core_torl.tracking.artifacts import check_artifacts, log_files, staged_in
from core_torl.tracking.metrics import SAMPLES, STEP, TOKENS, check_kept, check_names
from core_torl.tracking.mirror import JsonlMirror
from core_torl.tracking.offline import read_run
from core_torl.tracking.rollouts import COLUMNS, Tables, cells

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

MODES = ("offline", "online", "disabled")
SHORTEST_S = 0.1  # between two records of the machine; W&B takes no less
FLUSH_EVERY_S = 1.0  # what a killed run may lose of its W&B file
END_WITHIN_S = 10.0  # how long to wait for the last bytes of that file


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``. Lists and empty mappings are leaves.

    Raises ValueError if two leaves get one key (``{"a": {"b": 1}, "a.b": 2}``).
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        leaves = flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
        twice = flat.keys() & leaves.keys()
        if twice:
            raise ValueError(f"config key {min(twice)!r} stands twice, once nested and once dotted")
        flat.update(leaves)
    return flat


def _plain(value: Any) -> Any:
    """A config leaf as JSON can hold it: paths and other objects become their text."""
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value)


def _number(value: Any) -> float | int:
    """A Python number from a number, a NumPy scalar or a tensor of one element."""
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, int) and not isinstance(value, bool) else float(value)


def _wait_for_end(folder: Path) -> None:
    """Wait until the run's file has its exit record: W&B tells its writing process to end and does not wait itself."""
    give_up = time.monotonic() + END_WITHIN_S
    # A file without an end is no reason to fail here: it can be read all the same, and says so.
    while read_run(folder).exit_code is None and time.monotonic() < give_up:
        time.sleep(0.01)


class Tracker(Logger):
    """Logs metrics, rollouts, tables, pictures and files of one run.

    ``mode`` is offline, online or disabled (then nothing but ``jsonl_path`` and ``rollouts_path`` is written and wandb
    is not imported). ``dir`` holds the ``wandb/`` folder. ``group`` binds the runs of a sweep, ``job_type`` is train or
    eval, ``name`` is what people see. Pass the ``run_id`` of an earlier run to continue it. ``sample_rows`` is how long
    a table of rollouts may be. ``system_metrics`` lets W&B watch CPU, memory and GPU, every ``system_every_s`` seconds.
    ``artifacts`` says what ``log_files`` makes artifacts of.

    Raises ValueError for an unknown mode or artifact and for too short an interval, RuntimeError if the online run
    cannot start or the run is finished already.
    """

    def __init__(
        self,
        *,
        dir: str,
        mode: str = "offline",
        project: str = "core-torl",
        entity: str | None = None,
        group: str | None = None,
        job_type: str = "train",
        tags: Sequence[str] = (),
        name: str | None = None,
        run_id: str | None = None,
        sample_rows: int = 8,
        system_metrics: bool = True,
        system_every_s: float = 15.0,
        artifacts: Sequence[str] = (),
        jsonl_path: str | None = None,
        rollouts_path: str | None = None,
    ):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"logger.mode must be one of {', '.join(MODES)}, not {mode!r}")
        check_artifacts(artifacts)
        if system_every_s < SHORTEST_S:
            raise ValueError(f"logger.system_every_s={system_every_s}: must be at least {SHORTEST_S}")
        self.mode, self.project, self.entity = mode, project, entity
        self.group, self.job_type, self.tags, self.run_name = group, job_type, tuple(tags), name
        self.sample_rows, self.artifacts = sample_rows, tuple(artifacts)
        self.system_metrics, self.system_every_s = system_metrics, system_every_s
        self.jsonl_path, self.rollouts_path = jsonl_path, rollouts_path
        self._dir = dir
        # Drawn here and not by W&B, so that a checkpoint can hold the id before anything is logged; by the operating
        # system's generator, so that equal seeds do not give equal ids. A sweep's agent sets the variable.
        self._run_id = run_id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        self._run: Run | None = None
        self._mirrors: dict[str, JsonlMirror] = {}
        self._finished = False
        self._last_step = 0
        self._spent: dict[str, float | int] = {}  # samples and tokens so far, once they are known

    # What Lightning asks of a logger: where the run lives and how it is called.

    @property
    def run_id(self) -> str:
        """The id to store in a checkpoint and to pass as ``run_id`` when the run resumes."""
        return self._run_id

    @property
    def name(self) -> str:
        return self.project

    @property
    def version(self) -> str:
        return self._run_id

    @property
    def save_dir(self) -> str:
        return self._dir

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace | None = None, *args: Any, **kwargs: Any) -> None:
        self.log_config(vars(params) if isinstance(params, Namespace) else params or {})

    # What the project logs.

    @rank_zero_only
    def log_config(self, config: Mapping[str, Any]) -> None:
        """Add a nested config to the run's config, as flat dotted leaf keys."""
        run = self._started()
        if run is not None:
            run.config.update({k: _plain(v) for k, v in flatten(config).items()}, allow_val_change=True)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log one row. Its RL step is ``train/rl_step`` of the row, else ``step``, else that of the row before.

        The samples and tokens so far are added to a row without them, such as an evaluation's: those of the row before.
        Raises ValueError for a name that ``metrics.py`` does not know.
        """
        # Lightning adds `epoch` to what a module logs; passes over the prompts are our `train/epoch`.
        row = {k: _number(v) for k, v in metrics.items() if k != "epoch"}
        check_names(row)
        if not row:
            return
        row = {STEP: self._at(row.get(STEP, step)), **self._spent, **{k: v for k, v in row.items() if k != STEP}}
        self._spent = {k: row[k] for k in (SAMPLES, TOKENS) if k in row}
        run = self._started()
        mirror = self._mirror_file(self.jsonl_path)
        if mirror is not None:
            mirror.append(row)
        if run is not None:
            run.log(row)

    @rank_zero_only
    def log_rollouts(self, rl_step: int, tables: Tables) -> None:
        """Log each kind of rows that has any as a table ``rollouts/KIND``, and its rows to ``rollouts_path``.

        A growing table would be uploaded anew at each step; one small table a step keeps the volume linear. Raises
        KeyError for an unknown kind, ValueError for a row with other columns than those of its kind.
        """
        filled = {kind: cells(kind, rows) for kind, rows in tables.items() if rows}
        mirror = self._mirror_file(self.rollouts_path, "rl_step")
        for kind, rows in filled.items():
            if mirror is not None:
                for row in rows:
                    mirror.append({"kind": kind, **dict(zip(COLUMNS[kind], row, strict=True))})
            self.log_table(f"rollouts/{kind}", COLUMNS[kind], rows, rl_step=rl_step)

    @rank_zero_only
    def log_table(
        self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], rl_step: int | None = None
    ) -> None:
        """Log a table under ``key``; ValueError for an unknown key or a row that has not one cell a column."""
        check_kept(key, "table")
        if any(len(row) != len(columns) for row in rows):
            raise ValueError(f"table {key!r}: a row has not {len(columns)} cells ({', '.join(columns)})")
        run = self._started()
        if run is not None:
            from wandb import Table

            table = Table(columns=list(columns), data=[list(row) for row in rows])
            with staged_in(self._wandb_folder):  # W&B keeps a second copy of a table, as an artifact
                run.log({key: table, STEP: self._at(rl_step)})

    @rank_zero_only
    def log_picture(self, key: str, path: str | os.PathLike[str], rl_step: int | None = None) -> None:
        """Log the image file at ``path`` (PNG or JPEG) under ``key``.

        Raises FileNotFoundError if there is none, ValueError for an unknown key.
        """
        check_kept(key, "picture")
        if not Path(path).is_file():
            raise FileNotFoundError(f"no picture at {path}")
        run = self._started()
        if run is not None:
            from wandb import Image

            run.log({key: Image(str(path)), STEP: self._at(rl_step)})

    @rank_zero_only
    def log_files(self, folder: str | os.PathLike[str]) -> None:
        """Save the result files of the run folder ``folder`` with the run, and its ``artifacts``; see ``artifacts.py``.

        Call it once they are written. What the run has not written is left out.
        """
        run = self._started()
        if run is not None:
            with staged_in(self._wandb_folder):
                log_files(run, Path(folder), self.artifacts)

    @rank_zero_only
    def rewind(self, rl_step: int, samples: int = 0, tokens: int = 0) -> None:
        """Begin after RL step ``rl_step``, by which so many samples and tokens were spent; -1: a run from its start.

        Lines of an earlier run, or of steps that a resumed one does again, go from both plain files.
        """
        for path, key in ((self.jsonl_path, STEP), (self.rollouts_path, "rl_step")):
            mirror = self._mirror_file(path, key)
            if mirror is not None:
                mirror.rewind(rl_step)
        self._last_step = rl_step
        self._spent = {SAMPLES: samples, TOKENS: tokens}

    @rank_zero_only
    def finish(self, exit_code: int = 0) -> None:
        """End the run; further calls do nothing. 0 is success, anything else marks the run as failed.

        An offline run's file is whole when this returns. Call it in a ``finally``: the trainer does not, because an
        evaluation may follow in the same run.
        """
        run, self._run, self._finished = self._run, None, True
        if run is not None:
            folder = Path(run.dir).parent
            run.finish(exit_code=exit_code)
            if self.mode == "offline":
                _wait_for_end(folder)

    def _at(self, step: float | None) -> int:
        self._last_step = self._last_step if step is None else int(step)
        return self._last_step

    @property
    def _wandb_folder(self) -> Path:
        return Path(self._dir, "wandb")

    def _mirror_file(self, path: str | None, step_key: str = STEP) -> JsonlMirror | None:
        if path is None:
            return None
        if path not in self._mirrors:
            self._mirrors[path] = JsonlMirror(path, step_key=step_key)
        return self._mirrors[path]

    def _started(self) -> Run | None:
        """The W&B run, started at the first call; None in disabled mode."""
        if self._finished:
            raise RuntimeError(f"run {self._run_id} is finished; nothing more can be logged to it")
        if self._run is None and self.mode != "disabled":
            self._run = self._start()
        return self._run

    def _start(self) -> Run:
        import wandb
        from wandb.errors import CommError, UsageError

        Path(self._dir).mkdir(parents=True, exist_ok=True)
        # Made anew for each run: `init` writes the run's id into the settings it is given.
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=not self.system_metrics)
        settings.x_stats_sampling_interval = self.system_every_s
        # W&B keeps up to 15 s of rows in memory, which a killed run would lose; older versions lack the setting.
        if hasattr(settings, "x_transaction_log_flush_interval"):
            settings.x_transaction_log_flush_interval = FLUSH_EVERY_S
        try:
            with staged_in(self._wandb_folder):
                run = wandb.init(
                    mode="online" if self.mode == "online" else "offline",
                    project=self.project,
                    entity=self.entity,
                    group=self.group,
                    job_type=self.job_type,
                    tags=self.tags,
                    name=self.run_name,
                    dir=self._dir,
                    id=self._run_id,
                    resume="allow",
                    # Two jobs of one process (a sweep under Hydra) are two runs, even while both are open.
                    reinit="create_new",
                    settings=settings,
                )
        except (UsageError, CommError) as error:
            reason = (str(error).splitlines() or ["no reason given"])[0].rstrip(".")
            raise RuntimeError(
                f"W&B cannot start the run ({reason}): run `wandb login`, or set logger.mode=offline"
            ) from error
        run.define_metric("*", step_metric=STEP)
        return run
