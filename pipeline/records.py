"""What the records of a run say: reading them, and rows for tables, each number with its threat model and attack.

The same records give the same rows (docs/records.md); nothing here draws or writes.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.attacks.spec import AttackSpec
from components.config import Experiment, TrainConfig
from components.errors import ConfigError, DataError
from components.evaluation.statistics import mcnemar, wilson_interval
from components.fields import parse_spec, to_dict
from pipeline import comparison, plots
from pipeline.runtime.storage import Storage

SCHEMA = 1
"""Of ``run.json``, ``sweep.json`` and ``best.json``."""
PHASES = ("joint", "autoencoder", "classifier", "adversarial", "reformer")
THREATS = {
    "clean": "clean",
    "random": "random (control)",
    "white_box": "white-box",
    "black_box": "black-box",
    "grey_box": "grey-box",
    "transfer": "transfer",
}
"""Threat models in the order of a table, as they are written for people; ``transfer:NAME`` comes after them."""
ROLES = {
    "source": "undefended, source of transfer",
    "control": "control: undefended, another seed",
    "defended": "defended",
    "given": "given, not trained here",
}

UNTRUSTED = "†"
"""Behind a number of an attack that failed its active test."""

Row = dict[str, Any]


# -- reading ---------------------------------------------------------------------------------------------------------------


def read_record(directory: Storage, file: str) -> dict[str, Any]:
    """Read ``run.json`` or ``sweep.json``.

    Raises:
        DataError: it is of another schema. StorageError: it cannot be read.
    """
    record = directory.read_json(file)
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise DataError(f"{directory.uri}/{file} has schema {schema!r}; this version reads schema {SCHEMA}")
    return dict(record)


def read_run(run: Storage) -> dict[str, Any]:
    """``run.json`` with what a run that is not complete lacks filled in empty.

    Raises:
        DataError: it is missing, of another schema, or lacks what every run has. StorageError: it cannot be read.
    """
    if not run.exists("run.json"):
        raise DataError(f"{run.uri} is not the directory of a run: it has no run.json. Runs lie under STORAGE/runs/")
    record = read_record(run, "run.json")
    for key in ("name", "experiment"):
        if key not in record:
            raise DataError(f"{run.uri}/run.json lacks {key!r}; run the same command again to write it anew")
    empty: dict[str, Any] = {"models": {}, "evaluations": [], "stages": {}, "data": {}, "git": {}, "hardware": {}}
    whole = {**empty, "versions": {}, "command": "", "created": "", "finished": None}
    whole.update({k: v for k, v in record.items() if v is not None})
    # JSON objects are stored by name; people read them in the order in which things happen
    whole["stages"] = in_order(whole["stages"], ("pyramids", "train", "attack", "report"))
    whole["data"] = {
        **whole["data"],
        "rows": in_order(whole["data"].get("rows") or {}, ("train", "validation", "test")),
    }
    whole["models"] = in_order(whole["models"], tuple(roles(whole)))
    for i, evaluation in enumerate(whole["evaluations"]):
        for key in ("model", "threat_model", "attack", "n", "metrics"):
            if key not in evaluation:
                raise DataError(f"{run.uri}/run.json: evaluation {i} lacks {key!r}; run the same command again")
        for key in ("accuracy", "accuracy_low", "accuracy_high"):
            if not isinstance(evaluation["metrics"].get(key), int | float):
                raise DataError(f"{run.uri}/run.json: evaluation {i} lacks metrics.{key}; run the same command again")
    return whole


def in_order(values: Mapping[str, Any], first: Sequence[str]) -> dict[str, Any]:
    return {name: values[name] for name in dict.fromkeys((*first, *values)) if name in values}


def history_files(root: Storage, model: Mapping[str, Any]) -> list[str]:
    """Names, below the storage, of a model's epoch records, first epoch first."""
    directory = f"{model['path']}/history"
    return [f"{directory}/{name}" for name in root.list(directory)]


def read_epoch(root: Storage, file: str) -> dict[str, Any]:
    """One epoch record. Raises DataError if it is not one, StorageError if it cannot be read."""
    record = root.read_json(file)
    try:
        if (
            record["phase"] in PHASES
            and int(record["epoch"]) >= 0
            and all({"step", "time"} <= s.keys() for s in record["steps"])
        ):
            return dict(record)
    except (KeyError, TypeError, AttributeError):
        pass
    raise DataError(
        f"{root.uri}/{file} is not the record of an epoch; delete its directory and run the same command again"
    )


