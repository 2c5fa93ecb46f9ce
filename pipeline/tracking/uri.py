"""The address of a run's MLflow, and the file of an SQLite database. Imports no mlflow."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shlex
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from components.errors import ConfigError, UserError
from pipeline.program import program
from pipeline.runtime.redaction import without_password
from pipeline.runtime.storage import Storage

OPTION, VARIABLE = "--tracking-uri", "MLFLOW_TRACKING_URI"
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")
DATABASE = "mlflow.db"
"""Database file in a local storage, where no tracking URI is given."""
DEFAULT_PORT = 5000
"""MLflow's own default, which links can name before a server runs."""
LOCK_SECONDS = 60.0
"""How long to wait for another process's lock of a database file before going on without it."""
UI_OF_DATABASE = f"http://127.0.0.1:{DEFAULT_PORT}"
"""Where the command ``ui`` opens the UI of a database, unless another program has the port."""
_WORKFLOW = "workflowType=machine_learning"
"""Without it the UI opens its pages for language models."""
TABLES_WITH_ROWS = {"alembic_version", "experiments", "workspaces"}
"""Tables that are not empty in a new database. Its only experiment is number 0, the default."""


def resolve(option: str, storage: Storage) -> tuple[str, str]:
    """Return the tracking URI of a run and where it comes from: OPTION, VARIABLE, or "" by default.

    Args:
        option: value of ``--tracking-uri``, or "".
        storage: its ``mlflow.db`` is the default.

    Raises:
        UserError: neither names a URI, and the storage is not on this machine, as SQLite requires.
    """
    if option:
        return option, OPTION
    if variable := os.environ.get(VARIABLE):
        return variable, VARIABLE
    if not storage.is_local:
        raise UserError(
            f"storage {storage.uri} is not on this machine, so MLflow cannot keep its database there: "
            "give a server with --tracking-uri http://HOST:PORT, or a local file with "
            "--tracking-uri sqlite:////absolute/path/mlflow.db"
        )
    return sqlite_uri(storage.local_root / DATABASE), ""


def default_uri(storage: Storage) -> str:
    """Return the tracking URI of a run without ``--tracking-uri``; see :func:`resolve`."""
    return resolve("", storage)[0]


def sqlite_uri(path: Path) -> str:
    """Return the URI of a database file, with the characters quoted that SQLAlchemy interprets."""
    return "sqlite:///" + str(path).replace("%", "%25").replace("?", "%3F")


def sqlite_path(uri: str) -> Path:
    """Return the database file of an SQLite URI."""
    return Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0]))


def check_address(uri: str, named_by: str = "") -> None:
    """Refuse a text that cannot be the address of an MLflow. No server is asked.

    Args:
        named_by: the option or the variable that it comes from, for the message.

    Raises:
        ConfigError: the message says what is wrong with the text.
    """
    what = f"{named_by or 'tracking URI'} {without_password(uri)!r}"
    known = "one of " + ", ".join(f"{scheme}://" for scheme in SCHEMES)
    scheme, _, rest = uri.partition("://") if "://" in uri else ("", "", uri)
    dialect = scheme.partition("+")[0]
    if not uri.strip():
        raise ConfigError(f"{what} is empty: it has to begin with {known}")
    if not uri.isprintable():
        raise ConfigError(f"{what} holds characters that no address has")
    if re.match(r"(databricks|databricks-uc|uc)(:|$)", uri):
        raise ConfigError(
            f"{what} is a Databricks workspace, which is not supported: give a server, http://HOST:PORT, or a database"
        )
    if dialect in ("http", "https") or re.match("https?:", uri):
        if not (scheme and _host(uri)):
            raise ConfigError(f"{what} names no host: give http://HOST:PORT")
    elif uri.startswith("sqlite"):
        if not (uri.startswith("sqlite:///") and sqlite_path(uri).is_absolute()):
            path = os.path.abspath(os.path.expanduser(re.sub("^sqlite[^:/]*:?/*", "", uri) or "mlflow.db"))
            raise ConfigError(
                f"{what} has no absolute path, and a Ray job would look for a relative path elsewhere: "
                f"give sqlite:///{path} (four slashes)"
            )
    elif uri.startswith("file:") or (not scheme and not re.match(r"[\w.-]+:\d+(/|$)", uri)):
        path = os.path.abspath(os.path.expanduser(re.sub("^file:(//)?", "", uri)))
        raise ConfigError(
            f"{what} is a directory, which MLflow 3 no longer supports: "
            f"give a database, sqlite:///{path}.db, or a server, http://HOST:PORT"
        )
    elif not scheme:
        raise ConfigError(f"{what} has no scheme: a server would be http://{uri}")
    elif dialect not in SCHEMES or not rest:
        raise ConfigError(f"{what} has the scheme {scheme!r}: expected {known}, and something after that")


