"""What evaluations say together: which examples meet which model, the spread over seeds, and the paper's numbers beside ours."""

from __future__ import annotations

import dataclasses
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from components.config import EvaluationConfig, Experiment, TrainConfig, roles
from components.fields import to_dict
from pipeline.evaluation.plan import Model, plan_evaluations
from pipeline.recipes.paper import PAPER
from pipeline.recipes.registry import RECIPES
from pipeline.recipes.scales import SCALES
from pipeline.records import RunRecord
from pipeline.reporting import labels, markdown, over_seeds, paper, records, results
from pipeline.reporting.cells import cell
from pipeline.reporting.paper import beside_paper
from pipeline.reporting.tracked import metrics
from pipeline.runtime.storage import Storage


def subjects(experiment: Experiment) -> list[Model]:
    """Models of an experiment, as run.py makes them, without weights."""
    found: dict[str, Model] = {}
    variants = experiment.model_configs()
    for name in sorted(variants, key=lambda n: variants[n].defense == "comdefend"):
        behind = found[experiment.transfer_source_of(name) or ""] if variants[name].defense == "comdefend" else None
        found[name] = Model(name=name, path=f"models/{name}", sha256=name, classifier=behind)
    return [found[name] for name in variants]


def planned(experiment: Experiment) -> list[dict[str, Any]]:
    """The evaluations of an experiment as run.json has them, with accuracies that differ everywhere."""
    out = []
    for i, e in enumerate(plan_evaluations(subjects(experiment), experiment)):
        accuracy = (i % 97) / 100
        metrics = {"accuracy": accuracy, "accuracy_low": accuracy, "accuracy_high": accuracy + 0.01}
        out.append(
            {
                "model": e.model.name,
                "source": e.source.name if e.source else None,
                "threat_model": e.threat_model,
                "attack": e.attack,
                "n": 100,
                "metrics": metrics,
            }
        )
    return out


