"""``main.py sweep``: Ray Tune over a recipe's training, from a space of ``tune_spaces/`` to one configuration, tested once.

``sweep.json`` says what every trial gave, and is what a sweep goes on from: run again, the same command takes finished trials as
they are (search and early stopping are told their results) and goes on with the others, whose models have checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from components.config import Experiment
from components.errors import UserError
from components.fields import parse_spec
from components.search_space import choose, pareto_front
from pipeline import run, run_directory, stages
from pipeline.records import SCHEMA
from pipeline.runtime import cluster
from pipeline.runtime.console import say, stage
from pipeline.sweep.final_experiment import _base
from pipeline.sweep.options import SweepOptions
from pipeline.sweep.report import html, mlflow_sweep, summary
from pipeline.sweep.search import early_stopping, tuner
from pipeline.sweep.sweep_directory import Sweep, open_sweep
from pipeline.sweep.trials.plan import Objective, SweepPlan
from pipeline.sweep.trials.states import DIVERGED, ENDED, FINISHED
from pipeline.sweep.trials.trial import new_entry
from pipeline.tracking.uri import ui_command
from pipeline.training import exports, pretrained, train


def execute(experiment: Experiment, options: SweepOptions) -> None:
    """Run a sweep from its trials to the evaluation of its choice, or what is left of it."""
    sweep, probed = open_sweep(experiment, options)
    try:
        mlflow_sweep.start_sweep(sweep.tracker, sweep.record)
        pending = _pending(sweep)
        beside, missing = _references(sweep)
        runs = tuner.runs_at_once(sweep, len(pending) + len(missing))
        for line in _announced(sweep, len(pending), runs):
            say(line)
        # one set of pyramids serves all trials: as many kinds of targets as the trials have
        sets = stages.make_pyramids(replace(sweep, experiment=probed))
        plan = make_plan(sweep, sets)
        jobs = train.prepare_jobs(beside, sweep.shapes, sets.training, sweep.root, sweep.tracker.uri)
        references = [job for job in jobs if job.name in missing]
        if pending or references:
            with sweep.timed("trials"):
                tuner.run_trials(sweep, plan, pending, references)
        _conclude(sweep)
        if sweep.options.evaluate != "none":
            _evaluate(sweep)
        sweep.record["finished"] = run_directory.now()
        sweep.save()
        with stage("report"):
            _report(sweep)
            sweep.tracker.conclude()
        say(f"sweep: {sweep.storage.uri}")
        say(f"MLflow: {ui_command(sweep.tracker.uri, sweep.tracker.experiment_id, sweep.tracker.run_id())}")
    except BaseException as e:
        sweep.tracker.stop_for(e, complete=bool(sweep.record.get("finished")))
        say(f"stopped; all that was computed is kept at {sweep.root.uri}: the same command continues")
        raise
    finally:
        if sweep.lease is not None:
            sweep.lease.release()


def make_plan(sweep: Sweep, sets: stages.ShardSets) -> SweepPlan:
    """What all trials have in common. Pretrained weights are copied to the storage, where every worker reaches them."""
    experiment = sweep.experiment
    weights = pretrained.fetch(sweep.base, sweep.root, sweep.tracker.uri) if sweep.base.pretrained else ""
    return SweepPlan(
        root=sweep.root.full_uri,
        experiment=experiment,
        base=sweep.base,
        shapes=sweep.shapes,
        data=sets.training,
        weights=weights,
        objective=Objective(attack=sweep.space.attack, images=sweep.space.images, validation=sets.training.validation),
    )


def _references(sweep: Sweep) -> tuple[Experiment, list[str]]:
    """What the trials are seen beside: undefended, control, and the model as the recipe has it; and the names of those models that
    are not measured yet."""
    final = sweep.final({})
    texts = {parse_spec(t)[0]: t for t in (*sweep.experiment.models, *final.models)}
    names = (*(_base(t) for t in final.models[:2]), sweep.model)
    beside = replace(final, models=tuple(texts[n] for n in dict.fromkeys(names)))
    known = sweep.record["references"]
    return beside, [n for n in beside.model_configs() if known.get(n, {}).get("state") not in (FINISHED, DIVERGED)]


def _pending(sweep: Sweep) -> list[dict[str, Any]]:
    """The trials that are to be run (again), as entries of the record; TPE's new ones are not known yet and come as {}."""
    trials = sweep.trials
    if sweep.space.search == "tpe":
        new: list[dict[str, Any]] = [{}] * max(0, sweep.space.count - len(trials))
    else:
        points = sweep.space.points(sweep.options.seed)
        trials += [new_entry(i + 1, point) for i, point in enumerate(points) if i >= len(trials)]
        trials, new = trials[: len(points)], []
    return [t for t in trials if t["state"] not in ENDED] + new


