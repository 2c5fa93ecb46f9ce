"""Results of evaluations, runs and trainings, as objects for notebooks."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from components.attacks.spec import AttackSpec
from components.errors import ConfigError, DataError
from components.threat_models import DIRECT
from pipeline.evaluation.chunks import chunk_name, read_examples
from pipeline.records import EvaluationEntry, RunRecord, WorstCase, WorstCasePair, in_order, run_address
from pipeline.reporting import records
from pipeline.runtime.storage import Storage

if TYPE_CHECKING:
    from pandas import DataFrame

METRICS = (
    *("accuracy", "accuracy_low", "accuracy_high", "clean_accuracy", "success_rate", "accuracy_rounded"),
    *(f"{norm}_{quantile}" for norm in ("l2", "linf") for quantile in ("q25", "median", "q75")),
)
"""Metrics of :meth:`Result.to_dataframe` in their order. Files sort them by name."""


class Result:
    """Results of attacks on one or several models.

    Names of keys and columns are those of run.json (docs/records.md).
    """

    def __init__(self, record: RunRecord, root: Storage, directory: Storage) -> None:
        self.record = record
        """All of run.json."""
        self._root, self._directory = root, directory

    @property
    def directory(self) -> str:
        """Path or URI of the run: run.json is in it."""
        return self._directory.uri

    # -- numbers

    @property
    def worst_case(self) -> tuple[WorstCase, ...]:
        """Accuracy of each model and budget if the most harmful example counts for each image.

        It has a Wilson interval: ``accuracy``, ``accuracy_low``, ``accuracy_high``.
        """
        return tuple(self.record.worst_case or ())

    @property
    def worst_case_pairs(self) -> tuple[WorstCasePair, ...]:
        """Worst cases of two models on the same images, with the p-value of McNemar's exact test."""
        return tuple(self.record.worst_case_pairs or ())

    @property
    def flags(self) -> list[dict[str, Any]]:
        """The signs of a failed attack that were raised: model, name, measured, remedy, attacks."""
        from pipeline.reporting import verdicts  # It loads scipy.

        return verdicts.raised_flags(self.record)

    @property
    def active_tests(self) -> DataFrame:
        """Active tests, a row per test: whether an attack finds the adversarial examples that were planted for it."""
        rows = [
            {"model": model, **{k: v for k, v in test.items() if not isinstance(v, list | dict)}}
            for model, tested in (self.record.reliability or {}).items()
            for test in tested.active.values()
        ]
        return frame(rows)

    def to_dataframe(self) -> DataFrame:
        """Return a row per evaluation: model, threat_model, attack, source, n, and its metrics."""
        return frame(
            [
                {
                    "model": e.model,
                    "threat_model": e.threat_model,
                    "attack": e.attack,
                    "source": e.source,
                    "n": e.n,
                    **{k: v for k, v in in_order(e.metrics, METRICS).items() if not isinstance(v, dict)},
                }
                for e in self.record.evaluations
            ]
        )

    def worst_case_dataframe(self) -> DataFrame:
        """Return a row per model, threat model and budget (:attr:`worst_case`)."""
        return frame([w.to_json() for w in self.worst_case])

    def curve(self, attack: str, model: str = "", source: str = "") -> DataFrame:
        """Return accuracy over the norm allowed, for an attack of minimal norm such as ddn.

        Returns:
            Columns ``eps`` (in units of images in [0,1]) and ``accuracy``.

        Raises:
            ConfigError: as :meth:`samples`; also for an attack within a budget.
        """
        entry = self._entry(attack, model, source)
        if entry.curve is None:
            raise ConfigError.of("attack", attack, "an attack of minimal norm: cw, ddn or fab-t")
        return frame({"eps": entry.curve["eps"], "accuracy": entry.curve["accuracy"]})

    # -- samples

    def samples(self, attack: str, model: str = "", source: str = "") -> DataFrame:
        """Return a row per image under one attack.

        Args:
            attack: its spec, or its name if there is one attack of that name. "none": clean images.
            model: the model under attack. Empty: the first one.
            source: the model that the examples were made on. Empty: ``model`` itself.

        Returns:
            Columns index, label, clean_prediction, adversarial_prediction, rounded_prediction, l2
            and linf (docs/records.md).

        Raises:
            ConfigError: there is no such evaluation, or there are several.
            DataError: its files are missing or damaged.
        """
        entry = self._entry(attack, model, source)
        return frame(records.read_judged(self._root, str(entry.path)))

    def examples(self, attack: str, model: str = "", source: str = "") -> Tensor:
        """Return the adversarial examples of one attack, float32 [N,C,W,W] in [0,1] on the CPU.

        Args, Raises: as :meth:`samples`.
        """
        entry = self._entry(attack, model, source)
        if entry.examples is None:
            raise ConfigError.of("attack", attack, "an attack: clean images have no adversarial examples")
        chunk_size = self.record.experiment.evaluation.chunk_size
        directory, chunks = self._root / entry.examples, -(-entry.n // chunk_size)
        if not directory.exists(chunk_name(0)):
            raise DataError(f"{directory.uri} has no examples any more: run the same command again")
        return torch.tensor(np.concatenate([read_examples(directory, i) for i in range(chunks)]))

    def _entry(self, attack: str, model: str, source: str) -> EvaluationEntry:
        """Return the only evaluation that the arguments of :meth:`samples` name."""
        models = list(dict.fromkeys(e.model for e in self.record.evaluations))
        model = model or next(iter(models), "")
        if model not in models:
            raise ConfigError.unknown("model", model, models)
        shown = [e for e in self.record.evaluations if e.model == model and e.source in (None, source or model)]
        wanted = attack if attack == "none" or ":" not in attack else str(AttackSpec.parse(attack))
        matches = [e for e in shown if wanted in (e.attack, e.attack.partition(":")[0])]
        if not matches:
            known = [e.attack.partition(":")[0] if ":" not in attack else e.attack for e in shown]
            raise ConfigError.unknown(f"attack on {model}:", attack, dict.fromkeys(known))
        if len(matches) > 1:
            raise ConfigError.of("attack", attack, f"one of {', '.join(e.attack for e in matches)}")
        return matches[0]

    # -- display

    def to_json(self) -> dict[str, Any]:
        """Return the record as run.json holds it."""
        return self.record.to_json()

    def __str__(self) -> str:
        from pipeline.api import view  # It loads scipy and rich.

        return view.text(self.record, self._remarks())

    def _remarks(self) -> list[str]:
        """Return sentences for the display, beside those that follow from the record."""
        return []

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.record.name}: {len(self.record.evaluations)} evaluations>"

    def _repr_html_(self) -> str:
        from pipeline.api import view

        return view.html(self.record, self._remarks())


