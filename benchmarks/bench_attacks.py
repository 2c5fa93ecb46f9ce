"""Our attacks against Foolbox's and against the cost of their passes alone, on one trained network.

    python benchmarks/bench_attacks.py                  # about 4 minutes
    python benchmarks/bench_attacks.py --clock cpu      # on a machine that does other work too
    python benchmarks/bench_attacks.py --device cuda --samples 1000 --width 64

The development extra installs Foolbox. Both sides get the same images, labels, steps and step sizes.
Both attack the same network with frozen parameters: Foolbox would otherwise compute the parameters'
gradients too, which costs it 3 %. Our attacks never compute them.
"""

from __future__ import annotations

import argparse
import io
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import foolbox as fb
import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from components.attacks.fgsm import fgsm  # noqa: E402
from components.attacks.pgd import random_start  # noqa: E402
from components.attacks.registry import run_attack  # noqa: E402
from components.attacks.spec import AttackSpec  # noqa: E402
from components.evaluation.judge import judge, verify_examples  # noqa: E402
from components.evaluation.metrics import summarize  # noqa: E402

EPS = 0.2


class SmallResNet(nn.Sequential):
    """torchvision's residual blocks at three sizes, so large that the passes dominate Python's time."""

    def __init__(self, width: int) -> None:
        def stage(inside: int, outside: int, stride: int) -> BasicBlock:
            shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
            return BasicBlock(inside, outside, stride, None if stride == 1 else shortcut)

        super().__init__(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            stage(width, width, 1),
            stage(width, 2 * width, 2),
            stage(2 * width, 4 * width, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, 10),
        )


