"""What fewer passes buy: early leaving and the order of AutoAttack's cascade, in passes per image.

    python benchmarks/bench_passes.py                   # a few minutes on one core
    python benchmarks/bench_passes.py --samples 50 --networks robust

Counted, not timed: the figures are exact on a busy machine, too. Networks, images, budgets and seed are those of bench_suite.py; every search
runs on the stand-in, as the pipeline's do. The row of the authors' AutoAttack needs it installed (see there).
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


def parts(model: nn.Module, args: argparse.Namespace, leaving: bool) -> dict[str, Attack]:
    """The four of the cascade, drawing one after the other. Without leaving, a sample takes all steps towards all targets;
    Square's leave at once, always."""
    generator = torch.Generator().manual_seed(args.seed)
    ball = {"eps": EPS, "generator": generator}
    gradient = {**ball, "steps": args.steps, "stop_on_success": leaving}

    def fab(x: Tensor, y: Tensor) -> Tensor:
        found = fab_t(model, x, y, steps=args.steps, enough=EPS if leaving else 0.0, generator=generator)
        return found.where(((found - x).flatten(1).abs().amax(dim=1) <= EPS).view(-1, 1, 1, 1), x)

    return {
        "apgd": lambda x, y: apgd(model, x, y, **gradient),
        "apgd-t": lambda x, y: apgd_t(model, x, y, **gradient),
        "fab-t": fab,
        "square": lambda x, y: square(model, x, y, queries=args.queries, rescale=False, **ball),
    }


def cascade(
    order: Sequence[str], model: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace, leaving: bool = True
) -> Tensor:
    """:func:`autoattack` in any order, each attack on what the ones before it left."""
    attacks, result = parts(model, args, leaving), x.clone()
    with torch.no_grad():
        left = (model(x).argmax(1) == y).nonzero().squeeze(1)
        for name in order:
            if not len(left):
                break
            found = attacks[name](x[left], y[left])
            broken = model(found).argmax(1) != y[left]
            result[left[broken]] = found[broken]
            left = left[~broken]
    return result


def same_as_ours(model: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace) -> bool:
    """Whether the cascade counted here is the one that users get; budgets so small that all four have something to do."""
    few = argparse.Namespace(**{**vars(args), "steps": 2, "queries": 3})
    generator = torch.Generator().manual_seed(args.seed)
    ours = autoattack(model, x, y, eps=EPS, steps=few.steps, queries=few.queries, generator=generator)
    return torch.equal(cascade(AS_PUBLISHED, model, x, y, few), ours)


def count(model: nn.Module, x: Tensor, y: Tensor, attack: Attack) -> tuple[Passes, Tensor]:
    """Passes, and who withstood, bool [N]."""
    torch.manual_seed(0)
    with counted(model) as seen:
        found = attack(x, y)
    with torch.no_grad():
        return seen, model(found.clamp(0, 1)).argmax(1) == y


def report(name: str, model: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace) -> None:
    def row(what: str, seen: Passes, stands: Tensor, base: Passes | None = None) -> None:
        share = "" if base is None else f"{seen.all / base.all:.2f}"
        per_image = f"{seen.all / len(x):.1f} | {seen.backward / len(x):.1f}"
        print(f"| {name}, {what} | {stands.double().mean():.3f} | {per_image} | {share} |", flush=True)

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(args.seed)

    single: dict[str, Callable[[bool], Attack]] = {
        "bim": lambda leaving: lambda x, y: bim(model, x, y, eps=EPS, steps=args.steps, stop_on_success=leaving),
        "pgd": lambda leaving: (
            lambda x, y: pgd(model, x, y, eps=EPS, steps=args.steps, stop_on_success=leaving, generator=seeded())
        ),
        **{part: lambda leaving, part=part: parts(model, args, leaving)[part] for part in AS_PUBLISHED},
    }
    alone: dict[str, tuple[Passes, Tensor]] = {}
    nobody_leaves, stands_all = Passes(), torch.ones_like(y, dtype=torch.bool)
    for attack, make in single.items():
        seen, stands = count(model, x, y, make(False))
        if attack in AS_PUBLISHED:
            nobody_leaves.forward += seen.forward
            nobody_leaves.backward += seen.backward
            stands_all &= stands
        if attack == "square":
            alone[attack] = seen, stands
            row("square (always leaving)", seen, stands)
            continue
        row(f"{attack}, all steps", seen, stands)
        alone[attack] = count(model, x, y, make(True))
        row(f"{attack}, leaving", *alone[attack], seen)

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
    row("autoattack, nobody leaves", nobody_leaves, stands_all, nobody_leaves)
    between = count(model, x, y, lambda x, y: cascade(AS_PUBLISHED, model, x, y, args, leaving=False))
    row("autoattack, leaving between its attacks", *between, nobody_leaves)
    also = orders.pop(AS_PUBLISHED, "")
    whole = count(model, x, y, lambda x, y: cascade(AS_PUBLISHED, model, x, y, args))
    row(f"autoattack, leaving within them, too{also and f' ({also})'}", *whole, nobody_leaves)
    if importlib.util.find_spec("autoattack") is not None:
        budget = {"norm": "Linf", "eps": EPS, "steps": args.steps, "queries": args.queries, "seed": args.seed}
        row("the authors' AutoAttack", *count(model, x, y, lambda x, y: authors_cascade(model, x, y, **budget)))
    for order, label in orders.items():
        found = count(model, x, y, lambda x, y, order=order: cascade(order, model, x, y, args))
        row(f"autoattack, {label}: {' > '.join(order)}", *found, nobody_leaves)


def main() -> None:
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
        f"Python {platform.python_version()}, torch {torch.__version__}; n={args.samples}, linf, eps {EPS}, steps {args.steps}, "
        f"queries {args.queries}, seed {args.seed}, width {args.width}, {args.train_images} training images\n"
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
