"""Strength of the white-box attack on ComDefend by the surrogate gradient of its bits.

    python benchmarks/bench_surrogate.py                                   # about 12 minutes on one core
    python benchmarks/bench_surrogate.py --device cuda --width 16 --steps 400 --samples 500

For each seed it trains an undefended ResNet-18 and a ComDefend on the bundled training images, then attacks
both together through surrogates of several widths. The widths are compared on training images that
neither network has seen, never on test images.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from components.attacks.registry import run_attack  # noqa: E402
from components.attacks.spec import AttackSpec  # noqa: E402
from components.config import DataConfig, Shapes, TrainConfig  # noqa: E402
from components.models.comdefend import ComDefend, Reformed  # noqa: E402
from components.network import build_net  # noqa: E402
from components.precision import true_float32  # noqa: E402
from components.training.augment import Batch, gaussian_noise  # noqa: E402
from components.training.schedule import learning_rate, phase_at_epoch  # noqa: E402
from components.training.step import PhaseModule, make_optimizer, train_step  # noqa: E402
from pipeline.data.sources.open import open_source  # noqa: E402
from pipeline.runtime import provenance  # noqa: E402

SHAPES = Shapes(image_size=28, channels=1, num_classes=10, sizes=(28, 14, 7))
WIDTHS = {"sigma / 10": 0.1, "sigma / 3": 1 / 3, "sigma": 1.0, "3 sigma": 3.0, "10 sigma": 10.0, "identity": 1e6}
"""Name -> width of the surrogate in units of sigma."""


def load(rows: int) -> tuple[Tensor, Tensor]:
    """Return images uint8 [N,1,28,28] and labels int64 [N] of the bundled training images."""
    images, labels = open_source(DataConfig(), "train").read(np.arange(rows))
    return torch.from_numpy(images), torch.from_numpy(labels)


def train(config: TrainConfig, images: Tensor, labels: Tensor, steps: int) -> nn.Module:
    """Train a network as the pipeline does, for a number of steps, and return it in eval mode."""
    net = build_net(config, SHAPES).to(images.device).train()
    module = PhaseModule(net, phase_at_epoch(0, config), config)
    optimizer = make_optimizer(net, config)
    order = torch.Generator().manual_seed(config.seed)
    for step in range(steps):
        rows = torch.randint(len(images), (config.batch_size,), generator=order).to(images.device)
        train_step(
            module,
            optimizer,
            Batch(images=images[rows], labels=labels[rows]),
            lr=learning_rate(step, steps, config),
            config=config,
            sizes=SHAPES.sizes,
            noise=gaussian_noise(config, step, 0, images.device),
        )
    return net.eval().requires_grad_(False)


def measure(model: nn.Module, x: Tensor, y: Tensor, text: str) -> tuple[float, float]:
    """Return the accuracy in % under an attack, and the median L2 norm of its successes (NaN without any)."""
    examples = run_attack(AttackSpec.parse(text), model, x, y, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wrong = model(examples).argmax(1) != y
        fooled = wrong & (model(x).argmax(1) == y)
    norms = (examples - x).flatten(1).norm(dim=1)[fooled]
    return 100 * (~wrong).float().mean().item(), norms.median().item() if len(norms) else float("nan")


@true_float32()
def main() -> None:
    """Train both networks for each seed, attack them and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=8, help="of both networks; 64 is the paper's")
    parser.add_argument("--steps", type=int, default=300, help="training steps of each network")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=100, help="images attacked")
    parser.add_argument("--train-images", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--eps", type=float, nargs="+", default=[0.1, 0.2], help="of PGD, Linf")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    images, labels = (t.to(args.device) for t in load(args.train_images + args.samples))
    known = slice(args.train_images)
    x, y = images[args.train_images :].float() / 255, labels[args.train_images :]
    hardware = provenance.hardware()
    name = hardware["gpus"][0] if args.device == "cuda" else hardware["cpu"]
    print(f"{name}; Python {platform.python_version()}, torch {torch.__version__}; {vars(args)}", flush=True)
    attacks = [f"pgd:eps={eps},steps=20" for eps in args.eps] + ["ddn:steps=40"]
    results: dict[str, list[list[float]]] = {name: [] for name in WIDTHS}
    for seed in range(args.seeds):
        shared = {"width": args.width, "batch_size": args.batch_size, "seed": seed, "epochs": 1}
        classifier = train(
            TrainConfig(defense="none", clip_norm=1.0, **shared), images[known], labels[known], args.steps
        )
        config = TrainConfig(defense="comdefend", optimizer="adam", lr=1e-3, weight_decay=0.0, **shared)
        reformer = train(config, images[known], labels[known], args.steps)
        assert isinstance(reformer, ComDefend)
        model = Reformed(reformer, classifier).eval()
        with torch.no_grad():
            code = reformer.encode(x)
            clean = [100 * (m(x).argmax(1) == y).float().mean().item() for m in (classifier, model)]
            error = (reformer(x) - x).square().mean().item()
        print(
            f"seed {seed}: clean {clean[0]:.1f} % bare, {clean[1]:.1f} % reformed; MSE {error:.4f}; code rms "
            f"{code.square().mean().sqrt().item():.0f}, "
            f"{100 * (code.abs() < reformer.sigma).float().mean().item():.0f} % of the code within sigma",
            flush=True,
        )
        for name, width in WIDTHS.items():
            reformer.surrogate_width = width * reformer.sigma
            measured = [measure(model, x, y, text) for text in attacks]
            results[name].append([*(accuracy for accuracy, _ in measured), measured[-1][1]])
    print("\n| surrogate width | " + " | ".join(f"{a}: accuracy left %" for a in attacks) + " | ddn: median L2 |")
    print("| --- |" + " --- |" * (len(attacks) + 1))
    for name, rows in results.items():
        cells = [
            " / ".join(f"{row[i]:.2f}" if i == len(attacks) else f"{row[i]:.1f}" for row in rows)
            for i in range(len(attacks) + 1)
        ]
        print(f"| {name} | " + " | ".join(cells) + f" | (mean {statistics.fmean(row[-1] for row in rows):.3f}) |")


if __name__ == "__main__":
    main()
