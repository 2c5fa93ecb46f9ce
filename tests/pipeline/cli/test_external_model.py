"""An external model: from its file to a verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_network import Net
from safetensors.torch import save_file
from torch import nn

import defendpp
from components.attacks.spec import AttackSpec
from components.config import EvaluationConfig, Experiment, TrainConfig, level_sizes
from components.config.data import Shapes
from components.errors import ConfigError, DataError
from components.network import build_net
from pipeline.cli.external_model import default_name
from pipeline.cli.recipe_arguments import parse_experiment
from pipeline.data import shards
from pipeline.evaluation import chunks, plan
from pipeline.evaluation.worst_case import budgets
from pipeline.main import main
from pipeline.recipes.registry import RECIPES
from pipeline.recipes.suites import full_suite
from pipeline.runtime.storage import Storage
from pipeline.stages import as_subjects
from pipeline.tracking.uri import default_uri
from pipeline.training import exports, monitor, pretrained, train
from pipeline.training.external import AUTOENCODER
from pipeline.training.jobs import TrainingData

GREY = Shapes(image_size=28, channels=1, num_classes=10, sizes=level_sizes(28))


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "net.pth"
    torch.save(Net(1, 10).state_dict(), path)
    return path


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """Return an export of a training run: Defend++ of another width and normalisation."""
    shapes = Shapes(image_size=32, channels=3, num_classes=7, sizes=level_sizes(32))
    config = TrainConfig(width=4, arch="resnet18", normalize_mean=(0.5,) * 3, normalize_std=(0.2,) * 3)
    exports.export(Storage(str(tmp_path / "ours")), build_net(config, shapes), config, shapes)
    return tmp_path / "ours" / "classifier.safetensors"


def asked(*arguments: str) -> Experiment:
    experiment: Experiment = parse_experiment("attack", list(arguments))
    return experiment


def test_a_strangers_file_with_its_network(stranger: Path) -> None:
    experiment = asked("--model", str(stranger), "--arch", "own_network:make", "--data", "folder:/images")
    (config,) = experiment.model_configs().values()
    assert (config.epochs, config.defense, config.arch) == (0, "none", "own_network:make")
    assert (config.pretrained, experiment.data.source) == (str(stranger), "folder:/images")
    assert experiment.evaluation.attacks == full_suite("0.3")
    assert experiment.evaluation.threat_models == ("white_box", "black_box")
    assert not experiment.trains


def test_our_own_file_knows_what_it_is(exported: Path) -> None:
    experiment = asked("--model", str(exported))
    (name,) = experiment.model_configs()
    config = experiment.model_configs()[name]
    assert name == "ours"
    assert (config.arch, config.width, config.normalize_mean) == ("resnet18", 4, (0.5, 0.5, 0.5))
    data = experiment.data
    assert (data.image_size, data.channels, data.num_classes) == (32, 3, 7)
    assert experiment.evaluation.attacks == full_suite(f"{8 / 255}", channels=3)


def test_the_budget_follows_from_the_images_unless_given(stranger: Path) -> None:
    base = ("--model", str(stranger), "--arch", "own_network:make")
    large = asked(*base, "--data.image-size", "224", "--data.channels", "3", "--data.num-classes", "5")
    assert large.evaluation.attacks == full_suite(f"{4 / 255}", channels=3)
    assert asked(*base, "--eps", "0.1", "--data.channels", "3").evaluation.attacks == full_suite("0.1", channels=3)
    assert large.data.num_classes == 5
    assert asked(*base, "--eps", "0.1").evaluation.attacks == full_suite("0.1")
    assert asked(*base, "--norm", "l2").evaluation.attacks == full_suite("1.5", "l2")
    assert budgets(asked(*base, "--data.image-size", "32", "--data.channels", "3")) == [("l2", 0.5), ("linf", 8 / 255)]
    large = asked(*base, "--norm", "l2", "--data.image-size", "224", "--data.channels", "3")
    assert large.evaluation.attacks == full_suite("3.0", "l2", channels=3)
    few = asked(*base, "--evaluation.attacks", "fgsm:eps=0.2")
    assert few.evaluation.attacks == ("fgsm:eps=0.2",)


@pytest.mark.parametrize(
    "options",
    [
        ("--evaluation.threat-models", "white_box", "black_box"),
        ("--evaluation.threat-models", "black_box"),
        ("--evaluation.attacks", "fgsm:eps=0.2"),
        ("--evaluation.attacks", *EvaluationConfig().attacks),
    ],
)
def test_attacks_and_threat_models_are_set_one_without_the_other(stranger: Path, options: tuple[str, ...]) -> None:
    experiment = asked("--model", str(stranger), "--arch", "own_network:make", *options)
    assert experiment.evaluation.threat_models == (
        options[1:] if "threat" in options[0] else ("white_box", "black_box")
    )
    assert experiment.evaluation.attacks == (options[1:] if "attacks" in options[0] else full_suite("0.3"))


def test_the_suite() -> None:
    """Check the attacks that docs/evaluation.md promises."""
    grey = full_suite("0.3")
    assert {"pgd:eps=0.3,steps=40,restarts=3", "autoattack:eps=0.3", "square:eps=0.3"} < set(grey)
    assert {
        "adaptive:eps=0.3,steps=40,restarts=3",
        "adaptive:eps=0.3,objective=reconstruction,steps=40,restarts=3",
        "fab-t:norm=linf,steps=40",  # the accuracy at every Linf norm
        "cw:steps=20,binary_search_steps=5",
    } < set(grey)
    assert not any("linf" in a for a in full_suite("1.5", "l2"))
    assert {a.partition(":")[0] for a in full_suite("1.5", "l2")} == {a.partition(":")[0] for a in grey} - {"fab-t"}
    smoke = RECIPES["robustness-smoke"].make().evaluation.attacks
    specs = [AttackSpec.parse(a) for a in smoke]
    assert {s.objective for s in specs} == {None, "latent", "reconstruction"}
    assert {s.name for s in specs} >= {s.name for s in map(AttackSpec.parse, grey)} - {"bim", "cw"}


@pytest.mark.parametrize("name", [*RECIPES, "a stranger's"])
def test_the_step_size_of_cw_goes_by_the_images(name: str, stranger: Path) -> None:
    """In 5 x 20 steps, 0.01 hardly moves MNIST's black and white pixels, and 0.5 is too coarse for natural images."""
    colour = ("--model", str(stranger), "--arch", "own_network:make", "--data.channels", "3")
    experiment = RECIPES[name].make() if name in RECIPES else asked(*colour)
    specs = [AttackSpec.parse(a) for a in experiment.evaluation.attacks]
    assert {s.lr for s in specs if s.name == "cw"} <= {0.01 if experiment.data.channels == 3 else 0.5}
    if experiment.paper in ("table1", "table3", "table4", "table6") or name == "a stranger's":
        assert any(s.name == "cw" for s in specs)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (".hidden.pth", "hidden"),
        ("..b.pth", "b"),
        ("x" * 200 + ".pth", "x" * 84 + "-"),
        ("ä" * 100 + ".pth", "ä" * 42 + "-"),
        ("epoch=3 step.1.pth", "epoch-3-step.1"),
        ("---.pth", "model"),
    ],
)
def test_a_models_name_follows_from_any_name_of_its_file(stranger: Path, file: str, name: str) -> None:
    renamed = stranger.rename(stranger.with_name(file))
    (found,) = asked("--model", str(renamed), "--arch", "own_network:make").model_configs()
    assert found == name or (name.endswith("-") and found.startswith(name) and len(found.encode()) == 93)


