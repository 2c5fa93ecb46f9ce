"""Follows epochs and models on storage while they train."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from components.errors import DataError
from pipeline.runtime.console import say
from pipeline.runtime.lease import LeaseLost
from pipeline.runtime.polling import polling
from pipeline.runtime.storage import Storage
from pipeline.training.jobs import TrainingJob

LIVE_INTERVAL_S = 1.0
VISIBLE_S = 90.0
"""How long a network file system may hide a new file (NFS caches directory entries for up to a minute)."""


class Progress:
    """What :func:`train` tells while it goes on. All calls come from one thread at a time, though not the caller's."""

    def on_epoch(self, name: str, record: dict[str, Any]) -> None:
        """An epoch's record, in order, once."""

    def on_live(self, done: int, total: int, note: str) -> None:
        """About once a second: steps done and in all, over all models."""

    def on_external(self, name: str, without: str) -> None:
        """A model that is given, not trained, has no auto-encoder, and why."""

    def on_model(self, name: str, model: dict[str, Any]) -> None:
        """A model is finished: its model.json, with "path"."""


class TrainingMonitor:
    """Follows the files that the ranks 0 write. Records pass over the storage, so none is lost with a process."""

    def __init__(self, root: Storage, jobs: Sequence[TrainingJob], progress: Progress) -> None:
        self.root, self.jobs, self.progress = root, jobs, progress
        self.finished: dict[str, dict[str, Any]] = {}
        self.told: dict[str, set[str]] = {job.name: set() for job in jobs}
        self.lost: LeaseLost | None = None
        self._announced = ""

    def look(self) -> None:
        """Tell what is new."""
        steps, losses = {}, {}
        for job in self.jobs:
            if job.name in self.finished:
                continue
            home = self.root / job.address
            whole = home.exists("model.json")  # asked first: what it counts is there by then
            for name in home.list("history"):
                if name not in self.told[job.name]:
                    self.progress.on_epoch(job.name, home.read_json(f"history/{name}"))
                    self.told[job.name].add(name)
            if whole:
                model = finished_model(home, job.address)
                self.progress.on_model(job.name, model)
                self.finished[job.name] = model
            elif home.exists("live.json"):
                live = home.read_json("live.json")
                steps[job.name], losses[job.name] = (live["done"], live["total"]), live["loss"]
        if steps:
            share = (sum(done / total for done, total in steps.values()) + len(self.finished)) / len(self.jobs)
            now = (f"{name} step {done} of {total}, loss {losses[name]:.4f}" for name, (done, total) in steps.items())
            self.progress.on_live(round(100 * share), 100, f"%: {'; '.join(now)}")

    def check(self) -> None:
        """Raise LeaseLost where another process has taken the run over."""
        if self.lost is not None:
            raise self.lost

    @contextmanager
    def following(self) -> Iterator[None]:
        """Look about once a second while the body runs, and once more at its end."""
        interrupted = False
        try:
            with polling(self._look_safely, LIVE_INTERVAL_S):
                yield
        except KeyboardInterrupt:
            interrupted = True  # the last look could hang on a server that does not answer
            raise
        finally:
            if not interrupted:
                self.look()

    def _look_safely(self) -> None:
        """Look, and announce an error instead of raising it: it passes, or the last look raises it again."""
        if self.lost is not None:
            return
        try:
            self.look()
        except LeaseLost as e:
            self.lost = e
        except Exception as e:
            if str(e) != self._announced:
                say(f"progress cannot be read or published for the moment ({e}); training goes on")
                self._announced = str(e)


def finished_model(home: Storage, address: str) -> dict[str, Any]:
    model: dict[str, Any] = home.read_json("model.json")
    for file, digest in model["files"].items():
        if hashlib.sha256(home.read_bytes(file)).hexdigest() != digest:
            raise DataError(f"{home.uri}/{file} is not what was exported; delete {home.uri} to train the model again")
    return {**model, "path": address}
