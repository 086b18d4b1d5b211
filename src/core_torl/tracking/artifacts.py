"""Files of a run that go to W&B: its results as run files and an artifact, its weights as artifacts where asked for.

Everything is copied into the ``wandb/`` folder of the run, never linked: an offline run can be sent, and a report made
from it, after the rest of the run's folder is gone. W&B would stage such copies, and those of its tables, in the home
directory; ``staged_in`` keeps them beside the run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from core_torl.tracking.metrics import check_kept
from core_torl.variant.checkpoint import newest

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

RESULT_FILES = ("results.json", "metrics.jsonl", "rollouts.jsonl", "transcripts.md", "run.json")
RUN_FILES = ("results.json", "run.json")  # what a report is made from, where only W&B's files are left
ARTIFACTS = ("results", "checkpoint", "policy")
_PLACES = {"WANDB_DATA_DIR": "data", "WANDB_CACHE_DIR": "cache"}


def check_artifacts(wanted: Sequence[str]) -> None:
    """Raises ValueError if one of them is none of ``ARTIFACTS`` or stands there twice."""
    for kind in wanted:
        if kind not in ARTIFACTS:
            raise ValueError(f"logger.artifacts: {kind!r} is none of {', '.join(ARTIFACTS)}")
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"logger.artifacts={list(wanted)}: a kind stands there twice")


def artifact_files(kind: str, folder: Path) -> list[Path]:
    """The files of that artifact in the run folder ``folder``; none if the run has not written any."""
    if kind == "results":
        return [folder / name for name in RESULT_FILES if (folder / name).is_file()]
    if kind == "checkpoint":
        checkpoint = newest(folder / "checkpoints")
        return [checkpoint] if checkpoint else []
    return sorted(path for path in (folder / "policy").rglob("*") if path.is_file())


def log_files(run: Run, folder: Path, wanted: Sequence[str]) -> None:
    """Save ``RUN_FILES`` as files of the run, and log each artifact of ``wanted`` that has files in ``folder``."""
    from wandb import Artifact

    own = Path(run.dir)
    for name in RUN_FILES:
        if (folder / name).is_file():
            # W&B would make a link. A file that is already among the run's own stays as it is.
            shutil.copyfile(folder / name, own / name)
            run.save(str(own / name), base_path=str(own), policy="now")
    for kind in wanted:
        files = artifact_files(kind, folder)
        if not files:
            continue
        check_kept(f"{kind}-{{run}}", "artifact")
        artifact = Artifact(f"{kind}-{run.id}", type=kind)
        root = folder / "policy" if kind == "policy" else None
        for path in files:
            # Copied when added: a later run in this folder may write other files under these names.
            artifact.add_file(str(path), name=str(path.relative_to(root)) if root else path.name, skip_cache=True)
        run.log_artifact(artifact, aliases=["latest"])


@contextmanager
def staged_in(folder: Path) -> Iterator[None]:
    """W&B keeps its copies and logs under ``folder`` meanwhile, unless the user's environment names another place."""
    ours = {name: str(folder / place) for name, place in _PLACES.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]
