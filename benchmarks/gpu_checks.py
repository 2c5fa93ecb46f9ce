"""Correctness of this project on a GPU, and its speed against the GPU's limits. benchmarks/gpu.sh runs it.

    python benchmarks/gpu_checks.py check    --out DIR [--device cuda|cpu] [--quick]    part 1: correct on this device
    python benchmarks/gpu_checks.py speed    --out DIR [--device cuda|cpu] [--quick]    part 2: ceilings and fractions
    python benchmarks/gpu_checks.py pipeline --out DIR --storage DIR "RECIPE ARGS"      part 3: a whole run through Ray
    python benchmarks/gpu_checks.py table    --out DIR                                  the rows of all parts as tables

Each measurement is appended to DIR/PART.jsonl and flushed, so a process that is killed loses no finished
row. A measurement that fails becomes a row with its error, and the next one runs. The exit status is 1
if any row failed.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *(p for p in sys.path if p != str(ROOT / "benchmarks"))]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from components.attacks.common import is_adversarial, loss_gradient, norms  # noqa: E402
from components.attacks.fast_copy import computes_in_bfloat16, make_fast_copy  # noqa: E402
from components.attacks.registry import run_attack  # noqa: E402
from components.attacks.spec import AttackSpec  # noqa: E402
from components.config import DataConfig, Shapes, TrainConfig, level_sizes, stored_levels  # noqa: E402
from components.models.defend import DefendNet, Noise, adaptive_objective  # noqa: E402
from components.network import build_net  # noqa: E402
from components.precision import true_float32  # noqa: E402
from components.training.augment import Batch, gaussian_noise  # noqa: E402
from components.training.schedule import Phase, phase_at_epoch  # noqa: E402
from components.training.step import PhaseModule, make_optimizer, train_step  # noqa: E402
from pipeline.data.sources.open import open_source  # noqa: E402
from pipeline.recipes.registry import RECIPES  # noqa: E402
from pipeline.runtime import provenance  # noqa: E402

LOSS_TOLERANCE = 1e-3
"""Largest relative difference between the first loss on the GPU and on the CPU, both in float32."""
SECOND_LOSS_TOLERANCE = 1e-2
"""The same after one update, and for losses of adversarial examples: a sign that flips changes a whole pixel."""
BFLOAT16_TOLERANCE = 5e-2
NORM_TOLERANCE = 2e-2
"""Largest relative difference between median norms of minimal-norm attacks."""
ATTACKS = (
    "noise:eps=0.1",
    "fgsm:eps=0.1",
    "bim:eps=0.1,steps=10",
    "bim:eps=1.5,norm=l2,steps=10",
    "pgd:eps=0.1,steps=10,restarts=2",
    "apgd:eps=0.1,steps=10",
    "apgd:eps=1.5,norm=l2,steps=10",
    "apgd-t:eps=0.1,steps=5,targets=3",
    "fab-t:norm=linf,steps=5,targets=3",
    "square:eps=0.1,queries=50",
    "autoattack:eps=0.1,steps=5,queries=20",
    "adaptive:eps=0.1,steps=10",
    "adaptive:eps=0.1,objective=reconstruction,steps=10",
    "cw:steps=10,binary_search_steps=3",
    "ddn:steps=20",
)
VARIANTS = ("eager", "fused", "graph", "compile", "compile+graph")
"""Ways to run one training step. fused: PyTorch's fused SGD, which the later ones use too."""


class Rows:
    """JSON-lines file of one part. Each row is written to disk once it is measured."""

    def __init__(self, directory: Path, part: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"{part}.jsonl"
        self.failed: list[str] = []

    def add(self, name: str, **values: Any) -> None:
        """Append one row and print it."""
        row = {"name": name, **values}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if row.get("ok") is False:
            self.failed.append(name)
        print(f"[{time.strftime('%H:%M:%S')}] " + " ".join(f"{k}={_short(v)}" for k, v in row.items()), flush=True)

    @contextmanager
    def guarded(self, name: str, **values: Any) -> Iterator[None]:
        """Turn an exception of one measurement into a failed row."""
        try:
            yield
        except Exception as e:  # Every kind of failure becomes a row, and the next measurement runs.
            trace = traceback.format_exc(limit=-4)
            self.add(name, ok=False, error=f"{type(e).__name__}: {e}"[:2000], trace=trace[-2000:], **values)


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)[:200]


