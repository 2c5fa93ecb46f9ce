"""Results of runs and trainings on a storage, with their models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from components.errors import DataError
from pipeline.api.result import Result, frame
from pipeline.evaluation import attack_tasks
from pipeline.records import RunRecord
from pipeline.reporting import records
from pipeline.runtime.storage import Storage
from pipeline.stages import as_subjects
from pipeline.training import exports

if TYPE_CHECKING:
    from pandas import DataFrame

EPOCH_KEYS = ("epoch", "phase", "seconds", "images_per_second")


class RunResult(Result):
    """A run on its storage: models, evaluations and report."""

    def __init__(self, directory: Storage, root: Storage, trusted: exports.Trusted = ()) -> None:
        super().__init__(records.read_run(directory), root, directory)
        self.models: Mapping[str, nn.Module] = TrainedModels(self.record, root, trusted)
        """The trained models by name, in eval mode on the CPU, each loaded when it is asked for."""

    @property
    def report(self) -> str:
        """Path or URI of the report. There is a file once the run is finished."""
        return f"{self.directory}/report/report.html"

    def history(self) -> DataFrame:
        """Return a row per model and epoch: seconds, mean loss, and accuracy on validation images.

        Losses are means over the steps of the epoch.
        """
        rows = []
        for name, model in self.record.models.items():
            for file in records.history_files(self._root, model.path):
                epoch = records.read_epoch(self._root, file)
                steps = epoch.get("steps", [])
                losses = sorted({key for step in steps for key in step if key.startswith("loss")})
                rows.append(
                    {
                        "model": name,
                        **{key: epoch[key] for key in EPOCH_KEYS if key in epoch},
                        **{key: float(np.mean([step[key] for step in steps if key in step])) for key in losses},
                        **{f"validation_{key}": value for key, value in epoch.get("validation", {}).items()},
                    }
                )
        return frame(rows)


class TrainResult(RunResult):
    """Result of :func:`defendpp.train`: trained models and their history."""

    def to_dataframe(self) -> DataFrame:
        """Return :meth:`history`."""
        return self.history()


class TrainedModels(Mapping[str, nn.Module]):
    """Models of a run by name. A model is loaded anew whenever it is asked for."""

    def __init__(self, record: RunRecord, root: Storage, trusted: exports.Trusted) -> None:
        self._record, self._root = record, root
        exports.trust([trusted] if isinstance(trusted, str) else trusted)

    def __getitem__(self, name: str) -> nn.Module:
        """Return a model: images [N,C,W,W] in [0,1] to logits.

        Raises:
            KeyError: the run has no such model.
            DataError, StorageError: its files are missing or damaged, or it was evaluated in memory.
        """
        if name not in self._record.models:
            raise KeyError(f"{name!r}: the run has {', '.join(self) or 'no model'}")
        if self._record.experiment.data.source.startswith("memory:"):
            raise DataError(f"{name} was in the memory of a process that called defendpp.evaluate; no file holds it")
        files = {
            n: {**self._root.read_json(f"{m.path}/model.json"), "path": m.path} for n, m in self._record.models.items()
        }
        subject = next(s for s in as_subjects(self._record.experiment, files) if s.name == name)
        return attack_tasks.load_model.__wrapped__(self._root.full_uri, subject.weights, "cpu")

    def __iter__(self) -> Iterator[str]:
        return iter(self._record.models)

    def __len__(self) -> int:
        return len(self._record.models)

    def __repr__(self) -> str:
        return f"<models {', '.join(self)}>"
