"""One run in Weights & Biases, as a Lightning logger.

The run starts at the first thing logged and on rank zero only, so that composing a config costs no run. The config is
logged as flat dotted leaf keys (``trainer.max_epochs``): the same keys that a sweep sets, so the two cannot disagree.
Every curve is drawn against ``train/rl_step``, whatever the optimizer counts. Offline is the default and needs no
account; ``wandb sync`` uploads later. Each number also goes to a JSON-lines file of our own (``mirror.py``), which is
the record that survives any mode.

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

from core_torl.tracking.metrics import STEP, check_names
from core_torl.tracking.mirror import JsonlMirror
from core_torl.tracking.offline import read_run
from core_torl.tracking.samples import SAMPLE_COLUMNS, table_rows
from core_torl.trajectory import Trajectory

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

MODES = ("offline", "online", "disabled")
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
    """Logs metrics, samples, tables and pictures of one run.

    ``mode`` is offline, online or disabled (then nothing but ``jsonl_path`` is written and wandb is not imported).
    ``dir`` holds the ``wandb/`` folder. ``group`` binds the runs of a sweep, ``job_type`` is train or eval, ``name``
    is what people see. Pass the ``run_id`` of an earlier run to continue it. At most ``sample_rows`` samples are kept
    a step. ``system_metrics`` lets W&B watch CPU, memory and GPU.

    Raises ValueError for an unknown mode, RuntimeError if the online run cannot start or the run is finished already.
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
        jsonl_path: str | None = None,
    ):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"logger.mode must be one of {', '.join(MODES)}, not {mode!r}")
        self.mode, self.project, self.entity = mode, project, entity
        self.group, self.job_type, self.tags, self.run_name = group, job_type, tuple(tags), name
        self.sample_rows, self.system_metrics, self.jsonl_path = sample_rows, system_metrics, jsonl_path
        self._dir = dir
        # Drawn here and not by W&B, so that a checkpoint can hold the id before anything is logged; by the operating
        # system's generator, so that equal seeds do not give equal ids. A sweep's agent sets the variable.
        self._run_id = run_id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        self._run: Run | None = None
        self._mirror: JsonlMirror | None = None
        self._finished = False
        self._last_step = 0

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

        Raises ValueError for a name that ``metrics.py`` does not know.
        """
        # Lightning adds `epoch` to what a module logs; passes over the prompts are our `train/epoch`.
        row = {k: _number(v) for k, v in metrics.items() if k != "epoch"}
        check_names(row)
        if not row:
            return
        row = {STEP: self._at(row.get(STEP, step)), **{k: v for k, v in row.items() if k != STEP}}
        run = self._started()
        mirror = self._mirror_file()
        if mirror is not None:
            mirror.append(row)
        if run is not None:
            run.log(row)

    @rank_zero_only
    def log_samples(self, rl_step: int, rows: Sequence[Trajectory | Mapping[str, Any]]) -> None:
        """Log a few of the step's trajectories as a table of their own under ``samples``.

        A growing table would be uploaded anew at each step; one small table a step keeps the volume linear.
        """
        table = table_rows(rl_step, rows, self.sample_rows)
        if table:
            self.log_table("samples", SAMPLE_COLUMNS, table, rl_step=rl_step)

    @rank_zero_only
    def log_table(
        self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], rl_step: int | None = None
    ) -> None:
        """Log a table under ``key``; every row has one cell a column (ValueError otherwise)."""
        if any(len(row) != len(columns) for row in rows):
            raise ValueError(f"table {key!r}: a row has not {len(columns)} cells ({', '.join(columns)})")
        run = self._started()
        if run is not None:
            from wandb import Table

            run.log({key: Table(columns=list(columns), data=[list(row) for row in rows]), STEP: self._at(rl_step)})

    @rank_zero_only
    def log_picture(self, key: str, path: str | os.PathLike[str], rl_step: int | None = None) -> None:
        """Log the image file at ``path`` (PNG or JPEG) under ``key``; FileNotFoundError if there is none."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no picture at {path}")
        run = self._started()
        if run is not None:
            from wandb import Image

            run.log({key: Image(str(path)), STEP: self._at(rl_step)})

    @rank_zero_only
    def rewind(self, rl_step: int) -> None:
        """Forget the lines of ``jsonl_path`` after RL step ``rl_step``: call it once a checkpoint has been loaded."""
        mirror = self._mirror_file()
        if mirror is not None:
            mirror.rewind(rl_step)
        self._last_step = rl_step

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

    def _mirror_file(self) -> JsonlMirror | None:
        if self._mirror is None and self.jsonl_path is not None:
            self._mirror = JsonlMirror(self.jsonl_path)
        return self._mirror

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
        # W&B keeps up to 15 s of rows in memory, which a killed run would lose; older versions lack the setting.
        if hasattr(settings, "x_transaction_log_flush_interval"):
            settings.x_transaction_log_flush_interval = FLUSH_EVERY_S
        try:
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