class EvaluationResult(Result):
    """Result of :func:`defendpp.evaluate`."""

    def __init__(
        self, record: RunRecord, root: Storage, *, was_training: Sequence[str] = (), temporary: str = ""
    ) -> None:
        super().__init__(record, root, root / run_address(record.experiment))
        self.was_training = list(was_training)
        """Networks that came in training mode. They were evaluated in eval mode."""
        if temporary:
            weakref.finalize(self, shutil.rmtree, temporary, ignore_errors=True)

    @property
    def model(self) -> str:
        """Name of the network under test."""
        return next(iter(self.record.models))

    @property
    def clean_accuracy(self) -> float:
        """Accuracy of the network under test without an attack."""
        return self._entry("none", self.model, "").accuracy

    @property
    def robust_accuracy(self) -> float:
        """Worst case of the network under test within the first attack's budget, white- and black-box.

        It is an upper bound: another attack can only lower it.
        """
        return self.robust.accuracy

    @property
    def robust(self) -> WorstCase:
        """Entry of :attr:`worst_case` that :attr:`robust_accuracy` is the accuracy of.

        Raises:
            ConfigError: no attack but noise was run.
        """
        own = [w for w in self.worst_case if w.model == self.model and w.threat_model in DIRECT]
        if not own:
            raise ConfigError.of("attacks", self.record.experiment.evaluation.attacks, "an attack beside noise")
        specs = map(AttackSpec.parse, self.record.experiment.evaluation.attacks)
        budgets = [(s.norm, s.eps) for s in specs if s.eps is not None and s.name != "noise"]
        return next((w for w in own if (w.norm, w.eps) in budgets[:1]), own[0])

    def _remarks(self) -> list[str]:
        if not self.was_training:
            return []
        one = len(self.was_training) == 1
        return [
            f"{', '.join(self.was_training)} came in training mode, {'was' if one else 'were'} evaluated in eval mode, "
            f"and {'is' if one else 'are'} in training mode again."
        ]

    def save(self, directory: str | Path) -> Path:
        """Save record, examples and report as a run leaves them, and return the report's HTML file.

        :func:`defendpp.load_run` reads the directory of the run, which is two above the report.

        Args:
            directory: a local directory, as ``--storage`` of a run.

        Raises:
            StorageError: a file cannot be written.
        """
        from pipeline.reporting import report  # It loads matplotlib.

        target = Storage(Path(directory).expanduser().absolute())
        for e in self.record.evaluations:
            for path in filter(None, (e.path, e.examples)):
                _copy_files(self._root / path, target / path)
        run = target / run_address(self.record.experiment)
        _copy_files(self._directory, run)
        report.build(run, target)
        return Path(run.root) / "report" / "report.html"


def _copy_files(source: Storage, target: Storage) -> None:
    """Copy the files of a directory that the target lacks."""
    for name in source.list():
        if not target.exists(name):
            target.write_bytes(name, source.read_bytes(name))


def frame(rows: Any) -> DataFrame:
    """Return a data frame of rows or columns."""
    import pandas as pd  # It takes half a second, and not every caller needs it.

    return pd.DataFrame(rows)
