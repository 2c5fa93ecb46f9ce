"""Success and time of attacks that search in bfloat16 instead of float32 (evaluation.search_precision).

    python benchmarks/bench_precision.py                # about 10 minutes on one core
    python benchmarks/bench_precision.py --clock cpu    # on a machine that does other work too
    python benchmarks/bench_precision.py --model DIR/classifier.safetensors --eps 0.25 --from 1000

Both search on the network's fast copy and are judged by the network itself, as in the pipeline. The table
counts the samples that only one of the two breaks, in both directions. For scale it also counts those
that float32 gains and loses with another seed: all attacks but FGSM start at random. The images come
from the training half of the bundled sample; the networks trained here do not see them.
"""

from __future__ import annotations

import argparse
import platform

import torch
from bench_attacks import EPS, ROOT, SmallResNet, _cpu_name, load, seconds, train
from torch import Tensor, nn

from components.attacks.fast_copy import make_fast_copy, run_attack_on_copy
from components.attacks.spec import AttackSpec
from pipeline.training import exports

ATTACKS = (
    "pgd:eps={eps},steps=40",
    "apgd:eps={eps},steps=40",
    "apgd-t:eps={eps},steps=20",
    "square:eps={eps},queries=500",
    "autoattack:eps={eps},steps=20,queries=200",
)


def compare(name: str, model: nn.Module, x: Tensor, y: Tensor, eps: float, args: argparse.Namespace) -> None:
    """Print a row for each attack on one network."""
    exact, bfloat16 = make_fast_copy(model, x[:8]), make_fast_copy(model, x[:8], bfloat16=True)
    with torch.no_grad():
        clean = model(x).argmax(1) == y
    for text in args.attacks or ATTACKS:
        spec = AttackSpec.parse(text.format(eps=eps))
        broken: dict[str, Tensor] = {}
        times: dict[str, float] = {}

        def run(search: str, fast: nn.Module | None, seed: int, spec: AttackSpec = spec) -> None:
            generator = torch.Generator().manual_seed(seed)
            examples = run_attack_on_copy(
                spec, model, fast, x, y, stop_on_success=spec.can_stop_on_success, generator=generator
            )
            with torch.no_grad():
                # This runs before `broken` is bound to the next attack's results.
                broken[search] = (model(examples).argmax(1) != y) & clean  # noqa: B023

        for search, fast, seed in (
            ("float32", exact, args.seed),
            ("bfloat16", bfloat16, args.seed),
            ("again", exact, args.seed + 1),
        ):
            times[search] = seconds(lambda search=search, fast=fast, seed=seed: run(search, fast, seed), args)
        base = broken["float32"]
        pairs = [f"-{int((base & ~broken[w]).sum())} +{int((broken[w] & ~base).sum())}" for w in ("bfloat16", "again")]
        print(
            f"| {name}, {spec} | {int(base.sum())} | {int(broken['bfloat16'].sum())} | {pairs[0]} | {pairs[1]} | "
            f"{times['bfloat16'] / times['float32']:.2f} |",
            flush=True,
        )


def main() -> None:
    """Train the networks, or load the one that is given, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200, help="images attacked")
    parser.add_argument("--from", dest="first", type=int, default=4000, help="the first of them")
    parser.add_argument("--attacks", nargs="+", help="specs with {eps}")
    parser.add_argument("--model", help="an exported classifier of 28x28 images instead of the two trained here")
    parser.add_argument("--eps", type=float, help="instead of 0.1 (undefended) and 0.2")
    parser.add_argument("--width", type=int, default=8, help="channels of the first stage")
    parser.add_argument("--train-images", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=3, help="of the undefended network; the robust one takes twice")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on CPU")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu: processor time, not with cuda")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False
    data = ROOT / "pipeline" / "data"
    images, labels = (t.to(args.device) for t in load(data, "train", args.first + args.samples))
    x, y = images[args.first :], labels[args.first :]
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else _cpu_name()
    print(
        f"hardware: {hardware}; threads {args.threads}, {args.clock} time; Python {platform.python_version()}, "
        f"torch {torch.__version__}; n={len(x)}, seed {args.seed}\n"
    )
    print(
        "| network, attack | broken in float32 | in bfloat16 | its difference | float32, other seed "
        "| time, of float32's |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    if args.model:
        model = exports.load_classifier(args.model, args.device).requires_grad_(False)
        compare("given", model, x, y, args.eps or EPS, args)
        return
    for name, epochs, eps in (("undefended", args.epochs, 0.1), ("robust", 2 * args.epochs, EPS)):
        torch.manual_seed(args.seed)
        net = SmallResNet(args.width).to(args.device)
        known = slice(min(args.train_images, args.first))
        model = train(net, images[known], labels[known], epochs, adversarial=name == "robust")
        compare(name, model, x, y, args.eps or eps, args)


if __name__ == "__main__":
    main()
