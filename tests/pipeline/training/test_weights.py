"""Files of weights in the shapes that the field saves them in, and what is said of those that are none."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import odd_networks
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from own_network import Net
from safetensors.torch import save as safetensors_save
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from components.config import Experiment, TrainConfig, level_sizes
from components.config.data import Shapes
from components.errors import ConfigError, DataError, UserError
from components.models import libraries
from components.models.weights import load_strictly, renamed
from components.network import build_net
from pipeline.cli.recipe_arguments import parse_experiment
from pipeline.runtime.storage import Storage
from pipeline.training import exports, pretrained, train

SHAPES = Shapes(image_size=28, channels=1, num_classes=10, sizes=level_sizes(28))


def weights(make: Callable[..., nn.Module] | None = None) -> dict[str, Tensor]:
    """Return a state_dict that no untrained network has."""
    torch.manual_seed(11)
    net = Net(1, 10) if make is None else make(num_classes=10, channels=1, image_size=28, width=64)
    return net.state_dict()


def prefixed(prefix: str, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in (state or weights()).items()}


def config_of(file: Path | str, arch: str = "own_network:make") -> TrainConfig:
    return TrainConfig(arch=arch, defense="none", epochs=0, pretrained=str(file))


def loaded(file: Path | str, arch: str = "own_network:make") -> nn.Module:
    """Load a file as a run does: read, copied to the storage, and loaded from there."""
    config = config_of(file, arch)
    return build_net(config, SHAPES, pretrained.read(config))


def said_of(file: Path, arch: str = "own_network:make") -> str:
    """Return the one error that a file leads to, without a warning beside it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError) as caught:
            loaded(file, arch)
    message = str(caught.value)
    assert "\x1b" not in message
    assert "weights_only argument" not in message
    assert len(message) < 1200, message
    return message


# --- what loads