def written(experiment: Experiment, evaluations: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return run.json of an experiment, by default with all its evaluations."""
    made = planned(experiment) if evaluations is None else evaluations
    return {"schema": 1, "name": "x", "experiment": to_dict(experiment), "evaluations": made}


def record_of(experiment: Experiment, evaluations: list[dict[str, Any]] | None = None) -> RunRecord:
    return RunRecord.from_json(written(experiment, evaluations))


SMALL = Experiment(
    name="x",
    train=TrainConfig(width=8),
    models=("no_defense:defense=none", "control:defense=none,seed=1", "comdefend:defense=comdefend", "defend:seed=1"),
    evaluation=EvaluationConfig(attacks=("noise:eps=0.2", "fgsm:eps=0.2", "bim:eps=0.2,steps=3")),
)


def test_a_reformer_is_grey_box_where_its_own_classifier_is_attacked() -> None:
    evaluations = plan_evaluations(subjects(SMALL), SMALL)
    of = {(e.model.name, e.threat_model, e.attack.partition(":")[0]): e for e in evaluations}
    grey = of["comdefend", "grey_box", "fgsm"]
    assert grey.source is not None
    assert grey.source.name == "no_defense"
    assert ("comdefend", "transfer", "fgsm") not in of
    white = of["comdefend", "white_box", "bim"]
    assert white.source == white.model  # through the reformer, not around it
    assert white.stop_on_success
    assert not of["comdefend", "grey_box", "bim"].stop_on_success
    assert not of["defend", "transfer", "bim"].stop_on_success
    assert white.model.identity == "comdefend+no_defense"
    assert white.model.address == "models/comdefend+models/no_defense"
    assert ("no_defense", "transfer", "fgsm") not in of


def test_examples_of_a_named_model_meet_every_other() -> None:
    experiment = dataclasses.replace(
        SMALL, seeds=2, evaluation=dataclasses.replace(SMALL.evaluation, threat_models=("transfer:defend",))
    )
    found = [e for e in plan_evaluations(subjects(experiment), experiment) if e.threat_model == "transfer:defend"]
    pairs = {(e.source.name if e.source else "", e.model.name) for e in found}
    assert pairs == {(f"defend-s{r}", f"{m}-s{r}") for r in (0, 1) for m in ("no_defense", "control", "comdefend")}


def with_accuracies(values: dict[str, list[float]]) -> RunRecord:
    """A record of one FGSM column; ``values``: model -> accuracy by seed."""
    seeds = len(next(iter(values.values())))
    experiment = dataclasses.replace(SMALL, seeds=seeds)
    evaluations = [
        {
            "model": f"{model}-s{r}",
            "source": None,
            "threat_model": "transfer",
            "attack": "fgsm:eps=0.2",
            "n": 300,
            "metrics": {"accuracy": a, "accuracy_low": a - 0.02, "accuracy_high": a + 0.02},
        }
        for model, accuracies in values.items()
        for r, a in enumerate(accuracies)
    ]
    return record_of(experiment, evaluations)


def test_mean_and_spread_over_the_seeds() -> None:
    record = with_accuracies({"control": [0.6, 0.7, 0.8], "defend": [0.9, 0.9, 0.9]})
    control, defend = over_seeds.over_seeds(record)
    assert (control["model"], control["seeds"], control["n"]) == ("control", 3, 900)
    assert control["accuracy_mean"] == pytest.approx(0.7)
    assert control["accuracy_sd"] == pytest.approx(statistics.stdev([0.6, 0.7, 0.8]))
    assert (control["accuracy_min"], control["accuracy_max"]) == (0.6, 0.8)
    assert defend["accuracy_sd"] == pytest.approx(0.0, abs=1e-12)


def test_a_difference_counts_only_beyond_the_seeds() -> None:
    """Paired: the same large spread in both cancels; Student's t of three pairs has the known factor 4.303."""
    record = with_accuracies({"control": [0.5, 0.7, 0.9], "defend": [0.56, 0.75, 0.96]})
    (row,) = over_seeds.differences(record, "control")
    assert row["difference"] == pytest.approx((0.06 + 0.05 + 0.06) / 3)
    sd = statistics.stdev([0.06, 0.05, 0.06])
    assert row["half_width"] == pytest.approx(4.3027 * sd / 3**0.5, rel=1e-3)
    assert row["resolved"]
    record = with_accuracies({"control": [0.5, 0.7, 0.9], "defend": [0.66, 0.65, 0.86]})
    (row,) = over_seeds.differences(record, "control")
    assert not row["resolved"]


def test_one_seed_has_no_spread() -> None:
    record = record_of(SMALL)
    assert over_seeds.over_seeds(record) == []
    assert over_seeds.differences(record, "control") == []


TABLES = [f"{name}-{scale}" for name in PAPER for scale in SCALES if name.startswith("table")]


@pytest.mark.parametrize("name", TABLES)
def test_every_number_of_a_table_has_one_of_ours_beside_it(name: str) -> None:
    experiment = RECIPES[name].make()
    record = record_of(experiment)
    rows = beside_paper(record)
    wanted = paper.printed_values(experiment.paper)
    assert [r["paper"] for r in rows] == [p.text for p in wanted]
    # what stands in sec. 4.2 but is no evaluation of it: gains, and what it repeats from other tables
    lacking = {(r["row"], r["column"]) for r in rows if not r["ours"]}
    if experiment.paper == "sec4.2":
        assert not [pair for pair in lacking if pair[1] == "pgd" or pair[0] == "adv_pgd"]
    else:
        assert not lacking


def test_a_paper_cell_gets_the_right_evaluations() -> None:
    experiment = RECIPES["table7-smoke"].make()
    record = record_of(experiment)
    (row,) = [r for r in beside_paper(record) if (r["row"], r["arch"], r["made_on"]) == ("defend", "vgg16", "resnet18")]
    accuracy = {
        e.threat_model: e.accuracy
        for e in record.evaluations
        if e.model == "defend-vgg16" and e.attack.startswith("fgsm")
    }
    assert {o["threat_model"]: o["mean"] for o in row["ours"]} == {
        t: accuracy[t] for t in ("transfer:no_defense-resnet18", "transfer:defend-resnet18")
    }
    experiment = RECIPES["table2-smoke"].make()
    rows = {(r["row"], r["column"]): r for r in beside_paper(record_of(experiment))}
    assert [o["threat_model"] for o in rows["comdefend", "fgsm"]["ours"]] == ["grey_box"]
    assert [o["threat_model"] for o in rows["comdefend_wb", "fgsm"]["ours"]] == ["white_box"]
    assert [o["threat_model"] for o in rows["comdefend_wb", "clean"]["ours"]] == ["clean"]
    assert [o["threat_model"] for o in rows["defend", "bim"]["ours"]] == ["white_box", "transfer"]


def test_the_paper_attacks_in_linf() -> None:
    """FGSM and BIM within an L2 norm are other attacks than those of its columns."""
    base = RECIPES["table2-smoke"].make()
    attacks = ("fgsm:eps=1.5,norm=l2", "bim:eps=1.5,norm=l2,steps=2")
    record = record_of(dataclasses.replace(base, evaluation=dataclasses.replace(base.evaluation, attacks=attacks)))
    assert {r["column"] for r in beside_paper(record) if r["ours"]} == {"clean"}


def test_roles_and_titles() -> None:
    record = record_of(SMALL)
    assert record.roles == {
        "no_defense": "source",
        "control": "control",
        "comdefend": "defended",
        "defend": "defended",
    }
    assert roles.references(record.experiment) == ["control", "defend"]
    assert labels.threat_title("transfer:defend-vgg16") == "transfer from defend-vgg16"
    assert labels.threat_title("grey_box") == "grey-box"


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        # the paper sets each ablation and each baseline beside ours, not beside the first row of the table
        ("table1-slim", ["control", "defend"]),
        ("table3-smoke", ["control", "defend"]),
        ("table5-smoke", ["control-vgg16", "defend-vgg16", "control-resnet50", "defend-resnet50"]),
    ],
)
def test_models_are_compared_with_the_control_and_with_ours(recipe: str, wanted: list[str]) -> None:
    record = record_of(RECIPES[recipe].make())
    assert roles.references(record.experiment) == wanted