def test_a_files_uri_has_options_and_a_key(stranger: Path) -> None:
    where = "s3://b/c/x.v1.pth?endpoint_override=http://minio.example.com:9000&region=x"
    for uri in (where, f"{where}#ema"):
        storage, name, key = pretrained.locate(uri)
        assert (storage.full_uri, name) == (where.replace("/x.v1.pth", ""), "x.v1.pth")
        assert key == uri.removeprefix(where).removeprefix("#")
        assert default_name(uri) == "x.v1"
    memory = Storage("memory://test-given/nets")
    memory.write_bytes("a#1.pth", stranger.read_bytes())
    for uri, name, key in (
        ("a#1.pth", "a#1.pth", ""),
        ("a#1.pth#ema", "a#1.pth", "ema"),
        ("a.pth#ema", "a.pth", "ema"),
    ):
        assert pretrained.locate(memory.join(uri))[1:] == (name, key)
    (name,) = asked("--model", memory.join("a#1.pth"), "--arch", "own_network:make").model_configs()
    assert name == "a-1"


def test_what_cannot_be_asked_for(stranger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--arch"):
        asked("--model", str(stranger))
    with pytest.raises(ConfigError, match=r"--norm is 'l3'.*linf, l2"):
        asked("--model", str(stranger), "--arch", "own_network:make", "--norm", "l3")
    bare = tmp_path / "bare.safetensors"
    save_file(Net(1, 10).state_dict(), bare)
    with pytest.raises(ConfigError, match="--arch"):
        asked("--model", str(bare))
    bare.write_bytes(bare.read_bytes()[:20])
    with pytest.raises(DataError, match="not a whole safetensors file"):
        asked("--model", str(bare))
    assert main(["attack", "--model", str(tmp_path / "none.pth"), "--arch", "x:y"]) == 1
    assert "none.pth" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["attack", "--model", "x", "--help"])
    assert "--arch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arch", "channels", "said"),
    [
        ("own_network:nothing", 1, "no function 'nothing'"),
        ("resnet18", 1, "another architecture"),
        ("torchvision:resnet18", 1, "--data.channels 3"),
        ("torchvision:no_such_net", 3, "it must be a network of torchvision"),
        ("timm:no_such_net", 3, "timm"),
        ("own_network:make", 3, "another architecture"),
    ],
)
@pytest.mark.slow
def test_a_network_that_does_not_fit_is_refused_before_anything_is_computed(
    stranger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arch: str, channels: int, said: str
) -> None:
    storage = tmp_path / "storage"
    command = ["attack", "--model", str(stranger), "--arch", arch, "--data.channels", str(channels)]
    assert main([*command, "--storage", str(storage)]) in (1, 2)
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("error:")
    assert said in error
    assert not (storage / "pyramids").exists()
    assert not (storage / "models").exists()