def read_arrays(run: Storage, name: str) -> dict[str, np.ndarray]:
    """A .npz of a run; empty if it has none. Raises DataError if it is corrupt."""
    if not run.exists(name):
        return {}
    try:
        with np.load(io.BytesIO(run.read_bytes(name)), allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as e:
        raise DataError(f"{run.uri}/{name} is corrupt ({e}); delete it and run the same command again") from e


def read_gallery(run: Storage) -> dict[str, np.ndarray]:
    """``gallery.npz``; empty if the run has none yet. Raises DataError if it is corrupt."""
    gallery = read_arrays(run, "gallery.npz")
    if not gallery or ({"clean", "label"} <= gallery.keys() and len(gallery["clean"]) == len(gallery["label"])):
        return gallery
    raise DataError(
        f"{run.uri}/gallery.npz is corrupt (it has not as many labels as images); delete it and run the same command again"
    )


def read_judged(root: Storage, path: str) -> dict[str, np.ndarray]:
    """The columns of one ``judged/<hash>``, by sample index. Raises DataError if a chunk is missing or corrupt."""
    chunks = [name for name in root.list(path) if name.endswith(".parquet")]
    if not chunks:
        raise DataError(f"{root.uri}/{path} has no records of an evaluation; run the same command again")
    wanted = ["index", "label", "adversarial_prediction"]
    try:
        tables = [pq.read_table(pa.BufferReader(root.read_bytes(f"{path}/{name}")), columns=wanted) for name in chunks]
    except (pa.ArrowInvalid, OSError, KeyError) as e:
        raise DataError(f"{root.uri}/{path} is corrupt ({e}); delete it and run the same command again") from e
    table = pa.concat_tables(tables).sort_by("index")
    return {name: table.column(name).to_numpy() for name in wanted}


# -- meaning ---------------------------------------------------------------------------------------------------------------


def model_config(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The complete training config of a model, also before it is trained."""
    trained: dict[str, Any] | None = record["models"].get(name, {}).get("train") if "models" in record else None
    return trained or to_dict(comparison.experiment_of(record).variants()[name].canonical())


def roles(record: Mapping[str, Any]) -> dict[str, str]:
    """Model -> source, control, defended or given (not trained here), in the order of the config."""
    experiment = comparison.experiment_of(record)
    variants = experiment.variants()
    sources = {experiment.source_of(name) for name in variants}

    def role(name: str, config: TrainConfig) -> str:
        if config.defense != "none":
            return "defended"
        if name in sources:
            return "source"
        return "control" if config.epochs else "given"

    return {name: role(name, config) for name, config in variants.items()}


def threat_title(threat: str) -> str:
    """A threat model as it is written for people."""
    base, _, source = threat.partition(":")
    return f"{THREATS.get(base, base)} from {source}" if source else THREATS.get(threat, threat)


def attack_labels(record: Mapping[str, Any]) -> dict[str, str]:
    """Attack spec -> a short name, ``bim``, with settings only where the run has several of that name: ``bim_eps0.1``."""
    specs = dict.fromkeys(["none", *(e["attack"] for e in record.get("evaluations", []))])
    short = {spec: short_name(spec) for spec in specs}
    out = {}
    for spec, name in short.items():
        rivals = [s for s, n in short.items() if n == name]
        fields = {s: parse_spec(s)[1] for s in rivals}
        differing = [k for k in fields[spec] if len({fields[s].get(k) for s in rivals}) > 1]
        out[spec] = "_".join([name, *(f"{k}{_decimal(fields[spec][k])}" for k in differing)])
    return out


def short_name(spec: str) -> str:
    try:
        return AttackSpec.parse(spec).short_name
    except ConfigError:  # "none", or an attack of another version
        return parse_spec(spec)[0]


def attack_title(spec: str) -> tuple[str, str]:
    """Name and settings for people: ``bim:eps=0.2,steps=100`` is ("BIM", "eps 0.2, 100 steps")."""
    if spec == "none":
        return "no attack", ""
    fields = parse_spec(spec)[1]
    said = []
    try:
        parsed = AttackSpec.parse(spec)
        if parsed.kind == "minimal_norm":
            said.append(f"any {norm_text(parsed.norm)} norm")
        elif parsed.norm == "l2":
            said.append("L2")
    except ConfigError:
        pass  # an attack of another version: its text says all we know
    for key, value in fields.items():
        if key == "steps":
            said.append(f"{value} steps")
        elif key != "norm":
            said.append(f"{key.replace('_', ' ')} {_decimal(value)}")
    return parse_spec(spec)[0].upper() if spec.partition(":")[0] != "noise" else "random noise", ", ".join(said)


def median_norm(cell: Mapping[str, Any]) -> str:
    """Return ``L2 1.23 of 197``, the median norm and the number of broken images that it is over.

    Args:
        cell: a cell of :func:`table`, or what comparison.shown_metrics returned.

    Returns:
        Without a median ``4 broken``, ``none broken`` or ``nothing to break``; empty for an attack within a budget.
    """
    if cell["norm"] and cell.get("clean_accuracy") == 0:
        return "nothing to break"
    return _norm_summary(cell["norm"], cell.get(f"{cell['norm']}_median"), cell["broken"], cell["broken"])


def norms_over_seeds(row: Mapping[str, Any]) -> str:
    """Return the same of a row over the seeds: ``L2 1.23 of 195–198``, or ``4–12 broken``."""
    return _norm_summary(row["norm"], row["norm_median_mean"], row["broken_min"], row["broken_max"])


def _norm_summary(norm: str | None, median: float | None, fewest: int | None, most: int | None) -> str:
    if norm is None or fewest is None or most is None:
        return ""
    if most == 0:
        return "none broken"
    count = f"{fewest}" if fewest == most else f"{fewest}–{most}"
    if median is None:
        return f"{count} broken"
    return f"{norm_text(norm)} {median:.{3 if norm == 'linf' else 2}f} of {count}"


def norms_note(record: Mapping[str, Any]) -> str:
    """Return the sentence that explains :func:`median_norm`; empty if no attack of the run minimises a norm."""
    if not any(e["metrics"].get("curve") for e in record["evaluations"]):
        return ""
    return (
        "Attacks of any norm: the median norm ([0,1] pixels) of the examples that broke an image which was classified "
        f"correctly, and how many such images there are. With fewer than {comparison.MIN_FOR_MEDIAN}, no median is shown."
    )


def norm_text(name: str | None) -> str:
    return {"l2": "L2", "linf": "Linf"}.get(name or "", name or "")


def _decimal(text: str) -> str:
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text


def table(record: Mapping[str, Any]) -> dict[str, Any]:
    """The result table as data: ``columns`` (threat model x attack) and ``rows`` (models) with a cell per column."""
    order = list(THREATS)
    evaluations = record["evaluations"]
    keys = dict.fromkeys((e["threat_model"], e["attack"]) for e in evaluations)
    ranked = sorted(
        keys, key=lambda k: order.index(k[0]) if k[0] in order else len(order)
    )  # stable: attacks keep their order
    labels = attack_labels(record)
    columns = []
    for threat, attack in ranked:
        name, settings = attack_title(attack)
        columns.append(
            {
                "key": "clean" if threat == "clean" else f"{threat}/{labels[attack]}",
                "threat_model": threat,
                "threat_title": threat_title(threat),
                "attack": attack,
                "attack_title": name,
                "settings": settings,
                "minimal_norm": any(e["metrics"].get("curve") for e in evaluations if e["attack"] == attack),
            }
        )
    rows = []
    for model, role in roles(record).items():
        cells: dict[str, Any] = {}
        for e in evaluations:
            if e["model"] == model:
                key = next(
                    c["key"] for c in columns if (c["threat_model"], c["attack"]) == (e["threat_model"], e["attack"])
                )
                metrics = {k: v for k, v in comparison.shown_metrics(e).items() if k != "curve"}
                cells[key] = {
                    "source": e.get("source"),
                    "n": e["n"],
                    "untrusted": is_untrusted(record, e),
                    **metrics,
                }
        if cells or model in record["models"]:
            rows.append({"model": model, "role": role, "cells": cells})
    return {"schema": 1, "recipe": record["name"], "columns": columns, "rows": rows}


def comparisons(record: Mapping[str, Any], root: Storage) -> list[Row]:
    """Every defended model against every control on the same transferred examples (exact McNemar test).

    Raises:
        DataError: a judged record is missing or corrupt, or two evaluations are not of the same samples.
    """
    role = roles(record)
    transferred = [e for e in record["evaluations"] if e["threat_model"] == "transfer" and e.get("path")]
    out = []
    for a in transferred:
        for b in transferred:
            same = a["attack"] == b["attack"] and a.get("source") == b.get("source")
            if not (same and role.get(a["model"]) == "defended" and role.get(b["model"]) == "control"):
                continue
            first, second = read_judged(root, a["path"]), read_judged(root, b["path"])
            if not np.array_equal(first["index"], second["index"]):
                raise DataError(
                    f"{root.uri}/{a['path']} and {b['path']} are not of the same samples; delete both and run the same command again"
                )
            right_a = first["adversarial_prediction"] == first["label"]
            right_b = second["adversarial_prediction"] == second["label"]
            out.append(
                {
                    "attack": a["attack"],
                    "attack_title": ", ".join(filter(None, attack_title(a["attack"]))),
                    "source": a.get("source"),
                    "untrusted": is_untrusted(record, a),
                    "defended": a["model"],
                    "control": b["model"],
                    "n": len(right_a),
                    "accuracy_defended": float(right_a.mean()),
                    "accuracy_control": float(right_b.mean()),
                    "only_defended": int((right_a & ~right_b).sum()),
                    "only_control": int((right_b & ~right_a).sum()),
                    "p": mcnemar(right_a, right_b),
                }
            )
    return out


def explanation(record: Mapping[str, Any]) -> list[str]:
    """Return plain sentences on how to read the numbers of a run, each about something that is in it."""
    return [*_threat_models_explained(record), *_controls_explained(record), *_exceptions_explained(record)]


def _threat_models_explained(record: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each threat model that the run has."""
    sources: dict[str, dict[str, None]] = {}
    for e in record["evaluations"]:
        sources.setdefault(e["threat_model"], {})[str(e.get("source"))] = None
    fixed = {
        "white_box": "White-box: the examples were made on the very model under test. This is the number that says how much a "
        "model withstands, and no more than that: a stronger attack can only lower it.",
        "black_box": "Black-box: the examples were made on the very model under test, from its scores alone, without gradients.",
        "grey_box": "Grey-box: the examples were made on the classifier behind the defense. The attacker does not know what "
        "stands in front of it.",
    }
    caution = (
        "and then shown to the model under test. A high number says that these examples do not carry over, not that the model "
        "withstands an attacker who knows it."
    )
    out = [sentence for threat, sentence in fixed.items() if threat in sources]
    for threat, made_on in sources.items():
        base, _, name = threat.partition(":")
        if base == "transfer":
            where = name or f"an undefended model ({', '.join(made_on)})"
            head = f"Transfer from {name}" if name else "Transfer"
            out.append(f"{head}: the examples were made on {where} {caution}")
    return out


def _controls_explained(record: Mapping[str, Any]) -> list[str]:
    """Return what the controls of the run are, or which defended models lack one."""
    role, experiment = roles(record), comparison.experiment_of(record)
    transferred = [e for e in record["evaluations"] if e["threat_model"] == "transfer"]
    controlled = {experiment.source_of(name) for name, r in role.items() if r == "control"}
    alone = dict.fromkeys(
        e["model"] for e in transferred if role[e["model"]] == "defended" and e["source"] not in controlled
    )
    if alone:
        return [
            f"There is no control for {', '.join(alone)}: no other undefended model of its architecture is in this run. So the "
            "transfer numbers may be what any other network of another seed would have, and nothing of them can be owed to the "
            'defense. Add one to "models", e.g. "control:defense=none,seed=1", and run the command again.'
        ]
    judged = evaluated(record)
    controls = []
    if any(role[name] == "control" for name in judged):
        same = " on the same examples" if any(role[e["model"]] == "control" for e in transferred) else ""
        controls.append(f"an undefended model of another seed{same}")
    if any(e["threat_model"] == "random" for e in record["evaluations"]):
        controls.append("random noise of the same size without any attacker")
    if not controls:
        return []
    said = f"Control: {', and '.join(controls)}."
    if any(role[name] == "defended" for name in judged):
        said += " Only what a defended model does better than its controls can be owed to its defense."
    return [said]


def _exceptions_explained(record: Mapping[str, Any]) -> list[str]:
    """Return what was computed otherwise than usual: in smaller batches, or in bfloat16."""
    out = []
    split = [
        f"{e['model']} under {e['threat_model']}, {attack_text(e['attack'])}"
        for e in record["evaluations"]
        if e.get("chunks_split_for_memory")
    ]
    if split:
        out.append(f"In smaller batches, where memory was short, so with other random starts: {'; '.join(split)}.")
    if comparison.experiment_of(record).evaluation.search_precision != "bfloat16":
        return out
    searched = dict.fromkeys(
        attack_title(e["attack"])[0] for e in record["evaluations"] if _may_search_in_bfloat16(e["attack"])
    )
    in_float32 = dict.fromkeys(
        f"{attack_text(e['attack'])} on {e['source']}"
        for e in record["evaluations"]
        if e.get("chunks_searched_in_float32")
    )
    if searched:
        said = f"{', '.join(searched)} searched in bfloat16 (evaluation.search_precision). All verdicts are float32."
        if in_float32:
            said += f" In float32 after all, where there is no such copy of the network: {'; '.join(in_float32)}."
        out.append(said)
    return out


def _may_search_in_bfloat16(attack: str) -> bool:
    try:
        return AttackSpec.parse(attack).may_search_in_bfloat16
    except ConfigError:  # "none", or an attack of another version
        return False


def evaluated(record: Mapping[str, Any]) -> list[str]:
    """Return the models that the run has evaluations of, in their order."""
    return [name for name in roles(record) if any(e["model"] == name for e in record["evaluations"])]


def role_titles(record: Mapping[str, Any]) -> dict[str, str]:
    """Return model -> its role as it is written for people."""
    made_on = {e.get("source") for e in record["evaluations"] if e.get("source") != e["model"]}
    return {
        name: "undefended" if role == "source" and name not in made_on else ROLES[role]
        for name, role in roles(record).items()
    }


def stage_times(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of each stage by its title."""
    title = model_stage(comparison.experiment_of(record))
    return {title if k == "train" else k: v for k, v in record["stages"].items()}


def model_stage(experiment: Experiment) -> str:
    """Return the title of stage 2: a run that trains nothing reads its models."""
    return "train" if experiment.trains else "models"


def is_untrusted(record: Mapping[str, Any], evaluation: Mapping[str, Any]) -> bool:
    """Whether the attack failed its active test on the model that the examples were made on: what withstands them is no sign of
    robustness, nor do they show anything where they are transferred."""
    tested = (record.get("reliability") or {}).get(evaluation.get("source") or "", {}).get("active", {})
    return evaluation["attack"] in tested and tested[evaluation["attack"]]["passed"] is False


def mark(row: Mapping[str, Any]) -> str:
    """What stands behind the number of a row or cell."""
    return UNTRUSTED if row.get("untrusted") else ""


def untrusted_note(record: Mapping[str, Any]) -> str:
    """The footnote of :data:`UNTRUSTED`: which attacks failed on which models. Empty where none did."""
    failed: dict[str, list[str]] = {}
    for model in in_order(record.get("reliability") or {}, tuple(roles(record))):
        for attack, test in record["reliability"][model]["active"].items():
            if test["passed"] is False:
                failed.setdefault(model, []).append(attack_text(attack))
    if not failed:
        return ""
    where = "; ".join(f"on {model}: {', '.join(attacks)}" for model, attacks in failed.items())
    return (
        f"{UNTRUSTED} Not to be trusted, {where}. The attack did not find adversarial examples that were planted for it there (active "
        f"test, docs/reliability.md), so what withstands it is no sign of robustness. A worst case with {UNTRUSTED} counts such an attack."
    )


def worst_cases(record: Mapping[str, Any]) -> list[Row]:
    """Return the worst case per sample of each model and budget, with the budget and threat model as written for people.

    A record also holds the worst case over noise and what was made on the model itself, as threat model "any". It is left out
    where no examples of other models were shown to the model.
    """
    shown = _shown_examples_of_others(record)
    return [
        {**_worst_titled(w), "untrusted": _untrusted_in(record, w)}
        for w in record.get("worst_case") or []
        if w["threat_model"] != "any" or w["model"] in shown
    ]


def _shown_examples_of_others(record: Mapping[str, Any]) -> set[str]:
    return {e["model"] for e in record["evaluations"] if e.get("source") not in (None, e["model"])}


def worst_over_seeds(record: Mapping[str, Any]) -> list[Row]:
    """The same over the seeds, where there are several; untrusted where one of them is."""
    bases = comparison.experiment_of(record).bases()
    keys = ("norm", "eps", "threat_model")
    doubted = {(bases[w["model"]], *(w[k] for k in keys)) for w in worst_cases(record) if w["untrusted"]}
    shown = {bases[model] for model in _shown_examples_of_others(record)}
    return [
        {**_worst_titled(w), "untrusted": (w["model"], *(w[k] for k in keys)) in doubted}
        for w in comparison.worst_over_seeds(record)
        if w["threat_model"] != "any" or w["model"] in shown
    ]


def worst_case_pairs(record: Mapping[str, Any]) -> list[Row]:
    """Return the worst case of one model against that of another on the same samples (exact McNemar test)."""
    shown = _shown_examples_of_others(record)
    return [
        _worst_titled(w)
        for w in record.get("worst_case_pairs") or []
        if w["threat_model"] != "any" or {w["model"], w["against"]} <= shown
    ]


def _worst_titled(row: Mapping[str, Any]) -> Row:
    said = {"white_box": "made on the model itself", "any": "also transferred to it"}
    budget = f"{norm_text(row['norm'])} ≤ {row['eps']:.4g}"
    return {**row, "budget": budget, "threat_title": said[row["threat_model"]]}


def _untrusted_in(record: Mapping[str, Any], worst: Row) -> list[str]:
    """The attacks on which a worst case rests, of its norm and within its budget, that are not to be trusted."""
    threats = ("white_box", "black_box")
    found = dict.fromkeys(
        e["attack"]
        for e in record["evaluations"]
        if e["model"] == worst["model"]
        and (worst["threat_model"] == "any" or e["threat_model"] in threats)
        and is_untrusted(record, e)
    )

    def counts(text: str) -> bool:
        try:
            spec = AttackSpec.parse(text)
        except ConfigError:  # an attack of another version
            return True
        return spec.norm == worst["norm"] and (spec.eps is None or spec.eps <= worst["eps"])

    return [text for text in found if counts(text)]


def raised_flags(record: Mapping[str, Any]) -> list[Row]:
    """The reliability flags that fired, in the order of the models: {model, name, measured, remedy}."""
    found = record.get("reliability") or {}
    return [
        {"model": model, **flag}
        for model in in_order(found, tuple(roles(record)))
        for flag in found[model]["flags"]
        if flag["fired"]
    ]


def near_chance(record: Mapping[str, Any]) -> list[Row]:
    """Find the models whose accuracy on clean images cannot be told from guessing: their robust accuracy means nothing.

    Of K classes chance is 1/K. A model is near it if the lower end of the Wilson interval of its clean accuracy is at
    most 1.5/K, and at most chance plus a twentieth of what is left to 1 (for two classes 52.5 %, not 75 %).

    Returns:
        {model, accuracy, n, chance, sentence} for each, in the order of the models.
    """
    clean = {e["model"]: e for e in record.get("evaluations") or () if e["threat_model"] == "clean"}
    if not clean:
        return []
    chance = 1 / record["experiment"]["data"]["num_classes"]
    limit = min(1.5 * chance, chance + 0.05 * (1 - chance))
    rows = []
    for model in in_order(clean, tuple(roles(record))):
        n, accuracy = clean[model]["n"], clean[model]["metrics"]["accuracy"]
        low, high = wilson_interval(round(accuracy * n), n)
        if low > limit:
            continue
        if accuracy > limit:
            verdict = f"cannot be told from chance ({percent(chance)} %) by so few images: raise evaluation.test_images"
        else:
            where = "below" if high < chance else "near"
            verdict = (
                f"is {where} chance ({percent(chance)} %): check the order of the classes, the normalisation "
                "(train.normalize_mean, train.normalize_std), the channels (RGB or BGR), the image size and the weights"
            )
        sentence = (
            f"{model}: clean accuracy {percent(accuracy)} % (n = {n}) {verdict}. Robust accuracies of such a model "
            "mean nothing."
        )
        rows.append({"model": model, "accuracy": accuracy, "n": n, "chance": chance, "sentence": sentence})
    return rows


def reliability_in_short(record: Mapping[str, Any]) -> str:
    """One sentence that says whether the numbers can be trusted; empty where nobody looked."""
    tested = record.get("reliability") or {}
    if not tested:
        return ""
    fired = raised_flags(record)
    where = ", ".join(dict.fromkeys(f["model"] for f in fired))
    flags = f"{_counted(len(fired), 'flag')} raised ({where})" if fired else "no flag raised"
    found = _active_tests_in_short([a for one in tested.values() for a in one["active"].values()], len(tested))
    return f"Reliability: {flags} on {_counted(len(tested), 'model')}; {found} (docs/reliability.md)."


def _active_tests_in_short(tests: Sequence[Mapping[str, Any]], models: int) -> str:
    """Return how many active tests were passed, and how many are undecided."""
    decided = [t for t in tests if t["passed"] is not None]
    undecided = len(tests) - len(decided)
    why = "too few images, or random search finds the planted examples too"
    if not tests:
        return f"none of {'its' if models == 1 else 'their'} attacks has an active test"
    if not decided:
        return f"the active test of {_counted(undecided, 'attack')} is undecided: {why}"
    passed = sum(t["passed"] for t in decided)
    said = f"{passed} of {len(decided)} attacks found the adversarial examples that were planted for them"
    return said + (f", {undecided} {'is' if undecided == 1 else 'are'} undecided: {why}" if undecided else "")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def transfer_matrices(record: Mapping[str, Any]) -> dict[str, tuple[list[str], list[str], np.ndarray]]:
    """Attack -> (models that examples were made on, models that judged them, accuracy [made on, judged by]); the diagonal is white-box.

    Of each attack whose examples were made on at least two models and judged by others; of several seeds the first.
    """
    first = plots.first_replicates(roles(record), comparison.experiment_of(record).bases())
    cells: dict[str, dict[tuple[str, str], float]] = {}
    for e in record["evaluations"]:
        if e.get("source") in first and e["model"] in first and e["threat_model"] != "black_box":
            cells.setdefault(e["attack"], {})[e["source"], e["model"]] = e["metrics"]["accuracy"]
    out = {}
    for attack, found in cells.items():
        sources = [m for m in first if any(s == m and judge != m for s, judge in found)]
        judges = [m for m in first if any(judge == m for _, judge in found)]
        if len(sources) > 1:
            values = np.array([[found.get((s, j), np.nan) for j in judges] for s in sources])
            out[attack_text(attack)] = sources, judges, values
    return out


def across(record: Mapping[str, Any]) -> dict[str, list[Row]]:
    """What several evaluations say together: ``over_seeds``, ``differences`` and ``paper`` (pipeline/comparison.py)."""
    cells = comparison.by_seed(record)
    found: list[Row] = []
    compared = comparison.references(record, roles(record))
    worst: list[Row] = []
    for i, reference in enumerate(compared):
        found += [d for d in comparison.differences(record, reference) if d["model"] not in compared[:i]]
        worst += [d for d in comparison.worst_differences(record, reference) if d["model"] not in compared[:i]]
    rows = {
        "over_seeds": comparison.over_seeds(record),
        "differences": found,
        "paper": comparison.beside_paper(record),
    }
    for row in (*rows["over_seeds"], *rows["differences"], *(o for p in rows["paper"] for o in p["ours"])):
        row["threat_title"], row["attack_title"] = threat_title(row["threat_model"]), attack_text(row["attack"])
        models = (row["model"], row.get("reference"))
        row["untrusted"] = any(
            is_untrusted(record, e)
            for model in models
            for e in cells.get((model, row["threat_model"], row["attack"]), {}).values()
        )
    # the worst case last: no attack of its own, but what a reader asks for first
    doubted = {(w["model"], w["budget"]) for w in worst_over_seeds(record) if w["untrusted"]}
    for row in map(_worst_titled, worst):
        marked = any((m, row["budget"]) in doubted for m in (row["model"], row["reference"]))
        said = {"threat_title": "worst case", "attack_title": f"{row['budget']}, {row['threat_title']}"}
        rows["differences"].append({**row, **said, "untrusted": marked})
    return rows


def in_short(record: Mapping[str, Any]) -> list[str]:
    """One sentence per model: clean accuracy and the attack within a budget that leaves least of it."""
    said, titles = [row["sentence"] for row in near_chance(record)], role_titles(record)
    for row in table(record)["rows"]:
        clean = row["cells"].get("clean")
        parts = [] if clean is None else [f"{percent(clean['accuracy'])} % clean"]
        for threat in ("white_box", "transfer"):
            found = [
                (e["metrics"]["accuracy"], e["attack"], mark({"untrusted": is_untrusted(record, e)}))
                for e in record["evaluations"]
                if (e["model"], e["threat_model"]) == (row["model"], threat) and not e["metrics"].get("curve")
            ]
            if found:
                lowest, attack, marked = min(found)
                parts.append(
                    f"{percent(lowest)}{marked} % under the worst {THREATS[threat]} attack ({attack_text(attack)})"
                )
        parts += [
            f"{percent(w['accuracy'])}{mark(w)} % in the worst case per sample at {w['budget']}"
            for w in worst_cases(record)
            if w["model"] == row["model"] and w["threat_model"] == "white_box"
        ]
        if parts:
            said.append(f"{row['model']} ({titles[row['model']]}): " + ", ".join(parts) + ".")
    return [*said, *filter(None, [reliability_in_short(record)])]


def missing(
    record: Mapping[str, Any], gallery: Mapping[str, Any], histories: Mapping[str, Any], drawn: Iterable[str]
) -> list[str]:
    """What a partial run lacks, in words; empty for a complete one. ``drawn``: names of the plots that were made."""
    out = []
    untrained = [name for name in roles(record) if name not in record["models"]]
    if diverged := record.get("diverged"):
        said = ", ".join(f"{name} at step {step}" for name, step in diverged.items())
        out.append(f"training diverged, so it was not evaluated: {said}")
        untrained = [name for name in untrained if name not in diverged]
    for what, given in (("not trained yet", False), ("not read yet", True)):
        if names := [name for name in untrained if (roles(record)[name] == "given") == given]:
            out.append(f"{what}: {', '.join(names)}")
    trained = [name for name, model in record["models"].items() if model.get("train", {}).get("epochs", 1)]
    no_history = [name for name in trained if not histories.get(name)]
    if no_history:
        out.append("no training history of: " + ", ".join(no_history))
    if not record["evaluations"]:
        out.append("no evaluations yet")
    if not gallery:
        out.append("no gallery of images yet")
    if undrawn := [f for f in record["experiment"].get("figures", ()) if f not in drawn]:
        out.append(f"the records hold nothing to draw these from: {', '.join(undrawn)}")
    if not record.get("finished"):
        out.append("the run has not finished")
    return out


def counted(record: Mapping[str, Any]) -> str:
    """``n = 1,000 test images``, or the range where evaluations differ."""
    sizes = sorted({e["n"] for e in record["evaluations"]})
    if not sizes:
        return "no evaluations yet"
    return f"n = {sizes[0]:,} test images" if len(sizes) == 1 else f"n = {sizes[0]:,} to {sizes[-1]:,} test images"


def attack_text(attack: str) -> str:
    name, settings = attack_title(attack)
    return f"{name}, {settings}" if settings else name


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def p_value(p: float) -> str:
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def mean_and_sd(mean: float, sd: float | None) -> str:
    """Fractions as percentages: ``98.3`` or ``98.3 ± 0.4``."""
    return percent(mean) if sd is None else f"{percent(mean)} ± {100 * sd:.1f}"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def when(iso: str | None) -> str:
    """An ISO time as ``2026-01-31 12:00 UTC``; what is none, as it is."""
    try:
        return datetime.fromisoformat(iso or "").strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return iso or ""
