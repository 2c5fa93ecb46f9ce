"""The MLflow runs of a run directory, published from its records.

The records on storage are the truth, and MLflow is a view of them. Every call here may fail without
harm: what could not be sent waits in the :class:`Outbox`, and the same command run again sends it.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import tempfile
import time as clock
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

from components.training import schedule
from pipeline.runtime.storage import Storage
from pipeline.tracking.outbox import BEHIND, Outbox
from pipeline.tracking.registry import Registration, text_of
from pipeline.tracking.requests import UPLOAD_TIMEOUT_SECONDS, error_within, http_limits, reason_of
from pipeline.tracking.server import EXPERIMENT, to_stderr
from pipeline.tracking.uri import check_address

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

T = TypeVar("T")

METRICS_AT_ONCE = 1000
"""MLflow's limit on the metrics of one request."""
ENTRIES_AT_ONCE = 100
"""MLflow's limit on the tags or params of one request."""
TAG_LENGTH, PARAM_LENGTH, DIGEST_LENGTH = 5000, 6000, 36
"""MLflow's limits on the characters of a tag, a param and the digest of a data set."""
UNQUOTED = " !#$&()*+,-./:;<=>?@[]^_`{|}~"
"""Characters besides letters and digits that are not quoted in the key by which a run is found."""


class Tracker:
    """The MLflow runs of one run directory, addressed by alias.

    Aliases are "run", "model/defend" or "evaluation/defend/white_box/fgsm". Only :meth:`flush`,
    :meth:`conclude` and :meth:`stop` wait for MLflow, and no method raises because of it. Safe to
    call from several threads.

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
            self.outbox.put(alias, "create", lambda client: self._create(client, alias, name, parent, start))
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
            alias, f"history/{epoch}", lambda client: self._log_metrics(client, alias, _epoch_metrics(read()))
        )

    def metrics(
        self, alias: str, values: Mapping[str, float | None], *, step: int = 0, time: float | None = None
    ) -> None:
        """Publish metrics at one step.

        Args:
            values: None is left out.
            time: unix seconds. None: when the run began; sending them again then adds nothing.
        """
        self._require(alias)
        at = self._starts[alias] if time is None else _milliseconds(time)
        metrics = [Metric(k, float(v), at, step) for k, v in values.items() if v is not None]
        self._put_metrics(alias, f"metrics/{step}/{_digest(sorted(values.items()))}", metrics)

    def curve(self, alias: str, name: str, steps: Sequence[int], values: Sequence[float]) -> None:
        """Publish one metric over many steps."""
        self._require(alias)
        at = self._starts[alias]
        metrics = [Metric(name, float(v), at, int(s)) for s, v in zip(steps, values, strict=True)]
        self._put_metrics(alias, f"curve/{name}/{_digest([list(steps), list(values)])}", metrics)

    def dataset(self, alias: str, *, name: str, digest: str, source: str, context: str, rows: int) -> None:
        """Publish a data set that the run read. ``context`` is training, validation or test."""
        self._require(alias)
        data = Dataset(
            name=name,
            digest=digest[:DIGEST_LENGTH],
            source_type="storage",
            source=json.dumps({"uri": source}),
            profile=json.dumps({"num_rows": rows}),
        )
        entry = DatasetInput(data, [InputTag("mlflow.data.context", context)])
        self.outbox.put(
            alias,
            f"dataset/{context}/{_digest([name, digest, source, rows])}",
            lambda client: client.log_inputs(self.outbox.run_id(alias), datasets=[entry]),
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

    def register_model(
        self, alias: str, module: nn.Module, example_input: np.ndarray, name: str, **options: Any
    ) -> None:
        """Publish a network as a logged model of the run and as a version of a registered model.

        The arguments are the fields of :class:`Registration`.
        """
        self._require(alias)
        registration = Registration(module, example_input, name, **options)
        self.outbox.put(alias, registration.key, lambda client: registration.send(client, self.outbox, alias))

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

    def _create(self, client: MlflowClient, alias: str, name: str, parent: str | None, start: int) -> None:
        # The answer to an earlier try may have been lost, so a run is found again by a key.
        key = f"{self.outbox.token}/{quote(alias, safe=UNQUOTED)}"  # MLflow's filters have no escape for quotes.
        experiment_id = str(self.outbox.state["experiment"])
        runs = client.search_runs([experiment_id], f"tags.defendpp_key = '{key}'", max_results=1)
        if runs:
            run_id = runs[0].info.run_id
        else:
            if not self.outbox.is_saved:
                # A restarted process can find the run only by a key that is persistent.
                self.outbox.save()
            tags = {"defendpp_key": key, "mlflow.user": _user(), "mlflow.source.name": "pipeline/main.py"}
            if parent is not None:
                tags["mlflow.parentRunId"] = self.outbox.run_id(parent)
            run_id = client.create_run(experiment_id, start, tags, name).info.run_id
        with self.outbox.lock:
            self.outbox.state["runs"][alias] = {"id": run_id, "start": start}

    def _put_batch(self, alias: str, what: str, **entries: Any) -> None:
        self.outbox.put(alias, what, lambda client: client.log_batch(self.outbox.run_id(alias), **entries))

    def _put_metrics(self, alias: str, what: str, metrics: list[Metric]) -> None:
        self.outbox.put(alias, what, lambda client: self._log_metrics(client, alias, metrics))

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


def _epoch_metrics(record: Mapping[str, Any]) -> list[Metric]:
    phase = schedule.PHASES.index(record["phase"])
    metrics: list[Metric] = []
    at, number = 0, 0
    for step in record["steps"]:
        at, number = _milliseconds(step["time"]), int(step["step"])
        for key, value in step.items():
            if key not in ("step", "time") and value is not None:
                metrics.append(Metric(f"train/{key}", float(value), at, number))
        metrics.append(Metric("train/phase", float(phase), at, number))
        metrics.append(Metric("train/epoch", float(record["epoch"]), at, number))
    for key, value in (record.get("validation") or {}).items():
        if value is not None:
            metrics.append(Metric(f"validation/{key}", float(value), at, number))
    return metrics


def _milliseconds(time: float | None) -> int:
    return round(1000 * (clock.time() if time is None else time))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _slices(entries: Sequence[T], size: int) -> Iterator[list[T]]:
    for begin in range(0, len(entries), size):
        yield list(entries[begin : begin + size])


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # A container's user may have no name.
        return "unknown"
