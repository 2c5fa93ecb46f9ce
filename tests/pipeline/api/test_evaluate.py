"""evaluate() in this process: what it takes, what it refuses, and what its result says."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from repository import ROOT
from small_cnn import digits, trained_cnn
from torch import Tensor, nn

import defendpp
from components.attacks.spec import AttackSpec
from components.config import Shapes, TrainConfig
from components.errors import ConfigError, DataError
from components.evaluation.judge import largest_norm
from components.network import build_net
from pipeline.api.evaluation import specs
from pipeline.evaluation import attack_tasks
from pipeline.recipes.suites import full_suite

ATTACKS = ("noise:eps=0.1", "fgsm:eps=0.1", "pgd:eps=0.1,steps=5", "square:eps=0.1,queries=50", "ddn:steps=20")
N = 30


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return trained_cnn(1)


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    return digits("test", N)


@pytest.fixture(scope="module")
def result(network: nn.Module, images: tuple[Tensor, Tensor]) -> defendpp.EvaluationResult:
    """Evaluate a network beside another one, in training mode, in chunks that do not divide the images."""
    network.train()
    torch.manual_seed(3)
    other = copy.deepcopy(network).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    stream, threads = torch.get_rng_state(), torch.get_num_threads()
    options: dict[str, Any] = {"chunk_size": 20, "reliability_images": 8, "progress": False}
    done = defendpp.evaluate(network, *images, ATTACKS, against={"other": other}, **options)
    assert torch.equal(torch.get_rng_state(), stream)
    assert torch.get_num_threads() == threads
    assert network.training
    assert not other.training
    assert all(p.grad is None for p in network.parameters())
    network.eval()
    return done


def test_the_result_is_that_of_a_run(result: defendpp.EvaluationResult) -> None:
    frame = result.to_dataframe()
    own = frame[frame.model == "model"].set_index("threat_model").attack.groupby(level=0).agg(list)
    texts = [str(AttackSpec.parse(text)) for text in ATTACKS]
    assert own["clean"] == ["none"]
    assert own["random"] == texts[:1]
    assert own["white_box"] == [texts[1], texts[2], texts[4]]
    assert own["black_box"] == texts[3:4]
    assert own["transfer:other"] == own["white_box"]
    assert (frame.n == N).all()
    assert result.clean_accuracy > 0.7 > result.robust_accuracy
    assert set(result.active_tests.model) == {"model", "other"}
    assert set(result.active_tests.attack) == {texts[2], texts[3], texts[4]}
    assert result.record.experiment.evaluation.attacks == ATTACKS


def test_the_worst_case_recounts_from_the_samples(result: defendpp.EvaluationResult) -> None:
    right = np.ones(N, dtype=bool)
    for attack in ("fgsm", "pgd", "square", "ddn"):
        rows = result.samples(attack)
        assert rows["index"].tolist() == list(range(N))
        limit = largest_norm("linf", 0.1)
        right &= ((rows.adversarial_prediction == rows.label) | (rows.linf > limit)).to_numpy()
        right &= (rows.clean_prediction == rows.label).to_numpy()
    assert (result.robust.norm, result.robust.eps, result.robust.n) == ("linf", 0.1, N)
    assert result.robust_accuracy == right.mean()
    assert result.robust.accuracy_low <= result.robust_accuracy <= result.robust.accuracy_high
    pairs = {(p.model, p.against, p.threat_model) for p in result.worst_case_pairs}
    assert pairs == {("model", "other", "white_box"), ("model", "other", "any")}
    assert len(result.worst_case_dataframe()) == len(result.worst_case)


def test_the_examples_are_those_that_were_judged(
    result: defendpp.EvaluationResult, network: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    x, _ = images
    for attack, source in (("pgd", ""), ("ddn", "other")):
        examples = result.examples(attack, source=source)
        assert examples.shape == x.shape
        rows = result.samples(attack, source=source)
        assert network(examples).argmax(1).tolist() == rows.adversarial_prediction.tolist()
        assert np.allclose((examples - x).flatten(1).norm(dim=1).numpy(), rows.l2, atol=1e-5)
    curve = result.curve("ddn")
    norms = result.samples("ddn")
    median = curve.eps[50]
    survives = (norms.clean_prediction == norms.label) & (
        (norms.adversarial_prediction == norms.label) | (norms.l2 > median)
    )
    assert curve.accuracy[50] == survives.mean()
    with pytest.raises(ConfigError, match="attack is 'pgd'; it must be an attack of minimal norm"):
        result.curve("pgd")
    with pytest.raises(ConfigError, match=r"unknown attack on model: 'pdg'; did you mean"):
        result.samples("pdg")
    with pytest.raises(ConfigError, match=r"unknown model 'nobody'; there are model, other"):
        result.samples("pgd", model="nobody")
    with pytest.raises(ConfigError, match="clean images have no adversarial examples"):
        result.examples("none")


def test_it_is_shown_in_terminals_and_notebooks(result: defendpp.EvaluationResult) -> None:
    text, html = str(result), result._repr_html_()
    robust = f"{100 * result.robust_accuracy:.1f}"
    for shown in (text, html):
        assert robust in shown
        assert "n = 30" in shown
        assert "DDN" in shown
        assert "model came in training mode, was evaluated in eval mode, and is in training mode again." in shown
    assert f'<b class="number">{robust}</b>' in html
    assert html.count("<polyline") == 2
    assert "only model withstands" in html
    assert repr(result) == "<EvaluationResult evaluate-model: 18 evaluations>"


def test_its_experiment_cannot_be_run_again(result: defendpp.EvaluationResult, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.source is 'memory:\w+'; .* call it again"):
        defendpp.run(result.record.experiment, storage=tmp_path)


def test_the_files_go_with_the_result(network: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    result = defendpp.evaluate(network, x[:4], y[:4], "fgsm:eps=0.1", reliability_images=0, progress=False)
    directory = Path(result.directory).parents[1]
    assert directory.is_dir()
    del result
    assert not directory.exists()
    assert attack_tasks.load_model.cache_info().currsize == 0  # It would keep the network alive.


def test_with_a_storage_the_same_call_continues(
    network: nn.Module, images: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(model: nn.Module, storage: Path = tmp_path) -> defendpp.EvaluationResult:
        return defendpp.evaluate(
            model, *images, ATTACKS, chunk_size=10, storage=storage, reliability_images=4, progress=False
        )

    crafted: list[int] = []
    real = attack_tasks.craft

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if len(crafted) == 5:
            raise KeyboardInterrupt
        crafted.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(attack_tasks, "craft", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(network)
    assert not network.training
    calls: list[int] = []
    monkeypatch.setattr(attack_tasks, "craft", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    result = call(network)
    assert len(calls) == 3 * len(ATTACKS) - 5
    calls.clear()
    assert call(network).to_dataframe().equals(result.to_dataframe())
    assert calls == []
    # The same weights in another forward() are another network.
    call(nn.Sequential(*network, Negated()))
    assert len(calls) == 3 * (len(ATTACKS) - 1)  # Noise needs no network.


def test_a_split_that_does_not_exist_is_no_other_one() -> None:
    split: Any = "tests"
    with pytest.raises(ConfigError, match=r"split is 'tests'; .*did you mean test"):
        defendpp.load_images("sample:mnist", split)


class Negated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x


def test_budgets_are_suites() -> None:
    def canonical(texts: tuple[str, ...]) -> list[str]:
        return [str(AttackSpec.parse(text)) for text in texts]

    linf, l2 = canonical(full_suite("8/255", "linf", 3)), canonical(full_suite("0.5", "l2", 3))
    assert canonical(specs("linf:8/255", 3)) == linf
    assert canonical(specs(["linf:8/255", "l2:0.5"], 3)) == list(dict.fromkeys(linf + l2))
    assert specs(["linf:0.1", "pgd:eps=0.2"], 1)[-1] == "pgd:eps=0.2"
    for attacks, message in (
        ((), 'attacks is .*; it must be a budget such as "linf:8/255"'),
        ("pdg:eps=0.1", "unknown attack 'pdg'"),
        (
            "linf:8",
            "attacks is 'linf:8'; it must be a budget such as .* at most 1 in linf, in units of .*: write 8/255",
        ),
        ("linf", "attacks is 'linf'; it must be a budget such as .*, its size a number"),
        ("linf:0.1,steps=5", "attacks is 'linf:0.1,steps=5'; it must be a budget such as .*, its size a number"),
    ):
        with pytest.raises(ConfigError, match=message):
            specs(attacks, 1)


def test_the_adaptive_attack_knows_the_auto_encoder(images: tuple[Tensor, Tensor]) -> None:
    shapes = Shapes(image_size=28, channels=1, num_classes=10, sizes=(28, 14, 7))
    net = build_net(TrainConfig(width=4), shapes)
    x, y = images
    attacks = ["pgd:eps=0.3,steps=2", "adaptive:eps=0.3,steps=2"]
    options: dict[str, Any] = {"reliability_images": 0, "progress": False}
    result = defendpp.evaluate(net.classifier, x[:4], y[:4], attacks, autoencoder=net.autoencoder, **options)
    assert result.record.models["model"].autoencoder
    assert not torch.equal(result.examples("adaptive"), result.examples("pgd"))
    alone = defendpp.evaluate(net.classifier, x[:4], y[:4], attacks, **options)
    assert "adaptive:eps=0.3,steps=2" not in set(alone.to_dataframe().attack)
    assert alone.directory.rpartition("/")[2] != result.directory.rpartition("/")[2]  # Storages keep both.
    with pytest.raises(ConfigError, match="autoencoder is 'Linear'; it must be an AutoEncoder"):
        defendpp.evaluate(net.classifier, x, y, attacks, autoencoder=nn.Linear(1, 1), **options)


# -- what cannot be evaluated ---------------------------------------------------------------------


def case(change: Callable[[Tensor, Tensor], tuple[Any, Any]], message: str) -> Any:
    return pytest.param(change, message, id=message[:40])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        case(lambda x, y: (x * 255, y), r"images reach from 0 to 255; they must be in \[0,1\]: divide them by 255"),
        case(lambda x, y: ((x - 0.5) / 0.5, y), "reach from -1 to 1; .* let the network normalise them"),
        case(lambda x, y: ((x * 255).byte(), y), "images are uint8; .* divide pixels of 0 to 255 by 255"),
        case(lambda x, y: (x.index_fill(0, torch.tensor([3]), torch.nan), y), "1 of 30 images .* is image 3"),
        case(lambda x, y: (x[0], y), r"images have the shape \[1, 28, 28\]; they must be \[N,C,W,W\]"),
        case(lambda x, y: (x.permute(0, 2, 3, 1), y), r"images.transpose\(0, 3, 1, 2\)"),
        case(lambda x, y: (x[:0], y[:0]), r"images have the shape \[0, 1, 28, 28\]"),
        case(lambda x, y: (x.tolist(), y), "images are of type list; they must be a torch tensor or a NumPy array"),
        case(lambda x, y: (x, y[:-1]), r"labels have the shape \[29\]; for 30 images it must be \[30\]"),
        case(lambda x, y: (x, y.float()), "labels are float32; they must be whole numbers"),
        case(lambda x, y: (x, nn.functional.one_hot(y, 10)), r"labels have the shape \[30, 10\]; .*labels.argmax\(1\)"),
        case(lambda x, y: (x, y - 1), "is -1; classes count from 0"),
        case(lambda x, y: (x, y + 1), "is 10, but model has 10 classes, 0 to 9"),
        case(lambda x, y: (x[..., :14, :14], y), "model does not take images of float32 .* Wrap it"),
    ],
)
def test_images_and_labels_that_are_refused(
    network: nn.Module,
    images: tuple[Tensor, Tensor],
    change: Callable[[Tensor, Tensor], tuple[Any, Any]],
    message: str,
) -> None:
    with pytest.raises((DataError, ConfigError), match=message):
        defendpp.evaluate(network, *change(*images), "fgsm:eps=0.1", progress=False)


class Tupled(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x.flatten(1)[:, :10], x


class Counting(nn.Module):
    """A network with a state of its own: it counts its passes in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1  # type: ignore[operator]
        return x.flatten(1)[:, 300:310]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda x: x, {}, "model is <function .*; it must be an nn.Module that maps images"),
        (Tupled(), {}, r"model returns tuple for 8 images; it must return logits \[8,K\]"),
        (nn.Identity(), {}, r"model returns a tensor \[8, 1, 28, 28\] for 8 images"),
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 1)), {}, r"model returns a tensor \[8, 1\]"),
        (Counting(), {}, "model changed its own parameters or buffers while it was evaluated"),
        (nn.Linear(2, 2).to("meta"), {}, "model is on meta"),
        (Counting(), {"name": "a/b"}, "name is 'a/b'; it must be 1 to 100 bytes"),
        (Counting(), {"against": {"model": Counting()}}, "it must be other names than 'model'"),
        (Counting(), {"storage": "/proc/nowhere"}, "storage /proc/nowhere is not writable"),
        (Counting(), {"chunk_size": 0}, "evaluation.chunk_size is 0; it must be at least 1"),
    ],
)
def test_networks_that_are_refused(
    images: tuple[Tensor, Tensor], model: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=message) as raised:
        defendpp.evaluate(model, *images, "fgsm:eps=0.1", reliability_images=0, progress=False, **options)
    assert isinstance(raised.value, defendpp.UserError)