def _host(uri: str) -> str | None:
    """Return the host of an HTTP address, or None if the address is malformed."""
    try:
        parts = urlsplit(uri)
        return parts.hostname if parts.port != 0 else None
    except ValueError:  # The port is no number, or half of an IPv6 address is missing.
        return None


def models_page(experiment_id: str) -> str:
    """Return the page of the models of an experiment, which follows the address of MLflow's UI."""
    return f"#/experiments/{experiment_id}/models?{_WORKFLOW}"


def comparison_page(experiment_id: str, run_ids: Sequence[str]) -> str:
    """Return the page that compares runs, which follows the address of MLflow's UI."""
    runs = ",".join(f"%22{run_id}%22" for run_id in run_ids)
    return f"#/compare-runs?runs=[{runs}]&experiments=[%22{experiment_id}%22]&{_WORKFLOW}"


def ui_address(uri: str) -> str:
    """Return the address of MLflow's UI: the server's, or that at which :func:`ui_command` opens it."""
    return (without_password(uri).rstrip("/") if uri.startswith("http") else UI_OF_DATABASE) + "/"


def page(experiment_id: str | None, run_id: str | None, part: str = "") -> str:
    """Return the page of a run, of an experiment or of all experiments, which follows the address.

    Args:
        part: of the page, such as ``/artifacts/report/report.html``.
    """
    parts = ([f"experiments/{experiment_id}"] if experiment_id else []) + ([f"runs/{run_id}"] if run_id else [])
    return f"#/{'/'.join(parts) or 'experiments'}{part}?{_WORKFLOW}"


def ui_command(uri: str, experiment_id: str | None, run_id: str | None) -> str:
    """Return how to see a run in MLflow: a server's page, or the command that opens a database."""
    if uri.startswith("http"):
        return ui_address(uri) + page(experiment_id, run_id)
    path = sqlite_path(uri) if uri.startswith("sqlite:") else Path()
    where = ["--storage", str(path.parent)] if path.name == DATABASE else ["--tracking-uri", without_password(uri)]
    return f"{program()} {shlex.join(['ui', *where, *(['--run', run_id] if run_id else [])])}"


# -- the file of an SQLite database --------------------------------------------------------------


def is_absent(path: Path) -> bool:
    """Return whether a database has to be created: its file is missing or empty."""
    return not path.exists() or path.stat().st_size == 0


def place(path: Path, database: bytes) -> None:
    """Write a new database, whole or not at all, unless another process has written one.

    Raises:
        OSError: the directory cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path) as locked:
        if locked:
            for half_written in path.parent.glob(f".{path.name}.*.tmp"):
                half_written.unlink(missing_ok=True)
        if not is_absent(path):
            return
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(database)
                file.flush()
                os.fsync(file.fileno())
            if path.exists() and is_absent(path):
                path.unlink()
            # Unlike a rename, a link never replaces another process's database, even if files
            # cannot be locked. File systems without hard links get the rename, which is as whole.
            try:
                os.link(temporary, path)
            except FileExistsError:
                pass
            except OSError:
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def put_aside(path: Path, inode: int) -> Path | None:
    """Rename a broken database and return its new name, or None if it was replaced meanwhile."""
    aside = path.with_name(f"{path.name}.broken-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")
    with _locked(path):
        if path.stat().st_ino != inode:
            return None
        path.rename(aside)
        return aside


def holds_nothing(path: Path) -> bool:
    """Return whether a file is an MLflow database, whole or not, without runs and experiments."""
    try:
        with contextlib.closing(
            sqlite3.connect(f"file:{path.as_uri()[7:]}?mode=ro", uri=True, timeout=5)
        ) as connection:
            query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
            tables = {name for (name,) in connection.execute(query)}
            filled = {t for t in tables if connection.execute(f'SELECT 1 FROM "{t}" LIMIT 1').fetchone()}
            if not ({"experiments", "runs"} <= tables and filled <= TABLES_WITH_ROWS):
                return False
            return connection.execute("SELECT 1 FROM experiments WHERE experiment_id <> 0").fetchone() is None
    except sqlite3.Error:
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock file of a database. Yield whether it could be locked within LOCK_SECONDS."""
    deadline = time.monotonic() + LOCK_SECONDS
    with path.with_name(f".{path.name}.lock").open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                yield False
            except OSError:
                yield False
            else:
                yield True
            return