def versions() -> dict[str, Any]:
    """Return the versions of Python and the main packages, the processor, the GPU and the revision."""
    machine = provenance.hardware()
    details = {**provenance.versions(), "cpus": machine["cpus"], "cuda": torch.version.cuda}
    if machine["gpus"]:
        details |= {"gpu": machine["gpus"][0], "cudnn": torch.backends.cudnn.version()}
    return {**details, "revision": provenance.revision(ROOT)["revision"] or provenance.source_hash(ROOT) or "unknown"}


# --- part 1


def random_batch(shapes: Shapes, size: int, *, levels: bool = True) -> Batch:
    """Return a batch of random images on the CPU, the same one at each call."""
    generator = torch.Generator().manual_seed(0)
    side = shapes.sizes[0]
    images = torch.randint(256, (size, shapes.channels, side, side), dtype=torch.uint8, generator=generator)
    labels = torch.randint(shapes.num_classes, (size,), generator=generator)
    stored = [torch.rand(size, shapes.channels, s, s, generator=generator) for s in shapes.sizes[1:]]
    return Batch(images=images, labels=labels, levels=tuple(stored) if levels else ())


def moved(batch: Batch, device: torch.device) -> Batch:
    """Return a copy of a batch on a device."""
    return Batch(
        images=batch.images.to(device), labels=batch.labels.to(device), levels=tuple(x.to(device) for x in batch.levels)
    )


def noise_from_cpu(config: TrainConfig, step: int) -> Noise | None:
    """Draw the noise of a step on the CPU for any device, so that two devices can be compared."""
    draw = gaussian_noise(config, step, 0, torch.device("cpu"))
    return None if draw is None else lambda x: x + draw(torch.zeros(x.shape)).to(x)


def losses_of_steps(
    net: nn.Module, phase: Phase, config: TrainConfig, batch: Batch, sizes: tuple[int, ...], *, same_noise: bool
) -> list[float]:
    """Take two training steps and return their losses. The second loss checks the first step's update."""
    device = batch.images.device
    if config.channels_last:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    module, optimizer = PhaseModule(net.train(), phase, config), make_optimizer(net, config)
    losses = []
    for step in range(2):
        noise = noise_from_cpu(config, step) if same_noise else gaussian_noise(config, step, 0, device)
        generator = torch.Generator().manual_seed(step)
        terms = train_step(
            module, optimizer, batch, lr=1e-3, config=config, sizes=sizes, noise=noise, generator=generator
        )
        losses.append(float(terms["loss"]))
    return losses


def check_models(rows: Rows, device: torch.device, quick: bool) -> None:
    """Compare a float32 step of every model of tables 1, 3 and of recipe robust with the CPU's.

    Also take a step in bfloat16 with channels_last.
    """
    for table in ("table1", "table3", "robust"):
        experiment = RECIPES[f"{table}-{'smoke' if quick else 'fast'}"].make()
        data = experiment.data
        shapes = Shapes(
            image_size=data.image_size,
            channels=data.channels,
            num_classes=data.num_classes,
            sizes=level_sizes(data.image_size),
        )
        for name, config in experiment.model_configs().items():
            for phase in dict.fromkeys(phase_at_epoch(epoch, config) for epoch in range(config.epochs)):
                check_step(rows, f"step {table} {name} {phase}", phase, config, shapes, device, 4 if quick else 16)


