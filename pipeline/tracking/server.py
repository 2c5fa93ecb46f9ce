"""The MLflow server or database: chosen, reached and prepared."""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import re
import secrets
import sqlite3
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import (
    Experiment,
)
from mlflow.exceptions import MlflowException, RestException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri
from sqlalchemy.exc import SQLAlchemyError

from components.errors import ConfigError, UserError
from pipeline.runtime.redaction import without_password
from pipeline.runtime.storage import Storage
from pipeline.tracking.uri import (
    OPTION,
    VARIABLE,
    check_address,
    holds_nothing,
    is_absent,
    place,
    put_aside,
    resolve,
    sqlite_path,
    sqlite_uri,
)

REACH_SECONDS = 30.0
"""How long MLflow, and then the place of its artifacts, may take to answer before a run."""
EXPERIMENT = "defendpp"
"""The MLflow experiment of runs that name none."""


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def choose(
    option: str, experiment: str, root: Storage, *, required: bool, echo: Callable[[str], None]
) -> tuple[str, str]:
    """Say where a run is published, and make sure that it can be. Returns the tracking URI and the experiment's name.

    Args:
        option: tracking URI of the command line, or "".
        experiment: MLflow experiment of the command line, or "".
        root: the storage.
        required: refuse where MLflow cannot be used. Otherwise say it: the run goes on, and is published later.

    Raises:
        UserError: see :func:`check_reachable`. ConfigError, for an address that cannot be, also where MLflow is not
            required.
    """
    uri, named_by = resolve(option, root)
    experiment = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    source = f" (from {named_by})" if named_by == VARIABLE else ""
    echo(f"MLflow: {without_password(uri)}{source}, experiment {experiment}")
    try:
        check_reachable(uri, experiment, named_by=named_by, echo=echo)
    except ConfigError:
        raise
    except UserError as e:
        if required:
            raise
        echo(f"{e}. The run goes on without MLflow, and is published by a later command")
    return uri, experiment


def check_reachable(
    uri: str, experiment: str = EXPERIMENT, *, named_by: str = OPTION, echo: Callable[[str], None] = to_stderr
) -> None:
    """Make sure, within about ten seconds and before hours of compute, that runs and artifacts can be published.

    An SQLite database that is not there is made; one that holds no run and is broken is put aside and made anew.

    Args:
        named_by: what holds ``uri``: :data:`OPTION`, :data:`VARIABLE`, or "" for the database of the storage.
        echo: takes a line for a person.

    Raises:
        ConfigError: a text that cannot be the address of an MLflow.
        UserError: a server that does not answer or refuses, a database that is none or cannot be written, or an experiment
            whose artifacts cannot be written from here. The message names the address, the cause and what to do.
    """
    check_address(uri, named_by)
    path = sqlite_path(uri) if uri.startswith("sqlite:") else None
    # before MLflow tries to mend it; the inode tells it from one that another process puts in its place
    inode = path.stat().st_ino if path is not None and holds_nothing(path) else None
    error = _reach(uri, experiment)
    broken = error is not None and _blames_database(error)
    if broken and path is not None and inode is not None and _replaced(path, inode, echo):
        error = _reach(uri, experiment)
    if isinstance(error, UserError):
        raise error
    if error is not None:
        raise UserError(_refusal(uri, error, named_by, experiment)) from None


def _reach(uri: str, experiment: str) -> BaseException | None:
    """Return why MLflow cannot be used, or None."""

    location = ""

    def ask() -> None:
        nonlocal location
        location = experiment_of(connect(uri), experiment, artifact_root_of(uri)).artifact_location

    try:
        if uri.startswith("sqlite:"):
            _prepare(sqlite_path(uri))  # takes seconds for the first, and more on a busy machine
    except (OSError, sqlite3.Error, SQLAlchemyError, MlflowException) as e:
        return e
    with http_limits(timeout=4, retries=1):
        # mlflow asks a database fifteen times, whatever the settings say; a bucket may be asked for minutes
        error = error_within(REACH_SECONDS, ask)
        if error is None:
            error = error_within(REACH_SECONDS, lambda: _check_artifacts(uri, experiment, location))
            if isinstance(error, TimeoutError):
                error = _unwritable(experiment, location, error)
    return error


def _blames_database(error: BaseException) -> bool:
    """Return whether an error is one of the tables or the format of a database, and not of a lock, a name or a folder."""
    return not isinstance(error, UserError | OSError) and bool(
        re.search(
            "no such (table|column)|table .* already exists|duplicate column|out-of-date database schema"
            "|can't locate revision|malformed|not a database",
            str(error),
            re.IGNORECASE,
        )
    )


