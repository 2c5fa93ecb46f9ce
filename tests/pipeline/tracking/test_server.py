"""MLflow is checked before a run spends compute: its address, its database, and where artifacts go."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shlex
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow_server import MlflowServer
from ports import free_port

from components.config import Experiment
from components.errors import ConfigError, UserError
from pipeline import run_directory
from pipeline.runtime.storage import Storage
from pipeline.tracking import server as tracking_server
from pipeline.tracking.tracker import Tracker
from pipeline.tracking.uri import check_address, default_uri, ui_command

pytestmark = pytest.mark.slow

PATHS = ["plain", "repo_feature%2Fx", "a?b", "a#b", "x y", "o'neil & co", "bücher 数", "%", "a%2525?#"]
"""Names of directories; some have a meaning in URLs, some in shells."""


@pytest.fixture(scope="module")
def forked() -> Callable[[str], Any]:
    """Return a function that starts ``check_reachable`` in a process that has imported MLflow."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.tracking.tracker"])

    def start(uri: str) -> Any:
        process = context.Process(target=tracking_server.check_reachable, args=(uri,))
        process.start()
        return process

    return start


def _database(directory: Path) -> Path:
    """Create a database of MLflow with one experiment and one run."""
    tracking_server.check_reachable(f"sqlite:///{directory}/mlflow.db")
    client = MlflowClient(f"sqlite:///{directory}/mlflow.db")
    experiment = client.get_experiment_by_name("defendpp")
    assert experiment is not None
    client.create_run(experiment.experiment_id, run_name="a")
    return directory / "mlflow.db"


def _break(database: Path) -> None:
    """Leave a database as a process that is killed while it migrates. MLflow has not read the copy yet."""
    os.replace(shutil.copy(database, database.with_name("copy")), database)
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        connection.execute("DROP TABLE webhook_events")
        connection.commit()


# -- the database --------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.drill)])
def test_a_kill_while_the_database_is_made_leaves_nothing_broken(
    kills: int, forked: Callable[[str], Any], tmp_path: Path
) -> None:
    """One kill comes when the file gets its name, the others at random moments of the first seconds."""
    databases = [tmp_path / str(i) / "mlflow.db" for i in range(kills + 1)]
    forked("starts the server that forks, and names no database").join()
    begin = time.monotonic()
    process = forked(f"sqlite:///{databases[0]}")
    while process.is_alive() and not databases[0].exists():
        time.sleep(0.001)
    process.kill()
    process.join()
    seconds = max(4.0, time.monotonic() - begin)
    draw = random.Random(0)
    moments = sorted(seconds * draw.random() for _ in range(kills))
    for i in range(0, kills, 2):  # one on each core
        begin = time.monotonic()
        pair = databases[i + 1 : i + 3]
        processes = [forked(f"sqlite:///{database}") for database in pair]
        for moment, process in zip(moments[i : i + 2], processes, strict=True):
            time.sleep(max(0.0, begin + moment - time.monotonic()))
            process.kill()
            process.join()
    made = [database for database in databases if database.exists()]
    assert databases[0] in made
    assert len(made) < len(databases), "every kill came too late"
    # those that are absent are as new: one of them stands for all
    databases = [*made, next(database for database in databases if database not in made)]
    broken = []
    for database in databases:
        try:
            tracking_server.check_reachable(f"sqlite:///{database}")
        except UserError as e:
            broken.append(str(e))
    assert not broken, f"{len(broken)} of {len(databases)}, the first: {broken[0]}"
    assert not list(tmp_path.rglob("*broken*"))