def test_differences_are_told_once_and_within_an_architecture() -> None:
    record = record_of(dataclasses.replace(RECIPES["table5-smoke"].make(), seeds=2))
    rows = results.across(record)["differences"]
    pairs = {(d["model"], d["reference"]) for d in rows}
    assert pairs == {
        (model, reference)
        for arch in ("vgg16", "resnet50")
        for model, reference in (
            (f"no_defense-{arch}", f"control-{arch}"),
            (f"defend-{arch}", f"control-{arch}"),
            (f"no_defense-{arch}", f"defend-{arch}"),
        )
    }


def test_a_cell_beside_the_paper_names_interval_n_and_the_network_where_it_is_another(tmp_path: Path) -> None:
    run = Storage(str(tmp_path))
    run.write_json("run.json", written(RECIPES["table5-smoke"].make()))
    lines = markdown.markdown(records.read_run(run)).splitlines()
    assert any(line.startswith("### Beside the paper's table5, scale smoke") for line in lines)
    (row,) = [line for line in lines if line.startswith("| ours (VGG16) | vgg16 | fgsm |")]
    # another network than the paper's: with batch norm
    assert re.search(r"white-box (\d+\.\d) \(\1–\d+\.\d; 100, vgg16_bn\)", row)
    (row,) = [line for line in lines if line.startswith("| ours (ResNet-50) | resnet50 | fgsm |")]
    assert re.search(r"white-box (\d+\.\d) \(\1–\d+\.\d; 100\)", row)


def test_tables_share_the_models_that_they_have_in_common() -> None:
    """Trained once: the same canonical config in both tables."""
    for scale in ("smoke", "fast", "paper"):
        one, two, three = (RECIPES[f"{t}-{scale}"].make().model_configs() for t in ("table1", "table2", "table2-pgd"))
        for name in ("no_defense", "control", "defend"):
            assert one[name].canonical() == two[name].canonical() == three[name].canonical()
        for name in ("adv_fgsm", "adv_ddn", "comdefend", "defend_gn"):
            assert two[name].canonical() == three[name].canonical()
        assert one["defend"].canonical() != one["shared3"].canonical()


def test_figure_7_has_the_papers_eps() -> None:
    attacks = RECIPES["fig7-smoke"].make().evaluation.attacks
    assert attacks == tuple(
        f"fgsm:eps={e}" for e in ("0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "1")
    )


def test_a_median_is_of_the_norm_that_the_attack_makes_small() -> None:
    evaluation = EvaluationConfig(
        attacks=("fab-t:norm=linf", "ddn", "pgd:eps=0.2"), threat_models=("white_box",), test_images=100
    )
    one = dataclasses.replace(SMALL, models=("no_defense:defense=none",), evaluation=evaluation, seeds=2)
    evaluations = planned(one)
    for e in evaluations:
        norm = {"fab-t": "linf", "ddn": "l2"}.get(e["attack"].partition(":")[0])
        e["metrics"] |= {"clean_accuracy": 1.0, "success_rate": 0.2}  # 20 of 100 images
        e["metrics"] |= {"l2_median": 1.25, "linf_median": 0.03125 if e["model"].endswith("s0") else 0.0625}
        if norm:
            e["metrics"]["curve"] = {"norm": norm, "eps": [0.0], "accuracy": [1.0]}
    record = record_of(one, evaluations)
    data = results.table(record)
    cells = {c["attack"].partition(":")[0]: cell(c, data["rows"][0]) for c in data["columns"]}
    assert cells["fab-t"][2:] == ["Linf 0.031 of 20"]
    assert cells["ddn"][2:] == ["L2 1.25 of 20"]
    assert cells["pgd"][2:] == []
    over = {r["attack"].partition(":")[0]: results.norms_over_seeds(r) for r in over_seeds.over_seeds(record)}
    assert over == {"none": "", "fab-t": "Linf 0.047 of 20", "ddn": "L2 1.25 of 20", "pgd": ""}
    published = metrics.test_metrics(record, "no_defense-s1")
    medians = {name: value for name, value in published.items() if "median" in name}
    assert medians == {"norm/white_box/fab-t_linf_median": 0.0625, "norm/white_box/ddn_l2_median": 1.25}
    within_a_budget = {"norm": None, "l2_median": 1.25, "broken": 20}
    assert labels.median_norm(within_a_budget) == ""