def _replaced(path: Path, inode: int, echo: Callable[[str], None]) -> bool:
    """Put aside a database that cannot be used and holds nothing. Returns whether it is out of the way."""
    try:
        aside = put_aside(path, inode)
    except OSError:
        return False
    if aside is not None:
        echo(f"The MLflow database {path} was broken and held no run; it is {aside} now, and a new one is made")
    return True


def _refusal(uri: str, error: BaseException, named_by: str, experiment: str) -> str:
    """Return the sentence for an MLflow that cannot be used: what, why, and what to do."""
    shown, status = without_password(uri), _http_status(error)
    other = {
        OPTION: "give another one with --tracking-uri, or leave that out to keep mlflow.db in the storage",
        VARIABLE: f"set {VARIABLE} to another one, or unset it to keep mlflow.db in the storage",
    }.get(
        named_by,
        "make it readable and writable, move it away for a new one, or name another MLflow with --tracking-uri",
    )
    if isinstance(error, MlflowException) and error.error_code == "INVALID_PARAMETER_VALUE":
        return (
            f"MLflow at {shown} refuses the experiment {experiment[:100]!r}: {reason_of(error)}. "
            "Name another one with --experiment-name"
        )
    if not uri.startswith("http"):
        return f"MLflow database {sqlite_path(uri) if uri.startswith('sqlite:') else shown} cannot be used: {reason_of(error)}. To go on, {other}"
    if status in (401, 403):
        return (
            f"The MLflow server {shown} refuses who asks (HTTP {status}): set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    if status in (200, 404, 405):
        return f"{shown} is no MLflow server, though something answers there (HTTP {status}); {other}"
    if status is not None:
        return f"The MLflow server {shown} answers with an error (HTTP {status}): look into its log, or {other}"
    return (
        f"The MLflow server {shown} cannot be used: {reason_of(error)}. "
        f"Start it (mlflow server --host HOST --port PORT), {other}"
    )


def _http_status(error: BaseException) -> int | None:
    """Return the status of an HTTP answer that was no answer of MLflow's; None where no answer came."""
    text = str(error)
    if "not in a valid JSON format" in text:
        return 200
    number = re.search(r"failed with error code (\d{3}) != 200|too many (\d{3}) error responses", text)
    if number:
        return int(number[1] or number[2])
    return status_of(error) if isinstance(error, RestException) else None


def _check_artifacts(uri: str, experiment: str, location: str) -> None:
    """Write a small artifact to the place of an experiment and delete it.

    Raises:
        UserError: it cannot be written from here.
    """
    name = f"write-test-{secrets.token_hex(4)}.txt"
    try:
        folder = Path(local_file_uri_to_path(location)) if is_local_uri(location) else None
        # mlflow would make the folder, though it lies on the server's machine, or has moved with the storage
        if folder is not None and not (folder.is_dir() or _stands(folder.parent)):
            raise FileNotFoundError(f"the folder {folder.parent} does not exist on this machine")
        repository = get_artifact_repository(location, tracking_uri=uri)
        with tempfile.TemporaryDirectory(prefix="defendpp-") as directory:
            file = Path(directory) / name
            file.write_bytes(b"defendpp")
            repository.log_artifact(str(file))
        with contextlib.suppress(Exception):  # some stores let nobody delete
            repository.delete_artifacts(name)
    except Exception as e:  # whatever the library of that store raises
        raise _unwritable(experiment, location, e) from None


def _unwritable(experiment: str, location: str, error: Exception) -> UserError:
    """Return the error for artifacts that cannot be written to the place of an experiment."""
    hint = ""
    if location.startswith("mlflow-artifacts:"):
        hint = " (the server has to run with --serve-artifacts, and to reach its store)"
    return UserError(
        f"artifacts of the MLflow experiment {experiment!r} go to {without_password(location)}, which cannot be "
        f"written from here: {reason_of(error)}{hint}. Mend that, or name another experiment with --experiment-name"
    )


def artifact_root_of(uri: str) -> str | None:
    """Return where artifacts of a new experiment go. None: where the server says."""
    if not uri.startswith("sqlite:"):
        return None
    # mlflow's own default is the working directory; it takes a path for a URI that is quoted
    return (sqlite_path(uri).parent / "mlartifacts").as_uri()


def experiment_of(client: MlflowClient, name: str, artifact_root: str | None) -> Experiment:
    """Return an experiment, which is made where there is none, and restored where it was deleted."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # the kind opens the UI's page for training runs; without it the UI asks
        kind = {"mlflow.experimentKind": "custom_model_development"}
        try:
            experiment = client.get_experiment(client.create_experiment(name, artifact_root, tags=kind))
        except MlflowException:
            experiment = client.get_experiment_by_name(name)  # another process may have been quicker
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return experiment


def _stands(parent: Path) -> bool:
    return parent.is_dir() or (parent.name == "mlruns" and parent.parent.is_dir())  # mlflow's own root is made late


def connect(uri: str) -> MlflowClient:
    """Return a client. An SQLite database is there before MLflow opens it."""
    if not uri.startswith("sqlite:"):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    path = sqlite_path(uri)
    _prepare(path)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    # mlflow makes the directory that it reads out of the URI without unquoting it
    unquoted = Path(uri.removeprefix("sqlite:///").partition("?")[0]).parent
    if unquoted != path.parent:
        with contextlib.suppress(OSError):
            os.removedirs(unquoted)
    return client


def _prepare(path: Path) -> None:
    """Make the file of a database where there is none, whole: MLflow's own migrations are many transactions.

    Raises:
        OSError, sqlite3.Error: the file cannot be made or written, or is no database.
    """
    if is_absent(path):
        place(path, _empty_database())
    with contextlib.closing(sqlite3.connect(path, timeout=5, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")  # asks for the right to write, and writes nothing
        connection.execute("PRAGMA schema_version")  # reads the header: tells a database from another file
        connection.execute("ROLLBACK")


@functools.cache
def _empty_database() -> bytes:
    """Return a new database of this version of MLflow, made in a directory that no other process uses."""
    with tempfile.TemporaryDirectory(prefix="defendpp-") as directory:
        file = Path(directory) / "mlflow.db"
        MlflowClient(tracking_uri=sqlite_uri(file)).search_experiments(max_results=1)
        return file.read_bytes()


def status_of(error: Exception) -> int | None:
    """The HTTP status that stands for an error of MLflow, also where no HTTP is spoken."""
    if not isinstance(error, MlflowException):
        return None
    status: int = error.get_http_status_code()  # type: ignore[no-untyped-call]
    return status


def reason_of(error: BaseException) -> str:
    """The first line of an error, without the addresses and nesting that urllib3 puts around it."""
    text = without_password(str(error)).splitlines()[0] if str(error).strip() else type(error).__name__
    text = text.partition(". Response body: '<")[0]  # a page of HTML
    if number := re.search(r"too many (\d{3}) error responses", text):
        return f"HTTP {number[1]}"
    for known in (
        "Connection refused",
        "timed out",
        "Name or service not known",
        "Temporary failure in name resolution",
    ):
        if known in text:
            return known.lower()
    return text if len(text) <= 300 else text[:297] + "..."


_limits_lock = threading.Lock()
_limits: list[dict[str, str | None]] = []
"""Limits in force, the latest last. The first are those of the environment before any of them."""


@contextlib.contextmanager
def http_limits(*, timeout: int, retries: int | None = None) -> Iterator[None]:
    """Set other limits for the requests inside. MLflow reads them from the environment at each request.

    The environment is shared by all threads, so the latest limits hold for all, until their block ends.
    """
    limits: dict[str, str | None] = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout)}
    if retries is not None:
        limits["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = str(retries)
    with _limits_lock:
        if not _limits:
            names = ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES")
            _limits.append({name: os.environ.get(name) for name in names})
        _limits.append(limits)
        _set_limits()
    try:
        yield
    finally:
        with _limits_lock:
            _limits[:] = [others for others in _limits if others is not limits]
            _set_limits()
            if len(_limits) == 1:
                _limits.clear()


def _set_limits() -> None:
    for name, value in functools.reduce(operator.or_, _limits).items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def global_uri(uri: str) -> Iterator[None]:
    """Let MLflow's global functions use ``uri``. They would keep it, in the environment too, for whatever comes next."""
    before = os.environ.get(VARIABLE)
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
        if before is not None:
            os.environ[VARIABLE] = before


def error_within(seconds: float | None, work: Callable[[], None]) -> BaseException | None:
    """What ``work`` raised, or TimeoutError if it is not done by then (it is left behind), or None."""
    found: list[BaseException | None] = [TimeoutError(f"no answer within {seconds} s")]

    def run() -> None:
        try:
            work()
            found[0] = None
        except Exception as e:
            found[0] = e

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0]
