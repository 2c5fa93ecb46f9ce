"""Every attack of the suite against the installed peers: Foolbox, torchattacks, the authors' AutoAttack.

    python benchmarks/bench_suite.py                    # about 10 minutes on one core
    python benchmarks/bench_suite.py --clock cpu        # on a machine that does other work too
    python benchmarks/bench_suite.py --device cuda --samples 500 --width 64

The development extra installs Foolbox. `pip install --no-deps torchattacks` installs torchattacks, and
github.com/fra31/auto-attack has `autoattack`. All get the same images, budget, steps and queries, and the
same network with frozen parameters. The undefended network shows the cost of samples that break at once,
the robust one that of samples that withstand.

"ours" searches on the network itself, as the peers do. "ours, fast copy" searches on its fast copy, as the
pipeline does (components/attacks/fast_copy.py). "ours, bfloat16" searches on the copy of
evaluation.search_precision=bfloat16.

The floor is the cost of the passes of "ours" alone. It counts the images sent forward, and forward and
back, and multiplies them by the cost of such an image in a full batch, measured right before and after.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from bench_attacks import EPS, ROOT, SmallResNet, _cpu_name, load, passes, seconds, train
from torch import Tensor, nn

from components.attacks.fast_copy import make_fast_copy, run_attack_on_copy
from components.attacks.spec import AttackSpec
from components.evaluation.judge import judge, verify_examples
from components.evaluation.metrics import summarize
from pipeline.reporting.over_seeds import shown_metrics

Attack = Callable[[], Tensor]


@dataclass
class Passes:
    """Number of images in the passes of a network."""

    forward: int = 0
    """Images sent only forward."""
    backward: int = 0
    """Images sent forward and back."""

    @property
    def all(self) -> int:
        """Return the images of all passes."""
        return self.forward + self.backward


@contextmanager
def counted(*models: nn.Module) -> Iterator[Passes]:
    """Count the images that all models together receive within the block."""
    counts = Passes()

    def count_images(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            counts.backward += len(args[0])
        else:
            counts.forward += len(args[0])

    handles = [model.register_forward_hook(count_images) for model in models]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def foolbox_attacks(model: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace) -> dict[str, Attack]:
    """Return Foolbox's attacks by our names."""
    import foolbox as fb

    wrapped, criterion = fb.PyTorchModel(model, bounds=(0, 1), device=args.device), fb.criteria.Misclassification(y)
    cw = AttackSpec.parse("cw")
    step = 2.5 * EPS / args.steps
    bim = fb.attacks.LinfBasicIterativeAttack(steps=args.steps, abs_stepsize=step)
    pgd = fb.attacks.LinfPGD(steps=args.steps, abs_stepsize=step)
    search = fb.attacks.L2CarliniWagnerAttack(
        binary_search_steps=5, steps=20, stepsize=cw.lr, initial_const=cw.initial_const, abort_early=False
    )

    def successes(examples: Tensor) -> Tensor:
        # If Foolbox's C&W fails, it returns a black image, which would count as an example.
        return torch.where(examples.flatten(1).any(dim=1).view(-1, 1, 1, 1), examples, x)

    return {
        "fgsm": lambda: fb.attacks.LinfFastGradientAttack(random_start=False).run(wrapped, x, criterion, epsilon=EPS),
        "bim": lambda: bim.run(wrapped, x, criterion, epsilon=EPS),
        "pgd": lambda: pgd.run(wrapped, x, criterion, epsilon=EPS),
        "ddn": lambda: fb.attacks.DDNAttack(steps=args.steps).run(wrapped, x, criterion),
        "cw": lambda: successes(search.run(wrapped, x, criterion)),
    }


def torchattacks_attacks(model: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace) -> dict[str, Attack]:
    """Return the attacks of torchattacks by our names."""
    import torchattacks as ta

    step = 2.5 * EPS / args.steps
    linf = {"norm": "Linf", "eps": EPS, "seed": args.seed}
    return {
        "fgsm": lambda: ta.FGSM(model, eps=EPS)(x, y),
        "bim": lambda: ta.BIM(model, eps=EPS, alpha=step, steps=args.steps)(x, y),
        "pgd": lambda: ta.PGD(model, eps=EPS, alpha=step, steps=args.steps)(x, y),
        "apgd": lambda: ta.APGD(model, steps=args.steps, n_restarts=1, **linf)(x, y),
        "apgd-t": lambda: ta.APGDT(model, steps=args.steps, n_restarts=1, n_classes=10, **linf)(x, y),
        "square": lambda: ta.Square(model, n_queries=args.queries, **linf)(x, y),
    }


