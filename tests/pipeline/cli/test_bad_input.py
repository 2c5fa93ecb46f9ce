"""A corpus of bad input: each ends in one clear error before compute is spent. docs/errors.md is made from it.

    python tests/pipeline/cli/test_bad_input.py --write    # after a change of CASES

A case is: what a user gave, the arguments, a part of the message that names the cause, and one that names the remedy.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import io
import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from components.fields import to_dict
from pipeline.main import main
from pipeline.recipes.registry import RECIPES

ROOT = Path(__file__).resolve().parents[3]
SAMPLE = ROOT / "pipeline" / "data" / "mnist-sample"
PAGE = ROOT / "docs" / "errors.md"
LINES = 7
"""The longest error, in lines."""
SMALL = "run mnist-smoke --models a:defense=none --evaluation.threat-models white_box"
"""A run of one undefended model, whose checks are quick."""
GIVEN = "attack --model {here}/weights.pth"

# -- files that users have -------------------------------------------------------------------------------------------------


def parquet(here: Path, **changes: list[Any]) -> None:
    """Write train.parquet and test.parquet of 40 images; ``changes`` replace columns of the training table."""
    for split in ("train", "test"):
        columns: dict[str, list[Any]] = {
            "image": [{"bytes": png(28, i % 10), "path": None} for i in range(40)],
            "label": [i % 10 for i in range(40)],
        }
        columns |= changes if split == "train" else {}
        pq.write_table(pa.table({k: v for k, v in columns.items() if v}), here / f"{split}.parquet")


def png(size: int, value: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (size, size), value).save(file, "png")
    return file.getvalue()


def folders(here: Path, *, splits: tuple[str, ...] = ("train", "test"), classes: tuple[str, ...] = ()) -> None:
    """Write SPLIT/CLASS/0.png for each of ten classes, or of ``classes``."""
    for split in splits:
        for name in classes or [f"class{i}" for i in range(10)]:
            directory = here / split / name
            directory.mkdir(parents=True)
            (directory / "0.png").write_bytes(png(28, 9))


def weights(here: Path, state: object = None) -> None:
    torch.save({"weight": torch.zeros(2, 2)} if state is None else state, here / "weights.pth")


def record(here: Path, **changes: Any) -> None:
    """Write run.json with the experiment of mnist-smoke, changed."""
    (here / "run.json").write_text(json.dumps({"experiment": {**to_dict(RECIPES["mnist-smoke"].make()), **changes}}))


def text(name: str, content: str) -> Callable[[Path], None]:
    def write(here: Path) -> None:
        (here / name).write_text(content)

    return write


def space(parameters: str, more: str = "") -> Callable[[Path], None]:
    return text(
        "space.py",
        "from components.search_space import *\n" + f"SPACE = Space(parameters={{{parameters}}}, **dict({more}))\n",
    )


def sample_without_a_class(here: Path) -> None:
    parquet(here, label=[i % 9 for i in range(40)])


def row_17(here: Path, column: str, value: object) -> None:
    values: list[Any] = [{"bytes": png(28, 1), "path": None}] * 40 if column == "image" else [i % 10 for i in range(40)]
    values[17] = value
    parquet(here, **{column: values})


# -- the corpus ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One kind of bad input."""

    given: str
    """What the user gave, in words."""
    arguments: str
    """The command's arguments. {here} is a new directory that ``make`` fills."""
    says: str
    """The part of the message that names the cause."""
    do: str
    """The part of the message that names the remedy."""
    make: Callable[[Path], object] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    without: str = ""
    """A package that must not be installed for this to be wrong."""


def override(option: str, says: str, do: str, given: str = "", arguments: str = SMALL, without: str = "") -> Case:
    """A recipe with one wrong field."""
    return Case(given or f"`{option}`", f"{arguments} {option}", says, do, without=without)


