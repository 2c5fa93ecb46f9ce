"""The MLflow server or database: choice, connection and checks."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException, RestException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri
from sqlalchemy.exc import SQLAlchemyError

from components.errors import ConfigError, UserError
from pipeline.runtime.redaction import without_password
from pipeline.runtime.storage import Storage
from pipeline.tracking.requests import error_within, http_limits, reason_of, status_of
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
"""How long MLflow may take to answer before a run, and then its artifact store."""
EXPERIMENT = "defendpp"
"""Name of the MLflow experiment by default."""


def to_stderr(line: str) -> None:
    """Print a line to standard error."""
    print(line, file=sys.stderr, flush=True)


def choose(
    option: str, experiment: str, root: Storage, *, required: bool, echo: Callable[[str], None]
) -> tuple[str, str]:
    """Return a run's tracking URI and MLflow experiment, after printing and checking them.

    Args:
        option: tracking URI of the command line, or "".
        experiment: MLflow experiment of the command line, or "".
        required: raise if MLflow cannot be used. Otherwise print why, since the run can be
            published later.

    Raises:
        ConfigError: the text cannot be the address of an MLflow, required or not.
        UserError: as of :func:`check_reachable`, if ``required``.
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
    """Check that runs and artifacts can be published, within about ten seconds.

    A missing SQLite database is created. A broken one that holds no run is put aside first.

    Args:
        experiment: name of the MLflow experiment, which is created if there is none.
        named_by: where ``uri`` comes from: :data:`OPTION`, :data:`VARIABLE`, or "" for the default.

    Raises:
        ConfigError: the text cannot be the address of an MLflow.
        UserError: the server does not answer or refuses, the file is no database or cannot be
            written, or the experiment's artifacts cannot be written from here. The message names
            the address, the cause and the remedy.
    """
    check_address(uri, named_by)
    path = sqlite_path(uri) if uri.startswith("sqlite:") else None
    # Look before MLflow tries to repair it. The inode tells whether another process replaces it.
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
    """Return the error that shows that MLflow cannot be used, or None."""
    location = ""

    def ask() -> None:
        nonlocal location
        location = experiment_of(connect(uri), experiment, artifact_root_of(uri)).artifact_location

    try:
        if uri.startswith("sqlite:"):
            prepare(sqlite_path(uri))  # The first takes seconds, and more on a busy machine.
    except (OSError, sqlite3.Error, SQLAlchemyError, MlflowException) as e:
        return e
    with http_limits(timeout=4, retries=1):
        # Whatever the limits, MLflow asks a database fifteen times, and some libraries ask a bucket
        # for minutes.
        error = error_within(REACH_SECONDS, ask)
        if error is None:
            error = error_within(REACH_SECONDS, lambda: _check_artifacts(uri, experiment, location))
            if isinstance(error, TimeoutError):
                error = _unwritable(experiment, location, error)
    return error


def _blames_database(error: BaseException) -> bool:
    """Return whether an error is about a database's tables or format, not its lock or its name."""
    return not isinstance(error, UserError | OSError) and bool(
        re.search(
            "no such (table|column)|table .* already exists|duplicate column|out-of-date database schema"
            "|can't locate revision|malformed|not a database",
            str(error),
            re.IGNORECASE,
        )
    )


def _replaced(path: Path, inode: int, echo: Callable[[str], None]) -> bool:
    """Put aside a broken database that holds no run. Return whether another can take its place."""
    try:
        aside = put_aside(path, inode)
    except OSError:
        return False
    if aside is not None:
        echo(f"The MLflow database {path} was broken and held no run; it is {aside} now, and a new one is made")
    return True


