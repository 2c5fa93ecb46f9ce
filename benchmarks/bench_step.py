"""Time of a Defend++ training step over a classifier's, against the ratio of their FLOPs.

    .venv/bin/python benchmarks/bench_step.py [--precision bfloat16 --channels-last] [--profile]

Both networks are ResNet-18 on random images. Their steps are interleaved, so that a change of clock
speed or load affects both. The times are medians of whole steps (forward, backward, SGD). The FLOPs are
those of torch.utils.flop_counter, forward and backward. The goal is time ratio / FLOP ratio <= 1.1.

On a shared machine, wall-clock times are unreliable (the load and the quartiles show it). Use the ratio of
CPU times there, with --threads 1: threads that wait for one another count as busy.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from components.config import TrainConfig, level_sizes
from components.config.data import Shapes
from components.network import build_net
from components.training.augment import Batch
from components.training.schedule import Phase
from components.training.step import PhaseModule, make_optimizer, train_step

GOAL = 1.1


def make_step(phase: Phase, args: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """Return a function that takes one training step of the phase on one fixed batch."""
    config = TrainConfig(
        defense="none" if phase == "classifier" else "defend++",
        width=args.width,
        shared_blocks=args.shared_blocks,
        batch_size=args.batch,
        precision=args.precision,
        channels_last=args.channels_last,
        lr=1e-3,
        seed=args.seed,
    )
    sizes = level_sizes(args.image_size)
    shapes = Shapes(image_size=args.image_size, channels=args.channels, num_classes=10, sizes=sizes)
    net = build_net(config, shapes).to(device)
    if config.channels_last:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    module, optimizer = PhaseModule(net.train(), phase, config), make_optimizer(net, config)
    generator = torch.Generator().manual_seed(args.seed)
    images = torch.randint(256, (args.batch, args.channels, sizes[0], sizes[0]), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (args.batch,), generator=generator)
    levels = [torch.rand(args.batch, args.channels, s, s, generator=generator) for s in sizes[1:]]
    if phase == "classifier":
        levels = []
    batch = Batch(images=images.to(device), labels=labels.to(device), levels=tuple(x.to(device) for x in levels))

    def step() -> None:
        train_step(module, optimizer, batch, lr=config.lr, config=config)

    return step


def flops(step: Callable[[], None]) -> int:
    """Count the floating-point operations of one step."""
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    return int(counter.get_total_flops())


def seconds(step: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Measure the wall-clock and CPU seconds of one step."""
    begin, cpu = time.perf_counter(), time.process_time()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, time.process_time() - cpu


def processor(device: torch.device) -> str:
    """Describe the processor and how much of it is used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return f"{name}, {torch.get_num_threads()} threads"


def main() -> None:
    """Time both steps and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--shared-blocks", type=int, default=3)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="PyTorch threads; 0: its own choice")
    parser.add_argument("--repetitions", type=int, default=8, help="timed steps of each network")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", action="store_true", help="print where the time of each goes, by operation")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.channels_last and args.precision == "float32" and device.type == "cpu":
        parser.error("channels-last float32 gradients on CPU corrupt memory (PyTorch 2.14.1): add --precision bfloat16")

    print(f"hardware   {processor(device)}")
    print(f"versions   Python {platform.python_version()}, PyTorch {torch.__version__}")
    print(
        f"setting    ResNet-18 width {args.width}, {args.channels}x{args.image_size}x{args.image_size}, batch "
        f"{args.batch}, shared_blocks {args.shared_blocks}, {args.precision}, channels_last {args.channels_last}, "
        f"seed {args.seed}"
    )
    load = os.getloadavg()[0]
    phases: tuple[Phase, Phase] = ("classifier", "joint")
    steps = {phase: make_step(phase, args, device) for phase in phases}
    work = {phase: flops(step) for phase, step in steps.items()}
    for _ in range(args.warmup):
        for step in steps.values():
            seconds(step, device)
    times: dict[str, list[float]] = {phase: [] for phase in phases}
    cpu: dict[str, list[float]] = {phase: [] for phase in phases}
    for i in range(args.repetitions):
        for phase in phases if i % 2 == 0 else phases[::-1]:
            wall, busy = seconds(steps[phase], device)
            times[phase].append(wall)
            cpu[phase].append(busy)
    for phase in phases:
        t = statistics.median(times[phase])
        print(
            f"{phase:10} {1e3 * t:8.1f} ms/step (median of n={args.repetitions}; min {1e3 * min(times[phase]):.1f}, "
            f"max {1e3 * max(times[phase]):.1f})   {work[phase] / 1e9:8.1f} GFLOP   "
            f"{work[phase] / t / 1e9:7.1f} GFLOP/s"
        )
    if device.type == "cpu":
        print(f"load       {load:.1f} before, {os.getloadavg()[0]:.1f} after ({os.cpu_count()} CPUs)")
    time_ratio = statistics.median(times["joint"]) / statistics.median(times["classifier"])
    # Steps next to each other ran under the same load: the spread of their ratios shows the median's error.
    pairs = sorted(j / c for j, c in zip(times["joint"], times["classifier"], strict=True))
    flop_ratio = work["joint"] / work["classifier"]
    print(
        f"time ratio {time_ratio:.3f} "
        f"(quartiles of pairs {pairs[len(pairs) // 4]:.3f} to {pairs[-1 - len(pairs) // 4]:.3f})"
    )
    print(f"FLOP ratio {flop_ratio:.3f}")
    score = time_ratio / flop_ratio
    print(f"time ratio / FLOP ratio {score:.3f} (goal <= {GOAL}: {'reached' if score <= GOAL else 'missed'})")

    if device.type == "cpu":
        cpu_ratio = statistics.median(cpu["joint"]) / statistics.median(cpu["classifier"])
        spread = {phase: max(cpu[phase]) / min(cpu[phase]) for phase in phases}
        print(
            f"CPU time   ratio {cpu_ratio:.3f}, / FLOP ratio {cpu_ratio / flop_ratio:.3f} (longest / shortest step: "
            f"classifier {spread['classifier']:.2f}, joint {spread['joint']:.2f})"
        )

    if args.profile:
        for phase in phases:
            with torch.profiler.profile(record_shapes=True) as profile:
                for _ in range(3):
                    steps[phase]()
            print(f"\n{phase}, 3 steps")
            table = profile.key_averages(group_by_input_shape=True)
            print(
                table.table(
                    sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=48, max_shapes_column_width=70
                )
            )
            print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=48))


if __name__ == "__main__":
    main()