@pytest.mark.slow
def test_torchvisions_networks_take_their_own_weights(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    path = tmp_path / "mobile.pth"
    theirs = models.get_model("mobilenet_v3_small", weights=None, num_classes=5).eval()
    torch.save(theirs.state_dict(), path)
    config = TrainConfig(arch="torchvision:mobilenet_v3_small", defense="none", pretrained=str(path), epochs=0)
    shapes = Shapes(image_size=64, channels=3, num_classes=5, sizes=level_sizes(64))
    ours = build_net(config, shapes, torch.load(path)).eval()
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(ours(images), theirs(images))


def test_defend_needs_blocks_that_a_bare_network_does_not_name() -> None:
    shapes = Shapes(image_size=28, channels=1, num_classes=10, sizes=level_sizes(28))
    with pytest.raises(ConfigError, match="Adapter"):
        build_net(TrainConfig(arch="own_network:make"), shapes)


def test_nothing_is_trained_without_weights_or_from_another_seed() -> None:
    with pytest.raises(ConfigError, match="epochs"):
        TrainConfig(epochs=0, defense="none")
    with pytest.raises(ConfigError, match="epochs"):
        TrainConfig(epochs=0, pretrained="x.pth")
    with pytest.raises(ConfigError, match="epochs"):
        Experiment(name="t", train=TrainConfig(epochs=0, defense="none", pretrained="x.pth"), models=("one",), seeds=2)


def verdict(storage: Path, name: str) -> tuple[Path, dict[str, Any]]:
    (directory,) = storage.glob(f"runs/{name}-*")
    return directory, json.loads((directory / "run.json").read_text())


# -- the auto-encoder beside the classifier ------------------------------------------------------


def defended(directory: Path, shapes: Shapes = GREY, **settings: Any) -> Path:
    """Export Defend++ of few channels, and return its classifier's file."""
    config = TrainConfig(**{"width": 4, "shared_blocks": 2, **settings})
    exports.export(Storage(str(directory)), build_net(config, shapes), config, shapes)
    return directory / "classifier.safetensors"


class Told(monitor.Progress):
    def __init__(self) -> None:
        self.without: list[str] = []

    def on_external(self, name: str, without: str) -> None:
        self.without.append(without)


def taken(storage: Path, *arguments: str) -> tuple[plan.Model, list[str]]:
    """Return the model that ``attack --model`` attacks, and why it has no auto-encoder."""
    experiment, told = asked(*arguments, "--storage", str(storage)), Told()
    data = experiment.data
    sizes = level_sizes(data.image_size, experiment.pyramids.levels)
    shapes = Shapes(image_size=data.image_size, channels=data.channels, num_classes=data.num_classes, sizes=sizes)
    root = Storage(str(storage))
    models = train.train(experiment, shapes, TrainingData(train={}, without_levels=""), root, told, default_uri(root))
    (model,) = as_subjects(experiment, models)
    return model, told.without


@pytest.mark.slow
def test_the_auto_encoder_beside_our_own_file_comes_with_it(tmp_path: Path) -> None:
    file = defended(tmp_path / "ours")
    model, said = taken(tmp_path / "storage", "--model", str(file))
    assert said == []
    images = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    copied, original = (
        exports.load_autoencoder(path)(images) for path in (tmp_path / "storage" / model.path, file.parent)
    )
    assert all(torch.equal(a, b) for a, b in zip(copied, original, strict=True))
    described = json.loads((tmp_path / "storage" / model.path / "model.json").read_text())
    assert described["files"]["autoencoder.safetensors"] == model.autoencoder
    assert set(described["parameters"]) == {"classifier", "autoencoder"}
    planned = plan.plan_evaluations([model], asked("--model", str(file)))
    assert {e.attack.partition(":")[0] for e in planned if e.threat_model == "white_box"} >= {"pgd", "adaptive"}
    # taken again, it is the same model; without its auto-encoder another
    assert taken(tmp_path / "storage", "--model", str(file))[0] == model
    (tmp_path / "ours" / "autoencoder.safetensors").unlink()
    bare, said = taken(tmp_path / "storage", "--model", str(file))
    assert (bare.path != model.path, bare.autoencoder) == (True, "")
    assert said == [f"there is no autoencoder.safetensors in {tmp_path / 'ours'}, where the classifier lies"]


@pytest.mark.slow
def test_its_levels_are_those_that_it_was_trained_with(tmp_path: Path) -> None:
    file = defended(tmp_path / "two", Shapes(image_size=28, channels=1, num_classes=10, sizes=(28, 14)))
    assert asked("--model", str(file)).pyramids.levels == 2
    assert taken(tmp_path / "storage", "--model", str(file))[0].autoencoder


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"seed": 1}, "their shared blocks differ"),
        ({"width": 8}, "its width is 8, here it is 4"),
        ({"arch": "resnet50"}, "its arch is 'resnet50', here it is 'resnet18'"),
        ({"normalize_mean": (0.1,), "normalize_std": (0.3,)}, r"its normalize_mean is \(0.1,\), here it is \(\)"),
        ("cut", "cannot be read"),
        ("foreign", "was not exported by this project"),
    ],
)
def test_an_auto_encoder_of_another_classifier_is_left_alone(tmp_path: Path, settings: Any, said: str) -> None:
    file = defended(tmp_path / "ours")
    beside = file.with_name("autoencoder.safetensors")
    if settings == "cut":
        beside.write_bytes(beside.read_bytes()[:-20])
    elif settings == "foreign":
        save_file({"x": torch.zeros(1)}, beside)
    else:
        beside.write_bytes((defended(tmp_path / "other", **settings).parent / beside.name).read_bytes())
    model, why = taken(tmp_path / "storage", "--model", str(file))
    assert model.autoencoder == ""
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(*why)


