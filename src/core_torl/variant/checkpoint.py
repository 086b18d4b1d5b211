"""Checkpoints by RL step, whole or not at all, and a Ctrl-C that loses nothing.

A checkpoint is written beside its final name and renamed, so a file with a final name is always complete. Ctrl-C (or
SIGTERM, which clusters send) lets the RL step in progress finish, saves, and ends the run; a second one ends at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import re
import signal
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from core_torl.config.errors import UserError
from core_torl.variant.policy_gradient import PolicyGradient

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{6,})\.ckpt")


class RLCheckpoint(pl.Callback):
    """Save every ``every`` RL steps (0: never in between) and after the last one; keep the ``keep`` newest.

    A step that fails before it has changed the weights, because its sampler or sandbox is gone, say, is as if it had
    not begun: the state after the step before it is saved, and nothing is lost. One whose new weights cannot be handed
    to the sampler is done, and saved as such.
    """

    def __init__(self, folder: Path, every: int, keep: int) -> None:
        self.folder, self.every, self.keep = folder, every, keep
        self.interrupted = False
        self.last: Path | None = None
        self._handlers: dict[int, Any] = {}
        self._refused = False  # the disk did not take a checkpoint: not to be tried again on the way out

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        assert isinstance(pl_module, PolicyGradient)
        # Other ranks may be well and would not come to a joint save; a second Ctrl-C means at once.
        if not pl_module.settled or trainer.world_size > 1 or not isinstance(exception, Exception) or self._refused:
            return
        step = pl_module.rl_step
        if step and step not in found(self.folder):
            try:
                self.save(trainer, step)
            except UserError as error:  # what went wrong first is what the user has to know
                log.warning("%s", error)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def stop(number: int, frame: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            print("\ncore-torl: finishing this RL step, then saving (press Ctrl-C again to stop at once)", flush=True)

        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread: leave signals to whoever owns them
                self._handlers[number] = signal.signal(number, stop)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PolicyGradient)
        step = pl_module.rl_step
        stop = self.interrupted
        if trainer.world_size > 1:  # every rank must take the same decision
            flag = torch.tensor(int(stop), device=pl_module.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            stop = bool(flag)
        if stop or pl_module.finished or (self.every and step % self.every == 0):
            self.save(trainer, step)
        if stop:
            self.interrupted = True
            trainer.should_stop = True

    def save(self, trainer: pl.Trainer, step: int) -> None:
        """Write ``step-NNNNNN.ckpt`` atomically and drop the oldest. Raises UserError when the disk refuses."""
        final = self.folder / f"step-{step:06d}.ckpt"
        part = final.with_suffix(".part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            trainer.save_checkpoint(part)
            if trainer.is_global_zero:
                with open(part, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(part, final)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of its zip writer
            part.unlink(missing_ok=True)
            self._refused = True
            if isinstance(error, RuntimeError) and "write" not in str(error).lower():
                raise
            whole = self.last or newest(self.folder)
            raise UserError(
                f"cannot write the checkpoint {final} ({' '.join(str(error).split())[:120]}): make room or move "
                f"paths.root; {'the last whole one is ' + str(whole) if whole else 'there is no earlier one'}"
            ) from error
        self.last = final
        if trainer.is_global_zero:
            for old in sorted(found(self.folder))[: -self.keep]:
                found(self.folder)[old].unlink()


def found(folder: Path) -> dict[int, Path]:
    """RL step -> complete checkpoint in ``folder``."""
    if not folder.is_dir():
        return {}
    return {int(m[1]): p for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))}


def newest(folder: Path) -> Path | None:
    steps = found(folder)
    return steps[max(steps)] if steps else None


def resolve(resume: str | None, output_dir: Path) -> Path | None:
    """The checkpoint that ``resume`` means: None, ``auto`` (this run's own folder), a file or a folder.

    Raises UserError if there is none; ``auto`` without a checkpoint starts anew.
    """
    if resume is None:
        return None
    if resume == "auto":
        return newest(output_dir / "checkpoints")
    path = Path(resume)
    if path.is_file():
        return path
    checkpoint = newest(path) or newest(path / "checkpoints")
    if checkpoint is None:
        raise UserError(
            f"resume={resume}: no step-*.ckpt there; give a checkpoint, or a run folder that has checkpoints/"
        )
    return checkpoint


def read(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint. Raises UserError if it is not one of ours or is damaged."""
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path}: cannot be read as a checkpoint ({' '.join(str(error).split())[:100]}); take an earlier one"
        ) from error
    if not isinstance(contents, dict) or "core_torl" not in contents:
        raise UserError(f"{path}: not a checkpoint of core-torl-train")
    return contents


def check_fingerprint(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to continue a run under another configuration: the curve would belong to neither."""
    differing = sorted(k for k in {*saved, *current} if saved.get(k) != current.get(k))
    if differing:
        shown = ", ".join(f"{k} was {saved.get(k)!r} and is {current.get(k)!r}" for k in differing[:3])
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(
            f"{path} was written by another configuration: {shown}{more}; repeat those settings, or start anew with "
            "resume=null"
        )