@true_float32()
def check_step(
    rows: Rows, name: str, phase: Phase, config: TrainConfig, shapes: Shapes, device: torch.device, size: int
) -> None:
    """Add the row of one model in one phase.

    It holds the losses of float32 on the CPU and the device, and of bfloat16 with channels_last on the
    device.
    """
    with rows.guarded(name):
        plain = dataclasses.replace(config, precision="float32", channels_last=False)
        batch = random_batch(shapes, size, levels=stored_levels(config))
        nets = [build_net(plain, shapes) for _ in range(3)]
        on_device = moved(batch, device)
        cpu = losses_of_steps(nets[0], phase, plain, batch, shapes.sizes, same_noise=True)
        ours = losses_of_steps(nets[1].to(device), phase, plain, on_device, shapes.sizes, same_noise=True)
        mixed = dataclasses.replace(config, precision="bfloat16", channels_last=True)
        bfloat16 = losses_of_steps(nets[2].to(device), phase, mixed, on_device, shapes.sizes, same_noise=False)
        apart = [abs(a - b) / max(abs(b), 1e-8) for a, b in zip(ours, cpu, strict=True)]
        apart16 = abs(bfloat16[0] - cpu[0]) / max(abs(cpu[0]), 1e-8)
        first = SECOND_LOSS_TOLERANCE if phase.startswith("adversarial") else LOSS_TOLERANCE
        # Noise drawn on the device differs from the CPU's. That loss is reported, but not compared.
        comparable = gaussian_noise(config, 0, 0, device) is None
        ok = apart[0] <= first and apart[1] <= SECOND_LOSS_TOLERANCE
        ok16 = all(x == x and abs(x) < float("inf") for x in bfloat16)
        ok16 = ok16 and (not comparable or apart16 <= BFLOAT16_TOLERANCE)
        rows.add(
            name,
            ok=ok and ok16,
            loss_cpu=cpu[0],
            loss=ours[0],
            apart=apart[0],
            apart_second=apart[1],
            loss_bfloat16=bfloat16[0],
            apart_bfloat16=apart16,
        )


def sample_images(count: int) -> tuple[Tensor, Tensor]:
    """Return the first images of the bundled MNIST sample: uint8 [N,1,28,28] and int64 [N]."""
    images, labels = open_source(DataConfig(), "train").read(np.arange(count))
    return torch.from_numpy(images), torch.from_numpy(labels)


@true_float32()
def trained_net(device: torch.device, width: int, steps: int) -> DefendNet:
    """Train a Defend++ network for a few steps on the bundled sample, in float32."""
    config = TrainConfig(width=width, lr=0.05, clip_norm=1.0, reconstruction_weight=10.0, seed=1)
    shapes = Shapes(image_size=28, channels=1, num_classes=10, sizes=level_sizes(28))
    images, labels = (x.to(device) for x in sample_images(64 * steps))
    net = build_net(config, shapes).to(device).train()
    assert isinstance(net, DefendNet)
    module, optimizer = PhaseModule(net, "joint", config), make_optimizer(net, config)
    for step in range(steps):
        rows = torch.arange(64, device=device).add(64 * step).remainder(len(images))
        small = torch.nn.functional.interpolate(images[rows].float() / 255, size=shapes.sizes[1])
        smaller = torch.nn.functional.interpolate(small, size=shapes.sizes[2])
        batch = Batch(images=images[rows], labels=labels[rows], levels=(small, smaller))
        train_step(module, optimizer, batch, lr=0.05, config=config, sizes=shapes.sizes)
    return net.eval()


@true_float32()
def check_attacks(rows: Rows, device: torch.device, quick: bool) -> None:
    """Compare every attack on the device with the same attack on the CPU, on one trained network."""
    count = 8 if quick else 48
    net = trained_net(device, 4 if quick else 16, 10 if quick else 60)
    host = copy.deepcopy(net).cpu()
    images, labels = sample_images(5000)
    images, labels = images[-count:].float().div(255), labels[-count:]
    with rows.guarded("fast copy"):
        random = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0)).to(device)
        exact_copy = make_fast_copy(net.classifier, random)
        fast = make_fast_copy(net.classifier, random, bfloat16=True)
        rows.add("fast copy", ok=exact_copy is not None, bfloat16=computes_in_bfloat16(fast))
    for text in ATTACKS:
        with rows.guarded(f"attack {text}"):
            on_cpu, cpu_s = attacked(text, host, images, labels)
            on_device, device_s = attacked(text, net, images.to(device), labels.to(device))
            compare_examples(rows, text, host, (images, labels), (on_cpu, cpu_s), (on_device.cpu(), device_s))