CHECKPOINTS: dict[str, Any] = {
    "a state_dict": lambda: weights(),
    "torch.compile": lambda: prefixed("_orig_mod."),
    "DDP": lambda: prefixed("module."),
    "DDP of torch.compile": lambda: prefixed("module._orig_mod."),
    "DDP twice": lambda: prefixed("module.module."),
    "one compiled layer": lambda: {k.replace("head.", "head._orig_mod."): v for k, v in weights().items()},
    "kuangliu": lambda: {"net": prefixed("module."), "acc": 95.1, "epoch": 199},
    "PyTorch's tutorial": lambda: {
        "epoch": 5,
        "model_state_dict": weights(),
        "optimizer_state_dict": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": []},
        "loss": torch.tensor(0.4),
    },
    "torchvision's references": lambda: {
        "model": weights(),
        "optimizer": {},
        "args": argparse.Namespace(model="resnet18", lr=0.1, output=Path("here")),
    },
    "a NumPy scalar": lambda: {"state_dict": weights(), "best_acc1": np.float64(93.2), "history": np.arange(3)},
    "Lightning": lambda: {"state_dict": prefixed("model."), "hyper_parameters": {"lr": 0.1}, "epoch": 7},
    "Lightning and torch.compile": lambda: {"state_dict": prefixed("net.model._orig_mod.")},
    "timm's average alone": lambda: {"state_dict_ema": weights(), "arch": "net"},
    "nested twice": lambda: {"ema": {"decay": 0.999, "module": weights()}},
    "an average of torch's": lambda: {"n_averaged": torch.tensor(7), **prefixed("module.")},
    "a tensor beside it": lambda: {"weights": weights(), "accuracy": torch.tensor([0.9, 0.8])},
    "statistics beside its tensors": lambda: {**weights(), "stats": {"mean": torch.zeros(3)}, "epoch": 3},
    "entries without a tensor": lambda: {"state_dict": {**weights(), "extra": None, "version": 2}, "loss": 0.1},
    "statistics within it": lambda: {"state_dict": {**weights(), "stats": {"covariance": torch.eye(3)}}},
    "a class of the script's own": lambda: {"net": weights(), "config": Settings(lr=0.1)},
    "parameters": lambda: {k: nn.Parameter(v) for k, v in weights().items()},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_of_the_fields_usual_shapes_loads(tmp_path: Path, name: str, legacy: bool) -> None:
    torch.save(CHECKPOINTS[name](), tmp_path / "c.pth", _use_new_zipfile_serialization=not legacy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = loaded(tmp_path / "c.pth").state_dict()
    assert all(torch.equal(state[k], v) for k, v in weights().items())


@pytest.mark.parametrize("make", ["module.", "net.", "_orig_mod.", "module.module.", ""])
def test_a_wrapper_takes_weights_with_and_without_its_own_prefix(tmp_path: Path, make: str) -> None:
    torch.save(prefixed(make), tmp_path / "c.pth")
    state = loaded(tmp_path / "c.pth", "odd_networks:wrapped").state_dict()
    assert all(torch.equal(state[f"module.{k}"], v) for k, v in weights().items())


def test_prefixes_are_dropped_before_a_librarys_older_keys_are_renamed() -> None:
    densenet = pytest.importorskip("torchvision.models.densenet")
    net = densenet.DenseNet(growth_rate=4, block_config=(2,), num_init_features=8, num_classes=10)
    old = {f"_orig_mod.{k.replace('.norm1.', '.norm.1.')}": v for k, v in net.state_dict().items()}
    load_strictly(net, libraries.tensors_for("torchvision:densenet121", renamed(net, old)), "c.pth")


def test_the_format_is_told_by_the_content(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "a.pth")
    torch.save(weights(), tmp_path / "b.safetensors")
    for name in ("a.pth", "b.safetensors"):
        state = loaded(tmp_path / name).state_dict()
        assert all(torch.equal(state[k], v) for k, v in weights().items())


def test_of_several_networks_in_a_file_one_is_named(tmp_path: Path) -> None:
    file, other = tmp_path / "two.pth", {k: v + 1 for k, v in weights().items()}
    torch.save({"generator": other, "teacher": {"net": weights()}, "epoch": 3}, file)
    assert f"{file}#teacher.net" in said_of(file)
    assert f"{file}#generator" in said_of(file)
    assert torch.equal(loaded(f"{file}#teacher.net").state_dict()["head.bias"], weights()["head.bias"])
    assert torch.equal(loaded(f"{file}#generator").state_dict()["head.bias"], other["head.bias"])
    with pytest.raises(DataError, match=r"no weights under 'student'.*generator, teacher\.net"):
        loaded(f"{file}#student")


def test_tensors_beside_a_network_are_one_of_their_own(tmp_path: Path) -> None:
    file, other = tmp_path / "two.pth", {k: v + 1 for k, v in weights().items()}
    torch.save({**weights(), "teacher": other}, file)
    said = said_of(file)
    assert f"{file}#teacher" in said
    assert "save the tensors at its top alone" in said
    assert torch.equal(loaded(f"{file}#teacher").state_dict()["head.bias"], other["head.bias"])


def test_of_usual_names_the_first_is_taken_and_said(tmp_path: Path) -> None:
    file, average = tmp_path / "two.pth", {k: v + 1 for k, v in weights().items()}
    torch.save({"state_dict": weights(), "state_dict_ema": average}, file)
    config = config_of(file)
    read = pretrained.read(config)
    assert torch.equal(read["head.bias"], weights()["head.bias"])
    assert f"{file}#state_dict_ema" in read.note
    assert pretrained.read(config_of(f"{file}#state_dict_ema")).note == ""
    assert torch.equal(loaded(f"{file}#state_dict_ema").state_dict()["head.bias"], average["head.bias"])


def test_a_file_name_may_hold_the_sign_that_names_a_key(tmp_path: Path) -> None:
    file = tmp_path / "run #3.pth"
    torch.save({"teacher": weights(), "other": prefixed("x.")}, file)
    assert f"{file}#teacher" in said_of(file)
    loaded(f"{file}#teacher")


# --- one tensor under two names


def test_tied_tensors_load_and_are_saved(tmp_path: Path) -> None:
    """All names in the file, or only some, as safetensors' save_model leaves them."""
    torch.manual_seed(11)
    net = odd_networks.Tied(1, 10)
    torch.save(net.state_dict(), tmp_path / "tied.pth")
    save_model(net, str(tmp_path / "tied.safetensors"))
    for name in ("tied.pth", "tied.safetensors"):
        config, root = config_of(tmp_path / name, "odd_networks:tied"), Storage(tmp_path / "root")
        copied = pretrained.load(root, pretrained.fetch(config, root))
        taken = build_net(config, SHAPES, copied)
        exports.export(root, taken, config, SHAPES)
        again = exports.load_classifier(root.uri, trusted=["odd_networks:tied"])
        for k, v in net.state_dict().items():
            assert torch.equal(again.state_dict()[k], v), k


def test_tied_tensors_that_differ_in_the_file_are_refused(tmp_path: Path) -> None:
    state = weights(odd_networks.tied)
    state["layers.0.weight"] = state["layers.0.weight"] + 1
    torch.save(state, tmp_path / "c.pth")
    said = said_of(tmp_path / "c.pth", "odd_networks:tied")
    assert "first.weight" in said
    assert "layers.0.weight" in said
    assert "one tensor" in said


# --- what does not load


def test_weights_that_do_not_fit_are_told_in_a_few_lines(tmp_path: Path) -> None:
    state = prefixed("model.", {k: v for k, v in weights().items() if k != "second.bias"})
    for i in range(9):
        state[f"model.more.{i}"] = torch.zeros(1)
    state["model.first.weight"] = torch.zeros(4, 3, 3, 3)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "c.pth")
    said = said_of(tmp_path / "c.pth")
    assert "another architecture" in said
    assert "4 of the 6 tensors of Net fit" in said
    assert "missing: second.bias" in said
    assert "too many: more.0, more.1, more.2 and 6 more" in said
    assert "first.weight is 4x3x3x3 in the file, 4x1x3x3 in the network" in said
    assert "state_dict, epoch" in said
    assert len(said.splitlines()) <= 6


class Settings(dict[str, Any]):
    """A dictionary with attributes, such as EasyDict and OmegaConf have."""


def _module() -> bytes:
    buffer = io.BytesIO()
    torch.save(Net(1, 10), buffer)
    return buffer.getvalue()


def _nested_module() -> bytes:
    buffer = io.BytesIO()
    torch.save({"epoch": 1, "ema": None, "model": Net(1, 10)}, buffer)
    return buffer.getvalue()


def _script() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(Net(1, 10), torch.zeros(1, 1, 28, 28)), buffer)
    return buffer.getvalue()


