"""Conclusion of a sweep: front, choice, report, and the test of the choice on test images."""

from __future__ import annotations

from components.errors import UserError
from components.search_space import choose, pareto_front
from pipeline import run
from pipeline.records import SCHEMA, run_address
from pipeline.run_directory import recorded
from pipeline.runtime.console import say
from pipeline.runtime.stored_record import now
from pipeline.sweep.report import html, summary
from pipeline.sweep.sweep_directory import Sweep


def conclude(sweep: Sweep) -> None:
    """Put front and choice into the record, write the choice as a recipe, and report.

    Raises:
        UserError: no trial was trained to its end.
    """
    finished = summary.finished(sweep.record)
    if not finished:
        reasons = "; ".join(dict.fromkeys(t.reason for t in sweep.trials if t.reason)) or "none was run"
        raise UserError(f"no trial of {sweep.storage.uri} was trained to its end: {reasons}")
    scores = [(trial.last.clean, trial.last.robust) for trial in finished]
    chosen = finished[choose(scores, sweep.space.clean_tolerance)]
    with sweep.stored.lock:
        before = sweep.record["choice"]
        if before and before["parameters"] != chosen.parameters:
            _put_away_evaluation(sweep)
        sweep.record["front"] = [finished[i].number for i in pareto_front(scores)]
        sweep.record["choice"] = {
            "trial": chosen.number,
            "parameters": chosen.parameters,
            "clean": chosen.last.clean,
            "robust": chosen.last.robust,
            "rule": summary.rule(sweep.space.clean_tolerance),
        }
        final = sweep.final(chosen.parameters)
        sweep.storage.write_json("best.json", {"schema": SCHEMA, "experiment": recorded(final)})
        sweep.stored.save()
    say(summary.conclusion(sweep.record))
    write_report(sweep)


def write_report(sweep: Sweep) -> None:
    """Write report and study of a sweep that has a choice, and publish the record."""
    html.build(sweep.record, sweep.storage)
    from pipeline.sweep.search import study  # Importing Optuna takes a second.

    sweep.storage.write_bytes(study.FILE, study.study_file(sweep.record))
    sweep.publish()


def evaluate_choice(sweep: Sweep) -> None:
    """Test the chosen configuration on test images as an ordinary run.

    It happens once, unless the choice or its attacks have changed.
    """
    final = sweep.final(sweep.record["choice"]["parameters"])
    address = run_address(final)
    with sweep.stored.lock:
        if sweep.record["evaluation"] != address:
            _put_away_evaluation(sweep)
            sweep.record["evaluation"] = address
        earlier = [e for e in sweep.record["earlier_evaluations"] if e["evaluation"] != address]
        sweep.record["earlier_evaluations"] = earlier
        sweep.stored.save()
    again = f" (these images have been attacked before, for {len(earlier)} earlier evaluation(s))" if earlier else ""
    say(f"evaluation of the choice on test images, once{again}: {sweep.root.uri}/{address}")
    with sweep.stored.timed("evaluation"):
        # The trials' compute is spent: what there is to publish waits until MLflow answers.
        run.execute("run", final, needs_tracking=False)


def _put_away_evaluation(sweep: Sweep) -> None:
    """Keep in the record that test images were used before, and for which choice."""
    record = sweep.record
    if record["evaluation"]:
        choice = {k: record["choice"][k] for k in ("trial", "parameters")}
        record["earlier_evaluations"].append({"evaluation": record["evaluation"], "date": now(), **choice})
        record["evaluation"] = None
