"""An Optuna search that was stopped goes on: its trials are in the storage, and only what is missing is run.

The sweeper alone would run all of ``n_trials`` again, and with a seeded sampler the same points first. So, before it
starts, the trials that stand in the storage are taken off ``n_trials``, the sampler's seed moves on by as many, and
trials that a killed process left open are closed.
"""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict, read_write

log = logging.getLogger(__name__)


def continue_search(config: DictConfig) -> None:
    """Change ``config.hydra.sweeper`` so that the search goes on; other sweepers and new studies stay as they are."""
    sweeper = config.hydra.sweeper
    if "optuna" not in str(OmegaConf.select(sweeper, "_target_", default="")).lower() or not sweeper.get("storage"):
        return
    storage = str(sweeper.storage)
    if storage.startswith("sqlite:///"):  # SQLite makes the file and not its folder
        Path(storage.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    done = _settle(str(sweeper.study_name), storage)
    if not done:
        return
    with read_write(config.hydra), open_dict(sweeper):
        left = max(0, int(sweeper.n_trials) - done)
        log.info(f"{done} trials of study {sweeper.study_name} are in {storage}; {left} are left to run")
        sweeper.n_trials = left
        if OmegaConf.select(sweeper, "sampler.seed") is not None:
            sweeper.sampler.seed = int(sweeper.sampler.seed) + done


def _settle(study_name: str, storage: str) -> int:
    """How many trials of the study are done; those that are open have no process any more and are closed as failed."""
    import optuna
    from optuna.trial import TrialState

    try:
        study = optuna.load_study(study_name=study_name, storage=storage)
    except KeyError:  # no such study yet
        return 0
    trials = study.get_trials(deepcopy=False)
    for trial in trials:
        if trial.state in (TrialState.RUNNING, TrialState.WAITING):
            study.tell(trial.number, state=TrialState.FAIL)
    return sum(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in trials)