CASES: dict[str, list[Case]] = {
    "The command": [
        Case("a typo in the command", "rnu mnist-demo", "unknown command 'rnu'", "did you mean run?"),
        Case("no such command", "frobnicate", "unknown command 'frobnicate'", "there are run, pyramids, train"),
        Case("an option in place of the command", "--storage /x", "unknown command '--storage'", "there are run"),
        Case("a typo in the recipe", "run mnist-dmeo", "unknown recipe 'mnist-dmeo'", "did you mean mnist-demo"),
        Case("no such recipe", "run xyzzy", "unknown recipe 'xyzzy'", "`defendpp recipes` lists what there is"),
        Case("an option before the recipe", "train --train.lr 1", "the recipe comes before --train.lr", "defendpp train RECIPE"),
        Case("an empty recipe", "run ''", "unknown recipe ''", "`defendpp recipes` lists what there is"),
        Case("a typo in a field", "run mnist-demo --train.lamda 1", "unknown option '--train.lamda'", "did you mean --train.lam"),
        Case("no such field", "run mnist-demo --xyzzy 3", "unknown option '--xyzzy'", "`defendpp run mnist-demo --help` lists what there is"),
        Case("a field without its section", "run mnist-demo --epochs 3", "unknown option '--epochs'", "did you mean --train.epochs?"),
        Case("a word too many", "run mnist-demo extra", "'extra' belongs to no option", "`defendpp run mnist-demo --help` lists the options"),
        Case("a field without its value", "run mnist-demo --train.epochs", "--train.epochs: expected one argument", "--help"),
        Case("text where a whole number is wanted", "run mnist-demo --train.epochs many", "--train.epochs is 'many'", "it must be a whole number"),
        Case("text where a number is wanted", "run mnist-demo --train.lr fast", "--train.lr is 'fast'", "it must be a number"),
        Case("a value that is none of a field's choices", "run mnist-demo --train.defense armour", "--train.defense is 'armour'", "it must be one of none, defend++"),
        Case("a typo in a field's choice", "run mnist-demo --train.defense advesarial", "--train.defense is 'advesarial'", "did you mean adversarial?"),
        Case("a value for a switch", "run mnist-demo --scaling.gpu maybe", "'maybe' follows --scaling.gpu, which takes no value", "--scaling.gpu turns it on, --scaling.no-gpu off"),
        Case("a scale that does not exist", "recipes --scale slimm", "--scale is 'slimm'", "did you mean slim?"),
        Case("a typo in an option of `recipes`", "recipes --jsn", "unrecognized arguments: --jsn", "`defendpp recipes --help`"),
        Case("completion for another shell", "--print-completion ksh", "--print-completion is 'ksh'", "it must be one of bash, zsh, fish"),
        Case("`ui` of a storage without MLflow", "ui --storage {here}", "there is no MLflow database {here}/mlflow.db", "name the storage of your runs with --storage"),
        Case("`ui` of a file that is no database", "ui --storage {here}", "{here}/mlflow.db is no MLflow database", "another storage with --storage", lambda here: text("mlflow.db", "no database, but text that is long enough")(here)),
        Case("`ui` on a port that does not exist", "ui --storage {here} --port 70000", "--port is 70000", "it must be 1 to 65535"),
        Case("bytes that are not UTF-8", "run mnist-demo --storage /tmp/\udcff", "'/tmp/\\udcff' is not UTF-8", "rename the file"),
    ],
    "Names": [
        override("--name ../../evil", "name is '../../evil'", "it must be 1 to 100 bytes of letters, digits, _ - + and ."),
        override("--name ''", "name is ''", "it must be 1 to 100 bytes of letters, digits, _ - + and ."),
        override(f"--name {'x' * 101}", "name is 'xxx", "it must be 1 to 100 bytes", "a name of 101 letters"),
        override("--models ../evil:defense=none", "the name in '../evil:defense=none' is '../evil'", "it must be 1 to 100 bytes of letters, digits"),
        override("--models 'my net:defense=none'", "is 'my net'", "it must be 1 to 100 bytes of letters, digits"),
        Case("`attack --model FILE --name a/b`", f"{GIVEN} --arch resnet18 --name a/b", "is 'attack-a/b'", "it must be 1 to 100 bytes of letters, digits", weights),
        Case("a space file called `o'neil (copy).py`", "sweep mnist-smoke --space \"{here}/o'neil (copy).py\"", "name of the --space file", "it must be 1 to 100 bytes of letters, digits", lambda here: text("o'neil (copy).py", "")(here)),
    ],
    "Settings of the data": [
        override("--data.source cifar", "data.source is 'cifar'", "it must be sample:mnist, parquet:DIR, folder:DIR"),
        override("--data.source http://x/y.zip", "data.source is 'http://x/y.zip'", "it must be sample:mnist, parquet:DIR, folder:DIR"),
        override("--data.source parquet:", "data.source is 'parquet:'", "it must be sample:mnist, parquet:DIR"),
        override("--data.source sample:cifar", "data.source is 'sample:cifar'", "it must be sample:mnist"),
        override("--data.source hf:cifar10", "data.source is 'hf:cifar10'", "it must be hf:ORG/NAME, hf:ORG/NAME@REVISION"),
        override("--data.source torchvision:svhn", "data.source is 'torchvision:svhn'", "it must be torchvision:mnist or torchvision:cifar10"),
        override("--data.image-size 6", "data.image_size is 6", "it must be at least 7 pixels"),
        override("--data.image-size 100000", "data.image_size is 100000", "it must be at most 16384 pixels"),
        override("--data.num-classes 100000000000", "data.num_classes is 100000000000", "it must be 2 to 1000000"),
        override("--data.image-size 32", "28x28 pixels, but data.image_size is 32", "set --data.image-size, or --data.resize crop"),
        override("--data.channels 2", "data.channels is 2", "it must be 1 (grey) or 3 (RGB)"),
        override("--data.num-classes 1", "data.num_classes is 1", "it must be 2 to 1000000"),
        override("--data.num-classes 5", "but data.num_classes is 5", "set --data.num-classes"),
        override("--data.validation-fraction 1", "data.validation_fraction is 1.0", "it must be in [0, 1)"),
        override("--data.validation-fraction nan", "data.validation_fraction is nan", "it must be in [0, 1)"),
        override("--data.train-limit -1", "data.train_limit is -1", "it must be 0 (all) or more"),
        override("--data.test-limit -5", "data.test_limit is -5", "it must be 0 (all) or more"),
        override("--data.train-limit 20 --data.validation-fraction 0.05 --scaling.workers 4", "the validation split has", "lower --scaling.workers", "fewer validation images than workers"),
    ],
    "Settings of the models and their training": [
        override("--models", "models is ()", "it must be at least one model, e.g. --models undefended:defense=none", arguments="run mnist-smoke"),
        override("--models a:defence=none", "unknown field of models[a]: 'defence'", "did you mean defense?"),
        override("--models a:defense", "'defense' in 'a:defense' is not FIELD=VALUE", "the form is NAME:FIELD=VALUE"),
        override("--models a:defense=armour", "models[a].defense is 'armour'", "it must be one of none, defend++"),
        override("--models a:width=8,width=9", "'a:width=8,width=9' sets width twice", "leave one out"),
        override("--models a:width=wide", "models[a].width is 'wide'", "it must be a whole number"),
        override("--models a:channels_last=yes", "models[a].channels_last is 'yes'", "it must be true or false"),
        override("--models a:normalize_mean=0.5", "models[a].normalize_mean cannot be set for one model", "as an option"),
        override("--models a:defense=none a:seed=1", "two models have the name 'a'", "give each a name of its own"),
        override("--models a:defense=none b:defense=none", "b is the same network as a", "another seed"),
        override("--models a:defense=comdefend", "a needs an undefended model", "add one, e.g. undefended:defense=none"),
        override("--models a:seed=1", "a needs an undefended model beside it, for transfer", "add one", arguments="run mnist-smoke"),
        override("--train.lam -1", "train.lam is -1.0", "it must be a finite number, 0 or more"),
        override("--train.lr 0", "train.lr is 0.0", "it must be a finite number above 0"),
        override("--train.lr nan", "train.lr is nan", "it must be a finite number above 0"),
        override("--train.momentum 1", "train.momentum is 1.0", "it must be in [0, 1)"),
        override("--train.epochs 0", "train.epochs is 0", "it must be at least 1; 0 takes given weights as they are: with --train.pretrained FILE"),
        override("--train.epochs -3", "train.epochs is -3", "it must be 0 or more"),
        override("--train.batch-size 0", "train.batch_size is 0", "it must be at least 1"),
        override("--train.batch-size 63 --scaling.workers 2", "models[a].batch_size is 63", "it must be a multiple of scaling.workers (2)"),
        override("--train.width 100000000", "train.width is 100000000", "it must be 1 to 4096 channels"),
        override(f"--train.epochs 1{'0' * 30}", "train.epochs is 1000", "it must be a number from -2**63 to 2**63 - 1", "a number of 31 digits"),
        override("--train.width 0", "train.width is 0", "it must be 1 to 4096 channels"),
        override("--train.shared-blocks 5", "train.shared_blocks is 5", "it must be 1 to 4"),
        override("--train.replace-head", "train.replace_head is True", "it must be False where no weights are given (--train.pretrained FILE"),
        override("--train.reformer-sigma 0", "train.reformer_sigma is 0.0", "it must be a finite number above 0"),
        override("--train.adversarial-eps 8", "train.adversarial_eps is 8.0", "it must be above 0, at most 1"),
        override("--train.adversarial-epochs 9", "train.adversarial_epochs is 9", "it must be 0 (all) to train.epochs, which is 2"),
        override("--train.channels-last", "models[a].channels_last is True", "--train.precision bfloat16 or --scaling.gpu"),
        override("--train.normalize-mean 0.1 --train.normalize-std 0", "train.normalize_std is (0.0,)", "it must be as many values as train.normalize_mean, all finite and above 0"),
        override("--train.normalize-mean 0.1 0.2 0.3 --train.normalize-std 1 1 1", "normalize_mean is (0.1, 0.2, 0.3)", "it must be one value per channel (1)"),
        override("--train.seed 9223372036854775808", "train.seed is 9223372036854775808", "it must be a number from -2**63 to 2**63 - 1", "`--train.seed` of 2**63"),
        override("--train.seed 7 --models a:defense=none,seed=1", "train.seed is 7", "it must be 0 where each of models names a seed of its own, as the recipes' do: set it there (--models NAME:seed=7"),
        override("--train.noise-location latent --models a:defense=none b:defense=adversarial", "noise_location is 'latent'", "it must be none with defense='adversarial', whose training adds no such noise; set it on the models that have it"),
        override("--train.schedule alternating --models a:seed=1", "train.epochs is 2", "it must be at least cycles * (autoencoder_epochs + classifier_epochs)"),
        override("--pyramids.levels 4", "pyramids.levels is 4", "it must be 1 to 3 at image size 28"),
        override("--pyramids.rows-per-shard -1", "pyramids.rows_per_shard is -1", "it must be 0 (by size) or more"),
        override("--seeds 0", "seeds is 0", "it must be at least 1"),
        override("--paper tabel1", "paper is 'tabel1'", "did you mean table1"),
        override("--figures fig9", "figures is 'fig9'", "it must be one of fig2"),
    ],
    "Settings of the evaluation and the cluster": [
        override("--evaluation.threat-models grey_box", "evaluation.threat_models is 'grey_box'", "it must be one of white_box, black_box", arguments="run mnist-smoke"),
        override("--evaluation.threat-models white_box white_box", "evaluation.threat_models is ('white_box', 'white_box')", "it must be at least one threat model, and each of them once", arguments="run mnist-smoke"),
        override("--evaluation.threat-models transfer:nobody", "evaluation.threat_models is 'transfer:nobody'", "it must be transfer: and one of the models control, defend, no_defense", arguments="run mnist-smoke"),
        override("--models a:defense=none --evaluation.threat-models transfer", "evaluation.threat_models is 'transfer'", "it must be left out, or --models must have a second model", arguments="run mnist-smoke"),
        override("--evaluation.threat-models black_box --evaluation.attacks pgd:eps=0.1", "evaluation.threat_models is 'black_box'", "it must be left out, or --evaluation.attacks must have an attack that needs no gradients, e.g. square:eps=0.2", arguments="run mnist-smoke"),
        override("--evaluation.transfer-source defend", "evaluation.transfer_source is 'defend'", "it must be the name of an undefended model out of models (control, no_defense", arguments="run mnist-smoke"),
        override("--evaluation.test-images -1", "evaluation.test_images is -1", "it must be 0 (all) or more"),
        override("--evaluation.chunk-size 0", "evaluation.chunk_size is 0", "it must be at least 1"),
        override("--evaluation.seed 9223372036854775808", "evaluation.seed is", "it must be a number from -2**63 to 2**63 - 1", "`--evaluation.seed` of 2**63"),
        override("--evaluation.reliability-images -1", "evaluation.reliability_images is -1", "it must be 0 (no such test) or more"),
        override("--scaling.workers 0", "scaling.workers is 0", "it must be at least 1"),
        override("--scaling.cpus-per-worker 0", "scaling.cpus_per_worker is 0.0", "it must be above 0"),
        override("--scaling.gpus-per-attack -1", "scaling.gpus_per_attack is -1.0", "it must be 0 or more"),
        override("--scaling.max-failures -1", "scaling.max_failures is -1", "it must be 0 or more"),
        override("--scaling.wait-s inf", "scaling.wait_s is inf", "it must be 0 or more seconds"),
    ],
    "Attacks (`--evaluation.attacks`)": [
        override(f"--evaluation.attacks {attack}", says, do, f"`{attack}`")
        for attack, says, do in [
            ("''", "the name in '' is ''", "it must be 1 to 100 bytes of letters, digits"),
            ("pgdd:eps=0.1", "unknown attack 'pgdd'", "did you mean pgd"),
            ("deepfool", "unknown attack 'deepfool'", "there are noise, fgsm"),
            ("fgsm", "fgsm needs eps", "e.g. fgsm:eps=0.2"),
            ("fgsm:eps=8", "fgsm.eps is 8.0", "it must be at most 1 in linf, in units of [0,1] pixels: write 8/255"),
            ("fgsm:eps=0", "fgsm.eps is 0.0", "it must be a finite number above 0"),
            ("fgsm:eps=1/0", "fgsm.eps is '1/0'", "it must be a number"),
            ("fgsm:eps=nan", "fgsm.eps is nan", "it must be a finite number above 0"),
            ("pgd:eps=0.1,norm=l1", "pgd.norm is 'l1'", "it must be linf or l2"),
            ("pgd:eps=99,norm=l2", "pgd.eps is 99.0", "it must be at most 28 in l2"),
            ("pgd:eps=0.1,steps=0", "pgd.steps is 0", "it must be at least 1"),
            ("pgd:eps=0.1,steps=2.5", "pgd.steps is '2.5'", "it must be a whole number"),
            ("pgd:epsilon=0.1", "unknown field of pgd: 'epsilon'", "did you mean eps"),
            ("ddn:eps=1", "unknown field of ddn: 'eps'", "There are norm, steps"),
            ("cw:norm=linf", "cw.norm is 'linf'", "it must be l2"),
            ("ddn:gamma=1", "ddn.gamma is 1.0", "it must be in (0, 1)"),
            ("apgd:eps=0.1,loss=hinge", "apgd.loss is 'hinge'", "it must be one of ce, dlr"),
            ("bim:eps=0.1,target=worst", "bim.target is 'worst'", "it must be one of random, least_likely, runner_up, or empty"),
            ("pgd:eps", "'eps' in 'pgd:eps' is not FIELD=VALUE", "the form is NAME:FIELD=VALUE"),
            ("pgd:eps=0.1,eps=0.2", "sets eps twice", "leave one out"),
            ("pgd:eps=0.2 pgd:eps=1/5", "pgd:eps=0.2 and pgd:eps=1/5 are both", "leave one out"),
        ]
    ],
    "Networks (`--train.arch`)": [
        override("--train.arch resnet81", "train.arch is 'resnet81'", "it must be resnet18, resnet50, vgg16, vgg16_bn or MODULE:FUNCTION"),
        override("--train.arch nowhere:net", "module 'nowhere' cannot be imported", "Python path"),
        override("--train.arch own_network:nothing", "has no function 'nothing'", "it has Drawing"),
        override("--train.arch :net", "train.arch is ':net'", "it must be resnet18, resnet50, vgg16, vgg16_bn, or MODULE:FUNCTION"),
        override("--train.arch torchvision:resnet18", "data.channels is 1, but torchvision's networks take 3", "--data.channels 3"),
        override("--train.arch torchvision:resnet81 --data.channels 3", "train.arch is 'torchvision:resnet81'", "it must be a network of torchvision; did you mean"),
        override("--train.arch timm:resnet18", "train.arch is 'timm:resnet18'", "it must be a network of an installed library (No module named 'timm'): pip install timm", without="timm"),
        override("--train.arch torchvision:resnet18,transform_input=true --data.channels 3", "train.arch is", "have an option"),
        override("--train.arch json:loads", "calling it with num_classes=10", "failed (TypeError"),
    ],
    "Weights (`--train.pretrained`, `attack --model`)": [
        Case("a file that does not exist", GIVEN + " --arch resnet18", "weights.pth does not exist", "check the path"),
        Case("weights without `--arch`", GIVEN, "--arch is missing", "name the network", weights),
        Case("`--model` without a value", "attack --model", "--model: expected one argument", "defendpp attack --help"),
        Case("a norm that is none", f"{GIVEN} --arch resnet18 --norm l3", "--norm is 'l3'", "it must be one of linf, l2", weights),
        Case("`--eps 8`", f"{GIVEN} --arch resnet18 --eps 8", "--eps is 8.0", "it must be at most 1 in linf, in units of [0,1] pixels: write 8/255", weights),
        Case("weights of another network", f"{GIVEN} --arch resnet18", "another architecture", "name the network that they are of (--arch", weights),
        Case("a dictionary without tensors", f"{GIVEN} --arch resnet18", "holds no dictionary of tensors", "Give a state_dict", lambda here: weights(here, {"epoch": 3})),
        Case("a safetensors file cut short", "attack --model {here}/w.safetensors --arch resnet18", "cannot be read as a state_dict", "copy it again", text("w.safetensors", "abc")),
        Case("weights of another number of classes", f"{GIVEN} --arch own_network:make", "holds a head of 4 classes, but data.num_classes is 10", "--data.num-classes 4", lambda here: other_head(here)),
        Case("torchvision's weights that do not exist", "attack --model torchvision:NONE --arch torchvision:resnet18 --data.channels 3", "train.pretrained is 'torchvision:NONE'", "it must be torchvision:IMAGENET1K_V1"),
        Case("a model of the Hugging Face Hub without the package for it", "attack --model hf:org/net --arch resnet18", "--model is 'hf:org/net'; the Hugging Face Hub needs a package of its own", "pip install 'defendpp[hub]'", without="huggingface_hub"),
        Case("a model of RobustBench without the package for it", "attack --model robustbench:Wong2020Fast", "--model is 'robustbench:Wong2020Fast'; the model zoo is in a package of its own", "pip install 'defendpp[robustbench]'", without="robustbench"),
        Case("weights that MLflow does not have", "attack --model mlflow:models:/nobody@best --arch resnet18", "mlflow:models:/nobody@best", "check the name and --tracking-uri"),
        Case("an MLflow name without its kind", "attack --model mlflow:nobody --arch resnet18", "mlflow:nobody", "give mlflow:models:/MODEL_ID"),
    ],
    "Files for other programs (`export`)": [
        Case("`export` of a directory without a model", "export {here} --out {here}/net.onnx", "{here} is no model", "give the directory of one (STORAGE/models/KIND-HASH)"),
        Case("`export` without `--out`", "export {here}", "--out is missing", "name the file to write"),
        Case("a file of another format", "export {here} --out {here}/net.h5", "--format is ''", "it must be one of onnx, torch-export, safetensors"),
    ],
    "Data files": [
        override("--data.source parquet:{here}/none", "{here}/none does not exist", "must name a directory with train-*.parquet", "a directory that does not exist"),
        override("--data.source folder:{here}/none", "{here}/none is not a directory", "must name one with train/CLASS/*", "a folder that does not exist"),
        override("--data.source parquet:{here}", "no file for the train split", "the directory has no .parquet file", "an empty directory"),
        override("--data.source folder:s3://bucket/x", "data.source is 'folder:s3://bucket/x'", "it must be a local directory for folder:; use parquet: for a URI", "a folder on an object store"),
        override("--data.source torchvision:mnist --data.root {here}", "torchvision:mnist is not usable in", "set --data.download", "torchvision's files are not there"),
        *(
            Case(given, f"{SMALL} --data.source {source}:{{here}}", says, do, make)
            for given, source, says, do, make in [
                ("a Parquet file cut short", "parquet", "is not a readable Parquet file", "get it again", text("train.parquet", "PAR1")),
                ("no test split", "parquet", "no file for the test split", "there are only", lambda here: (parquet(here), (here / "test.parquet").unlink())),
                ("half of the shards", "parquet", "1 of 2 train-*-of-*.parquet files are there", "get the missing ones", lambda here: (parquet(here), (here / "train.parquet").rename(here / "train-00000-of-00002.parquet"))),
                ("no column of images", "parquet", "no column of images", "name the column with --data.image-column", lambda here: parquet(here, image=[])),
                ("images that are paths", "parquet", "column 'image' is string", "name the column with --data.image-column, or convert it", lambda here: parquet(here, image=["a.png"] * 40)),
                ("no column of labels", "parquet", "no column of labels", "name the column with --data.label-column", lambda here: parquet(here, label=[])),
                ("labels that are words", "parquet", "column 'label' is string", "or convert it", lambda here: parquet(here, label=["cat"] * 40)),
                ("a label out of range", "parquet", "row 17: label 12 is not in 0..9", "set --data.num-classes to this data set's number of classes, or repair the label", lambda here: row_17(here, "label", 12)),
                ("a missing label", "parquet", "row 17: the label is missing", "repair or remove this row", lambda here: row_17(here, "label", None)),
                ("a class without an image", "parquet", "1 of 10 classes have no image", "set --data.allow-empty-classes if", sample_without_a_class),
                ("a first image that is no image", "parquet", "the image cannot be decoded", "Get the file again", lambda here: parquet(here, image=[{"bytes": b"GIF8", "path": None}] * 40)),
                ("images of another size", "parquet", "the image is 32x32 pixels, but data.image_size is 28", "--data.resize crop", lambda here: parquet(here, image=[{"bytes": png(32, 1), "path": None}] * 40)),
                ("a folder without test/", "folder", "no folder for the test split", "there are only train", lambda here: folders(here, splits=("train",))),
                ("a folder of other classes than --data.num-classes", "folder", "but data.num_classes is 10", "set --data.num-classes 2", lambda here: folders(here, classes=("cat", "dog"))),
                ("class folders named 0 to 10", "folder", "their labels depend on how they are sorted", "Set --data.class-order to text or number", lambda here: folders(here, classes=tuple(map(str, range(11))))),
                ("a test class that is not in train/", "folder", "1 class folder is not in train (dog)", "remove them or add training images", lambda here: (folders(here), folders(here, splits=("test",), classes=("dog",)))),
                ("class folders without images", "folder", "no image in", "/CLASS/", lambda here: [(here / s / c).mkdir(parents=True) for s in ("train", "test") for c in "ab"]),
            ]
        ),
    ],
    "Storage and tracking": [
        override("--storage here", "storage is 'here'", "it must be an absolute path, a ~ path or a URI", "a relative path"),
        override("--storage /dev/null/x", "storage /dev/null/x is not writable", "Give another one with --storage", "a storage that cannot be written"),
        override("--storage nfs://server/x", "storage is 'nfs://server/x'", "it must be a path or a URI of pyarrow or fsspec", "a protocol that does not exist"),
        override("--storage memory://x", "is not on this machine", "--tracking-uri http://HOST:PORT", "a remote storage without a tracking server"),
        override("--tracking-uri http://127.0.0.1:9", "MLflow server http://127.0.0.1:9 cannot be used", "give another one with --tracking-uri", "a server that does not answer"),
        override("--tracking-uri {here}/mlruns", "is a directory", "sqlite:///{here}/mlruns.db", "a directory as tracking URI"),
        override("--tracking-uri sqlite:///mlflow.db", "has no absolute path", "give sqlite:////", "a relative path of a database"),
        Case("a database that is none", f"{SMALL} --tracking-uri sqlite:///{{here}}/mlflow.db", "MLflow database", "give another one with --tracking-uri", text("mlflow.db", "no database, but text that is long enough")),
        Case("the next stage before its first: `train`", "train mnist-smoke", "has no shards yet", "first run `defendpp pyramids mnist-smoke` with the same settings"),
        Case("the next stage before its first: `attack`", "attack mnist-smoke", "has no shards yet", "first run `defendpp pyramids mnist-smoke` with the same settings"),
        Case("the next stage before its first: `report`", "report mnist-smoke", "there are no records at", "run the other stages with the same settings first"),
    ],
    "Sweeps": [
        Case("no space", "sweep mnist-smoke", "a sweep needs a space", "--space tune_spaces/lambda_blocks.py"),
        Case("a space that does not exist", "sweep mnist-smoke --space nope", "--space is 'nope'", "it must be a file that exists (in a job: in its working directory), or one of ablation, lambda_blocks"),
        Case("a typo in a space", "sweep mnist-smoke --space lamda_blocks", "--space is 'lamda_blocks'", "did you mean lambda_blocks"),
        Case("a typo in an option", "sweep mnist-smoke --space lambda_blocks --trails 2", "unknown option '--trails'", "did you mean --trials"),
        Case("a space that is no Python", "sweep mnist-smoke --space {here}/space.txt", "--space is", "it must be a file whose name ends in .py", text("space.txt", "")),
        Case("a space file without SPACE", "sweep mnist-smoke --space {here}/space.py", "has no SPACE = Space(...)", "copy a file of tune_spaces/", text("space.py", "x = 1")),
        Case("a space file that fails", "sweep mnist-smoke --space {here}/space.py", "is not a search space: NameError", "mend the file, or copy one of tune_spaces/", text("space.py", "SPACE = Space()")),
        Case("`--trials many`", "sweep mnist-smoke --space lambda_blocks --trials many", "--trials is 'many'", "it must be a whole number"),
        Case("`--trials 0`", "sweep mnist-smoke --space lambda_blocks --trials 0", "space.trials is 0", "it must be at least 1"),
        Case("`--search bayes`", "sweep mnist-smoke --space lambda_blocks --search bayes", "--search is 'bayes'", "it must be one of grid, random, tpe"),
        Case("`--search grid` over real numbers", "sweep mnist-smoke --space lambda_blocks --search grid", "space.parameters['lam'] is", "it must be Choice or IntRange where search is 'grid'"),
        Case("`--evaluate some`", "sweep mnist-smoke --space lambda_blocks --evaluate some", "--evaluate is 'some'", "it must be one of full, recipe, none"),
        Case("`--max-concurrent -1`", "sweep mnist-smoke --space lambda_blocks --max-concurrent -1", "--max-concurrent is -1", "it must be 0 (as there is room) or more"),
        Case("`--resume` of no sweep", "sweep mnist-smoke --space lambda_blocks --resume", "there is no sweep at", "leave out --resume"),
        Case("a sweep without validation images", "sweep mnist-smoke --space lambda_blocks --data.validation-fraction 0", "data.validation_fraction is 0.0", "it must be above 0 in a sweep"),
        *(
            Case(given, "sweep mnist-smoke --space {here}/space.py", says, do, space(*made))
            for given, says, do, made in [
                ("a parameter that is no field", "'lamb'", "did you mean lam", ["'lamb': Choice([1.0])"]),
                ("a swept seed", "space.parameters['seed'] cannot be swept", "--seeds N", ["'seed': IntRange(0, 9)"]),
                ("an empty choice", "Choice is []", "it must be a list of at least one value", ["'lam': Choice([])"]),
                ("a range upside down", "Uniform is (1, 0)", "it must be (low, high) with low < high", ["'lam': Uniform(1, 0)"]),
                ("real numbers for a whole one", "'shared_blocks'", "it must be IntRange or Choice", ["'shared_blocks': Uniform(1, 4)"]),
                ("a value of another type", "is 'a'", "it must be a number", ["'lam': Choice(['a'])"]),
                ("a value that no trial can have", "shared_blocks=5 cannot be run", "it must be 1 to 4 (resnet18 has 4 encoder blocks). Take that out of the space", ["'shared_blocks': Choice([4, 5])"]),
                ("an attack without a budget", "space.attack is 'cw'", "it must be an attack with a budget", ["'lam': Choice([1.0])", "attack='cw'"]),
                ("a model that the recipe lacks", "unknown model of the recipe in space.model: 'b'", "there are no_defense, control, defend", ["'lam': Choice([1.0])", "model='b'"]),
            ]
        ),
    ],
    "Records (`run --from FILE`)": [
        Case("no file", "run --from", "--from needs a file", "the best.json of a sweep, or the run.json of a run"),
        Case("a file that does not exist", "run --from {here}/run.json", "{here}/run.json does not exist", "check the path"),
        Case("a file that is no JSON", "run --from {here}/run.json", "run.json is not valid JSON", "delete it", text("run.json", "{")),
        Case("JSON without an experiment", "run --from {here}/run.json", "--from is", "it must be a record with an experiment", text("run.json", "[]")),
        *(
            Case(given, "run --from {here}/run.json", says, do, make)
            for given, says, do, make in [
                ("an unknown field", "unknown field of experiment: 'colour'", "there are name, description", lambda here: record(here, colour="red")),
                ("a missing name", "experiment lacks the field name", "every record of this version has", text("run.json", '{"experiment": {}}')),
                ("a field of another type", "experiment.seeds is 'three'", "it must be a whole number. Correct that field of the file", lambda here: record(here, seeds="three")),
                ("a section that is a list", "experiment.train is []", "it must be a JSON object", lambda here: record(here, train=[])),
                ("a list that is text", "experiment.models is 'a'", "it must be a list", lambda here: record(here, models="a")),
                ("a name that leaves the storage", "name is '../../evil'", "it must be 1 to 100 bytes of letters, digits", lambda here: record(here, name="../../evil")),
                ("half a character", "experiment.description is '\\ud800'", "text without NUL characters", lambda here: record(here, description="\ud800")),
            ]
        ),
    ],
    "The environment": [
        Case("`HOME` that cannot be written", SMALL, "storage /dev/null/defendpp is not writable", "Give another one with --storage", environment={"HOME": "/dev/null"}),
        Case("`HOME` that is relative", SMALL, "storage is 'home/defendpp'", "it must be an absolute path", environment={"HOME": "home"}),
        Case("the home of a user who does not exist", f"{SMALL} --storage ~nobody-here/x", "storage is '~nobody-here/x'", "it must be an absolute path"),
    ],
}  # fmt: skip