@pytest.mark.cluster
def test_our_own_export_meets_the_attacker_who_knows_its_auto_encoder(
    ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage, file = tmp_path / "storage", defended(tmp_path / "ours")
    specs = ("pgd:eps=0.3,steps=2", "adaptive:eps=0.3,steps=2", "adaptive:eps=0.3,objective=reconstruction,steps=2")
    few = ["--evaluation.test-images", "4", "--evaluation.chunk-size", "4", "--evaluation.reliability-images", "0"]
    common = ["--storage", str(storage), *few]
    assert main(["attack", "--model", str(file), "--register", "--evaluation.attacks", *specs, *common]) == 0
    assert "the adaptive attack cannot run" not in capsys.readouterr().out
    _, record = verdict(storage, "attack-ours")
    assert record["models"]["ours"]["autoencoder"]
    found = {e["attack"]: e for e in record["evaluations"] if e["threat_model"] == "white_box"}
    assert found.keys() == {str(AttackSpec.parse(text)) for text in specs}
    assert len({e["examples"] for e in found.values()}) == 3

    registered = ("--model", "mlflow:models:/attack-ours-ours@newest", "--name", "again")
    again, said = taken(storage, *registered)
    assert said == []
    assert again.autoencoder == json.loads((storage / again.path / "model.json").read_text())["files"][AUTOENCODER]


@pytest.mark.cluster
@pytest.mark.drill
@pytest.mark.parametrize("arch", ["torchvision:squeezenet1_1", "timm:lcnet_050"])
def test_a_librarys_network_from_a_local_file(
    ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arch: str
) -> None:
    """Pass its state_dict to the command. The attacked network has the logits of the library's own."""
    library, _, name = arch.partition(":")
    module = pytest.importorskip("torchvision.models" if library == "torchvision" else library)
    make = module.get_model if library == "torchvision" else module.create_model
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = make(name, num_classes=10).eval()
    file, storage = tmp_path / "net.pth", tmp_path / "storage"
    torch.save(theirs.state_dict(), file)
    images = ["--data.image-size", "64", "--data.channels", "3", "--data.resize", "crop"]
    few = ["--evaluation.test-images", "4", "--evaluation.chunk-size", "4", "--evaluation.reliability-images", "0"]
    specs = ("pgd:eps=0.1,steps=2", "fab-t:norm=linf,steps=2,targets=2", "adaptive:eps=0.1,steps=2")
    command = ["attack", "--model", str(file), "--arch", arch, *images, *few, "--evaluation.attacks", *specs]
    assert main([*command, "--storage", str(storage)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"net: the adaptive attack cannot run, it needs the model's auto-encoder: there is no {AUTOENCODER}" in said
    _, record = verdict(storage, "attack-net")
    found = {e["attack"].partition(":")[0]: e for e in record["evaluations"] if e["threat_model"] == "white_box"}
    assert set(found) == {"pgd", "fab-t"}
    root = Storage(str(storage))
    for e in found.values():
        examples = torch.tensor(chunks.read_examples(root / e["examples"], 0))
        with torch.no_grad():
            predicted = theirs(examples).argmax(1)
        assert predicted.tolist() == chunks.read_chunks(root / e["path"], 1)["adversarial_prediction"].tolist()


def assert_evaluate_agrees(file: Path, storage: Path, record: dict[str, Any], attacks: tuple[str, ...]) -> None:
    """Evaluate the same network and images in memory, without and with Ray: each sample has the same verdict."""
    network, root = Net(1, 10), Storage(str(storage))
    network.load_state_dict(torch.load(file))
    rows = shards.load(root, record["data"]["splits"]["test"]).read_rows(0, 12)
    images, labels = torch.from_numpy(rows["image"]).float() / 255, rows["label"]
    options: dict[str, Any] = {"name": "net", "chunk_size": 6, "reliability_images": 4, "progress": False}
    for ray in (False, True):
        result = defendpp.evaluate(network, images, labels, attacks, ray=ray, **options)
        assert [e.attack for e in result.record.evaluations] == [e["attack"] for e in record["evaluations"]]
        for e in record["evaluations"]:
            of_run = chunks.read_chunks(root / e["path"], 2)
            for column, values in result.samples(e["attack"]).items():
                assert column == "index" or np.array_equal(values, of_run[str(column)]), (e["attack"], column)
        content = result.to_json()
        assert content["worst_case"] == record["worst_case"]
        assert content["reliability"]["net"] == record["reliability"]["net"]


@pytest.mark.cluster
def test_from_a_file_to_a_verdict_and_from_mlflow_to_the_same(
    ray_cluster: str, stranger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Attack a file, then the model that this run registered in MLflow, with other tasks.

    The verdict on every sample is the same.
    """
    storage = tmp_path / "storage"
    attacks = (
        "noise:eps=0.3",
        "pgd:eps=0.3,steps=5",
        "autoattack:eps=0.3,steps=3,queries=5",
        "square:eps=0.3,queries=5",
    )
    common = ["--arch", "own_network:make", "--storage", str(storage), "--evaluation.attacks", *attacks]
    common += ["--evaluation.test-images", "12", "--evaluation.chunk-size", "6", "--evaluation.reliability-images", "4"]
    assert main(["attack", "--model", str(stranger), "--register", *common]) == 0
    directory, record = verdict(storage, "attack-net")
    said = capsys.readouterr().out
    assert "taken as it is" in said
    assert "adaptive" not in said  # not asked for
    assert {(e["threat_model"], e["attack"].partition(":")[0]) for e in record["evaluations"]} == {
        ("clean", "none"),
        ("random", "noise"),
        ("white_box", "pgd"),
        ("white_box", "autoattack"),
        ("black_box", "square"),
    }
    worst = {(w["threat_model"], w["norm"], w["eps"]): w["accuracy"] for w in record["worst_case"]}
    attacked = [e["metrics"]["accuracy"] for e in record["evaluations"] if e["threat_model"].endswith("_box")]
    assert worst["white_box", "linf", 0.3] <= min(attacked)
    assert set(record["reliability"]) == {"net"}
    assert {a.partition(":")[0] for a in record["reliability"]["net"]["active"]} == {"pgd", "autoattack", "square"}
    assert [s.stem for s in storage.glob("pyramids/*/manifest.json")] == ["manifest"]  # of the test images alone
    html = (directory / "report" / "report.html").read_text()
    for part in ("external, not trained here", "Worst case per sample", "Could the attacks find anything?"):
        assert part in html

    assert_evaluate_agrees(stranger, storage, record, attacks)

    registered = "mlflow:models:/attack-net-net@newest"
    tasks = ["--scaling.chunks-per-attack", "2", "--scaling.cpus-per-attack", "0.5"]
    assert main(["attack", "--model", registered, "--name", "again", *common, *tasks]) == 0
    _, again = verdict(storage, "attack-again")
    assert again["models"]["again"]["path"] != record["models"]["net"]["path"]  # nothing was taken over
    for first, second in zip(record["evaluations"], again["evaluations"], strict=True):
        assert first["attack"] == second["attack"]
        one, two = (chunks.read_chunks(Storage(str(storage)) / e["path"], 2) for e in (first, second))
        assert all(np.array_equal(one[name], two[name]) for name in one)
    capsys.readouterr()
    assert main(["attack", "--model", "mlflow:models:/nobody@newest", *common]) == 1
    assert "nobody" in capsys.readouterr().err


def test_the_file_of_a_module_is_loaded_strictly(tmp_path: Path) -> None:
    shapes = Shapes(image_size=28, channels=1, num_classes=10, sizes=level_sizes(28))
    config = TrainConfig(arch="own_network:make", defense="none", epochs=0, pretrained="net.pth")
    weights = Net(1, 10).state_dict()
    assert isinstance(build_net(config, shapes, weights), nn.Module)
    with pytest.raises(DataError, match="another architecture"):
        build_net(config, shapes, {k: v for k, v in weights.items() if k != "head.bias"})
