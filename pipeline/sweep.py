"""``main.py sweep``: Ray Tune over a recipe's training, from a space of ``tune_spaces/`` to one configuration, tested once.

``sweep.json`` says what every trial gave, and is what a sweep goes on from: run again, the same command takes finished trials as
they are (search and early stopping are told their results) and goes on with the others, whose models have checkpoints.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import itertools
import math
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from components.attacks.spec import AttackSpec
from components.config import Experiment, TrainConfig
from components.errors import ConfigError, UserError
from components.evaluation.metrics import usual_eps
from components.fields import MAX_NAME_BYTES, check_name, content_hash, parse_spec, replace_typed, to_dict
from components.search_space import Point, Space, choose, ends, pareto_front
from pipeline import run, sweep_report, tuner
from pipeline.options import SweepOptions
from pipeline.recipes.suites import full_suite
from pipeline.reporting import records
from pipeline.runtime import cluster, provenance
from pipeline.runtime.console import say, stage
from pipeline.runtime.lease import Lease
from pipeline.runtime.storage import Storage
from pipeline.sweep.report import mlflow_sweep
from pipeline.sweep.trials.plan import Objective, SweepPlan, trial_config
from pipeline.sweep.trials.states import DIVERGED
from pipeline.tracking import server, tracker
from pipeline.tracking.uri import default_uri, ui_command
from pipeline.training import exports, gpu_memory, pretrained, train
from pipeline.trial import ENDED, FINISHED, new_entry


def load_space(options: SweepOptions) -> tuple[str, Space]:
    """The space of a file, with what the command line changes of it, and its name: the file's.

    Raises:
        ConfigError: no such file, one that is not Python, has no SPACE, or whose SPACE is not possible.
    """
    path = Path(options.space).expanduser()
    beside = cluster.ROOT / "tune_spaces" / f"{path.name.removesuffix('.py')}.py"
    if not path.is_file() and path.parent == Path() and beside.is_file():
        path = beside
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in beside.parent.glob("*.py") if p.stem != "__init__"))
        raise ConfigError.of(
            "--space", options.space, f"a file that exists (in a job: in its working directory), or one of {there}"
        )
    spec = importlib.util.spec_from_file_location(f"space_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError.of("--space", options.space, "a file whose name ends in .py")
    check_name("name of the --space file", path.stem)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError as e:
        raise ConfigError(f"{path}: {e}") from None
    except Exception as e:  # whatever the user's file does
        raise ConfigError(
            f"{path} is not a search space: {type(e).__name__}: {e}; mend the file, or copy one of tune_spaces/"
        ) from e
    space = getattr(module, "SPACE", None)
    if not isinstance(space, Space):
        raise ConfigError(f"{path} has no SPACE = Space(...); copy a file of tune_spaces/ (docs/sweeps.md)")
    changed: dict[str, Any] = {"trials": options.trials, "search": options.search}
    return path.stem, replace(space, **{k: v for k, v in changed.items() if v is not None})


@dataclass
class Sweep(run.Run):
    """A sweep on its storage. ``record`` is sweep.json; ``experiment`` the recipe as the command line left it."""

    space: Space
    options: SweepOptions
    model: str
    """Name, in the recipe, of the model that is varied."""
    base: TrainConfig
    lock: threading.RLock = field(default_factory=threading.RLock)
    """Guards the record, which the driver's threads share."""

    def save(self) -> None:
        with self.lock:
            if self.lease is not None:
                self.lease.check()
            self.storage.write_json("sweep.json", self.record)

    def publish(self) -> None:
        with self.lock:
            record = copy.deepcopy(self.record)
        # not under the lock: what is read from storage must not hold up the trials
        with self.tracker.excused("records"):
            mlflow_sweep.publish_sweep(self.tracker, record, self.storage, self.root)

    def final(self, point: Point) -> Experiment:
        """:func:`final_experiment`, as the options ask for it."""
        return final_experiment(
            self.experiment, self.model, point, "recipe" if self.options.evaluate == "recipe" else "full"
        )

    @property
    def trials(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.record["trials"]
        return found


def sweep_address(experiment: Experiment, name: str, space: Space, seed: int) -> str:
    """``sweeps/<recipe>-<space>-<hash>``. How many trials there are is not part of it: more of them go on with the same sweep."""
    said = {k: v for k, v in space.to_dict().items() if k != "trials"}
    return f"sweeps/{experiment.name}-{name}-{content_hash(run.run_address(experiment), said, seed)}"


def varied_model(experiment: Experiment, space: Space) -> tuple[str, TrainConfig]:
    """Name and config (of its first replicate) of the recipe's model that the trials are variants of.

    Raises:
        ConfigError: the recipe has no such model, it cannot be swept, or the space's attack does not fit the images.
    """
    AttackSpec.parse(space.attack).check_fits(experiment.data.channels, experiment.data.image_size)
    models = experiment.firsts()
    if space.model and space.model not in models:
        raise ConfigError.unknown("model of the recipe in space.model:", space.model, models)
    defended = [n for n, c in models.items() if c.defense == "defend++"] + [
        n for n, c in models.items() if c.defense != "none"
    ]
    name = space.model or (defended or list(models))[0]
    config = models[name]
    if not config.epochs:
        raise ConfigError.of(f"models[{name}].epochs", 0, "at least 1 in a sweep, which trains")
    if experiment.data.validation_fraction == 0:
        raise ConfigError.of(
            "data.validation_fraction", 0.0, "above 0 in a sweep: it chooses on validation images, never on test images"
        )
    return name, config


DRAWS = 100
"""Of a search whose points are not known beforehand, so many stand for them."""
MAX_COMBINATIONS = 256
NAMES_TARGETS = ("defense", "targets", "augment", "epochs")
"""Fields by which a model needs one kind of pyramids or another."""


def probe(experiment: Experiment, space: Space, base: TrainConfig, seed: int = 0) -> Experiment:
    """An experiment with a model for each trial (of TPE, whose points are not known: draws, and every combination of the ends of what
    is no real number), to check before anything is trained. Of trials that differ in real numbers alone there is one.

    Args:
        seed: of the search.

    Raises:
        ConfigError: a trial, or a value, that is not possible: names the parameters' values and what to do.
    """
    points = space.points(seed) or replace(space, search="random", trials=DRAWS).points(seed)
    for point in points:
        try:
            trial_config(experiment, base, point)
        except ConfigError as e:
            raise _refused(point, e) from None
    for name, domain in space.parameters.items():  # an end of a range is never drawn, but TPE may take it
        for value in ends(domain):
            _some_possible(experiment, base, [{**point, name: value} for point in points], {name: value})
    if space.search == "tpe":
        discrete = {name: ends(d) for name, d in space.parameters.items() if not isinstance(ends(d)[0], float)}
        if math.prod(len(values) for values in discrete.values()) > MAX_COMBINATIONS:
            discrete = {name: values for name, values in discrete.items() if name in NAMES_TARGETS}
        for values in itertools.product(*discrete.values()):
            point = {**points[0], **dict(zip(discrete, values, strict=True))}
            with contextlib.suppress(ConfigError):  # were it frequent, a draw had shown it; it is recorded as failed
                trial_config(experiment, base, point)
                points.append(point)
    models: dict[TrainConfig, str] = {_but_for_reals(base): "base"}
    for number, point in enumerate(points, 1):
        models.setdefault(_but_for_reals(trial_config(experiment, base, point)), _as_model(number, point))
    evaluation = replace(experiment.evaluation, threat_models=("white_box",), transfer_source="")
    return replace(
        experiment, train=base, models=tuple(models.values()), seeds=1, evaluation=evaluation, figures=(), paper=""
    )


def _some_possible(experiment: Experiment, base: TrainConfig, points: Sequence[Point], value: Point) -> None:
    for point in points:
        try:
            trial_config(experiment, base, point)
            return
        except ConfigError as e:
            error = e
    raise _refused(value, error)


def _refused(point: Point, error: ConfigError) -> ConfigError:
    said = " ".join(f"{name}={value}" for name, value in point.items())
    return ConfigError(
        f"a trial of the space with {said} cannot be run: {error}. Take that out of the space, or change the setting"
    )


def _but_for_reals(config: TrainConfig) -> TrainConfig:
    """Equal for models that differ in the seed or in real numbers alone, which build the same network of the same size."""
    reals = {f.name: f.default for f in fields(TrainConfig) if isinstance(f.default, float)}
    momentum = float(config.momentum > 0)  # without, there is no buffer for it
    return replace(config.canonical(), **{**reals, "momentum": momentum / 2, "seed": 0})


def _as_model(number: int, point: Point) -> str:
    """A model's text, whose name says what a person must know where it does not fit a GPU."""
    said = re.sub("[^a-zA-Z0-9_+.-]", "-", "".join(f"_{name}-{value}" for name, value in point.items()))
    return f"trial-{number}{said}"[:MAX_NAME_BYTES] + ":" + ",".join(f"{name}={value}" for name, value in point.items())


def final_experiment(
    experiment: Experiment, model: str, point: Point, suite: Literal["full", "recipe"] = "full"
) -> Experiment:
    """The evaluation of the chosen configuration beside an undefended network and its control.

    Args:
        model: the recipe's name of the model that was varied.
        suite: the attacks and threat models. full: :func:`pipeline.recipes.full_suite` at the budget of the recipe's first attack that
            has one, else at the field's usual one; recipe: the recipe's own. Images and chunks are the recipe's either way.
    """
    texts = {parse_spec(text)[0]: text for text in experiment.models}
    name, fields = parse_spec(texts[model])
    best = "best:" + ",".join(f"{k}={v}" for k, v in {**fields, **_as_text(point)}.items())
    models = experiment.firsts()
    chosen = replace_typed(models[name], _as_text(point), "space")
    undefended = [
        texts[n]
        for n, c in models.items()
        # a choice without a defense may be the recipe's own undefended model, which is then no control of it
        if c.defense == "none"
        and (c.arch, c.width) == (chosen.arch, chosen.width)
        and c.canonical() != chosen.canonical()
    ][:2]
    taken = {models[parse_spec(text)[0]].seed for text in undefended}
    taken |= {chosen.seed} if chosen.defense == "none" else set()
    free = (seed for seed in range(3) if seed not in taken)
    names = (n for n in ("no_defense", "control") if n not in map(_base, undefended))
    while len(undefended) < 2:
        undefended.append(f"{next(names)}:defense=none,seed={next(free)},arch={chosen.arch},width={chosen.width}")
    kept = {*map(_base, undefended), "best", "*"}
    evaluation = experiment.evaluation
    if suite == "full":
        evaluation = replace(
            evaluation, attacks=_full_suite(experiment), threat_models=("white_box", "black_box", "transfer")
        )
    threats = [t for t in evaluation.threat_models if ":" not in t or t.partition(":")[2] in kept]
    source = evaluation.transfer_source
    return replace(
        experiment,
        name=f"{experiment.name}-best",
        description=f"{experiment.name}: the configuration that a sweep chose, beside undefended and control",
        models=(*undefended, best),
        evaluation=replace(
            evaluation,
            threat_models=tuple(threats) or ("white_box",),
            transfer_source=source if source in kept else "",
        ),
        figures=(),
        paper="",
        scale="",
        allow_diverged=False,
    )


def _full_suite(experiment: Experiment) -> tuple[str, ...]:
    data = experiment.data
    specs = map(AttackSpec.parse, experiment.evaluation.attacks)
    given = next(((s.eps, str(s.norm)) for s in specs if s.eps is not None), None)
    eps, norm = given or (usual_eps(data.channels, data.image_size, "linf"), "linf")
    return full_suite(f"{eps}", norm, data.channels)


def _as_text(point: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in point.items()}


def _base(text: str) -> str:
    return parse_spec(text)[0]


def open_sweep(experiment: Experiment, options: SweepOptions) -> tuple[Sweep, Experiment]:
    """Check all that can be checked before compute is spent, join Ray, and open the sweep's record.

    Returns:
        The sweep, which is this process's from then on, and an experiment with a model for each trial (:func:`probe`).

    Raises:
        UserError: one of its kinds, naming what, where and what to do.
    """
    name, space = load_space(options)
    model, base = varied_model(experiment, space)
    probed = probe(experiment, space, base, options.seed)
    root = Storage(experiment.storage)
    root.check_writable()
    storage = root / sweep_address(experiment, name, space, options.seed)
    if options.resume and not storage.exists("sweep.json"):
        raise UserError(
            f"there is no sweep at {storage.uri} to go on with: leave out --resume, or give the settings that it has"
        )
    Lease(storage).check_free()
    uri, experiment_name = server.choose(
        experiment.tracking_uri,
        experiment.experiment_name,
        root,
        required=not storage.exists("sweep.json"),
        echo=say,
    )
    sweep = Sweep(
        experiment=experiment,
        root=root,
        storage=storage,
        record={},
        tracker=tracker.Tracker(uri, storage, experiment=experiment_name, echo=say),
        space=space,
        options=options,
        model=model,
        base=base,
    )
    for point in space.points(options.seed) or [{}]:
        sweep.final(point)
    run.check_and_join(experiment, probed, sweep.shapes, root)
    gpu_memory.check_gpu_memory(probed, sweep.shapes)
    sweep.lease = Lease(storage).acquire()  # before its record is read
    try:
        _open_record(sweep, name)
    except BaseException:
        sweep.lease.release()
        raise
    return sweep, probed


def _open_record(sweep: Sweep, space_name: str) -> None:
    storage, experiment = sweep.storage, sweep.experiment
    record = records.read_record(storage, "sweep.json") if storage.exists("sweep.json") else None
    say(f"{'continuing' if record else 'new sweep at'} {storage.uri}")
    if record is not None:
        sweep.record = record
    else:
        sweep.record = {
            "schema": records.SCHEMA,
            "name": experiment.name,
            "space_name": space_name,
            "seed": sweep.options.seed,
            "model": sweep.model,
            "base": to_dict(sweep.base),
            "experiment": run.recorded(experiment),
            "created": run._now(),
            "data": None,
            "trials": [],
            "references": {},
            "front": [],
            "choice": None,
            "evaluation": None,
            "stages": {},
        }
    sweep.record.setdefault("earlier_evaluations", [])
    sweep.record |= {"space": sweep.space.to_dict(), "finished": None, **provenance.environment()}
    sweep.save()


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
        sets = run.make_pyramids(replace(sweep, experiment=probed))
        plan = make_plan(sweep, sets)
        jobs = train.jobs_of(beside, sweep.shapes, sets.training, sweep.root)
        references = [job for job in jobs if job.name in missing]
        if pending or references:
            with sweep.timed("trials"):
                tuner.run_trials(sweep, plan, pending, references)
        _conclude(sweep)
        if sweep.options.evaluate != "none":
            _evaluate(sweep)
        sweep.record["finished"] = run._now()
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


def make_plan(sweep: Sweep, sets: run.Sets) -> SweepPlan:
    """What all trials have in common. Pretrained weights are copied to the storage, where every worker reaches them."""
    experiment = sweep.experiment
    uri = experiment.tracking_uri or default_uri(sweep.root)
    weights = pretrained.fetch(sweep.base, sweep.root, uri) if sweep.base.pretrained else ""
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
    return beside, [n for n in beside.variants() if known.get(n, {}).get("state") not in (FINISHED, DIVERGED)]


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
    grace = tuner.grace_of(sweep)
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
            "rule": sweep_report.rule(sweep.space.clean_tolerance),
        }
        final = sweep.final(chosen["parameters"])
        sweep.storage.write_json("best.json", {"schema": records.SCHEMA, "experiment": run.recorded(final)})
        sweep.save()
    say(sweep_report.conclusion(sweep.record))
    _report(sweep)
    _register(sweep, chosen)


def _report(sweep: Sweep) -> None:
    sweep_report.build(sweep.record, sweep.storage)
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
            run._example(data.channels, data.image_size),
            metadata={"path": f"{sweep.root.uri}/{path}", "parameters": chosen["parameters"]},
            **mlflow_sweep.choice_version(sweep.record, sweep.storage),
        )


def _evaluate(sweep: Sweep) -> None:
    """The chosen configuration on test images, as an ordinary run: once, unless the choice or its attacks became others."""
    final = sweep.final(sweep.record["choice"]["parameters"])
    address = run.run_address(final)
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