def authors_cascade(
    model: nn.Module, x: Tensor, y: Tensor, *, norm: str, eps: float, steps: int, queries: int, seed: int
) -> Tensor:
    """Run the authors' standard AutoAttack with the given budgets.

    Args:
        norm: in the authors' spelling, ``Linf`` or ``L2``.
    """
    from autoattack import AutoAttack
    from autoattack.autopgd_base import APGDAttack, APGDAttack_targeted

    device = str(x.device)
    standard = AutoAttack(model, norm=norm, eps=eps, seed=seed, version="standard", device=device, verbose=False)
    # APGD fixes its checkpoints when it is built. Setting n_iter later would keep the schedule of 100 steps.
    options = {"n_iter": steps, "norm": norm, "eps": eps, "seed": seed, "device": device, "logger": standard.logger}
    standard.apgd = APGDAttack(model, **options)
    standard.apgd_targeted = APGDAttack_targeted(model, n_target_classes=9, **options)
    standard.fab.n_iter = steps
    standard.square.n_queries = queries
    examples: Tensor = standard.run_standard_evaluation(x, y, bs=len(x))
    return examples


def autoattack_attacks(model: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace) -> dict[str, Attack]:
    """Return the attacks of the authors' AutoAttack by our names."""
    from autoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    from autoattack.fab_pt import FABAttack_PT
    from autoattack.square import SquareAttack

    linf = {"norm": "Linf", "eps": EPS, "seed": args.seed, "device": args.device}

    def cascade() -> Tensor:
        return authors_cascade(
            model, x, y, norm="Linf", eps=EPS, steps=args.steps, queries=args.queries, seed=args.seed
        )

    def smallest() -> Tensor:
        # FAB's perturb() stops at the first class within eps and returns nothing beyond eps. Ours minimises over
        # all classes, so this calls the search of each class.
        attack = FABAttack_PT(model, n_iter=args.steps, targeted=True, **linf)
        best, best_norm = x, torch.full((len(x),), torch.inf, device=x.device)
        for rank in range(2, 11):
            attack.target_class = rank
            out = attack.attack_single_run(x, y, is_targeted=True)
            norm = (out - x).flatten(1).abs().amax(1)
            # A failed search returns the clean image. Its norm shows that without another pass.
            norm = norm.where(norm > 0, torch.inf)
            best = out.where((norm < best_norm).view(-1, 1, 1, 1), best)
            best_norm = norm.minimum(best_norm)
        return best

    return {
        "apgd": lambda: APGDAttack(model, n_iter=args.steps, loss="ce", **linf).perturb(x, y),
        "apgd-t": lambda: APGDAttack_targeted(model, n_iter=args.steps, n_target_classes=9, **linf).perturb(x, y),
        "fab-t": smallest,
        "square": lambda: SquareAttack(model, n_queries=args.queries, **linf).perturb(x, y),
        "autoattack": cascade,
    }


NAMES = ("fgsm", "bim", "pgd", "apgd", "apgd-t", "fab-t", "square", "autoattack", "ddn", "cw")
PEERS = {"foolbox": foolbox_attacks, "torchattacks": torchattacks_attacks, "autoattack": autoattack_attacks}


def specs(args: argparse.Namespace) -> dict[str, AttackSpec]:
    """Return the specs of our attacks by name."""
    texts = {
        "fgsm": f"fgsm:eps={EPS}",
        "bim": f"bim:eps={EPS},steps={args.steps}",
        "pgd": f"pgd:eps={EPS},steps={args.steps}",
        "apgd": f"apgd:eps={EPS},steps={args.steps}",
        "apgd-t": f"apgd-t:eps={EPS},steps={args.steps}",
        "fab-t": f"fab-t:steps={args.steps}",
        "square": f"square:eps={EPS},queries={args.queries}",
        "autoattack": f"autoattack:eps={EPS},steps={args.steps},queries={args.queries}",
        "ddn": f"ddn:steps={args.steps}",
        "cw": "cw:steps=20,binary_search_steps=5",
    }
    return {name: AttackSpec.parse(text) for name, text in texts.items()}


