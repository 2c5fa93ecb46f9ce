"""The outbox of a run directory: requests to MLflow, sent in order, retried and remembered."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import threading
import time as clock
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from components.errors import UserError
from pipeline.runtime.redaction import without_password
from pipeline.runtime.storage import Storage, StorageError
from pipeline.tracking.requests import http_limits, reason_of, status_of
from pipeline.tracking.server import artifact_root_of, connect, experiment_of
from pipeline.tracking.state import SCHEMA, State, TrackingFile, new_state

FILE = "tracking.json"
RETRY_SECONDS = 10.0
"""Pause after an operation failed because of an outage, before it is tried again."""
SAVE_SECONDS = 2.0
"""Shortest time between two writes of ``tracking.json`` while operations are sent."""
ATTEMPTS = 3
"""Tries of an operation that fails although the server answers."""
BEHIND = 100
"""Number of waiting operations above which MLflow does not keep up or does not answer."""


@dataclass
class _Operation:
    """A request to MLflow. Sending it again changes nothing, since an answer can be lost."""

    key: str
    """``ALIAS|WHAT``."""
    send: Callable[[MlflowClient], object]
    is_remembered: bool = True
    """Whether ``tracking.json`` keeps the key, so that a later process does not send it again."""
    failures: int = 0
    """Failures while the server answered."""


class Outbox:
    """Operations that wait for MLflow, and the state of what is published.

    A thread sends them in the background, in order. An outage is announced once, and the operation
    is tried again. Safe to call from several threads. The run ``directory`` holds ``tracking.json``.
    """

    def __init__(self, uri: str, directory: Storage, *, experiment: str, echo: Callable[[str], None]) -> None:
        self.uri = uri
        self.shown_uri = without_password(uri)
        self.directory = directory
        self.experiment = experiment
        self.echo = echo
        self.lock = threading.RLock()
        """Guards everything below. It is never held during a request to MLflow."""
        self._changed = threading.Condition(self.lock)
        self._queue: deque[_Operation] = deque()
        self._waiting: set[str] = set()
        """Keys of the operations in the queue."""
        self._sender: threading.Thread | None = None
        self._waiters = 0
        self._stopped = False
        self._sent_at = 0.0
        """When the queue last became shorter (monotonic seconds)."""
        self._client: MlflowClient | None = None
        self._outage = False
        self._rejected: dict[str, str] = {}
        """Key of a refused operation or of records that could not be read -> reason."""
        self._saving = threading.Lock()
        """Held while ``tracking.json`` is written. It is taken before ``lock``."""
        self._saved_at = 0.0
        self._unsaved = False
        self._file = self._load()
        self.state = self._file["uris"].setdefault(self.shown_uri, new_state())
        for key, value in new_state().items():  # Files of earlier revisions lack some keys.
            self.state.setdefault(key, value)  # type: ignore[misc]
        self._published = set(self.state["published"])

    @property
    def token(self) -> str:
        """Random text, unique to this run directory. It is persistent after :meth:`save`."""
        return self._file["token"]

    @property
    def key_prefix(self) -> str:
        """What the keys of this directory's runs begin with in MLflow. Each generation has its own."""
        generation = self.state["generation"]
        return f"{self.token}-{generation}/" if generation else f"{self.token}/"

    @property
    def is_saved(self) -> bool:
        """Tell whether this process has written ``tracking.json``."""
        return self._saved_at > 0

    @property
    def is_connected(self) -> bool:
        """Tell whether the server has answered, so that ``state`` is known to be true."""
        return self._client is not None

    @property
    def pending(self) -> int:
        """Number of operations that wait for the server."""
        return len(self._queue)

    @property
    def refused(self) -> set[str]:
        """Keys of operations that were refused, and names of records that could not be read."""
        with self.lock:
            return set(self._rejected)

    def run_id(self, alias: str) -> str:
        """Return MLflow's id of a run. Raises KeyError if the run was refused."""
        return self.state["runs"][alias]["id"]

    def model_id(self, alias: str) -> str:
        """Return MLflow's id of a run's logged model. Raises KeyError if it was refused."""
        return self.state["models"][alias]

    def replace_runs(self) -> None:
        """Let everything be published into new runs. A replacement that an outage stopped goes on.

        Raises:
            StorageError: ``tracking.json`` cannot be written.
        """
        with self.lock:
            if not self.state["is_replacing"]:
                self._forget_runs(self.state["generation"] + 1, is_replacing=True)
        self.save()

    def _forget_runs(self, generation: int, *, is_replacing: bool) -> None:
        new = new_state()
        new["experiment"], new["generation"] = self.state["experiment"], generation
        self.state.update(new | {"is_replacing": is_replacing})
        self._published.clear()

    def is_waiting(self, prefix: str) -> bool:
        """Return whether an operation waits whose key begins with ``prefix``."""
        return any(key.startswith(prefix) for key in self._waiting)

    def put(self, alias: str, what: str, send: Callable[[MlflowClient], object], *, is_remembered: bool = True) -> None:
        """Queue an operation, unless it waits already or is published."""
        key = f"{alias}|{what}"
        with self.lock:
            if what.startswith("status/"):  # A run can return to an earlier status, so it is never remembered as sent.
                self._published.discard(key)
            # Until the server answers, it is unknown whether it still has what was published.
            if self._stopped or key in self._waiting or (self.is_connected and key in self._published):
                return
            self._waiting.add(key)
            self._queue.append(_Operation(key, send, is_remembered))
            if self._sender is None:
                self._sender = threading.Thread(target=self._send_all, name="MLflow", daemon=True)
                self._sender.start()
            self._changed.notify_all()

    @contextlib.contextmanager
    def excused(self, what: str) -> Iterator[None]:
        """Go on if the body fails. ``what`` counts as not published until a later call succeeds."""
        try:
            yield
        except Exception as e:  # Publication never ends a run that took hours.
            self._reject(what, f"MLflow: {what} not published", e)
        else:
            with self.lock:
                self._rejected.pop(what, None)

    def wait(self, timeout_s: float) -> bool:
        """Wait until all is sent, or nothing was for ``timeout_s``. Return whether all is sent."""
        begin = clock.monotonic()
        with self.lock:
            self._waiters += 1
            self._changed.notify_all()  # The pause after an outage ends now.
            try:
                while self._queue and (left := max(begin, self._sent_at) + timeout_s - clock.monotonic()) > 0:
                    self._changed.wait_for(lambda: not self._queue, left)
            finally:
                self._waiters -= 1
            done = not self._queue
        self._save_changes(0)
        return done

    def flush(self, timeout_s: float) -> bool:
        """Wait as :meth:`wait` and report the result. Return whether all is published."""
        self.wait(timeout_s)
        with self.lock:
            missing = len({operation.key for operation in self._queue} | set(self._rejected))
        if not missing:
            self.echo(f"MLflow: all published to {self.shown_uri}")
            return True
        self.echo(
            f"MLflow: {missing} operations not published to {self.shown_uri}; records are safe under "
            f"{self.directory.uri}; run the same command or `report` again to publish"
        )
        return False

    def halt(self, timeout_s: float) -> None:
        """Send nothing more. Wait up to ``timeout_s`` for the operation that is being sent."""
        with self.lock:
            self._stopped = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._sender is None, timeout_s)

    def connect(self) -> MlflowClient:
        """Return the client. The first call checks that the server has the runs of ``state``."""
        if self._client is not None:
            return self._client
        client = connect(self.uri)
        experiment_id = experiment_of(client, self.experiment, artifact_root_of(self.uri)).experiment_id
        if self.state["runs"] and not _has_runs(client, self.state, experiment_id):
            self.echo(
                f"MLflow at {self.shown_uri}, experiment {self.experiment}, no longer has what was published "
                "there; publishing it again"
            )
            with self.lock:
                self._forget_runs(self.state["generation"], is_replacing=self.state["is_replacing"])
        with self.lock:
            self.state["experiment"] = experiment_id
            self._client = client
        return client

    def save(self) -> None:
        """Write ``tracking.json`` now."""
        self._unsaved = True
        self._save_changes(0)

    # -- sender thread ----------------------------------------------------------------------------

    def _send_all(self) -> None:
        """Send the queue in order. An operation stays in the queue until it is sent or refused."""
        while True:
            with self.lock:
                if self._stopped or not self._queue:
                    self._sender = None
                    self._changed.notify_all()
                    return
                operation = self._queue[0]
            error = self._send(operation)
            given_up = error is not None and self._give_up(operation, error)
            with self.lock:
                if error is not None and not given_up:
                    self._changed.wait_for(lambda: self._stopped or self._waiters, RETRY_SECONDS)
                    self._changed.wait_for(lambda: self._stopped, 0.5)
                    continue
                if error is None:
                    if operation.is_remembered:
                        self._published.add(operation.key)
                    self._rejected.pop(operation.key, None)
                    self._unsaved = True
                else:
                    self._reject(operation.key, f"MLflow refused {operation.key.replace('|', ': ')}", error)
                self._queue.popleft()
                self._sent_at = clock.monotonic()
                self._waiting.discard(operation.key)
                if self._outage:
                    self._outage = False
                    self.echo(f"MLflow at {self.shown_uri} answers again")
                if not self._queue:
                    self._changed.notify_all()
            self._save_changes(SAVE_SECONDS)

    def _send(self, operation: _Operation) -> Exception | None:
        """Send an operation, unless the server has it. Return the error that it raised."""
        try:
            client = self.connect()
            if operation.key not in self._published:
                operation.send(client)
        except Exception as e:  # Publication never ends a run that took hours.
            return e
        return None

    def _reject(self, key: str, what: str, error: Exception) -> None:
        """Remember a key as not published. Report a reason once, whatever files it names."""
        reason = reason_of(error)
        kind = re.sub(r"\S*/\S*", "", reason)
        with self.lock:
            if kind not in self._rejected.values():
                self.echo(f"{what}: {reason}")
            self._rejected[key] = kind

    def _give_up(self, operation: _Operation, error: Exception) -> bool:
        """Return whether the operation itself is at fault, so that the next one can be sent."""
        # Its file cannot be read, its run was refused, or an artifact store's library is missing.
        if isinstance(error, UserError | KeyError | ImportError):
            return True
        status = status_of(error)
        if status in (400, 404, 405, 409, 413, 422):
            return True
        # A password may be corrected during the run. For a locked database MLflow answers 503.
        if status not in (401, 403, 408, 429, 502, 503, 504) and self._answers():
            operation.failures += 1
            return operation.failures >= ATTEMPTS
        if not self._outage:
            self._outage = True
            self.echo(
                f"MLflow at {self.shown_uri} cannot be used ({reason_of(error)}); the run goes on, "
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

    # -- tracking.json ----------------------------------------------------------------------------

    def _load(self) -> TrackingFile:
        """Return ``tracking.json``, or a new one if there is none or it cannot be used."""
        new: TrackingFile = {"schema": SCHEMA, "token": secrets.token_hex(8), "uris": {}}
        try:
            if not self.directory.exists(FILE):
                return new
            file: TrackingFile = self.directory.read_json(FILE)
            if isinstance(file, dict) and file.get("schema") == SCHEMA:
                return file
            reason = "its schema is another one"
        except (StorageError, OSError) as e:
            reason = str(e)
        self.echo(f"{self.directory.uri}/{FILE} cannot be used ({reason}); publishing into new MLflow runs")
        return new

    def _save_changes(self, interval_s: float) -> None:
        """Write ``tracking.json`` if it changed, at most once in ``interval_s``."""
        # One thread at a time: an older text must not replace a newer one. A caller returns once
        # its state is on storage.
        with self._saving:
            with self.lock:
                if not self._unsaved or clock.monotonic() - self._saved_at < interval_s:
                    return
                self.state["published"] = sorted(self._published)
                text = json.dumps(self._file, indent=1, sort_keys=True)
                self._unsaved, self._saved_at = False, clock.monotonic()
            try:
                self.directory.write_bytes(FILE, text.encode())
            except (StorageError, OSError) as e:
                self._unsaved = True
                self.echo(f"MLflow's bookkeeping could not be kept: {e}")


def _has_runs(client: MlflowClient, state: State, experiment_id: str) -> bool:
    """Return whether the server has the runs of ``state``, which may have been deleted there."""
    run = state["runs"].get("run") or next(iter(state["runs"].values()))
    try:
        info = client.get_run(run["id"]).info
    except MlflowException as e:
        if status_of(e) == 404:
            return False
        raise
    return bool(info.lifecycle_stage == "active" and info.experiment_id == experiment_id)
