"""Monitor of the models that train: it follows their files on storage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pipeline.runtime.console import say
from pipeline.runtime.lease import LeaseLost
from pipeline.runtime.polling import polling
from pipeline.runtime.storage import Storage
from pipeline.training.finished_models import read_finished
from pipeline.training.jobs import TrainingJob
from pipeline.training.worker_group import LIVE_INTERVAL_S


class Progress:
    """Callbacks of :func:`train`, called by one thread at a time, not the caller's."""

    def on_epoch(self, name: str, record: dict[str, Any]) -> None:
        """Take an epoch's record; each comes once and in order."""

    def on_live(self, done: int, total: int, note: str) -> None:
        """Take steps done and steps in all, over all models, about once a second."""

    def on_external(self, name: str, why_no_autoencoder: str) -> None:
        """Take the reason why an external model has no auto-encoder."""

    def on_model(self, name: str, model: dict[str, Any]) -> None:
        """Take the model.json of a finished model, with its "path"."""


class TrainingMonitor:
    """Reader of the files on storage that each rank 0 writes.

    Records pass over the storage, so none is lost with a process.
    """

    def __init__(self, root: Storage, jobs: Sequence[TrainingJob], progress: Progress) -> None:
        self.root, self.jobs, self.progress = root, jobs, progress
        self.finished: dict[str, dict[str, Any]] = {}
        self._reported: dict[str, set[str]] = {job.name: set() for job in jobs}
        self._lost: LeaseLost | None = None
        self._last_error = ""

    def look(self) -> None:
        """Report what is new on the storage."""
        steps, losses = {}, {}
        for job in self.jobs:
            if job.name in self.finished:
                continue
            home = self.root / job.address
            # Check model.json first: it is written last, so all other files exist once it does.
            finished = home.exists("model.json")
            for name in home.list("history"):
                if name not in self._reported[job.name]:
                    self.progress.on_epoch(job.name, home.read_json(f"history/{name}"))
                    self._reported[job.name].add(name)
            if finished:
                model = read_finished(home, job.address)
                self.progress.on_model(job.name, model)
                self.finished[job.name] = model
            elif home.exists("live.json"):
                live = home.read_json("live.json")
                steps[job.name], losses[job.name] = (live["done"], live["total"]), live["loss"]
        if steps:
            share = (sum(done / total for done, total in steps.values()) + len(self.finished)) / len(self.jobs)
            notes = (f"{name} step {done} of {total}, loss {losses[name]:.4f}" for name, (done, total) in steps.items())
            self.progress.on_live(round(100 * share), 100, f"%: {'; '.join(notes)}")

    def check(self) -> None:
        """Raise LeaseLost if another process has taken the run over."""
        if self._lost is not None:
            raise self._lost

    @contextmanager
    def following(self) -> Iterator[None]:
        """Look about once a second while the body runs, and once more at its end."""
        interrupted = False
        try:
            with polling(self._look_safely, LIVE_INTERVAL_S):
                yield
        except KeyboardInterrupt:
            interrupted = True  # A last look could hang on a server that does not answer.
            raise
        finally:
            if not interrupted:
                self.look()

    def _look_safely(self) -> None:
        """Look, and announce an error that passes. The last look raises one that does not."""
        if self._lost is not None:
            return
        try:
            self.look()
        except LeaseLost as e:
            self._lost = e
        except Exception as e:
            if str(e) != self._last_error:
                say(f"progress cannot be read or published for the moment ({e}); training goes on")
                self._last_error = str(e)
