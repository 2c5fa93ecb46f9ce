"""A sweep from end to end: from a space of ``tune_spaces/`` to one configuration, tested once.

Ray Tune searches over a recipe's training. ``sweep.json`` holds the result of every trial. Run
again, the same command takes the trials that are over from it (search and early stopping learn
their results) and continues the others from the checkpoints of their models.
"""

from __future__ import annotations

from dataclasses import replace

from components.config import Experiment
from components.fields import parse_spec
from pipeline import stages
from pipeline.reporting.tracked import links
from pipeline.run_directory import shapes_of
from pipeline.runtime import cluster
from pipeline.runtime.console import say, stage
from pipeline.runtime.storage import Storage
from pipeline.runtime.stored_record import now
from pipeline.sweep.conclusion import conclude, evaluate_choice, write_report
from pipeline.sweep.options import SweepOptions
from pipeline.sweep.report import mlflow_sweep
from pipeline.sweep.search import early_stopping, tuner
from pipeline.sweep.sweep_directory import Sweep, open_sweep
from pipeline.sweep.trials.entry import TrialEntry
from pipeline.sweep.trials.plan import Objective, SweepPlan
from pipeline.sweep.trials.states import DIVERGED, FINISHED
from pipeline.tracking.system_metrics import SystemMetrics
from pipeline.training import pretrained, train


def execute(experiment: Experiment, options: SweepOptions) -> Storage:
    """Run a sweep, or what is left of it, from its trials to the evaluation of its choice.

    Returns:
        The directory of the sweep.
    """
    sweep, preflight = open_sweep(experiment, options)
    usage = SystemMetrics(sweep.tracker, sweep.record["created"])
    try:
        mlflow_sweep.start_sweep(sweep.tracker, sweep.record, sweep.root)
        usage.start()
        pending, proposals = pending_trials(sweep)
        beside, missing = references(sweep)
        left = len(pending) + proposals
        runs = tuner.runs_at_once(sweep, left + len(missing))
        for line in announcement(sweep, left, runs):
            say(line)
        # One set of pyramids serves all trials: preflight has every kind of targets that they read.
        sets = stages.make_pyramids(preflight, sweep.stored, sweep.root)
        plan = make_plan(sweep, sets)
        jobs = train.prepare_jobs(beside, plan.shapes, sets.training, sweep.root, sweep.tracker.uri)
        reference_jobs = [job for job in jobs if job.name in missing]
        if left or reference_jobs:
            with sweep.stored.timed("trials"):
                tuner.run_trials(sweep, plan, pending, proposals, reference_jobs)
        conclude(sweep)
        if sweep.options.evaluate != "none":
            evaluate_choice(sweep)
        sweep.record["finished"] = now()
        sweep.stored.save()
        with stage("report"):
            write_report(sweep)
            sweep.tracker.conclude()
        say(f"report of the sweep: {sweep.storage.uri}/report/report.html")
        finished = [mlflow_sweep.trial_alias(trial) for trial in sweep.trials if trial.state == FINISHED]
        for line in links.lines(sweep.tracker, "trials", finished):
            say(line)
        return sweep.storage
    except BaseException as e:
        sweep.tracker.stop_for(e, complete=bool(sweep.record.get("finished")))
        say(f"stopped; all that was computed is kept at {sweep.root.uri}: the same command continues")
        raise
    finally:
        usage.stop()
        sweep.stored.release()


def make_plan(sweep: Sweep, sets: stages.ShardSets) -> SweepPlan:
    """Return what all trials share. Copies pretrained weights to the storage for the workers."""
    validation = sets.training.validation
    return SweepPlan(
        root=sweep.root.full_uri,
        experiment=sweep.experiment,
        base=sweep.base,
        shapes=shapes_of(sweep.experiment),
        data=sets.training,
        weights=pretrained.fetch(sweep.base, sweep.root, sweep.tracker.uri) if sweep.base.pretrained else "",
        objective=Objective(attack=sweep.space.attack, images=sweep.space.images, validation=validation),
    )


def references(sweep: Sweep) -> tuple[Experiment, list[str]]:
    """Return the models to compare the trials with, and the names of those not measured yet.

    They are an undefended network, its control, and the varied model as the recipe has it.
    """
    final = sweep.final({})
    texts = {parse_spec(t)[0]: t for t in (*sweep.experiment.models, *final.models)}
    names = (*(parse_spec(t)[0] for t in final.models[:2]), sweep.model)
    beside = replace(final, models=tuple(texts[n] for n in dict.fromkeys(names)))
    measured = sweep.record["references"]
    return beside, [n for n in beside.model_configs() if measured.get(n, {}).get("state") not in (FINISHED, DIVERGED)]


def pending_trials(sweep: Sweep) -> tuple[list[TrialEntry], int]:
    """Return the trials to run (again), and how many more TPE is to propose.

    Points of the other searches are known beforehand: those that the record lacks are added to it.
    """
    trials = sweep.trials
    if sweep.space.search == "tpe":
        return [t for t in trials if not t.is_settled], max(0, sweep.space.count - len(trials))
    points = sweep.space.points(sweep.options.seed)
    sweep.put(*(TrialEntry(number=i, parameters=p) for i, p in enumerate(points, 1) if i > len(trials)))
    sweep.forget_pending(len(points))  # An earlier command asked for more trials, and was stopped.
    return [t for t in sweep.trials[: len(points)] if not t.is_settled], 0


def announcement(sweep: Sweep, left: int, runs: int) -> list[str]:
    """Return the lines that say what the sweep will do, before anything is computed.

    Args:
        left: trials to run.
        runs: how many models are trained at once.
    """
    space, experiment, scaling = sweep.space, sweep.experiment, sweep.experiment.scaling
    done = sum(trial.is_settled for trial in sweep.trials)
    domains = "; ".join(f"{name}: {domain}" for name, domain in space.parameters.items())
    fewer = f" ({space.trials} were asked for: the space has no more)" if done + left < space.trials else ""
    grace = early_stopping.grace_of(sweep)
    stopping = f", the worse stopped early from epoch {grace} on" if grace else ""
    if space.asha and not grace:
        stopping = f", none stopped early (asha.grace_epochs={space.asha.grace_epochs})"
    seeds = f"{experiment.seeds} seeds each, " if experiment.seeds > 1 else ""
    resources = " and ".join(f"{v:g} {k}" for k, v in cluster.train_bundle(scaling).items())
    tests = {
        "none": "not tested on test images",
        "recipe": "tested once on test images, under the recipe's attacks",
        "full": "tested once on test images, under the full suite of attacks",
    }
    return [
        f"{done + left} trials{fewer}{f', {done} done already' if done else ''}, {space.search} search over {domains}",
        f"  each: model {sweep.model!r} of {experiment.name}, {seeds}{sweep.base.epochs} epochs{stopping}",
        "  judged on validation images: clean accuracy, and accuracy under white-box "
        f"{space.attack} on up to {space.images} of them",
        f"  the choice: {tests[sweep.options.evaluate]}",
        f"  at once: {runs} model{'s' if runs > 1 else ''}, each on {scaling.workers} worker(s) of {resources}",
    ]
