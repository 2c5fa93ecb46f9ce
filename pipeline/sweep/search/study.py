"""A sweep as a study of Optuna, in a file that Optuna and optuna-dashboard open.

It follows from ``sweep.json`` alone, so the same command writes it anew.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from pipeline.sweep.trials.entry import TrialEntry, trials_of
from pipeline.sweep.trials.states import DIVERGED, FAILED, FINISHED, PENDING, RUNNING, STOPPED

FILE = "study.log"
DIRECTIONS: tuple[Literal["maximize"], Literal["maximize"]] = ("maximize", "maximize")
METRICS = ("clean", "robust")
"""Names of the values, both of which are accuracies on validation images."""
_STATES = {
    PENDING: TrialState.WAITING,
    RUNNING: TrialState.RUNNING,
    FINISHED: TrialState.COMPLETE,
    STOPPED: TrialState.PRUNED,
    DIVERGED: TrialState.FAIL,
    FAILED: TrialState.FAIL,
}


def distributions(parameters: Mapping[str, Mapping[str, Any]]) -> dict[str, BaseDistribution]:
    """Return Optuna's distribution of each parameter, from ``parameters`` of ``Space.to_dict``."""
    result: dict[str, BaseDistribution] = {}
    for name, domain in parameters.items():
        if domain["domain"] == "Choice":
            result[name] = CategoricalDistribution(tuple(domain["values"]))
        elif domain["domain"] == "IntRange":
            result[name] = IntDistribution(domain["low"], domain["high"])
        else:
            result[name] = FloatDistribution(domain["low"], domain["high"], log=domain["domain"] == "LogUniform")
    return result


def study_file(record: Mapping[str, Any]) -> bytes:
    """Return the journal of the study of a sweep's record.

    Its name is that of recipe and space. A trial is as in :func:`_trial`.
    """
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        file = Path(directory) / FILE
        before = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(file))),
                study_name=f"{record['name']}-{record['space_name']}",
                directions=list(DIRECTIONS),
            )
        finally:
            optuna.logging.set_verbosity(before)
        study.set_metric_names(list(METRICS))
        for key in ("model", "seed", "front", "choice"):
            study.set_user_attr(key, record[key])
        study.set_user_attr("space", record["space"])
        study.add_trials([_trial(trial, record) for trial in trials_of(record)])
        return file.read_bytes()


def _trial(trial: TrialEntry, record: Mapping[str, Any]) -> FrozenTrial:
    """Return Optuna's form of a trial.

    A trial that early stopping ended is pruned, and one that diverged has failed. Robust accuracy after
    each epoch is the intermediate value, because Optuna has one. Our numbers begin at 1, Optuna's at
    0, so the user attribute ``trial`` has ours.
    """
    state = _STATES[trial.state]
    started = None
    if state is not TrialState.WAITING:
        # Optuna's times are local ones without a zone.
        started = datetime.fromisoformat(trial.started or record["created"]).astimezone().replace(tzinfo=None)
    attributes: dict[str, Any] = {
        "trial": trial.number,
        "epochs": len(trial.epochs),
        "training_seconds": trial.training_seconds,
        "objective_seconds": trial.objective_seconds,
        "models": [model.path for model in trial.models],
    }
    if trial.epochs:
        attributes |= {"attacked_images": trial.last.n, "each_seed": [list(scores) for scores in trial.last.each]}
    if trial.reason:
        attributes["reason"] = trial.reason
    return FrozenTrial(
        number=-1,  # The storage numbers the trials in their order.
        trial_id=-1,
        state=state,
        value=None,
        values=[trial.last.clean, trial.last.robust] if state is TrialState.COMPLETE else None,
        datetime_start=started,
        datetime_complete=started + timedelta(seconds=trial.seconds) if started and state.is_finished() else None,
        params=dict(trial.parameters),
        distributions=distributions(record["space"]["parameters"]),
        user_attrs=attributes,
        system_attrs={},
        intermediate_values={scores.epoch: scores.robust for scores in trial.epochs},
    )
