"""The MLflow runs of a run directory, published from its records.

The records on storage are the truth, and MLflow is a view of them. Every call here may fail without
harm: what could not be sent waits in the :class:`Outbox`, and the same command run again sends it.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import time as clock
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mlflow import MlflowClient
from mlflow.entities import DatasetInput, InputTag, LoggedModelInput, Metric, Param, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from pipeline.runtime.storage import Storage
from pipeline.tracking import runs
from pipeline.tracking.datasets import SplitData
from pipeline.tracking.history import epoch_metrics
from pipeline.tracking.logged_models import LoggedNetwork, text_of
from pipeline.tracking.outbox import BEHIND, Outbox
from pipeline.tracking.registry import Registration
from pipeline.tracking.requests import UPLOAD_TIMEOUT_SECONDS, error_within, http_limits, reason_of
from pipeline.tracking.server import EXPERIMENT, to_stderr
from pipeline.tracking.uri import check_address, page

T = TypeVar("T")

METRICS_AT_ONCE = 1000
"""MLflow's limit on the metrics of one request."""
ENTRIES_AT_ONCE = 100
"""MLflow's limit on the tags or params of one request."""
TAG_LENGTH, PARAM_LENGTH = 5000, 6000
"""MLflow's limits on the characters of a tag and a param."""