def other_head(here: Path) -> None:
    from own_network import Net

    weights(here, Net(1, 4).state_dict())


# -- the tests -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the home directory, and so the storage, of all cases: MLflow takes seconds to make its database."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def no_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail whatever reaches Ray: all that is wrong here can be found before."""
    import ray

    def begin(*_: object, **__: object) -> None:
        pytest.fail("compute would begin")

    monkeypatch.setattr(ray, "init", begin)


def hide(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the import of a package fail as if it were not installed."""

    class Hidden(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, *_: object) -> None:
            if name.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Hidden(), *sys.meta_path])


def identifiers() -> dict[str, tuple[str, Case]]:
    return {f"{group}: {case.given}": (group, case) for group, cases in CASES.items() for case in cases}


@pytest.mark.parametrize("case", [case for _, case in identifiers().values()], ids=list(identifiers()))
def test_bad_input_is_one_clear_error_before_compute(
    case: Case, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if case.without:
        hide(case.without, monkeypatch)
    if case.make is not None:
        case.make(tmp_path)
    # a run is kept below HOME unless --storage says otherwise
    for name, value in {"HOME": str(home), **case.environment}.items():
        monkeypatch.setenv(name, value)
    arguments = [a.replace("{here}", str(tmp_path)) for a in shlex.split(case.arguments)]
    assert main(arguments) in (1, 2)
    printed = capsys.readouterr().err
    message = " ".join(printed.split())
    assert printed.count("error: ") == 1, printed
    assert "Traceback" not in printed
    assert len(printed.splitlines()) <= LINES
    assert re.search(r"\b(data|pyramids|train|evaluation|scaling)\.\w+=", message) is None, "not spelled as an option"
    for part in (case.says, case.do):
        assert part.replace("{here}", str(tmp_path)) in message


def test_the_corpus_is_large_and_has_no_case_twice() -> None:
    assert len(identifiers()) == sum(map(len, CASES.values())) >= 150


def test_a_remedy_is_not_the_cause_again() -> None:
    assert [name for name, (_, case) in identifiers().items() if case.do in case.says] == []


def page() -> str:
    """Return docs/errors.md."""
    lines = ["# Error messages", ""]
    lines += [
        "What does this error mean, and what do I do about it? Every message names the cause and the remedy;",
        "here they stand by subject.",
        "",
        "Exit status: 2 where the command line or a setting is wrong, 1 where a file, a service or the run",
        "fails, 130 after Ctrl-C, 143 after SIGTERM. All of this is found before Ray starts. A test runs every row.",
    ]
    for group, cases in CASES.items():
        lines += ["", f"## {group}", "", "| you gave | it says | what to do |", "| --- | --- | --- |"]
        for case in cases:
            cells = (case.given, case.says, case.do)
            lines += ["| " + " | ".join(c.replace("|", "\\|").replace("{here}", "/data") for c in cells) + " |"]
    return "\n".join(lines) + "\n"


def test_the_page_lists_the_corpus() -> None:
    assert PAGE.read_text() == page(), "run: python tests/pipeline/cli/test_bad_input.py --write"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/pipeline/cli/test_bad_input.py --write")
    PAGE.write_text(page())
