"""Sweeps from Python, and their trials as a data frame."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from components.config import Experiment
from components.errors import DataError
from components.fields import from_dict
from pipeline.api.result import frame
from pipeline.api.run_result import RunResult
from pipeline.api.runs import below, experiment_of, load_run
from pipeline.reporting import records
from pipeline.runtime.storage import Storage
from pipeline.sweep import run as sweep_run
from pipeline.sweep.options import Evaluate, SweepOptions
from pipeline.sweep.report import summary
from pipeline.sweep.trials.entry import TrialEntry, trials_of

if TYPE_CHECKING:
    from pandas import DataFrame


def sweep(
    recipe: str | Experiment,
    space: str | os.PathLike[str],
    *,
    trials: int | None = None,
    search: str | None = None,
    seed: int = 0,
    max_concurrent: int = 0,
    evaluate: Evaluate = "full",
    **overrides: Any,
) -> SweepResult:
    """Search settings of a recipe's model, choose one, and test the choice once.

    The same call continues a sweep that was stopped.

    Args:
        recipe, overrides: as for :func:`defendpp.run`.
        space: a file of ``tune_spaces/`` or its name, or a copy of one (docs/sweeps.md).
        trials: number of configurations, instead of the space's.
        search: "grid", "random" or "tpe", instead of the space's.
        seed: seed of the search.
        max_concurrent: how many models are trained at once; 0: as many as there is room for.
        evaluate: attacks under which the choice is tested: "full", "recipe" or "none".

    Raises:
        UserError: of the kind that fits; the message names what, where and what to do.
    """
    experiment = experiment_of(recipe, overrides)
    options = SweepOptions(
        space=os.fspath(space),
        trials=trials,
        search=search,
        seed=seed,
        max_concurrent=max_concurrent,
        evaluate=evaluate,
    )
    return SweepResult(sweep_run.execute(experiment, options), Storage(experiment.storage))


def load_sweep(directory: str | os.PathLike[str]) -> SweepResult:
    """Read a sweep, finished or not.

    Args:
        directory: path or URI of ``sweeps/<recipe>-<space>-<hash>`` on a storage.

    Raises:
        DataError: there is no sweep.
        StorageError: its record cannot be read.
    """
    return SweepResult(*below(directory))


class SweepResult:
    """A sweep on its storage."""

    def __init__(self, directory: Storage, root: Storage) -> None:
        record = records.read_record(directory, "sweep.json")
        if record is None:
            raise DataError(f"{directory.uri} has no sweep.json. Sweeps lie under STORAGE/sweeps/")
        self.record = record
        """All of sweep.json (docs/records.md)."""
        self._directory, self._root = directory, root

    @property
    def directory(self) -> str:
        """Path or URI of the sweep."""
        return self._directory.uri

    @property
    def report(self) -> str:
        """Path or URI of the report. There is a file once a configuration is chosen."""
        return f"{self.directory}/report/report.html"

    @property
    def trials(self) -> list[TrialEntry]:
        """The trials by number, with the scores after each epoch."""
        return trials_of(self.record)

    @property
    def best(self) -> TrialEntry | None:
        """The chosen trial; None before there is a choice."""
        return summary.chosen(self.record) if self.record["choice"] else None

    @property
    def best_experiment(self) -> Experiment | None:
        """The experiment that tests the choice, for :func:`defendpp.run`; None before a choice."""
        if not self._directory.exists("best.json"):
            return None
        return from_dict(Experiment, self._directory.read_json("best.json")["experiment"])

    @property
    def evaluation(self) -> RunResult | None:
        """The test of the choice on test images; None if it was not tested."""
        address = self.record["evaluation"]
        if not address or not self._root.exists(f"{address}/run.json"):
            return None
        return load_run(self._root.join(address))

    def to_dataframe(self) -> DataFrame:
        """Return a row per trial, in the order of their numbers.

        Columns: ``trial``; ``state``; ``epochs`` done; ``clean`` and ``robust``, the accuracies on
        ``n`` validation images after the last epoch (NaN before the first); ``seconds``,
        ``training_seconds``, ``objective_seconds``; ``front`` (whether the trial is on the Pareto
        front) and ``chosen``; ``reason``; and a column ``config/NAME`` for each parameter, as in
        Ray Tune's ResultGrid.
        """
        best = self.best
        rows = []
        for trial in self.trials:
            last = trial.epochs[-1] if trial.epochs else None
            rows.append(
                {
                    "trial": trial.number,
                    "state": trial.state,
                    "epochs": len(trial.epochs),
                    "clean": last.clean if last else float("nan"),
                    "robust": last.robust if last else float("nan"),
                    "n": last.n if last else 0,
                    "seconds": trial.seconds,
                    "training_seconds": trial.training_seconds,
                    "objective_seconds": trial.objective_seconds,
                    "front": trial.number in self.record["front"],
                    "chosen": best is not None and trial.number == best.number,
                    "reason": trial.reason,
                    **{f"config/{name}": value for name, value in trial.parameters.items()},
                }
            )
        return frame(rows)

    def __str__(self) -> str:
        head = f"{self.record['name']}, space {self.record['space_name']}: {len(self.trials)} trials"
        return head + (f"\n{summary.conclusion(self.record)}" if self.record["choice"] else ", no choice yet")

    def __repr__(self) -> str:
        return f"<SweepResult {self.record['name']}: {len(self.trials)} trials>"

    def _repr_html_(self) -> str:
        frame = self.to_dataframe()
        shown = frame[[c for c in frame if c in ("trial", "state", "clean", "robust", "chosen") or "/" in c]]
        table: str = shown.to_html(index=False, float_format=lambda value: f"{value:.4g}")
        return f"<p>{_escaped(str(self))}</p>{table}"


def _escaped(text: str) -> str:
    from html import escape

    return "<br>".join(map(escape, text.splitlines()))