def load(directory: Path, split: str, rows: int) -> tuple[Tensor, Tensor]:
    """Read the first rows of an MNIST split in Hugging Face's Parquet layout.

    Returns:
        Images float32 [N,1,28,28] in [0,1], and labels int64 [N].
    """
    file = next(iter(sorted(directory.rglob(f"{split}*.parquet"))), None)
    if file is None:
        raise SystemExit(f"no {split}*.parquet below {directory}; give --data DIR")
    table = pq.read_table(file).slice(0, rows)
    pixels = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("L")) for row in table["image"].to_pylist()]
    images = torch.from_numpy(np.stack(pixels)).float().div_(255).unsqueeze(1)
    return images, torch.tensor(table["label"].to_pylist(), dtype=torch.int64)


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, *, adversarial: bool) -> nn.Module:
    """Train with one-cycle Adam and return the network in eval mode, with frozen parameters.

    Args:
        adversarial: train on FGSM examples from a random start (Wong et al. 2020).
    """
    batch = 100
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=epochs * (len(images) // batch))
    for epoch in range(epochs):
        order = torch.randperm(len(images)).to(images.device)
        # Training collapses if it starts at full strength.
        eps = EPS * min(1.0, (epoch + 1) / max(epochs - 2, 1))
        for rows in order.split(batch)[: len(images) // batch]:
            x, y = images[rows], labels[rows]
            model.train()
            if adversarial:
                model.eval()
                start = random_start(x, eps, "linf", None)
                step = fgsm(model, start, y, eps=1.25 * eps)
                x = torch.maximum(torch.minimum(step, x + eps), x - eps).clamp(0, 1)
                model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def seconds(call: Callable[[], object], args: argparse.Namespace) -> float:
    """Measure the seconds of a call by the chosen clock."""
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    if args.device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    call()
    if args.device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def passes(model: nn.Module, x: Tensor, y: Tensor, backward: int, forward: int) -> None:
    """Run the passes of an attack alone: ``backward`` of them forward and back, ``forward`` only forward."""
    for _ in range(backward):
        leaf = x.detach().requires_grad_()
        torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
    with torch.no_grad():
        for _ in range(forward):
            model(x)


def peers(model: nn.Module, x: Tensor, y: Tensor, device: str) -> dict[str, tuple[Callable[[], Tensor], int, int]]:
    """Map each spec to Foolbox's attack, our passes forward and back, and our passes only forward."""
    wrapped = fb.PyTorchModel(model, bounds=(0, 1), device=device)
    criterion = fb.criteria.Misclassification(y)
    pgd = fb.attacks.LinfPGD(steps=40, abs_stepsize=2.5 * EPS / 40)
    ddn = fb.attacks.DDNAttack(steps=100)
    spec = AttackSpec.parse("cw")
    cw = fb.attacks.L2CarliniWagnerAttack(
        binary_search_steps=5, steps=20, stepsize=spec.lr, initial_const=spec.initial_const, abort_early=False
    )
    return {
        f"pgd:eps={EPS},steps=40": (lambda: pgd.run(wrapped, x, criterion, epsilon=EPS), 40, 0),
        "ddn:steps=100": (lambda: ddn.run(wrapped, x, criterion), 100, 1),
        "cw:steps=20,binary_search_steps=5": (lambda: cw.run(wrapped, x, criterion), 1 + 5 * 19, 5),
    }


def compare(model: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace) -> None:
    """Print success, norms and times of our attacks, of Foolbox's and of the passes alone."""
    indices = range(len(x))
    print(
        "| attack | success ours | peer | median L2 ours | peer | s ours | s peer | ours/peer | s floor | ours/floor |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for text, (peer, backward, forward) in peers(model, x, y, args.device).items():
        spec = AttackSpec.parse(text)
        results: dict[str, Tensor] = {}

        def ours(spec: AttackSpec = spec, results: dict[str, Tensor] = results) -> None:
            generator = torch.Generator().manual_seed(args.seed)
            results["ours"] = run_attack(spec, model, x, y, generator=generator)

        def run_peer(peer: Callable[[], Tensor] = peer, results: dict[str, Tensor] = results) -> None:
            examples = peer()
            # If Foolbox's C&W fails, it returns a black image, which would count as an example.
            succeeded = examples.flatten(1).any(dim=1).view(-1, 1, 1, 1)
            results["peer"] = torch.where(succeeded, examples, x)

        def floor(backward: int = backward, forward: int = forward) -> None:
            passes(model, x, y, backward, forward)

        calls: list[tuple[str, Callable[[], None]]] = [("ours", ours), ("peer", run_peer), ("floor", floor)]
        times: dict[str, list[float]] = {name: [] for name, _ in calls}
        for _ in range(args.repetitions):
            torch.manual_seed(args.seed)
            for name, call in calls:
                times[name].append(seconds(call, args))
            # Rotate the order, so that no method always runs on the warmer machine.
            calls.append(calls.pop(0))
        rows = {}
        for name, examples in results.items():
            verify_examples(x, examples, indices, spec)
            rows[name] = summarize(judge(model, x, examples, y), spec, 0.0)
        median = {name: statistics.median(values) for name, values in times.items()}
        # Take the ratios within a repetition: a temporary slowdown of the machine then affects both sides.
        to_peer, to_floor = (
            statistics.median(a / b for a, b in zip(times["ours"], times[other], strict=True))
            for other in ("peer", "floor")
        )
        print(
            f"| {spec} | {rows['ours']['success_rate']:.3f} | {rows['peer']['success_rate']:.3f} "
            f"| {rows['ours']['l2_median']:.3f} | {rows['peer']['l2_median']:.3f} "
            f"| {median['ours']:.2f} | {median['peer']:.2f} | {to_peer:.2f} "
            f"| {median['floor']:.2f} | {to_floor:.2f} |",
            flush=True,
        )


def stop_on_success(models: dict[str, nn.Module], x: Tensor, y: Tensor, args: argparse.Namespace) -> None:
    """Print robust accuracy and time of PGD with and without early stopping."""
    spec = AttackSpec.parse(f"pgd:eps={EPS},steps=40")
    print(f"\nStopping on success, {spec}, white-box\n")
    print(
        "| model | clean | robust accuracy, all steps | stopping on success | s all steps | s stopping on success | speed-up |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, model in models.items():
        times: dict[bool, list[float]] = {False: [], True: []}
        metrics = {}
        for _ in range(args.repetitions):
            for stop in times:
                results: list[Tensor] = []

                def attack(model: nn.Module = model, stop: bool = stop, results: list[Tensor] = results) -> None:
                    generator = torch.Generator().manual_seed(args.seed)
                    results.append(run_attack(spec, model, x, y, stop_on_success=stop, generator=generator))

                times[stop].append(seconds(attack, args))
                metrics[stop] = summarize(judge(model, x, results[0], y), spec, 0.0)
        full, early = statistics.median(times[False]), statistics.median(times[True])
        print(
            f"| {name} | {metrics[False]['clean_accuracy']:.3f} | {metrics[False]['accuracy']:.3f} "
            f"| {metrics[True]['accuracy']:.3f} | {full:.2f} | {early:.2f} | {full / early:.1f}x |",
            flush=True,
        )


def main() -> None:
    """Train both networks, attack them and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50, help="test images attacked")
    parser.add_argument("--repetitions", type=int, default=7, help="interleaved; medians are printed")
    parser.add_argument("--width", type=int, default=8, help="channels of the first stage")
    parser.add_argument("--train-images", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=3, help="of the undefended network; the robust one takes twice")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on CPU")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu: processor time, not with cuda")
    parser.add_argument("--seed", type=int, default=0)
    bundled, shared = ROOT / "pipeline" / "data", ROOT.parent / "shared" / "data" / "mnist"
    default = bundled if any(bundled.rglob("train*.parquet")) else shared
    parser.add_argument("--data", type=Path, default=default, help="directory with train*.parquet and test*.parquet")
    args = parser.parse_args()
    if args.clock == "cpu" and args.device == "cuda":
        parser.error("--clock cpu says nothing about a GPU")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    # The printed times and success rates are those of float32.
    torch.backends.cudnn.allow_tf32 = False

    hardware = torch.cuda.get_device_name() if args.device == "cuda" else _cpu_name()
    print(
        f"hardware: {hardware}; threads {args.threads}, {args.clock} time; Python {platform.python_version()}, "
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, foolbox {fb.__version__}\n"
        f"n={args.samples} test images, {args.repetitions} interleaved repetitions (medians of seconds and of ratios), "
        f"seed {args.seed}, width {args.width}, {args.train_images} training images"
    )
    images, labels = (t.to(args.device) for t in load(args.data, "train", args.train_images))
    x, y = (t.to(args.device) for t in load(args.data, "test", args.samples))
    models = {}
    for name, epochs in (("undefended", args.epochs), ("robust (FGSM-trained)", 2 * args.epochs)):
        torch.manual_seed(args.seed)
        model = SmallResNet(args.width).to(args.device)
        models[name] = train(model, images, labels, epochs, adversarial=name != "undefended")
    accuracy = (models["undefended"](x).argmax(1) == y).double().mean().item()
    print(f"network: undefended SmallResNet, clean accuracy {accuracy:.3f} on these images\n", flush=True)
    compare(models["undefended"], x, y, args)
    stop_on_success(models, x, y, args)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
