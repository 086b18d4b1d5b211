"""An Optuna search that was stopped goes on: its trials are in the storage, and only what is missing is run.

The sweeper alone would run all of ``n_trials`` again, and with a seeded sampler the same points first. So, before it
starts, the trials that are done are taken off ``n_trials``, and the sampler's seed moves on by all that were drawn. A
trial that a killed command left open is closed and asked for once more, at its own point: its job is then found done,
or goes on from its checkpoint. The caller holds the sweep's lock, so that no open trial belongs to a living command.
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
    done, drawn = _settle(str(sweeper.study_name), storage)
    if not drawn:
        return
    with read_write(config.hydra), open_dict(sweeper):
        left = max(0, int(sweeper.n_trials) - done)
        log.info(f"{done} trials of study {sweeper.study_name} in {storage} are done; {left} are left to run")
        sweeper.n_trials = left
        if OmegaConf.select(sweeper, "sampler.seed") is not None:
            sweeper.sampler.seed = int(sweeper.sampler.seed) + drawn


def _settle(study_name: str, storage: str) -> tuple[int, int]:
    """How many trials of the study are done, and how many were drawn; open ones are closed and put in line again."""
    import optuna
    from optuna.trial import TrialState

    try:
        study = optuna.load_study(study_name=study_name, storage=storage)
    except KeyError:  # no such study yet
        return 0, 0
    trials = study.get_trials(deepcopy=False)
    for trial in trials:
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
            if trial.params:
                study.enqueue_trial(trial.params)
    return sum(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in trials), len(trials)
