"""Passes per image that early stopping and the order of AutoAttack's cascade save.

    python benchmarks/bench_passes.py                   # a few minutes on one core
    python benchmarks/bench_passes.py --samples 50 --networks robust

Passes are counted, not timed, so the figures are exact on a busy machine too. Networks, images,
budgets and seed are those of bench_suite.py. Every attack searches on the network's fast copy, as in the
pipeline. The row of the authors' AutoAttack appears if it is installed (bench_suite.py says how).
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
from collections.abc import Callable, Sequence

import torch
from bench_attacks import EPS, ROOT, SmallResNet, load, train
from bench_suite import Passes, authors_cascade, counted
from torch import Tensor, nn

from components.attacks.apgd import apgd, apgd_t
from components.attacks.autoattack import autoattack
from components.attacks.bim import bim
from components.attacks.fab import fab_t
from components.attacks.fast_copy import make_fast_copy
from components.attacks.pgd import pgd
from components.attacks.square import square

Attack = Callable[[Tensor, Tensor], Tensor]
AS_PUBLISHED = ("apgd", "apgd-t", "fab-t", "square")


def parts(model: nn.Module, args: argparse.Namespace, stop: bool) -> dict[str, Attack]:
    """Return the four attacks of the cascade, which draw from one generator in turn.

    Args:
        stop: stop attacking a sample once it is misclassified. Otherwise it takes all steps towards
            all targets. Square always stops.
    """
    generator = torch.Generator().manual_seed(args.seed)
    ball = {"eps": EPS, "generator": generator}
    gradient = {**ball, "steps": args.steps, "stop_on_success": stop}

    def fab(x: Tensor, y: Tensor) -> Tensor:
        examples = fab_t(model, x, y, steps=args.steps, enough=EPS if stop else 0.0, generator=generator)
        return examples.where(((examples - x).flatten(1).abs().amax(dim=1) <= EPS).view(-1, 1, 1, 1), x)

    return {
        "apgd": lambda x, y: apgd(model, x, y, **gradient),
        "apgd-t": lambda x, y: apgd_t(model, x, y, **gradient),
        "fab-t": fab,
        "square": lambda x, y: square(model, x, y, queries=args.queries, rescale=False, **ball),
    }


def cascade(
    order: Sequence[str], model: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace, stop: bool = True
) -> Tensor:
    """Run :func:`autoattack` in any order: each attack gets the samples that withstood the previous ones."""
    attacks, result = parts(model, args, stop), x.clone()
    with torch.no_grad():
        remaining = (model(x).argmax(1) == y).nonzero().squeeze(1)
        for name in order:
            if not len(remaining):
                break
            examples = attacks[name](x[remaining], y[remaining])
            broken = model(examples).argmax(1) != y[remaining]
            result[remaining[broken]] = examples[broken]
            remaining = remaining[~broken]
    return result


def same_as_ours(model: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace) -> bool:
    """Check that the cascade counted here returns the examples of :func:`autoattack`.

    The budgets are so small that some samples reach each of the four attacks.
    """
    small = argparse.Namespace(**{**vars(args), "steps": 2, "queries": 3})
    generator = torch.Generator().manual_seed(args.seed)
    ours = autoattack(model, x, y, eps=EPS, steps=small.steps, queries=small.queries, generator=generator)
    return torch.equal(cascade(AS_PUBLISHED, model, x, y, small), ours)


def count(model: nn.Module, x: Tensor, y: Tensor, attack: Attack) -> tuple[Passes, Tensor]:
    """Return the passes of an attack, and which samples withstood it (bool [N])."""
    torch.manual_seed(0)
    with counted(model) as passes:
        examples = attack(x, y)
    with torch.no_grad():
        return passes, model(examples.clamp(0, 1)).argmax(1) == y


def report(name: str, model: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace) -> None:
    """Print the passes of each attack alone and of the cascade in several orders."""

    def row(what: str, passes: Passes, withstood: Tensor, base: Passes | None = None) -> None:
        share = "" if base is None else f"{passes.all / base.all:.2f}"
        per_image = f"{passes.all / len(x):.1f} | {passes.backward / len(x):.1f}"
        print(f"| {name}, {what} | {withstood.double().mean():.3f} | {per_image} | {share} |", flush=True)

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(args.seed)

    single: dict[str, Callable[[bool], Attack]] = {
        "bim": lambda stop: lambda x, y: bim(model, x, y, eps=EPS, steps=args.steps, stop_on_success=stop),
        "pgd": lambda stop: (
            lambda x, y: pgd(model, x, y, eps=EPS, steps=args.steps, stop_on_success=stop, generator=seeded())
        ),
        **{part: lambda stop, part=part: parts(model, args, stop)[part] for part in AS_PUBLISHED},
    }
    alone: dict[str, tuple[Passes, Tensor]] = {}
    all_steps, withstood_all = Passes(), torch.ones_like(y, dtype=torch.bool)
    for attack, make in single.items():
        passes, withstood = count(model, x, y, make(False))
        if attack in AS_PUBLISHED:
            all_steps.forward += passes.forward
            all_steps.backward += passes.backward
            withstood_all &= withstood
        if attack == "square":
            alone[attack] = passes, withstood
            row("square (always stops on success)", passes, withstood)
            continue
        row(f"{attack}, all steps", passes, withstood)
        alone[attack] = count(model, x, y, make(True))
        row(f"{attack}, stopping on success", *alone[attack], passes)

    cheapest = tuple(sorted(AS_PUBLISHED, key=lambda part: alone[part][0].all))
    strongest = tuple(sorted(AS_PUBLISHED, key=lambda part: (int(alone[part][1].sum()), alone[part][0].all)))
    orders: dict[tuple[str, ...], str] = {}
    for label, order in {
        "cheapest alone first": cheapest,
        "strongest alone first": strongest,
        "reversed": AS_PUBLISHED[::-1],
        "Square first": ("square", *AS_PUBLISHED[:3]),
    }.items():
        orders[order] = f"{orders[order]}, {label}" if order in orders else label
    row("autoattack, all steps on every sample", all_steps, withstood_all, all_steps)
    between = count(model, x, y, lambda x, y: cascade(AS_PUBLISHED, model, x, y, args, stop=False))
    row("autoattack, what is broken is dropped between its attacks", *between, all_steps)
    also = orders.pop(AS_PUBLISHED, "")
    whole = count(model, x, y, lambda x, y: cascade(AS_PUBLISHED, model, x, y, args))
    row(f"autoattack, stopping on success within them, too{also and f' ({also})'}", *whole, all_steps)
    if importlib.util.find_spec("autoattack") is not None:
        budget = {"norm": "Linf", "eps": EPS, "steps": args.steps, "queries": args.queries, "seed": args.seed}
        row("the authors' AutoAttack", *count(model, x, y, lambda x, y: authors_cascade(model, x, y, **budget)))
    for order, label in orders.items():
        measured = count(model, x, y, lambda x, y, order=order: cascade(order, model, x, y, args))
        row(f"autoattack, {label}: {' > '.join(order)}", *measured, all_steps)


def main() -> None:
    """Train the networks and print the table of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20, help="test images attacked")
    parser.add_argument("--steps", type=int, default=40, help="of every attack but Square")
    parser.add_argument("--queries", type=int, default=1000, help="of Square")
    parser.add_argument("--networks", nargs="+", default=["undefended", "robust"], choices=("undefended", "robust"))
    parser.add_argument("--width", type=int, default=8, help="channels of the first stage")
    parser.add_argument("--train-images", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=3, help="of the undefended network; the robust one takes twice")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on CPU")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False
    data = ROOT / "pipeline" / "data"
    images, labels = (t.to(args.device) for t in load(data, "train", args.train_images))
    x, y = (t.to(args.device) for t in load(data, "test", args.samples))
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}; n={args.samples}, linf, eps {EPS}, "
        f"steps {args.steps}, queries {args.queries}, seed {args.seed}, width {args.width}, "
        f"{args.train_images} training images\n"
    )
    print(
        "| network, attack | robust accuracy | forward passes per image | backward | share of the passes of all steps |"
    )
    print("| --- | --- | --- | --- | --- |")
    for name, epochs in (("undefended", args.epochs), ("robust", 2 * args.epochs)):
        if name not in args.networks:
            continue
        torch.manual_seed(args.seed)
        model = train(SmallResNet(args.width).to(args.device), images, labels, epochs, adversarial=name == "robust")
        model = make_fast_copy(model, x[:8]) or model
        if not same_as_ours(model, x[:8], y[:8], args):
            raise SystemExit("components/attacks/autoattack.py runs another cascade than the one counted here")
        report(name, model, x, y, args)


if __name__ == "__main__":
    main()