def compare(name: str, model: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace) -> None:
    """Print the rows of every attack on one network."""
    available = {
        peer: make(model, x, y, args) for peer, make in PEERS.items() if importlib.util.find_spec(peer) is not None
    }
    fast, bfloat16 = make_fast_copy(model, x[:8]), make_fast_copy(model, x[:8], bfloat16=True)
    models = [net for net in (model, fast, bfloat16) if net is not None]
    for attack, spec in specs(args).items():
        if attack not in (args.attacks or [attack]):
            continue
        calls: dict[str, Attack] = {
            "ours": lambda spec=spec: _ours(spec, model, x, y, args),
            "ours, fast copy": lambda spec=spec: _ours(spec, model, x, y, args, fast),
        }
        if spec.may_search_in_bfloat16:
            calls["ours, bfloat16"] = lambda spec=spec: _ours(spec, model, x, y, args, bfloat16)
        calls |= {peer: attacks[attack] for peer, attacks in available.items() if attack in attacks}
        results: dict[str, Tensor] = {}
        counts: dict[str, Passes] = {}
        times: dict[str, list[float]] = {method: [] for method in calls}
        over_floor: list[float] = []
        order = list(calls)
        for _ in range(args.repetitions):
            for method in order:
                torch.manual_seed(args.seed)
                each = _pass_seconds(model, x, y, args) if method == "ours" else []
                with counted(*models) as counts[method]:
                    times[method].append(seconds(_storing(calls[method], results, method), args))
                if method == "ours":
                    # The speed of a shared machine varies, so the passes are timed before and after the attack.
                    each += _pass_seconds(model, x, y, args)
                    back, forth = (statistics.median(kind) for kind in zip(*each, strict=True))
                    over_floor.append(
                        times[method][-1] / (counts[method].backward * back + counts[method].forward * forth)
                    )
            order.append(order.pop(0))  # No method always runs on the warmer machine.
        ours = statistics.median(times["ours"])
        print(
            f"| {name} | {attack} | ours | {_success(spec, model, x, y, results['ours'])} | {ours:.2f} | | "
            f"{statistics.median(over_floor):.2f} | {counts['ours'].all / len(x):.0f} |",
            flush=True,
        )
        for method in [w for w in calls if w != "ours"]:
            ratio = statistics.median(a / b for a, b in zip(times["ours"], times[method], strict=True))
            success = _success(spec, model, x, y, results[method])
            passed = f"{counts[method].all / len(x):.0f}"
            print(
                f"| | | {method} | {success} | {statistics.median(times[method]):.2f} | {ratio:.2f} | | {passed} |",
                flush=True,
            )


def _pass_seconds(model: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace) -> list[tuple[float, float]]:
    """Measure the seconds of an image in a full batch: forward and back, and only forward. Repeat it."""
    kinds = ((1, 0), (0, 1))
    return [
        tuple(seconds(lambda b=b, f=f: passes(model, x, y, b, f), args) / len(x) for b, f in kinds) for _ in range(5)
    ]


def _storing(call: Attack, results: dict[str, Tensor], method: str) -> Callable[[], None]:
    def run() -> None:
        results[method] = call().detach()

    return run


def _ours(
    spec: AttackSpec, model: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace, fast: nn.Module | None = None
) -> Tensor:
    generator = torch.Generator().manual_seed(args.seed)
    return run_attack_on_copy(spec, model, fast, x, y, stop_on_success=spec.can_stop_on_success, generator=generator)


def _success(spec: AttackSpec, model: nn.Module, x: Tensor, y: Tensor, examples: Tensor) -> str:
    """Return the success rate as text, with the median norm of a minimal-norm attack."""
    bounded = examples.clamp(0, 1)
    verify_examples(x, bounded, range(len(x)), spec)
    columns = judge(model, x, bounded, y)
    metrics = shown_metrics({"metrics": summarize(columns, spec, 0.0), "n": len(x)})
    # The median of too few examples is None.
    median = metrics[f"{metrics['norm']}_median"] if metrics["norm"] else None
    return f"{metrics['success_rate']:.3f}" + ("" if median is None else f", {spec.norm} {median:.4f}")


def main() -> None:
    """Train the networks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100, help="test images attacked")
    parser.add_argument("--repetitions", type=int, default=3, help="interleaved; medians are printed")
    parser.add_argument("--steps", type=int, default=40, help="of every iterative attack but C&W (5 x 20)")
    parser.add_argument("--attacks", nargs="+", choices=NAMES, help="only these")
    parser.add_argument("--queries", type=int, default=1000, help="of Square")
    parser.add_argument("--width", type=int, default=8, help="channels of the first stage")
    parser.add_argument("--train-images", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=3, help="of the undefended network; the robust one takes twice")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on CPU")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu: processor time, not with cuda")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.clock == "cpu" and args.device == "cuda":
        parser.error("--clock cpu says nothing about a GPU")
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # The printed times and success rates are those of float32.
    data = ROOT / "pipeline" / "data"
    images, labels = (t.to(args.device) for t in load(data, "train", args.train_images))
    x, y = (t.to(args.device) for t in load(data, "test", args.samples))
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else _cpu_name()
    print(
        f"hardware: {hardware}; threads {args.threads}, {args.clock} time; Python {platform.python_version()}, "
        f"torch {torch.__version__}; n={args.samples}, {args.repetitions} interleaved repetitions, eps {EPS}, "
        f"steps {args.steps}, queries {args.queries}, seed {args.seed}, width {args.width}, "
        f"{args.train_images} training images\n"
    )
    print("| network | attack | who | success, median norm | s | ours/peer | ours/floor | passes per image |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, epochs in (("undefended", args.epochs), ("robust", 2 * args.epochs)):
        torch.manual_seed(args.seed)
        model = train(SmallResNet(args.width).to(args.device), images, labels, epochs, adversarial=name == "robust")
        compare(name, model, x, y, args)


if __name__ == "__main__":
    main()