def _zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("net.pth", b"x")
    return buffer.getvalue()


def _numpy() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


def _torch(value: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 46830571\n"
NO_WEIGHTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a module": (_module, r"whole pickled module \(own_network\.Net\).*weights_only=False\)\.state_dict\(\)"),
    "a module in a dictionary": (
        _nested_module,
        r"whole pickled module.*weights_only=False\)\['model'\]\.state_dict\(\)",
    ),
    "a module of before 2020": (
        lambda: _torch(Net(1, 10), _use_new_zipfile_serialization=False),
        r"whole pickled module.*weights_only=False\)\.state_dict\(\)",
    ),
    "a dictionary beside it": (lambda: _torch({"args": Settings(lr=1), "net": {}}), r"(cannot be read|no dictionary)"),
    "TorchScript": (_script, r"TorchScript.*torch\.jit\.load\(.*\)\.state_dict\(\)"),
    "Git LFS": (lambda: POINTER, r"Git LFS pointer.*46830571.*git lfs pull"),
    "HTML": (lambda: b"\n<!DOCTYPE html><html><head>", r"HTML page.*download"),
    "XML": (lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', r"XML.*AccessDenied"),
    "JSON": (lambda: b'{"error": "Repository not found"}', r"JSON.*Repository not found"),
    "text": (lambda: b"Invalid username or password.", r"text.*Invalid username"),
    "nothing": (lambda: b"", r"is empty"),
    "zeros": (lambda: b"\0" * 4096, r"zero bytes"),
    "gzip": (lambda: b"\x1f\x8b\x08\0" + b"x" * 40, r"gzip.*unpack"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + b"x" * 40, r"HDF5"),
    "a zip archive": (_zipped, r"zip archive.*net\.pth.*unpack"),
    "NumPy": (_numpy, r"NumPy"),
    "a torch file cut short": (lambda: _torch(weights())[:-600], r"cut short"),
    "a safetensors file cut short": (lambda: safetensors_save(weights())[:-60], r"cut short.*60 bytes"),
    "a legacy file cut short": (
        lambda: _torch(weights(), _use_new_zipfile_serialization=False)[:-60],
        r"cut short|copy it again",
    ),
    "a list": (lambda: _torch([1, 2]), r"holds no dictionary of tensors.*list"),
    "a tensor": (lambda: _torch(torch.zeros(3)), r"holds no dictionary of tensors.*Tensor"),
    "a dictionary of others": (lambda: _torch({"epoch": 3, "lr": 0.1}), r"holds no dictionary of tensors.*epoch, lr"),
    "an empty dictionary": (lambda: _torch({}), r"holds no dictionary of tensors"),
    "a quantised tensor": (
        lambda: _torch({"w": odd_networks.quantized()}),
        r"'w'.*quantised",
    ),
    "a sparse tensor": (lambda: _torch({"w": torch.eye(3).to_sparse()}), r"'w'.*sparse"),
    "a tensor without data": (lambda: _torch({"w": torch.zeros(3, device="meta")}), r"'w'.*without data"),
    "a numpy dictionary": (lambda: _torch({"w": np.zeros(3)}), r"holds no dictionary of tensors"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_a_file_that_holds_no_weights_says_what_it_is(tmp_path: Path, name: str, suffix: str) -> None:
    make, expected = NO_WEIGHTS[name]
    path = tmp_path / f"file{suffix}"
    path.write_bytes(make())
    said = said_of(path)
    assert str(path) in said
    with pytest.raises(AssertionError, match=f"(?s){expected}"):
        raise AssertionError(said)


def test_what_a_file_is_comes_before_what_its_network_is(tmp_path: Path) -> None:
    (tmp_path / "net.safetensors").write_bytes(POINTER)
    with pytest.raises(DataError, match="Git LFS pointer"):
        parse_experiment("attack", ["--model", str(tmp_path / "net.safetensors")])


def test_code_in_a_file_does_not_run(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path.touch, (tmp_path / "harm",)  # type: ignore[return-value]

    class Blocked:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            import os

            return os.mkdir, (str(tmp_path / "harm"),)

    for harm in (Harmful(), Blocked()):
        file = tmp_path / "c.pth"
        torch.save({"args": harm, "state_dict": weights()}, file)
        with contextlib.suppress(DataError):
            loaded(file)
        assert not (tmp_path / "harm").exists()


_LEAVES = st.one_of(
    st.none(),
    st.integers(-3, 3),
    st.text(max_size=3),
    st.builds(argparse.Namespace, a=st.integers(0, 3)),
    st.sampled_from(
        [
            torch.zeros(2),
            torch.tensor(3),
            torch.zeros(0),
            torch.ones(2, dtype=torch.complex128),
            torch.zeros(2, device="meta"),
            torch.eye(2).to_sparse(),
            np.float32(2),
            np.zeros(2),
            nn.Linear(1, 1),
            weights(),
            prefixed("module."),
            list(weights().values()),
        ]
    ),
)
_KEYS = st.one_of(st.sampled_from(["state_dict", "model", "net", "module.w", "", ".", "a.b"]), st.integers(0, 2))
_NESTED = st.recursive(_LEAVES, lambda inner: st.dictionaries(_KEYS, inner, max_size=4) | st.lists(inner, max_size=2))
_QUICK = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def loads_or_says_why(file: Path) -> None:
    """Load a file on the whole way of a run. Any exception that is not a UserError fails the test."""
    config, root = config_of(file), Storage(file.parent / "root")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with contextlib.suppress(UserError):
            build_net(config, SHAPES, pretrained.load(root, pretrained.fetch(config, root)))


@_QUICK
@given(value=_NESTED, legacy=st.booleans())
@example(value=weights(), legacy=False)
def test_any_nesting_loads_or_is_refused_with_one_error(tmp_path: Path, value: Any, legacy: bool) -> None:
    try:
        data = _torch(value, _use_new_zipfile_serialization=not legacy)
    except Exception:  # torch cannot save it, so there is no such file
        return
    (tmp_path / "c.pth").write_bytes(data)
    loads_or_says_why(tmp_path / "c.pth")


_WHOLE = [
    _torch({"state_dict": weights(), "args": argparse.Namespace(a=1)}),
    _torch(weights(), _use_new_zipfile_serialization=False),
    safetensors_save(weights()),
    _module(),
    _script(),
]


@_QUICK
@given(data=st.data(), whole=st.sampled_from(range(len(_WHOLE))), suffix=st.sampled_from([".pth", ".safetensors"]))
def test_any_damage_is_refused_with_one_error(tmp_path: Path, data: st.DataObject, whole: int, suffix: str) -> None:
    content = bytearray(_WHOLE[whole])
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(content)))
    (tmp_path / f"c{suffix}").write_bytes(content[:end])
    loads_or_says_why(tmp_path / f"c{suffix}")


@_QUICK
@given(content=st.binary(max_size=200))
def test_any_bytes_are_refused_with_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.pth").write_bytes(content)
    loads_or_says_why(tmp_path / "c.pth")


# --- networks that cannot be saved, or not be loaded again, are refused before training


def check(arch: str, **changes: Any) -> None:
    config = TrainConfig(**{"arch": f"odd_networks:{arch}", "defense": "none", "epochs": 1, **changes})
    train.check_models(Experiment(name="t", train=config, models=("one",)), SHAPES)


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ("with_complex128", r"'more' .*complex128"),
        ("with_quantized", r"'more' .*quantised"),
        ("with_sparse", r"'more' .*sparse"),
        ("with_expanded", r"single memory location"),
        ("extra", r"'_extra_state' .*dict"),
        ("hooked", r"gives other outputs"),
        ("drawn", r"gives other outputs"),
        ("remembering", r"gives other outputs"),
        ("in_place", r"InPlace changes its images in place"),
        ("in_place_in_training", r"InPlaceInTraining changes its images in place"),
        ("a_tuple", r"a tuple of 2"),
        ("a_dict", r"a dict with logits"),
    ],
)
def test_a_network_that_would_be_lost_is_refused_before_it_is_trained(arch: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^train\.arch is 'odd_networks:{arch}'; .*{said}"):
        check(arch)


@pytest.mark.parametrize("arch", ["tied", "robustbench", "wrapped", "normalizing", "with_view", "with_complex"])
def test_a_network_of_unusual_tensors_is_exported_and_loaded_again(tmp_path: Path, arch: str) -> None:
    check(arch)
    config = TrainConfig(arch=f"odd_networks:{arch}", defense="none")
    net = build_net(config, SHAPES).eval()
    exports.export(Storage(tmp_path), net, config, SHAPES)
    again = exports.load_classifier(tmp_path, trusted=f"odd_networks:{arch}")
    assert torch.equal(again(torch.ones(2, 1, 28, 28)), net(torch.ones(2, 1, 28, 28)))


def test_every_network_with_an_adapter_is_checked_with_its_auto_encoder() -> None:
    """Both parts are exported, so both are tried."""
    shapes = dataclasses.replace(SHAPES, sizes=(28, 14))
    config = TrainConfig(arch="odd_networks:with_adapter", shared_blocks=1)
    train.check_models(Experiment(name="t", train=config, models=("one", "bare:defense=none")), shapes)
    parts = exports.check_export(build_net(config, shapes), config, shapes)
    assert parts == ["classifier", "autoencoder"]


def test_a_submodule_called_normalize_is_the_networks_own(tmp_path: Path) -> None:
    """RobustBench's wrapper: its keys are those of the published files, and its constants take part."""
    torch.save(weights(odd_networks.robustbench), tmp_path / "rb.pth")
    net = loaded(tmp_path / "rb.pth", "odd_networks:robustbench").eval()
    assert {"normalize.mean", "normalize.std", "model.head.bias"} < set(net.state_dict())


def test_normalisation_does_not_take_a_networks_own_names() -> None:
    config = TrainConfig(arch="odd_networks:normalizing", defense="none", normalize_mean=(0.25,), normalize_std=(0.5,))
    net = build_net(config, SHAPES).eval()
    plain = build_net(TrainConfig(arch="odd_networks:normalizing", defense="none"), SHAPES).eval()
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(net(images), plain((images - 0.25) / 0.5))