def _announced(sweep: Sweep, left: int, runs: int) -> list[str]:
    """What a person is told before anything is computed.

    Args:
        left: trials to be run. runs: how many models are trained at once.
    """
    space, e = sweep.space, sweep.experiment
    done = sum(t["state"] in ENDED for t in sweep.trials)
    over = "; ".join(f"{name}: {domain}" for name, domain in space.parameters.items())
    few = done + left < space.trials
    asked = f" ({space.trials} were asked for: the space has no more)" if few else ""
    grace = early_stopping.grace_of(sweep)
    stopped = f", the worse stopped early from epoch {grace} on" if grace else ""
    if space.asha and not grace:
        stopped = f", none stopped early (asha.grace_epochs={space.asha.grace_epochs})"
    many = f"{e.seeds} seeds each, " if e.seeds > 1 else ""
    s = e.scaling
    each = " and ".join(f"{v:g} {k}" for k, v in cluster.train_bundle(s).items())
    tested = {"none": "not tested on test images", "recipe": "tested once on test images, under the recipe's attacks"}
    return [
        f"{done + left} trials{asked}{f', {done} done already' if done else ''}, {space.search} search over {over}",
        f"  each: model {sweep.model!r} of {e.name}, {many}{sweep.base.epochs} epochs{stopped}",
        f"  judged on validation images: clean accuracy, and under white-box {space.attack} on up to {space.images} of them",
        f"  the choice: {tested.get(sweep.options.evaluate, 'tested once on test images, under the full suite of attacks')}",
        f"  at once: {runs} model{'s' if runs > 1 else ''}, each on {s.workers} worker(s) of {each}",
    ]


# -- what came of it -------------------------------------------------------------------------------------------------------


def _conclude(sweep: Sweep) -> None:
    """Front and choice, and the chosen configuration as a recipe.

    Raises:
        UserError: no trial was trained to its end.
    """
    ended = [t for t in sweep.trials if t["state"] == FINISHED]
    if not ended:
        reasons = "; ".join(dict.fromkeys(t["reason"] for t in sweep.trials if t["reason"])) or "none was run"
        raise UserError(f"no trial of {sweep.storage.uri} was trained to its end: {reasons}")
    scores = [(t["epochs"][-1]["clean"], t["epochs"][-1]["robust"]) for t in ended]
    chosen = ended[choose(scores, sweep.space.clean_tolerance)]
    with sweep.lock:
        before = sweep.record["choice"]
        if before and before["parameters"] != chosen["parameters"]:
            _put_away_evaluation(sweep)
        sweep.record["front"] = [ended[i]["number"] for i in pareto_front(scores)]
        sweep.record["choice"] = {
            "trial": chosen["number"],
            "parameters": chosen["parameters"],
            "clean": chosen["epochs"][-1]["clean"],
            "robust": chosen["epochs"][-1]["robust"],
            "rule": summary.rule(sweep.space.clean_tolerance),
        }
        final = sweep.final(chosen["parameters"])
        sweep.storage.write_json("best.json", {"schema": SCHEMA, "experiment": run_directory.recorded(final)})
        sweep.save()
    say(summary.conclusion(sweep.record))
    _report(sweep)
    _register(sweep, chosen)


def _report(sweep: Sweep) -> None:
    html.build(sweep.record, sweep.storage)
    sweep.publish()


def _register(sweep: Sweep, chosen: Mapping[str, Any]) -> None:
    """The chosen model (of several seeds the first) in MLflow's registry (:func:`publish.choice_version`)."""
    path = chosen["models"][0]["path"]
    data = sweep.experiment.data
    with sweep.tracker.excused("registration of the chosen model"):
        sweep.tracker.register_model(
            mlflow_sweep.trial_alias(chosen),
            exports.load_classifier(
                sweep.root.join(path), trusted=str(chosen["parameters"].get("arch", sweep.base.arch))
            ),
            stages.example_input(data.channels, data.image_size),
            metadata={"path": f"{sweep.root.uri}/{path}", "parameters": chosen["parameters"]},
            **mlflow_sweep.choice_version(sweep.record, sweep.storage),
        )


def _evaluate(sweep: Sweep) -> None:
    """The chosen configuration on test images, as an ordinary run: once, unless the choice or its attacks became others."""
    final = sweep.final(sweep.record["choice"]["parameters"])
    address = run_directory.run_address(final)
    with sweep.lock:
        if sweep.record["evaluation"] != address:
            _put_away_evaluation(sweep)
            sweep.record["evaluation"] = address
        earlier = [e for e in sweep.record["earlier_evaluations"] if e["evaluation"] != address]
        sweep.record["earlier_evaluations"] = earlier
        sweep.save()
    again = f" (these images have been attacked before, for {len(earlier)} earlier evaluation(s))" if earlier else ""
    say(f"evaluation of the choice on test images, once{again}: {sweep.root.uri}/{address}")
    with sweep.timed("evaluation"):
        # what is published waits for a tracking server that is out of reach just now
        run.execute("run", final, needs_tracking=False)


def _put_away_evaluation(sweep: Sweep) -> None:
    """That test images were used before stays in the record, with the choice they were used for."""
    record = sweep.record
    if record["evaluation"]:
        choice = {k: record["choice"][k] for k in ("trial", "parameters")}
        date = datetime.now(UTC).isoformat(timespec="seconds")
        record["earlier_evaluations"].append({"evaluation": record["evaluation"], "date": date, **choice})
        record["evaluation"] = None