def attacked(text: str, net: DefendNet, images: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Run an attack on a network and return its examples and the seconds."""
    spec = AttackSpec.parse(text)
    auxiliary = None
    if spec.name == "adaptive":
        auxiliary = adaptive_objective(net.autoencoder, images, spec.objective or "", spec.weight or 1.0)
    begin = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    examples = run_attack(spec, net.classifier, images, labels, auxiliary=auxiliary, generator=generator)
    synchronize(images.device)
    return examples, time.perf_counter() - begin


def compare_examples(
    rows: Rows,
    text: str,
    host: DefendNet,
    clean: tuple[Tensor, Tensor],
    on_cpu: tuple[Tensor, float],
    on_device: tuple[Tensor, float],
) -> None:
    """Add the row of one attack: verdicts (by the CPU's network) and norms of both sets of examples."""
    images, labels = clean
    spec = AttackSpec.parse(text)
    with torch.no_grad():
        broken = [is_adversarial(host.classifier(x), labels, False) for x in (on_cpu[0], on_device[0])]
    norm = "linf" if spec.norm == "linf" else "l2"
    sizes = [float(norms(x - images, norm).median()) for x in (on_cpu[0], on_device[0])]  # type: ignore[arg-type]
    other = int((broken[0] ^ broken[1]).sum())
    ok = other <= max(1, len(images) // 16)
    if spec.kind == "minimal_norm":
        ok = ok and abs(sizes[1] - sizes[0]) <= NORM_TOLERANCE * sizes[0]
    else:
        within = norms(on_device[0] - images, norm).max() <= (spec.eps or 0) * (1 + 1e-5) + 1e-6  # type: ignore[arg-type]
        ok = ok and bool(within)
    rows.add(
        f"attack {text}",
        ok=ok,
        n=len(images),
        broken_cpu=int(broken[0].sum()),
        broken=int(broken[1].sum()),
        verdicts_apart=other,
        norm_cpu=sizes[0],
        norm=sizes[1],
        seconds_cpu=on_cpu[1],
        seconds=on_device[1],
    )


def check_collectives(rows: Rows, device: torch.device, quick: bool) -> None:
    """Take one step through DDP with world size 1: NCCL on a GPU, gloo on a CPU."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    backend = "nccl" if device.type == "cuda" else "gloo"
    name = f"{backend}, world size 1"
    with rows.guarded(name), tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        try:
            shapes = Shapes(image_size=28, channels=1, num_classes=10, sizes=level_sizes(28))
            config = TrainConfig(width=4 if quick else 64)
            net = build_net(config, shapes).to(device).train()
            batch = moved(random_batch(shapes, 8), device)
            module = DistributedDataParallel(PhaseModule(net, "joint", config))
            terms = train_step(module, make_optimizer(net, config), batch, lr=1e-3, config=config)
            total = torch.ones(4, device=device)
            dist.all_reduce(total)
            loss = float(terms["loss"])
            rows.add(name, ok=loss == loss and float(total.sum()) == 4.0, loss=loss)
        finally:
            dist.destroy_process_group()


def check(rows: Rows, device: torch.device, quick: bool) -> None:
    """Run part 1: compare everything on this device with the CPU."""
    check_collectives(rows, device, quick)
    check_models(rows, device, quick)
    check_attacks(rows, device, quick)


# --- part 2


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device, budget_s: float) -> float:
    """Return the median seconds of a call over 5 groups of calls.

    A group has as many calls as fit a fifth of the budget, and one synchronisation.
    """
    call()
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    once = max(time.perf_counter() - begin, 1e-7)
    calls = max(1, int(budget_s / 5 / once))
    groups = []
    for _ in range(5 if once < budget_s else 1):
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        groups.append((time.perf_counter() - begin) / calls)
    return statistics.median(groups)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in convolutions and matrix products within a ``with`` block."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def measure_ceilings(rows: Rows, device: torch.device, quick: bool, budget_s: float) -> dict[str, float]:
    """Measure bytes per second of a copy, and FLOP per second of a matrix product in each precision."""
    ceilings: dict[str, float] = {}
    with rows.guarded("ceiling copy"):
        source = torch.empty((1 << 24) if quick else (1 << 30), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        seconds = seconds_of(functools.partial(target.copy_, source), device, budget_s)
        rows.add("ceiling copy", ok=True, gigabytes_per_s=2 * source.numel() / seconds / 1e9)
        del source, target
    side = 256 if quick else 8192
    for precision in ("float32", "tf32", "bfloat16"):
        if precision == "tf32" and device.type == "cpu":
            continue
        with rows.guarded(f"ceiling matmul {precision}"), tf32(precision == "tf32"):
            dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
            generator = torch.Generator(device).manual_seed(0)
            a = torch.randn(side, side, generator=generator, device=device).to(dtype)
            b, c = a.flip(0).contiguous(), torch.empty_like(a)
            seconds = seconds_of(functools.partial(torch.mm, a, b, out=c), device, budget_s)
            ceilings[precision] = 2 * side**3 / seconds
            rows.add(f"ceiling matmul {precision}", ok=True, side=side, tflops=ceilings[precision] / 1e12)
    return ceilings


def flops_of(call: Callable[[], object]) -> float:
    """Count the floating-point operations of a call, as PyTorch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def make_step(
    defense: str, size: int, batch_size: int, variant: str, device: torch.device, quick: bool
) -> Callable[[], object]:
    """Return a function that takes a step on one batch in bfloat16, channels_last, in one of VARIANTS."""
    config = TrainConfig(
        defense="none" if defense == "no_defense" else "defend++",
        width=4 if quick else 64,
        shared_blocks=4 if size == 28 else 3,
        batch_size=batch_size,
        reconstruction_weight=10.0,
        clip_norm=1.0,
        precision="bfloat16",
        channels_last=True,
        seed=1,
    )
    channels = 1 if size == 28 else 3
    shapes = Shapes(image_size=size, channels=channels, num_classes=10, sizes=level_sizes(size))
    net = build_net(config, shapes).to(device).train()
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    phase: Phase = "classifier" if defense == "no_defense" else "joint"
    module: Any = PhaseModule(net, phase, config)
    optimizer = make_optimizer(net, config)
    if variant != "eager":
        optimizer = torch.optim.SGD(
            net.parameters(), lr=1e-3, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
        )
    if variant.startswith("compile"):
        module = torch.compile(module)
    batch = moved(random_batch(shapes, batch_size, levels=phase == "joint"), device)

    def step() -> None:
        train_step(module, optimizer, batch, lr=1e-3, config=config, sizes=shapes.sizes)

    return captured(step) if variant.endswith("graph") else step


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """Record a call as a CUDA graph and return its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure_training(
    rows: Rows, device: torch.device, quick: bool, budget_s: float, variants: tuple[str, ...], ceiling: float
) -> None:
    """Measure the images per second of training steps for all models, image sizes and variants."""
    settings = [(28, 4), (32, 4)] if quick else [(28, 256), (32, 256), (224, 64)]
    work: dict[tuple[str, int], float] = {}
    for variant in variants:
        for size, batch_size in settings:
            for defense in ("no_defense", "defend"):
                name = f"train {defense} {size} {variant}"
                with rows.guarded(name):
                    if device.type == "cpu" and variant.endswith("graph"):
                        continue
                    torch.backends.cudnn.benchmark = True
                    begin = time.perf_counter()
                    if (defense, size) not in work:
                        work[defense, size] = flops_of(make_step(defense, size, batch_size, "eager", device, quick))
                    call = make_step(defense, size, batch_size, variant, device, quick)
                    call()
                    synchronize(device)
                    ready = time.perf_counter() - begin
                    seconds = seconds_of(call, device, budget_s)
                    rows.add(
                        name,
                        ok=True,
                        batch=batch_size,
                        images_per_s=batch_size / seconds,
                        ms=1e3 * seconds,
                        gflop=work[defense, size] / 1e9,
                        of_ceiling=work[defense, size] / seconds / ceiling if ceiling else None,
                        ready_s=ready,
                    )
                    del call
                    torch.compiler.reset()
                    if device.type == "cuda":
                        torch.cuda.empty_cache()


def measure_attacks(rows: Rows, device: torch.device, quick: bool, budget_s: float, ceilings: dict[str, float]) -> None:
    """Measure passes to the images and back per second: alone, as a CUDA graph, and inside PGD."""
    net = trained_net(device, 4 if quick else 64, 2 if quick else 60).classifier.requires_grad_(False)
    torch.backends.cudnn.benchmark = False
    images, _ = sample_images(5000)
    images = images.float().div(255).to(device)
    precisions = ("float32", "bfloat16") if device.type == "cpu" else ("float32", "tf32", "bfloat16")
    for precision in precisions:
        with rows.guarded(f"passes {precision}"), tf32(False):
            fast = make_fast_copy(net, images[:8], bfloat16=precision == "bfloat16")
            if precision == "bfloat16" and not computes_in_bfloat16(fast):
                rows.add(
                    "passes bfloat16", ok=False, error="the fast copy of this network does not compute in bfloat16"
                )
                continue
            for chunk in (8,) if quick else (250, 1000, 4000):
                with tf32(precision == "tf32"):
                    measure_chunk(rows, fast or net, images[:chunk], precision, budget_s, ceilings.get(precision, 0.0))


def measure_chunk(rows: Rows, net: nn.Module, images: Tensor, precision: str, budget_s: float, ceiling: float) -> None:
    """Add the rows of one chunk size in one precision."""
    device, n = images.device, len(images)
    with torch.no_grad():
        labels = net(images).argmax(1)

    def losses(logits: Tensor, _: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    def single_pass() -> None:
        loss_gradient(net, images, losses)

    # PyTorch's counter follows backward(), but not autograd.grad(), which the attacks call.
    work = flops_of(lambda: losses(net(images.detach().requires_grad_()), images).sum().backward())
    spec = AttackSpec.parse("pgd:eps=0.1,steps=10")
    kinds: dict[str, Callable[[], tuple[Callable[[], object], int]]] = {
        "pass": lambda: (single_pass, 1),
        "pass, graph": lambda: (captured(single_pass), 1),
        "pgd": lambda: (
            (lambda: run_attack(spec, net, images, labels, generator=torch.Generator().manual_seed(0))),
            10,
        ),
    }
    for kind, make in kinds.items():
        name = f"{kind} {precision} {n}"
        if kind.endswith("graph") and device.type == "cpu":
            continue
        with rows.guarded(name):
            call, passes = make()
            seconds = seconds_of(call, device, budget_s) / passes
            of_ceiling = work / seconds / ceiling if ceiling else None
            rows.add(
                name, ok=True, chunk=n, image_passes_per_s=n / seconds, ms_per_pass=1e3 * seconds, of_ceiling=of_ceiling
            )


def speed(rows: Rows, device: torch.device, quick: bool) -> None:
    """Run part 2: ceilings and fractions of them. Compilation takes longest to prepare and comes last."""
    budget_s = 0.02 if quick else 0.5
    ceilings = measure_ceilings(rows, device, quick, budget_s)
    peak = ceilings.get("bfloat16", 0.0)
    measure_training(rows, device, quick, budget_s, VARIANTS[:3], peak)
    measure_attacks(rows, device, quick, budget_s, ceilings)
    if not quick:
        measure_training(rows, device, quick, budget_s, VARIANTS[3:], peak)


# --- part 3


def pipeline(rows: Rows, command: str, storage: str, data: str, limit_s: float) -> None:
    """Run part 3: one recipe through Ray in its own process. Add its wall-clock and its stages' seconds.

    Args:
        command: a recipe and its options, as pipeline/main.py takes them after ``run``.
        data: directory of Parquet files that replaces the source torchvision:mnist, or an empty string.
        limit_s: seconds after which the run is interrupted. The same command continues it.
    """
    arguments = shlex.split(command)
    recipe = RECIPES.get(arguments[0])
    source = recipe.make().data.source if recipe else ""
    if data and source == "torchvision:mnist" and "--data.source" not in command:
        arguments += ["--data.source", f"parquet:{data}"]
    line = [sys.executable, str(ROOT / "pipeline" / "main.py"), "run", *arguments, "--storage", storage]
    print("+ " + shlex.join(line), flush=True)
    begin = time.monotonic()
    process = subprocess.Popen(line, cwd=ROOT, start_new_session=True)
    cut = False
    try:
        status = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        cut = True
        status = interrupted(process)
    record = newest_record(Path(storage), arguments[0], time.time() - (time.monotonic() - begin))
    rows.add(
        f"run {command}",
        ok=status == 0,
        status="cut off by the time limit" if cut else status,
        wall_s=time.monotonic() - begin,
        stages_s=record.get("stages"),
        models={name: model.get("seconds") for name, model in record.get("models", {}).items()},
        images_per_s={name: model.get("images_per_second") for name, model in record.get("models", {}).items()},
        evaluations=len(record.get("evaluations", [])),
        finished=record.get("finished"),
    )


def interrupted(process: subprocess.Popen[bytes]) -> int:
    """End a run as Ctrl-C does, or by force after 20 seconds, and return its exit status."""
    for sign, wait_s in ((signal.SIGINT, 20.0), (signal.SIGKILL, 5.0)):
        os.killpg(process.pid, sign)
        try:
            return process.wait(wait_s)
        except subprocess.TimeoutExpired:
            continue
    return -9


def newest_record(storage: Path, recipe: str, since: float) -> dict[str, Any]:
    """Return the newest run.json of a recipe, or {} if none was written since a time."""
    files = sorted(storage.glob("runs/*/run.json"), key=lambda f: f.stat().st_mtime)
    if not files or files[-1].stat().st_mtime < since:
        return {}
    record: dict[str, Any] = json.loads(files[-1].read_text())
    return record


# --- tables


def table(directory: Path) -> None:
    """Print the rows of all parts as Markdown tables, failures last."""
    failures: list[str] = []
    for file in sorted(directory.glob("*.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
        failures += [f"{file.stem}: {r['name']}: {r.get('error', 'differs')}" for r in lines if r.get("ok") is False]
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in lines:
            if "error" not in row:
                groups.setdefault(tuple(k for k in row if k != "trace"), []).append(row)
        for columns, members in groups.items():
            print(f"\n**{file.stem}**\n\n| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
            for row in members:
                print("| " + " | ".join(_cell(row[c]) for c in columns) + " |")
    print(f"\n{len(failures)} failed" + "".join(f"\n- {line}" for line in failures))


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_cell(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    """Run one part and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("check", "speed", "pipeline", "table"))
    parser.add_argument(
        "command", nargs="?", default="table1-fast", help="pipeline: recipe and options in one argument"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the JSON-lines files")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that every measurement runs")
    parser.add_argument("--storage", default="", help="pipeline: where the run is kept")
    parser.add_argument("--data", default="", help="pipeline: Parquet directory in place of torchvision:mnist")
    parser.add_argument("--limit", type=float, default=480, help="pipeline: seconds")
    args = parser.parse_args()
    if args.part == "table":
        table(args.out)
        return 0
    rows = Rows(args.out, args.part)
    device = torch.device(args.device)
    rows.add("versions", **versions(), device=args.device, started=datetime.now(UTC).isoformat(timespec="seconds"))
    if args.part == "pipeline":
        pipeline(rows, args.command, args.storage or str((args.out / "storage").absolute()), args.data, args.limit)
    else:
        {"check": check, "speed": speed}[args.part](rows, device, args.quick)
    print(f"{args.part}: {len(rows.failed)} failed" + "".join(f"\n  {name}" for name in rows.failed), flush=True)
    return 1 if rows.failed else 0


if __name__ == "__main__":
    sys.exit(main())