def test_a_network_that_changes_itself_leaves_no_results_for_the_next_call(
    images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    model = Counting()
    for _ in range(2):
        model.load_state_dict({"passes": torch.zeros(())})
        with pytest.raises(ConfigError, match="model changed its own parameters or buffers"):
            defendpp.evaluate(model, *images, "fgsm:eps=0.1", reliability_images=0, storage=tmp_path, progress=False)


def test_a_network_is_not_compared_with_itself(network: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ConfigError, match="against is the same network as model"):
        defendpp.evaluate(network, *images, "fgsm:eps=0.1", against=network, progress=False)


def test_probabilities_get_a_warning_and_a_flag(network: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    with pytest.warns(UserWarning, match="model returns probabilities. Attacks need the logits") as caught:
        result = defendpp.evaluate(
            nn.Sequential(*network, nn.Softmax(1)), x[:8], y[:8], "fgsm:eps=0.1", reliability_images=8, progress=False
        )
    assert caught[0].filename == __file__
    assert "not_logits" in {flag["name"] for flag in result.flags}
    assert "not logits" in str(result)
    assert "not logits" in result._repr_html_()


def test_numpy_and_float64_are_taken_as_they_are_meant(network: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    options: dict[str, Any] = {"reliability_images": 0, "progress": False}
    first = defendpp.evaluate(network, x[:8], y[:8], "pgd:eps=0.1,steps=2", **options)
    second = defendpp.evaluate(network, x[:8].double().numpy(), y[:8].numpy(), "pgd:eps=0.1,steps=2", **options)
    assert torch.equal(first.examples("pgd"), second.examples("pgd"))


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("torch", "ray", "mlflow", "numpy", "pandas", "matplotlib")
    script = f"import sys, defendpp; dir(defendpp); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_of_the_package_is_there() -> None:
    assert set(dir(defendpp)) == set(defendpp.__all__)
    assert all(getattr(defendpp, name).__doc__ for name in defendpp.__all__)
    with pytest.raises(AttributeError, match="evaluat"):
        defendpp.evaluat  # noqa: B018
    # What pipeline.api imports is no part of it, and it is no package with modules of its own.
    assert [name for name in ("__path__", "logging", "evaluation", "runs") if hasattr(defendpp, name)] == []
