"""Run from end to end: the stages in order, with the record on storage and in MLflow after each.

The results of a stage lie under the hash of everything that they follow from. A finished stage is
therefore taken as it is, and a run that was stopped at any point continues there.
"""

from __future__ import annotations

from typing import Literal

from components.config import Experiment
from pipeline import stages
from pipeline.records import RunRecord
from pipeline.reporting import terminal
from pipeline.reporting.tracked import links, mlflow_run
from pipeline.run_directory import Run, open_run
from pipeline.runtime.console import say, stage
from pipeline.runtime.storage import Storage
from pipeline.runtime.stored_record import now
from pipeline.tracking.system_metrics import SystemMetrics


def finish(run: Run) -> None:
    """Publish the rest, then show the table, the report's path and MLflow's command."""
    with stage("MLflow"):
        run.publish()
        run.tracker.conclude()
    terminal.print_table(run.storage)
    say(f"report: {run.storage.uri}/report/report.html")
    for line in links.of_run(run.tracker, RunRecord.from_json(run.record)):
        say(line)


def execute(command: str, experiment: Experiment, *, needs_tracking: bool = True) -> Storage:
    """Run one stage (``command`` is pyramids, train, attack or report), or all of them (run).

    Returns:
        The directory of the run.
    """
    needs: dict[str, Literal["shards", "models"]] = {"train": "shards", "attack": "models"}
    run = open_run(
        experiment,
        records_only=command == "report",
        needs=needs.get(command, ""),
        will_train=command in ("run", "train"),
        needs_tracking=needs_tracking,
    )
    mlflow_run.start_run(run.tracker, RunRecord.from_json(run.record), run.root)
    complete = False
    usage = SystemMetrics(run.tracker, run.record["created"])
    try:
        if command == "report":
            stages.make_report(run)
            complete = True
            finish(run)
            return run.storage
        usage.start()
        if command in ("run", "pyramids"):
            sets = stages.make_pyramids(experiment, run.stored, run.root)
            if command == "pyramids":
                stages.finish_stage(run)
                return run.storage
        else:
            sets = stages.existing_pyramids(run.record["data"], run.root)
        models = stages.train_models(run, sets) if command in ("run", "train") else stages.trained_models(run)
        if command == "train":
            stages.finish_stage(run)
            return run.storage
        stages.attack_models(run, models, sets.test)
        run.record["finished"] = now()
        run.stored.save()
        stages.make_report(run)
        complete = True
        finish(run)
        return run.storage
    except BaseException as e:
        # The results are complete even if the report cannot be written.
        complete = complete or (isinstance(e, Exception) and bool(run.record["finished"]))
        run.tracker.stop_for(e, complete=complete)
        say(f"stopped; all that was computed is kept at {run.root.uri}: the same command continues")
        raise
    finally:
        usage.stop()
        run.stored.release()