def _refusal(uri: str, error: BaseException, named_by: str, experiment: str) -> str:
    """Return the message for an MLflow that cannot be used: which, why, and what to do."""
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
        database = sqlite_path(uri) if uri.startswith("sqlite:") else shown
        return f"MLflow database {database} cannot be used: {reason_of(error)}. To go on, {other}"
    if status in (401, 403):
        return (
            f"The MLflow server {shown} refuses access (HTTP {status}): set MLFLOW_TRACKING_USERNAME and "
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
    """Return the HTTP status of an unusual answer, or None if there was no answer."""
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
        UserError: the artifact cannot be written from here.
    """
    name = f"write-test-{secrets.token_hex(4)}.txt"
    try:
        folder = Path(local_file_uri_to_path(location)) if is_local_uri(location) else None
        # MLflow would create a folder that is on the server's machine or moved with the storage.
        if folder is not None and not (folder.is_dir() or _is_artifact_root(folder.parent)):
            raise FileNotFoundError(f"the folder {folder.parent} does not exist on this machine")
        repository = get_artifact_repository(location, tracking_uri=uri)
        with tempfile.TemporaryDirectory(prefix="defendpp-") as directory:
            file = Path(directory) / name
            file.write_bytes(b"defendpp")
            repository.log_artifact(str(file))
        with contextlib.suppress(Exception):  # Some stores allow no deletion.
            repository.delete_artifacts(name)
    except Exception as e:  # Each store's library raises its own errors.
        raise _unwritable(experiment, location, e) from None


def _unwritable(experiment: str, location: str, error: Exception) -> UserError:
    hint = ""
    if location.startswith("mlflow-artifacts:"):
        hint = " (the server has to run with --serve-artifacts, and to reach its store)"
    return UserError(
        f"artifacts of the MLflow experiment {experiment!r} go to {without_password(location)}, which cannot be "
        f"written from here: {reason_of(error)}{hint}. Correct that, or name another experiment with --experiment-name"
    )


def artifact_root_of(uri: str) -> str | None:
    """Return the artifact root of a new experiment, or None if the server chooses it."""
    if not uri.startswith("sqlite:"):
        return None
    # MLflow's own default is the working directory.
    return (sqlite_path(uri).parent / "mlartifacts").as_uri()


def experiment_of(client: MlflowClient, name: str, artifact_root: str | None) -> Experiment:
    """Return an experiment. It is created if there is none, and restored if it was deleted."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # With this kind the UI opens its page for training runs instead of asking.
        kind = {"mlflow.experimentKind": "custom_model_development"}
        try:
            experiment = client.get_experiment(client.create_experiment(name, artifact_root, tags=kind))
        except MlflowException:
            experiment = client.get_experiment_by_name(name)  # Another process may have created it.
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return experiment


def _is_artifact_root(folder: Path) -> bool:
    # MLflow creates its own root, mlruns, only with the first artifact.
    return folder.is_dir() or (folder.name == "mlruns" and folder.parent.is_dir())


def connect(uri: str) -> MlflowClient:
    """Return a client. A missing SQLite database is created first."""
    if not uri.startswith("sqlite:"):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    path = sqlite_path(uri)
    prepare(path)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    # MLflow creates the directory of the URI without unquoting it. Remove it if that differs.
    unquoted = Path(uri.removeprefix("sqlite:///").partition("?")[0]).parent
    if unquoted != path.parent:
        with contextlib.suppress(OSError):
            os.removedirs(unquoted)
    return client


def prepare(path: Path) -> None:
    """Create a missing database, whole. MLflow's own migrations are many transactions.

    Raises:
        OSError, sqlite3.Error: the file cannot be created or written, or is no database.
    """
    if is_absent(path):
        place(path, _empty_database())
    with contextlib.closing(sqlite3.connect(path, timeout=5, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")  # This needs the right to write, and writes nothing.
        connection.execute("PRAGMA schema_version")  # This reads the header, which other files do not have.
        connection.execute("ROLLBACK")


@functools.cache
def _empty_database() -> bytes:
    """Return the content of a new database, which MLflow creates in a temporary directory."""
    with tempfile.TemporaryDirectory(prefix="defendpp-") as directory:
        file = Path(directory) / "mlflow.db"
        MlflowClient(tracking_uri=sqlite_uri(file)).search_experiments(max_results=1)
        return file.read_bytes()
