"""Publication of finished records in MLflow, in today's form or to another server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from components.errors import ConfigError, UserError
from pipeline.cli.options import Parser
from pipeline.program import program

USAGE = """\
usage: {program} report --republish DIR [DIR ...] [--tracking-uri URI]
       [--experiment-name NAME] [--register]

Publishes the records of finished runs and sweeps in MLflow, in the form of this version. Nothing is
computed.

  DIR                a directory STORAGE/runs/NAME-HASH or STORAGE/sweeps/NAME-HASH

options:
  --tracking-uri     MLflow server or database (default: as for a run on that storage)
  --experiment-name  MLflow experiment (default: as for a run on that storage)
  --register         make the models versions of registered models too

What was published from DIR to that MLflow before is replaced: once the new runs are complete, the
earlier ones are deleted. MLflow keeps deleted runs, and its UI restores them.
"""


def republish(arguments: Sequence[str]) -> None:
    """Publish the records of directories anew.

    Raises:
        ConfigError: the command line is wrong.
        UserError: a directory has no records, another process works on it, or MLflow cannot be used.
    """
    if {"-h", "--help"} & set(arguments):
        print(USAGE.format(program=program()), end="")
        return
    parser = Parser("report --republish")
    parser.add_argument("--republish", nargs="+", metavar="DIR", required=True)
    parser.add_argument("--tracking-uri", default="")
    parser.add_argument("--experiment-name", default="")
    parser.add_argument("--register", action="store_true")
    options, rest = parser.parse_known_args(list(arguments))
    if rest:
        raise ConfigError(f"{rest[0]} is no option of report --republish, which takes directories; see --help")
    complete = [
        _republish(directory, options.tracking_uri, options.experiment_name, options.register)
        for directory in options.republish
    ]
    if not all(complete):
        raise UserError("not everything was published: run the same command again once MLflow answers")


def _republish(directory: str, tracking_uri: str, experiment_name: str, register: bool) -> bool:
    """Publish the records of one directory anew. Return whether all is published."""
    from pipeline.reporting.tracked import mlflow_run
    from pipeline.runtime.console import say
    from pipeline.runtime.lease import Lease
    from pipeline.runtime.storage import Storage
    from pipeline.sweep.report import mlflow_sweep
    from pipeline.tracking import server
    from pipeline.tracking.tracker import Tracker

    storage = Storage(directory)
    place = PurePosixPath(storage.uri).parent.name
    files = {"runs": "run.json", "sweeps": "sweep.json"}
    if place not in files or not storage.exists(files[place]):
        raise UserError(
            f"{storage.uri} has no records of a run or sweep: give STORAGE/runs/NAME-HASH or STORAGE/sweeps/NAME-HASH"
        )
    root = storage.parent.parent
    lease = Lease(storage).acquire()
    try:
        uri, experiment = server.choose(tracking_uri, experiment_name, root, required=True, echo=say)
        tracker = Tracker(uri, storage, experiment=experiment, echo=say)
        tracker.replace_runs()
        try:
            if place == "runs":
                mlflow_run.publish_run(tracker, storage, root, register=register)
            else:
                record = storage.read_json("sweep.json")
                mlflow_sweep.publish_sweep(tracker, record, storage, root, register=register)
            return tracker.flush()
        except BaseException as error:
            tracker.stop_for(error, complete=False)
            raise
    finally:
        lease.release()