class Tracker:
    """The MLflow runs of one run directory, addressed by alias.

    Aliases are "run", "model/defend" or "trial/001". Only :meth:`flush`, :meth:`conclude` and
    :meth:`stop` wait for MLflow, and no method raises because of it. Safe to call from several
    threads.

    Args:
        uri: MLflow server or database; see :func:`pipeline.tracking.server.check_reachable`.
        run: the run directory. Its ``tracking.json`` makes a second publication add nothing.
        echo: takes the few plain lines for the user.

    Raises:
        ConfigError: ``uri`` cannot be the address of an MLflow.
    """

    def __init__(
        self, uri: str, run: Storage, *, experiment: str = EXPERIMENT, echo: Callable[[str], None] = to_stderr
    ) -> None:
        check_address(uri)
        self.uri = uri
        self.storage = run
        self.outbox = Outbox(uri, run, experiment=experiment, echo=echo)
        self._starts = {alias: entry["start"] for alias, entry in self.outbox.state["runs"].items()}

    # -- content of runs --------------------------------------------------------------------------

    def start(
        self,
        alias: str,
        name: str,
        *,
        parent: str | None = None,
        tags: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        time: float | None = None,
    ) -> None:
        """Create the MLflow run of an alias, or continue it. A later call may add tags and params.

        Args:
            name: shown in MLflow's UI.
            parent: alias of the run that this one belongs to. It was started before.
            tags: values that are not texts are sent as JSON. None is left out.
            params: MLflow refuses another value for a param that a run has.
            time: when the run began (unix seconds), now if None. The first call decides.
        """
        with self.outbox.lock:  # Another thread must not queue an operation of the run before its creation.
            if parent is not None:
                self._require(parent)
            start = self._starts.setdefault(alias, _milliseconds(time))
            self.outbox.put(
                alias, "create", lambda client: runs.create(client, self.outbox, alias, name, parent, start)
            )
            if self.outbox.state["status"].get(alias) in ("FAILED", "KILLED"):
                self.outbox.put(
                    alias, "status/RUNNING", lambda client: self._set_status(client, alias, "RUNNING", None)
                )
        entries = [RunTag(k, text_of(v)[:TAG_LENGTH]) for k, v in sorted((tags or {}).items()) if v is not None]
        for tag_slice in _slices(entries, ENTRIES_AT_ONCE):
            self._put_batch(alias, f"tags/{_digest([[t.key, t.value] for t in tag_slice])}", tags=tag_slice)
        values = [Param(k, text_of(v)[:PARAM_LENGTH]) for k, v in sorted((params or {}).items())]
        for param_slice in _slices(values, ENTRIES_AT_ONCE):
            self._put_batch(alias, f"params/{_digest([[p.key, p.value] for p in param_slice])}", params=param_slice)

    def history(self, alias: str, epoch: int, read: Callable[[], Mapping[str, Any]]) -> None:
        """Publish the steps of one epoch as metrics ``train/...``, and its ``validation/...``.

        Args:
            read: returns the record of the epoch (a ``history/epoch-*.json``). It is called when
                the epoch is sent, so that epochs that wait take no memory.
        """
        self._require(alias)
        self.outbox.put(
            alias, f"history/{epoch}", lambda client: self._log_metrics(client, alias, epoch_metrics(read()))
        )

    def metrics(
        self,
        alias: str,
        values: Mapping[str, float | None],
        *,
        step: int = 0,
        time: float | None = None,
        is_remembered: bool = True,
    ) -> None:
        """Publish metrics of a run at one step.

        Args:
            values: None is left out.
            time: unix seconds. None: when the run began; sending them again then adds nothing.
            is_remembered: False for values that are sent once, and whose loss does no harm.
        """
        self._require(alias)
        at = self._starts[alias] if time is None else _milliseconds(time)
        metrics = [Metric(k, float(v), at, step) for k, v in values.items() if v is not None]
        self._put_metrics(alias, f"metrics/{step}/{_digest(sorted(values.items()))}", metrics, is_remembered)

    def model_metrics(
        self, alias: str, values: Mapping[str, float | None], *, time: float, data: SplitData | None = None
    ) -> None:
        """Publish metrics of a run and of its logged model, as measured on a data set.

        Args:
            values: None is left out.
            time: unix seconds. Other values of the same metrics need another time.
        """
        self._require(alias)
        if all(value is None for value in values.values()):
            return
        at = _milliseconds(time)
        name, digest = (data.name, data.digest) if data else (None, None)

        def send(client: MlflowClient) -> None:
            model_id = self.outbox.model_id(alias)
            metrics = [
                Metric(k, float(v), at, 0, model_id=model_id, dataset_name=name, dataset_digest=digest)
                for k, v in values.items()
                if v is not None
            ]
            self._log_metrics(client, alias, metrics)

        self.outbox.put(alias, f"model_metrics/{_digest([*sorted(values.items()), name, digest])}", send)

    def curve(self, alias: str, name: str, steps: Sequence[int], values: Sequence[float]) -> None:
        """Publish one metric over many steps."""
        self._require(alias)
        at = self._starts[alias]
        metrics = [Metric(name, float(v), at, int(s)) for s, v in zip(steps, values, strict=True)]
        self._put_metrics(alias, f"curve/{name}/{_digest([list(steps), list(values)])}", metrics)

    def dataset(self, alias: str, data: SplitData, context: str) -> None:
        """Publish a data set that the run read. ``context`` is training, validation or test."""
        self._require(alias)
        entry = DatasetInput(data.entity(), [InputTag("mlflow.data.context", context)])
        self.outbox.put(
            alias,
            f"dataset/{context}/{_digest([data.name, data.digest, data.source, data.rows])}",
            lambda client: client.log_inputs(self.outbox.run_id(alias), datasets=[entry]),
        )

    def reads_model(self, alias: str, model: str) -> None:
        """Publish that a run evaluated the logged model of another run, whose alias is ``model``."""
        self._require(alias)

        def send(client: MlflowClient) -> None:
            inputs = [LoggedModelInput(self.outbox.model_id(model))]
            client.log_inputs(self.outbox.run_id(alias), models=inputs)

        self.outbox.put(alias, f"model_input/{model}", send)

    def note(self, alias: str, text: str) -> None:
        """Publish the description of a run, in Markdown.

        A link to ``artifact:FILE`` becomes one to the page of that artifact of the run.
        """
        self._require(alias)

        def send(client: MlflowClient) -> None:
            run_id = self.outbox.run_id(alias)
            link = page(self.experiment_id, run_id, r"/artifacts/\1")
            client.set_tag(run_id, MLFLOW_RUN_NOTE, re.sub(r"artifact:([^)]*)", link, text)[:TAG_LENGTH])

        self.outbox.put(alias, f"note/{_digest(text)}", send)

    def text(self, alias: str, text: str, file: str) -> None:
        """Publish a text as the artifact ``file``."""
        self._require(alias)
        self.outbox.put(
            alias,
            f"text/{file}/{_digest(text)}",
            lambda client: client.log_text(self.outbox.run_id(alias), text, file),
        )

    def artifact(self, alias: str, storage: Storage, name: str, artifact_path: str = "") -> None:
        """Publish a file under its own name in the artifact directory ``artifact_path``.

        Raises:
            StorageError: there is no such file.
        """
        self._require(alias)
        digest = hashlib.sha256(storage.read_bytes(name)).hexdigest()[:16]

        def upload(client: MlflowClient, path: str) -> None:
            with http_limits(timeout=UPLOAD_TIMEOUT_SECONDS):
                client.log_artifact(self.outbox.run_id(alias), path, artifact_path or None)

        def send(client: MlflowClient) -> None:
            if storage.is_local:  # This works even if the disk for temporary files is full.
                upload(client, storage.path(name))
                return
            with tempfile.TemporaryDirectory(prefix="defendpp-") as directory:
                copy = Path(directory) / Path(name).name
                copy.write_bytes(storage.read_bytes(name))
                upload(client, str(copy))

        self.outbox.put(alias, f"artifact/{artifact_path}/{Path(name).name}/{digest}", send)

    def log_model(self, alias: str, network: LoggedNetwork) -> None:
        """Publish a network as the logged model of a run."""
        self._require(alias)
        send = partial(network.send, outbox=self.outbox, alias=alias)
        self.outbox.put(alias, f"logged_model/{network.weights}", send)

    def register(self, alias: str, registration: Registration) -> None:
        """Publish the logged model of a run as a version of a registered model."""
        self._require(alias)
        self.outbox.put(alias, registration.key, partial(registration.send, outbox=self.outbox, alias=alias))

    # -- end of runs ------------------------------------------------------------------------------

    def finish(self, alias: str, status: str = "FINISHED", *, time: float | None = None) -> None:
        """End a run as FINISHED, FAILED or KILLED. A later :meth:`start` continues the last two."""
        self._require(alias)
        end = _milliseconds(time)

        def send(client: MlflowClient) -> None:
            # The first connection forgets the status of a run that MLflow no longer has.
            if self.outbox.state["status"].get(alias) != status:
                self._set_status(client, alias, status, end)

        with self.outbox.lock:
            if not self.has_ended(alias, status) or self.outbox.is_waiting(f"{alias}|status/"):
                self.outbox.put(alias, f"status/{status}", send)

    def has_ended(self, alias: str, status: str) -> bool:
        """Return whether a run is published with this status, and its records need not be read."""
        with self.outbox.lock:
            return self.outbox.is_connected and self.outbox.state["status"].get(alias) == status

    def conclude(self, timeout_s: float = 30.0) -> bool:
        """Flush at the end of a run, and return whether all is published.

        Its MLflow runs are FINISHED even if the rest has to wait.
        """
        published = self.flush(timeout_s)
        if not published:
            self.stop("FINISHED")
        return published

    def stop_for(self, error: BaseException, *, complete: bool) -> None:
        """End the run as KILLED at once after an interruption, else as FAILED after a flush.

        It is FINISHED if the records are ``complete``, so that only their publication was stopped.
        """
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        if not interrupted:
            self.flush()
        self.stop("FINISHED" if complete else "KILLED" if interrupted else "FAILED")

    def stop(self, status: str) -> None:
        """End the run and its open children, in about two seconds even if MLflow hangs.

        Nothing else is sent from then on. A later command publishes it and continues these runs.
        Children of a run that is FAILED are KILLED.
        """
        deadline = clock.monotonic() + 2.0
        self.outbox.halt(timeout_s=1.0)  # A run that is being created now would stay open.
        state = self.outbox.state

        def close() -> None:
            client, end = self.outbox.connect(), _milliseconds(None)
            for alias in sorted(state["runs"], key=lambda alias: alias != "run"):
                if state["status"].get(alias) not in ("FINISHED", "FAILED", "KILLED"):
                    child_failed = status == "FAILED" and alias != "run"
                    self._set_status(client, alias, "KILLED" if child_failed else status, end)
            self.outbox.save()

        if not state["runs"]:
            return
        with http_limits(timeout=1, retries=0):
            error = error_within(max(0.5, deadline - clock.monotonic()), close)
        if error is not None:
            self.outbox.echo(
                f"MLflow at {self.outbox.shown_uri} did not learn that the run is {status} ({reason_of(error)})"
            )

    # -- replacement of runs ----------------------------------------------------------------------

    def replace_runs(self) -> None:
        """Let everything be published into new runs. :meth:`delete_earlier` deletes the others.

        Raises:
            StorageError: ``tracking.json`` cannot be written.
        """
        self.outbox.replace_runs()
        self._starts = {alias: entry["start"] for alias, entry in self.outbox.state["runs"].items()}

    def delete_earlier(self) -> None:
        """Delete the runs that :meth:`replace_runs` replaced, if nothing of the new ones was refused."""
        if self.outbox.state["is_replacing"]:
            what = f"delete/{self.outbox.state['generation']}"
            self.outbox.put(runs.EARLIER, what, lambda client: runs.delete_earlier(client, self.outbox))

    # -- outbox -----------------------------------------------------------------------------------

    def run_id(self, alias: str = "run") -> str | None:
        """Return MLflow's id of a run, or None while it could not be created."""
        run = self.outbox.state["runs"].get(alias)
        return run["id"] if run else None

    @property
    def experiment_id(self) -> str | None:
        """MLflow's id of the experiment, or None before the first answer of the server."""
        return self.outbox.state["experiment"]

    @property
    def is_behind(self) -> bool:
        """Tell whether many operations wait, so that a caller should omit what records hold anyway."""
        return self.outbox.pending > BEHIND

    def excused(self, what: str) -> AbstractContextManager[None]:
        """Go on if the body fails to read records; see :meth:`Outbox.excused`."""
        return self.outbox.excused(what)

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Send the rest until nothing moves for ``timeout_s``. Return whether all is published."""
        return self.outbox.flush(timeout_s)

    # -- requests ---------------------------------------------------------------------------------

    def _require(self, alias: str) -> None:
        if alias not in self._starts:
            raise ValueError(f"start({alias!r}, ...) comes first")

    def _put_batch(self, alias: str, what: str, **entries: Any) -> None:
        self.outbox.put(alias, what, lambda client: client.log_batch(self.outbox.run_id(alias), **entries))

    def _put_metrics(self, alias: str, what: str, metrics: list[Metric], is_remembered: bool = True) -> None:
        send = partial(self._log_metrics, alias=alias, metrics=metrics)
        self.outbox.put(alias, what, send, is_remembered=is_remembered)

    def _log_metrics(self, client: MlflowClient, alias: str, metrics: list[Metric]) -> None:
        # Sending it again changes nothing: MLflow has one row per metric, step and time.
        for part in _slices(metrics, METRICS_AT_ONCE):
            client.log_batch(self.outbox.run_id(alias), metrics=part)

    def _set_status(self, client: MlflowClient, alias: str, status: str, end: int | None) -> None:
        if status == "RUNNING":
            client.update_run(self.outbox.run_id(alias), status=status)
        else:
            client.set_terminated(self.outbox.run_id(alias), status, end)
        with self.outbox.lock:
            self.outbox.state["status"][alias] = status


def _milliseconds(time: float | None) -> int:
    return round(1000 * (clock.time() if time is None else time))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _slices(entries: Sequence[T], size: int) -> Iterator[list[T]]:
    for begin in range(0, len(entries), size):
        yield list(entries[begin : begin + size])