def test_two_commands_may_begin_on_a_new_storage_at_once(forked: Callable[[str], Any], tmp_path: Path) -> None:
    processes = [forked(f"sqlite:///{tmp_path}/new/mlflow.db") for _ in range(2)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    tracking_server.check_reachable(f"sqlite:///{tmp_path}/new/mlflow.db")


def test_a_broken_database_without_runs_is_put_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracking_server.prepare(tmp_path / "mlflow.db")
    _break(tmp_path / "mlflow.db")
    old = (tmp_path / "mlflow.db").stat().st_ino
    tracking_server.check_reachable(uri)
    (aside,) = tmp_path.glob("mlflow.db.broken-*")
    assert aside.stat().st_ino == old
    assert str(aside) in capsys.readouterr().err
    MlflowClient(uri).create_run("1")
    tracking_server.check_reachable(uri)
    assert len(list(tmp_path.glob("mlflow.db*"))) == 2


def test_a_whole_database_without_runs_is_never_put_aside(tmp_path: Path) -> None:
    uri, database = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "mlflow.db"
    tracking_server.prepare(database)
    inode = database.stat().st_ino
    with pytest.raises(UserError, match=r"refuses the experiment 'x.*500.*--experiment-name"):
        tracking_server.check_reachable(uri, "x" * 501)
    (tmp_path / "mlartifacts").touch()
    with pytest.raises(UserError, match=r"artifacts of the MLflow experiment 'defendpp' go to .*mlartifacts"):
        tracking_server.check_reachable(uri)
    (tmp_path / "mlartifacts").unlink()
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("DELETE FROM experiment_tags")
        connection.execute("DELETE FROM experiments")
        connection.commit()
        connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(UserError, match="database is locked"):
            tracking_server.check_reachable(uri)
    MlflowClient(uri).create_experiment("bucket", "s3://defendpp-test-bucket/artifacts")
    with pytest.raises(UserError, match="boto3"):
        tracking_server.check_reachable(uri, "bucket")
    assert database.stat().st_ino == inode
    assert not list(tmp_path.glob("*broken*"))


def test_a_broken_database_with_an_experiment_is_left_alone(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/first.db"
    tracking_server.check_reachable(uri, "of a person")
    database = (tmp_path / "first.db").rename(tmp_path / "mlflow.db")
    _break(database)
    with pytest.raises(UserError, match=r"mlflow\.db cannot be used"):
        tracking_server.check_reachable(f"sqlite:///{database}")
    assert not list(tmp_path.glob("*broken*"))


def test_a_broken_database_with_runs_is_left_alone(tmp_path: Path) -> None:
    database = _database(tmp_path).rename(tmp_path / "other.db")
    _break(database)
    with pytest.raises(UserError, match=r"other\.db cannot be used"):
        tracking_server.check_reachable(f"sqlite:///{database}")
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT count(*) FROM runs").fetchone() == (1,)
    assert not list(tmp_path.glob("*broken*"))


def test_a_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "photos.db")) as connection:
        connection.execute("CREATE TABLE experiments (colour TEXT)")
    with pytest.raises(UserError, match=r"photos\.db cannot be used"):
        tracking_server.check_reachable(f"sqlite:///{tmp_path}/photos.db")
    assert not list(tmp_path.glob("*broken*"))


