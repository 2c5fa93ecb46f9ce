"""MLflow, published from the records of a run. The only file that imports mlflow.

The records on storage are the truth; MLflow is a view of them. So every call here may fail without harm: what could not be
sent waits in order and is tried again, and the same command run again sends what is still missing. ``tracking.json`` of the run
directory remembers, for each tracking URI, which MLflow runs exist and what they already have.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import logging
import re
import secrets
import tempfile
import threading
import time as clock
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelOutput,
    Metric,
    Param,
    RunTag,
)
from mlflow.exceptions import MlflowException

from components.errors import UserError
from components.training import schedule
from pipeline.runtime.redaction import without_password
from pipeline.runtime.storage import Storage, StorageError
from pipeline.tracking.uri import (
    check_address,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import nn
from pipeline.runtime import provenance
from pipeline.tracking.server import (
    EXPERIMENT,
    artifact_root_of,
    connect,
    error_within,
    experiment_of,
    global_uri,
    http_limits,
    reason_of,
    status_of,
    to_stderr,
)

BATCH = 1000
"""MLflow refuses more metrics than that in one request."""
RETRY_SECONDS = 10.0
"""How long an outage is left alone before a call tries the server again."""
UPLOAD_TIMEOUT_SECONDS = 120
"""A server answers an upload only when it has passed the file on to its store."""
ATTEMPTS = 3
"""How often an operation is tried that fails although the server answers."""
BEHIND = 100
"""More operations than that wait only where MLflow does not keep up or does not answer."""
ENDED = ("FINISHED", "FAILED", "KILLED")
UNQUOTED = " !#$&()*+,-./:;<=>?@[]^_`{|}~"
"""Characters besides letters and digits that stand as they are in the key by which a run is found."""


@dataclass
class _Operation:
    """One thing to be published. It may be sent twice (an answer was lost), so each is written to bear that."""

    key: str
    """``ALIAS|WHAT``: what is remembered as published."""
    send: Callable[[MlflowClient], None]
    failures: int = 0
    """Failures while the server answered."""


class Tracker:
    """The MLflow runs of one run directory, addressed by alias: "run", "model/defend", "evaluation/defend/white_box/fgsm".

    A thread sends in the background, in order. No method waits for MLflow but :meth:`wait`, :meth:`flush` and :meth:`stop`, and
    none raises because of it: an outage is told once, and what could not be sent is tried again. Safe to call from several threads.

    Args:
        uri: MLflow server or database; see :func:`check_reachable`.
        run: the run directory; ``tracking.json`` there makes a second publication add nothing.
        experiment: name of the MLflow experiment.
        artifact_root: where artifacts go if the experiment is new. None: beside the SQLite file, or what the server says.
        echo: takes the few plain lines meant for a person.

    Raises:
        ConfigError: a text that cannot be the address of an MLflow.
    """

    def __init__(
        self,
        uri: str,
        run: Storage,
        *,
        experiment: str = EXPERIMENT,
        artifact_root: str | None = None,
        echo: Callable[[str], None] = to_stderr,
    ) -> None:
        check_address(uri)
        self.uri = uri
        self.storage = run
        self.experiment = experiment
        self.artifact_root = artifact_root or artifact_root_of(uri)
        self._echo = echo
        self._changed = threading.Condition(threading.RLock())
        """Guards everything below; nobody holds it while MLflow is asked."""
        self._queue: deque[_Operation] = deque()
        self._sender: threading.Thread | None = None
        self._waiters = 0
        self._stopped = False
        self._sent_at = 0.0
        """When the queue last became shorter (monotonic seconds)."""
        self._client: MlflowClient | None = None
        self._outage = False
        self._rejected: dict[str, str] = {}
        """What was refused or could not be read, by key, and why."""
        self._saving = threading.Lock()
        """Held while ``tracking.json`` is written; taken before ``_changed``."""
        self._saved_at = 0.0
        self._unsaved = False
        self._file = self._load()
        self._state: dict[str, Any] = self._file["uris"].setdefault(without_password(uri), _new_state())
        self._published: set[str] = set(self._state["published"])
        self._waiting: set[str] = set()
        self._starts: dict[str, int] = {alias: r["start"] for alias, r in self._state["runs"].items()}

    # -- what a user of this class calls ---------------------------------------------------------------------------------

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
        """Have an MLflow run of that alias: made once, continued ever after. Tags and params may be added by a later call.

        Args:
            parent: alias of the run it belongs to, started before.
            time: when it began (unix seconds); now if None. The first one stands.
        """
        with self._changed:
            self._starts.setdefault(alias, _milliseconds(time))
            if parent is not None:
                self._require(parent)

            def create(client: MlflowClient) -> None:
                self._create(client, alias, name, parent)

            self._put(alias, "create", create)
            if self._state["status"].get(alias) in ("FAILED", "KILLED"):
                self._put(alias, "status/RUNNING", lambda client: self._set_status(client, alias, "RUNNING", None))
            self._tags(alias, tags or {})
            self._params(alias, params or {})

    def history(self, alias: str, epoch: int, read: Callable[[], Mapping[str, Any]]) -> None:
        """Publish the steps of one epoch as metrics ``train/...``, and its ``validation/...``.

        Args:
            read: returns the record of the epoch (a ``history/epoch-*.json``). It is called when the epoch is sent, so that
                epochs that wait take no memory.
        """
        with self._changed:
            self._require(alias)

            def send(client: MlflowClient) -> None:
                self._log_metrics(client, alias, _epoch_metrics(read()))

            self._put(alias, f"history/{epoch}", send)

    def metrics(
        self, alias: str, values: Mapping[str, float | None], *, step: int = 0, time: float | None = None
    ) -> None:
        """Metrics at one step; None is left out. ``time``: unix seconds; when the run began if None, which repeats."""
        with self._changed:
            self._require(alias)
            at = self._starts[alias] if time is None else _milliseconds(time)
            metrics = [Metric(k, float(v), at, step) for k, v in values.items() if v is not None]
            self._put_metrics(alias, f"metrics/{step}/{_digest(sorted(values.items()))}", metrics)

    def curve(self, alias: str, name: str, steps: Sequence[int], values: Sequence[float]) -> None:
        """One metric over many steps."""
        with self._changed:
            self._require(alias)
            at = self._starts[alias]
            metrics = [Metric(name, float(v), at, int(s)) for s, v in zip(steps, values, strict=True)]
            self._put_metrics(alias, f"curve/{name}/{_digest([list(steps), list(values)])}", metrics)

    def dataset(
        self, alias: str, *, name: str, digest: str, source: str, context: str, rows: int | None = None
    ) -> None:
        """A data set that the run read, with its hash. ``context``: training, validation or test."""
        with self._changed:
            self._require(alias)
            data = Dataset(
                name=name,
                digest=digest[:36],  # mlflow's limit
                source_type="storage",
                source=json.dumps({"uri": source}),
                profile=None if rows is None else json.dumps({"num_rows": rows}),
            )
            entry = DatasetInput(data, [InputTag("mlflow.data.context", context)])

            def send(client: MlflowClient) -> None:
                client.log_inputs(self._id(alias), datasets=[entry])

            self._put(alias, f"dataset/{context}/{_digest([name, digest, source, rows])}", send)

    def artifact(self, alias: str, storage: Storage, name: str, artifact_path: str = "") -> None:
        """A file of a storage as an artifact, under its own name in the artifact directory ``artifact_path``.

        Raises:
            StorageError: there is no such file.
        """
        with self._changed:
            self._require(alias)
            digest = hashlib.sha256(storage.read_bytes(name)).hexdigest()[:16]

            def send(client: MlflowClient) -> None:
                if storage.is_local:
                    self._upload(client, alias, Path(storage.path(name)), artifact_path)
                else:
                    self._upload_bytes(client, alias, Path(name).name, storage.read_bytes(name), artifact_path)

            self._put(alias, f"artifact/{artifact_path}/{Path(name).name}/{digest}", send)

    def register_model(
        self,
        alias: str,
        module: nn.Module,
        example_input: np.ndarray,
        name: str,
        *,
        metadata: Mapping[str, Any] | None = None,
        version_alias: str = "newest",
        own_alias: str = "",
        concluded: float | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        """A network as a logged model of the run and as a version of the registered model ``name``.

        ``mlflow.pytorch.load_model("models:/NAME@newest")`` gives the module back, with ``eval()`` and gradients. That takes
        MLflow's pickle format (and so trust in who wrote it): its pt2 format comes back as a graph on which ``eval()`` raises.
        Attacks do not use either; they rebuild the network from ``classifier.safetensors`` and ``model.json``, which
        :func:`publish_run` logs beside it.

        Args:
            example_input: a batch of images, float32 [B,C,H,W]; gives the signature.
            metadata: JSON types, kept in the model's MLmodel file.
            version_alias: registry alias that is moved to this version.
            own_alias: another one, which nothing else moves.
            concluded: when it was found to be the best (unix seconds). ``version_alias`` stays where it is if it stands for what
                was concluded later; without, it is moved whenever other weights are registered.
            tags: of the version.
        """
        with self._changed:
            self._require(alias)
            weights = _weights_digest(module)
            name = re.sub("[/:]", "_", name)  # no name of a registered model holds them
            said = {**(tags or {}), **({} if concluded is None else {"concluded": concluded})}
            done: dict[str, str] = {}  # what a first try already made, so that a second one does not make it again

            def send(client: MlflowClient) -> None:
                run_id = self._id(alias)
                # no filter by name: MLflow's filters have no escape for quotes
                made = [v for v in client.search_model_versions(f"run_id = '{run_id}'") if v.name == name]
                version = next((v.version for v in made if v.tags.get("weights") == weights), None)
                if version is None:
                    model_id = self._log_model(client, run_id, module, example_input, name, dict(metadata or {}), done)
                    with contextlib.suppress(MlflowException):  # it is there
                        client.create_registered_model(name)
                    own = {"weights": weights, "alias": alias}
                    source = f"models:/{model_id}"
                    with global_uri(self.uri):  # with a database the logged model is looked up by that
                        version = client.create_model_version(name, source, run_id, own, model_id=model_id).version
                for key, value in said.items():
                    client.set_model_version_tag(name, version, key, _text(value))
                if own_alias:
                    client.set_registered_model_alias(name, own_alias, version)
                self._point(client, name, version_alias, str(version), concluded)

            # a later conclusion may be the same weights again
            self._put(
                alias,
                f"register/{name}/{version_alias}/{weights}" + ("" if concluded is None else f"/{concluded}"),
                send,
            )

    def finish(self, alias: str, status: str = "FINISHED", *, time: float | None = None) -> None:
        """End a run: FINISHED, FAILED or KILLED. A later :meth:`start` continues one that did not end well."""
        with self._changed:
            self._require(alias)
            if self.has_ended(alias, status) and not self._queued(alias, "status/"):
                return
            end = _milliseconds(time)

            def send(client: MlflowClient) -> None:
                # The first connection forgets the status of a run that MLflow no longer has.
                if self._state["status"].get(alias) != status:
                    self._set_status(client, alias, status, end)

            self._put(alias, f"status/{status}", send)

    def has_ended(self, alias: str, status: str) -> bool:
        """Whether a run is published as ended like that, so that nothing of it need be read again."""
        with self._changed:
            return self._client is not None and self._state["status"].get(alias) == status

    def run_id(self, alias: str = "run") -> str | None:
        """MLflow's id of a run; None while it could not be made."""
        run = self._state["runs"].get(alias)
        return run["id"] if run else None

    @property
    def experiment_id(self) -> str | None:
        """MLflow's id of the experiment; None before the first answer of the server."""
        experiment_id: str | None = self._state["experiment"]
        return experiment_id

    @property
    def pending(self) -> int:
        """How many operations wait for the server."""
        return len(self._queue)

    @property
    def is_behind(self) -> bool:
        """Whether so much waits that a caller had better leave out what can be read from records later."""
        return len(self._queue) > BEHIND

    @contextlib.contextmanager
    def excused(self, what: str) -> Iterator[None]:
        """Go on where a part of the records cannot be read. It counts as not published until it could be."""
        try:
            yield
        except Exception as e:  # publication never ends a run that took hours
            with self._changed:
                self._reject(what, f"MLflow: {what} not published", e)
        else:
            with self._changed:
                self._rejected.pop(what, None)

    def wait(self, timeout_s: float) -> bool:
        """Wait until all is sent, or nothing could be sent for ``timeout_s``. Return whether all is sent."""
        begin = clock.monotonic()
        with self._changed:
            self._waiters += 1
            self._changed.notify_all()  # an outage is not waited out now
            try:
                while self._queue and (left := max(begin, self._sent_at) + timeout_s - clock.monotonic()) > 0:
                    self._changed.wait_for(lambda: not self._queue, left)
            finally:
                self._waiters -= 1
            done = not self._queue
        self._save(force=True)
        return done

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Send what waits until nothing could be sent for ``timeout_s``, and say how it ended. Return whether all is published."""
        self.wait(timeout_s)
        with self._changed:
            missing = len({operation.key for operation in self._queue} | set(self._rejected))
        if not missing:
            self._echo(f"MLflow: all published to {without_password(self.uri)}")
            return True
        self._echo(
            f"MLflow: {missing} operations not published to {without_password(self.uri)}; records are safe under "
            f"{self.storage.uri}; run the same command or `report` again to publish"
        )
        return False

    def conclude(self, timeout_s: float = 30.0) -> bool:
        """Send what waits at the end of a run; see :meth:`flush`. Its runs end as FINISHED even if the rest has to wait."""
        published = self.flush(timeout_s)
        if not published:
            self.stop("FINISHED")
        return published

    def stop_for(self, error: BaseException, *, complete: bool) -> None:
        """End the run for what stopped it: KILLED at once by an interruption, FAILED after the rest is sent.

        Args:
            complete: all records are written, so that only their publication was stopped. The run is FINISHED then.
        """
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        if not interrupted:
            self.flush()
        self.stop("FINISHED" if complete else "KILLED" if interrupted else "FAILED")

    def stop(self, status: str, timeout_s: float = 2.0) -> None:
        """End the run and its open children, in about ``timeout_s`` even where MLflow hangs.

        Nothing else is sent from then on; a later command publishes it, and continues these runs.

        Args:
            status: FINISHED, FAILED or KILLED. Children of a run that did not finish are KILLED.
        """
        deadline = clock.monotonic() + timeout_s
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            # the run that is being made now would stay open
            self._changed.wait_for(lambda: self._sender is None, timeout_s / 2)

        def close() -> None:
            client, end = self._connect(), _milliseconds(None)
            for alias in sorted(self._state["runs"], key=lambda alias: alias != "run"):
                if self._state["status"].get(alias) not in ENDED:
                    self._set_status(client, alias, "KILLED" if status == "FAILED" and alias != "run" else status, end)
            self._unsaved = True
            self._save(force=True)

        if not self._state["runs"]:
            return
        with http_limits(timeout=1, retries=0):
            error = error_within(max(0.5, deadline - clock.monotonic()), close)
        if error is not None:
            self._echo(
                f"MLflow at {without_password(self.uri)} could not be told that the run is {status} ({reason_of(error)})"
            )

    # -- queue -----------------------------------------------------------------------------------------------------------

    def _require(self, alias: str) -> None:
        if alias not in self._starts:
            raise ValueError(f"start({alias!r}, ...) comes first")

    def _queued(self, alias: str, what: str) -> bool:
        return any(key.startswith(f"{alias}|{what}") for key in self._waiting)

    def _put(self, alias: str, what: str, send: Callable[[MlflowClient], None]) -> None:
        key = f"{alias}|{what}"
        if what.startswith("status/"):  # a status may come back; whether it is due is known to the caller
            self._published.discard(key)
        # before the first answer nobody knows whether the server still has what was published
        if self._stopped or key in self._waiting or (self._client is not None and key in self._published):
            return
        self._waiting.add(key)
        self._queue.append(_Operation(key, send))
        if self._sender is None:
            self._sender = threading.Thread(target=self._send_all, name="MLflow", daemon=True)
            self._sender.start()
        self._changed.notify_all()

    def _send_all(self) -> None:
        """Send what waits, in order. An operation stays in the queue until it is sent or refused."""
        while True:
            with self._changed:
                if self._stopped or not self._queue:
                    self._sender = None
                    self._changed.notify_all()
                    return
                operation = self._queue[0]
            failure = self._error_of(operation)
            given_up = failure is not None and self._give_up(operation, failure)
            with self._changed:
                if failure is not None and not given_up:
                    self._changed.wait_for(lambda: self._stopped or self._waiters, RETRY_SECONDS)
                    self._changed.wait_for(lambda: self._stopped, 0.5)
                    continue
                if failure is None:
                    self._published.add(operation.key)
                    self._rejected.pop(operation.key, None)
                    self._unsaved = True
                else:
                    self._reject(operation.key, f"MLflow refused {operation.key.replace('|', ': ')}", failure)
                self._queue.popleft()
                self._sent_at = clock.monotonic()
                self._waiting.discard(operation.key)
                if self._outage:
                    self._outage = False
                    self._echo(f"MLflow at {without_password(self.uri)} answers again")
                if not self._queue:
                    self._changed.notify_all()
            self._save()

    def _error_of(self, operation: _Operation) -> Exception | None:
        try:
            client = self._connect()
            if operation.key not in self._published:
                operation.send(client)
        except Exception as e:  # tracking never ends a run that took hours
            return e
        return None

    def _reject(self, key: str, what: str, error: Exception) -> None:
        """Remember what is not published. One reason is said once, for whatever files it names."""
        reason = reason_of(error)
        kind = re.sub(r"\S*/\S*", "", reason)
        if kind not in self._rejected.values():
            self._echo(f"{what}: {reason}")
        self._rejected[key] = kind

    def _give_up(self, operation: _Operation, error: Exception) -> bool:
        """Whether the operation itself is at fault, so that it must not hold up those behind it."""
        if isinstance(error, UserError | KeyError | ImportError):
            return (
                True  # its file cannot be read, the run it belongs to was refused, or the library of a store is missing
            )
        status = status_of(error)
        if status in (400, 404, 405, 409, 413, 422):
            return True
        # 503 is also what mlflow makes of a locked database; a password may be mended while the run goes on
        if status not in (401, 403, 408, 429, 502, 503, 504) and self._answers():
            operation.failures += 1
            return operation.failures >= ATTEMPTS
        if not self._outage:
            self._outage = True
            self._echo(
                f"MLflow at {without_password(self.uri)} cannot be used ({reason_of(error)}); the run goes on, "
                "its records are kept and published when it answers again"
            )
        return False

    def _answers(self) -> bool:
        try:
            with http_limits(timeout=4, retries=0):
                (self._client or MlflowClient(tracking_uri=self.uri)).search_experiments(max_results=1)
        except Exception:
            return False
        return True

    def _connect(self) -> MlflowClient:
        if self._client is not None:
            return self._client
        client = connect(self.uri)
        experiment_id = experiment_of(client, self.experiment, self.artifact_root).experiment_id
        if self._state["runs"] and not _all_there(client, self._state, experiment_id):
            self._echo(
                f"MLflow at {without_password(self.uri)}, experiment {self.experiment}, no longer has what was published "
                "there; publishing it again"
            )
            with self._changed:
                self._state.update(_new_state())
                self._published.clear()
        with self._changed:
            self._state["experiment"] = experiment_id
            self._client = client
        return client

    # -- sending ---------------------------------------------------------------------------------------------------------

    def _id(self, alias: str) -> str:
        run_id: str = self._state["runs"][alias]["id"]
        return run_id

    def _create(self, client: MlflowClient, alias: str, name: str, parent: str | None) -> None:
        # the answer to an earlier try may have been lost: such a run is found by its key
        key = f"{self._file['token']}/{quote(alias, safe=UNQUOTED)}"  # MLflow's filters have no escape for quotes
        experiment_id = self._state["experiment"]
        found = client.search_runs([experiment_id], f"tags.defendpp_key = '{key}'", max_results=1)
        if found:
            run_id = found[0].info.run_id
        else:
            if not self._saved_at:  # the key must outlive this process before a run carries it
                self._unsaved = True
                self._save(force=True)
            tags = {"defendpp_key": key, "mlflow.user": _user(), "mlflow.source.name": "pipeline/main.py"}
            if parent is not None:
                tags["mlflow.parentRunId"] = self._id(parent)
            run_id = client.create_run(experiment_id, self._starts[alias], tags, name).info.run_id
        with self._changed:
            self._state["runs"][alias] = {"id": run_id, "start": self._starts[alias]}

    def _tags(self, alias: str, tags: Mapping[str, Any]) -> None:
        entries = [RunTag(k, _text(v)[:5000]) for k, v in sorted(tags.items()) if v is not None]
        for part in _slices(entries, 100):

            def send(client: MlflowClient, part: list[RunTag] = part) -> None:
                client.log_batch(self._id(alias), tags=part)

            self._put(alias, f"tags/{_digest([[t.key, t.value] for t in part])}", send)

    def _params(self, alias: str, params: Mapping[str, Any]) -> None:
        entries = [Param(k, _text(v)[:6000]) for k, v in sorted(params.items())]
        for part in _slices(entries, 100):

            def send(client: MlflowClient, part: list[Param] = part) -> None:
                client.log_batch(self._id(alias), params=part)

            self._put(alias, f"params/{_digest([[p.key, p.value] for p in part])}", send)

    def _put_metrics(self, alias: str, what: str, metrics: list[Metric]) -> None:
        self._put(alias, what, lambda client: self._log_metrics(client, alias, metrics))

    def _log_metrics(self, client: MlflowClient, alias: str, metrics: list[Metric]) -> None:
        # the same metric at the same step and time is one row in MLflow: sending it again changes nothing
        for part in _slices(metrics, BATCH):
            client.log_batch(self._id(alias), metrics=part)

    def _upload(self, client: MlflowClient, alias: str, path: Path, artifact_path: str) -> None:
        with http_limits(timeout=UPLOAD_TIMEOUT_SECONDS):
            client.log_artifact(self._id(alias), str(path), artifact_path or None)

    def _upload_bytes(self, client: MlflowClient, alias: str, name: str, data: bytes, artifact_path: str) -> None:
        with tempfile.TemporaryDirectory(prefix="defendpp-") as directory:
            path = Path(directory) / name
            path.write_bytes(data)
            self._upload(client, alias, path, artifact_path)

    def _set_status(self, client: MlflowClient, alias: str, status: str, end: int | None) -> None:
        if status == "RUNNING":
            client.update_run(self._id(alias), status=status)
        else:
            client.set_terminated(self._id(alias), status, end)
        with self._changed:
            self._state["status"][alias] = status

    def _point(self, client: MlflowClient, name: str, alias: str, version: str, concluded: float | None) -> None:
        """Move a registry alias to a version, unless it stands for what was concluded later."""
        held = client.get_registered_model(name).aliases.get(alias)
        if concluded is not None and held is not None and str(held) != version:
            holder = client.get_model_version(name, str(held)).tags
            whose = f"version {held}, which {holder.get('sweep') or holder.get('alias', 'another run')} chose"
            if float(holder.get("concluded", "-inf")) > concluded:
                self._echo(f"MLflow: {name}@{alias} stays with {whose} later")
                return
            self._echo(f"MLflow: {name}@{alias} is now version {version}; before, {whose}")
        client.set_registered_model_alias(name, alias, version)

    def _log_model(
        self,
        client: MlflowClient,
        run_id: str,
        module: nn.Module,
        example_input: np.ndarray,
        name: str,
        metadata: dict[str, Any],
        done: dict[str, str],
    ) -> str:
        import copy

        import mlflow.pytorch
        import torch
        from mlflow.models import Model, infer_signature

        if "id" not in done:
            plain = re.sub("""[/:.%"']""", "_", name)  # a logged model's name may hold less than a registered one's
            logged = client.create_logged_model(self._state["experiment"], plain, run_id, model_type="classifier")
            done.update(id=logged.model_id, location=logged.artifact_location)
        model_id = done["id"]
        if "uploaded" not in done:
            module = copy.deepcopy(module).cpu().eval()
            with torch.no_grad():
                output = module(torch.from_numpy(example_input)).numpy()
            card = Model(done["location"], run_id, model_uuid=model_id, metadata=metadata or None, model_id=model_id)
            with tempfile.TemporaryDirectory(prefix="defendpp-") as directory, _quiet("mlflow.pytorch"):
                mlflow.pytorch.save_model(
                    module,
                    f"{directory}/model",
                    mlflow_model=card,
                    signature=infer_signature(example_input, output),
                    serialization_format="pickle",  # _quiet is for the warning that mlflow logs of it
                    code_paths=[str(provenance.ROOT / "components")],
                    # given, since mlflow would otherwise find them out by loading the model in another process
                    pip_requirements=[
                        f"torch=={torch.__version__.split('+')[0]}",
                        "torchvision",
                        "numpy",
                        "cloudpickle",
                    ],
                )
                with http_limits(timeout=UPLOAD_TIMEOUT_SECONDS):
                    client.log_model_artifacts(model_id, f"{directory}/model")
            done["uploaded"] = "yes"
        client.finalize_logged_model(model_id, "READY")
        if "output" not in done:
            client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
            done["output"] = "yes"
        return model_id

    # -- tracking.json ---------------------------------------------------------------------------------------------------

    def _load(self) -> dict[str, Any]:
        try:
            if not self.storage.exists("tracking.json"):
                return _new_file()
            found = self.storage.read_json("tracking.json")
            if isinstance(found, dict) and found.get("schema") == 1:
                return found
            reason = "its schema is another one"
        except (StorageError, OSError) as e:
            reason = str(e)
        self._echo(f"{self.storage.uri}/tracking.json cannot be used ({reason}); publishing into new MLflow runs")
        return _new_file()

    def _save(self, *, force: bool = False) -> None:
        # One at a time: an older text never replaces a newer one, and a caller returns when its state is on storage.
        with self._saving:
            with self._changed:
                if not (self._unsaved and (force or clock.monotonic() - self._saved_at > 2.0)):
                    return
                self._state["published"] = sorted(self._published)
                text = json.dumps(self._file, indent=1, sort_keys=True)
                self._unsaved, self._saved_at = False, clock.monotonic()
            try:
                self.storage.write_bytes("tracking.json", text.encode())
            except (StorageError, OSError) as e:
                self._unsaved = True
                self._echo(f"MLflow's bookkeeping could not be kept: {e}")


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


def _new_file() -> dict[str, Any]:
    return {"schema": 1, "token": secrets.token_hex(8), "uris": {}}


def _new_state() -> dict[str, Any]:
    return {"experiment": None, "runs": {}, "published": [], "status": {}}


def _all_there(client: MlflowClient, state: Mapping[str, Any], experiment_id: str) -> bool:
    """Whether the runs remembered are those of this server: it may have been emptied, or its runs deleted."""
    run = state["runs"].get("run") or next(iter(state["runs"].values()))
    try:
        info = client.get_run(run["id"]).info
    except MlflowException as e:
        if status_of(e) == 404:
            return False
        raise
    return bool(info.lifecycle_stage == "active" and info.experiment_id == experiment_id)


def _weights_digest(module: nn.Module) -> str:
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        # NumPy has no bfloat16 and no float8, so the bytes are read as integers.
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _milliseconds(time: float | None) -> int:
    return round(1000 * (clock.time() if time is None else time))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _slices(entries: list[Any], size: int) -> Iterator[list[Any]]:
    for begin in range(0, len(entries), size):
        yield entries[begin : begin + size]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"


@contextlib.contextmanager
def _quiet(logger: str) -> Iterator[None]:
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