def test_an_empty_file_is_replaced_by_a_database(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    (tmp_path / ".mlflow.db.0123.tmp").write_text("left behind by a process that was killed")
    tracking_server.check_reachable(f"sqlite:///{tmp_path}/mlflow.db")
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection:
        assert connection.execute("SELECT count(*) FROM alembic_version").fetchone() == (1,)
    assert sorted(os.listdir(tmp_path)) == [".mlflow.db.lock", "mlartifacts", "mlflow.db"]


@pytest.mark.parametrize("name", PATHS)
def test_any_path_of_a_storage_serves(name: str, tmp_path: Path) -> None:
    storage = Storage(tmp_path / name)
    uri = default_uri(storage)
    tracking_server.check_reachable(uri)
    tracker = Tracker(uri, storage / "runs/x", echo=lambda line: None)
    tracker.start("run", "x")
    storage.write_bytes("note.txt", b"n")
    tracker.artifact("run", storage, "note.txt")
    assert tracker.flush()
    assert (tmp_path / name / "mlflow.db").exists()
    assert list((tmp_path / name / "mlartifacts").rglob("note.txt"))
    assert os.listdir(tmp_path) == [name], "something was written beside the storage"
    words = shlex.split(ui_command(uri, tracker.experiment_id, tracker.run_id()))
    shown = default_uri(Storage(words[words.index("--storage") + 1]))
    assert words[-2:] == ["--run", tracker.run_id()]
    assert MlflowClient(shown).get_run(tracker.run_id() or "").info.run_name == "x"
    assert (storage / "runs/x").read_json("tracking.json")["uris"][uri]["experiment"] == tracker.experiment_id


# -- addresses that cannot be --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("databricks", "Databricks workspace"),
        ("databricks://profile", "Databricks workspace"),
        ("127.0.0.1:5000", r"no scheme.*http://127\.0\.0\.1:5000"),
        ("mlflow.example.org:5000/path", r"no scheme.*http://mlflow\.example\.org:5000/path"),
        ("htp://127.0.0.1:5000", "'htp'.*http://, https://, sqlite://"),
        ("sqllite:////tmp/mlflow.db", "'sqllite'.*http://, https://, sqlite://"),
        ("http:/127.0.0.1:5000", "http://HOST:PORT"),
        ("http://", "http://HOST:PORT"),
        ("sqlite://mlflow.db", "sqlite:////"),
        ("", "is empty"),
    ],
)
def test_an_address_that_cannot_be_is_refused_for_its_own_reason(uri: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        tracking_server.check_reachable(uri)
    assert "is a directory" not in str(refused.value)
    assert "\n" not in str(refused.value)


_PARTS = [
    "http",
    "https",
    "sqlite",
    "file",
    "postgresql",
    "databricks",
    "s3",
    "htp",
    "HTTP",
    ":",
    "/",
    "//",
    "///",
    "@",
]
_PARTS += [
    "127.0.0.1:1",
    "[::1",
    "[::1]:1",
    "u:p@",
    "%",
    "%2F",
    "?",
    "#",
    "=",
    " ",
    "\x00",
    "\n",
    "é",
    "..",
    "~",
    "mlflow.db",
]


@given(st.lists(st.sampled_from(_PARTS), max_size=6).map("".join) | st.text(max_size=12))
@example("http://127.0.0.1:1/é?#")
@example("http://[::1")
@example("sqlite:////\x00")
@settings(max_examples=150)
def test_every_address_is_taken_or_refused_in_one_sentence(uri: str) -> None:
    """No address of the parts reaches a machine: port 1 of this one refuses at once."""
    message = ""
    try:
        check_address(uri)
        ui_command(uri, "1", "a")
    except UserError as e:
        message = str(e)
    assert message.isprintable()


# -- what answers --------------------------------------------------------------------------------


THERE = {"experiment": {"experiment_id": "1", "name": "defendpp", "artifact_location": tempfile.gettempdir()}}


@contextmanager
def _answering(
    status: int, body: str, *, unless: str = "", kind: str = "text/html", reads: tuple[int, str] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Serve one answer to all requests, except an experiment to the Authorization ``unless``.

    Args:
        reads: another status and body for GET requests.
    """
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            seen.append(self.headers.get("Authorization") or "")
            good = unless and seen[-1] == unless
            code, text = reads if reads is not None and self.command == "GET" else (status, body)
            data = json.dumps(THERE).encode() if good else text.encode()
            self.send_response(200 if good else code)
            self.send_header("Content-Type", "application/json" if good else kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = answer

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()


HTML = "<!doctype html>\n<html><head><title>Router</title></head><body>Welcome</body></html>"


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, HTML, "no MLflow server"),
        (404, HTML, "no MLflow server"),
        (405, "", "no MLflow server"),
        (
            401,
            "You are not authenticated",
            "401.*MLFLOW_TRACKING_USERNAME.*MLFLOW_TRACKING_PASSWORD.*MLFLOW_TRACKING_TOKEN",
        ),
        (403, HTML, "403.*MLFLOW_TRACKING_USERNAME.*MLFLOW_TRACKING_PASSWORD.*MLFLOW_TRACKING_TOKEN"),
        (500, HTML, "500"),
    ],
)
def test_what_is_no_mlflow_server_is_called_so(status: int, body: str, message: str) -> None:
    with _answering(status, body) as (uri, _), pytest.raises(UserError, match=message) as refused:
        tracking_server.check_reachable(uri)
    assert "<" not in str(refused.value), "pages do not belong into a message"
    assert "\n" not in str(refused.value)
    assert "mlflow server --host" not in str(refused.value), "a server that answers need not be started"


def test_why_an_experiment_cannot_be_made_is_said() -> None:
    absent = json.dumps({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such experiment"})
    denied = json.dumps({"error_code": "PERMISSION_DENIED", "message": "Permission denied"})
    with (
        _answering(403, denied, kind="application/json", reads=(404, absent)) as (uri, _),
        pytest.raises(UserError, match=r"HTTP 403.*MLFLOW_TRACKING_USERNAME"),
    ):
        tracking_server.check_reachable(uri)


def test_a_store_of_artifacts_that_hangs_is_named(monkeypatch: pytest.MonkeyPatch, mute: str) -> None:
    monkeypatch.setattr(tracking_server, "REACH_SECONDS", 1.0)
    there = json.dumps({"experiment": {**THERE["experiment"], "artifact_location": f"{mute}/artifacts"}})
    with (
        _answering(200, there, kind="application/json") as (uri, _),
        pytest.raises(UserError, match=rf"(?s)artifacts .* go to {mute}/artifacts.*no answer within") as refused,
    ):
        tracking_server.check_reachable(uri)
    assert uri not in str(refused.value), "the server is not at fault"


@pytest.mark.parametrize(
    ("variables", "header"),
    [
        ({"USERNAME": "me", "PASSWORD": "secret"}, "Basic bWU6c2VjcmV0"),
        ({"TOKEN": "abc"}, "Bearer abc"),
    ],
)
def test_credentials_come_from_mlflows_variables(
    variables: dict[str, str], header: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    with _answering(401, "", unless=header) as (uri, seen):
        tracking_server.check_reachable(uri)
    assert set(seen) == {header}


# -- where artifacts go --------------------------------------------------------------------------


def test_artifacts_that_cannot_be_written_are_found_out_before_the_run(tmp_path: Path) -> None:
    client = MlflowClient(f"sqlite:///{_database(tmp_path)}")
    client.create_experiment("bucket", "s3://defendpp-test-bucket/artifacts")
    client.create_experiment("gone", str(tmp_path / "moved away" / "mlartifacts"))
    (tmp_path / "file").touch()
    client.create_experiment("file", str(tmp_path / "file" / "mlartifacts"))
    client.create_experiment("odd", "ftpx://example.org/a")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for name, reason in {
        "bucket": "boto3",
        "gone": "does not exist",
        "file": str(tmp_path / "file"),
        "odd": "ftpx",
    }.items():
        with pytest.raises(UserError, match=rf"(?s){name}.*{reason}.*--experiment-name") as refused:
            tracking_server.check_reachable(uri, name)
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "moved away").exists()
    client.create_experiment("fine", str(tmp_path / "artifacts of mine"))
    tracking_server.check_reachable(uri, "fine")
    assert not list((tmp_path / "artifacts of mine").rglob("*.txt")), "the test file was left behind"


def test_a_server_that_passes_no_artifacts_on_is_found_out_before_the_run(tmp_path: Path) -> None:
    database = f"sqlite:///{_database(tmp_path)}"
    MlflowClient(database).create_experiment("proxied", "mlflow-artifacts:/7")
    server = MlflowServer(database, tmp_path, "--no-serve-artifacts")
    server.start()
    try:
        with pytest.raises(UserError, match=r"proxied.*mlflow-artifacts:/7.*--serve-artifacts") as refused:
            tracking_server.check_reachable(server.uri, "proxied")
        assert "\n" not in str(refused.value)
    finally:
        server.kill()


# -- which MLflow --------------------------------------------------------------------------------


def test_mlflows_variables_are_obeyed_and_options_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Storage(tmp_path / "storage")
    lines: list[str] = []

    def publish(option: str = "", experiment: str = "") -> str:
        uri, name = tracking_server.choose(option, experiment, root, required=True, echo=lines.append)
        tracker = Tracker(uri, root / "runs/x", experiment=name, echo=lines.append)
        tracker.start("run", "x")
        assert tracker.outbox.wait(60)
        info = MlflowClient(tracker.uri).get_run(tracker.run_id() or "").info
        return MlflowClient(tracker.uri).get_experiment(info.experiment_id).name

    own, variable, option = (f"sqlite:///{tmp_path}/{name}/mlflow.db" for name in ("storage", "variable", "option"))
    assert publish() == "defendpp"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the variable")
    assert publish() == "of the variable"
    assert publish(option, "of the option") == "of the option"
    assert [line for line in lines if line.startswith("MLflow: ")] == [
        f"MLflow: {own}, experiment defendpp",
        f"MLflow: {variable} (from MLFLOW_TRACKING_URI), experiment of the variable",
        f"MLflow: {option}, experiment of the option",
    ]
    assert default_uri(root) == variable, "mlflow:... of --model is looked up there, too"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match="set MLFLOW_TRACKING_URI to another one"):
        publish()


def test_a_run_with_a_record_continues_without_mlflow(tmp_path: Path) -> None:
    root, lines = Storage(tmp_path), list[str]()
    dead = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match="connection refused"):
        tracking_server.choose(dead, "", root, required=True, echo=lines.append)
    assert tracking_server.choose(dead, "", root, required=False, echo=lines.append) == (dead, "defendpp")
    assert "connection refused" in lines[-1]
    assert "The run goes on" in lines[-1]
    with pytest.raises(ConfigError):  # a slip of the pen is none of the network
        tracking_server.choose("htp://127.0.0.1", "", root, required=False, echo=lines.append)


def test_where_a_run_is_published_is_no_part_of_its_address() -> None:
    recipe = Experiment(name="x")
    assert run_directory.run_address(recipe) == "runs/x-a67ab0a65280c75f"
    assert run_directory.run_address(
        replace(recipe, experiment_name="y", tracking_uri="http://h")
    ) == run_directory.run_address(recipe)
