"""Low-pass pyramids on one core: ours against torch-dct and scipy.fft, all levels, float32.

    python benchmarks/bench_pyramids.py                 # about 1 minute
    python benchmarks/bench_pyramids.py --clock cpu     # on a machine that does other work too

The three methods take turns in every repetition, on the same images in the same batches. torch-dct and
scipy.fft transform each image once and go back from its low-frequency block to every level. The exit
status is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import scipy.fft
import torch
import torch_dct
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from components.config import level_sizes
from components.dct import lowpass_pyramid
from pipeline.runtime.provenance import hardware

CASES = ((224, 3, 16, 5.0), (32, 3, 256, 10.0), (28, 1, 256, 10.0))
"""Size, channels, images per batch, and how many times torch-dct's speed is the goal. scipy.fft's is a goal everywhere.
Largest first: torch-dct is up to 1.6 times faster once large blocks have taught the allocator to keep freed memory."""
SEED = 0
MIN_SECONDS = 0.1
"""Of one measurement: a batch is repeated until it takes so long."""


def ours(images: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Compute all levels with this project's code."""
    return lowpass_pyramid(images, sizes)


def by_torch_dct(images: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Compute all levels with torch-dct."""
    spectrum = torch_dct.dct_2d(images, norm="ortho")
    return [images, *(torch_dct.idct_2d(spectrum[..., :k, :k] * (k / sizes[0]), norm="ortho") for k in sizes[1:])]


def by_scipy(images: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Compute all levels with scipy.fft."""
    spectrum = scipy.fft.dctn(images.numpy(), norm="ortho", axes=(-2, -1))
    blocks = (spectrum[..., :k, :k] * np.float32(k / sizes[0]) for k in sizes[1:])
    return [images, *(torch.from_numpy(scipy.fft.idctn(b, norm="ortho", axes=(-2, -1))) for b in blocks)]


METHODS: dict[str, Callable[[Tensor, Sequence[int]], list[Tensor]]] = {
    "ours": ours,
    "torch-dct": by_torch_dct,
    "scipy.fft": by_scipy,
}


def main() -> int:
    """Print the speeds of all cases. Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=25)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    arguments = parser.parse_args()
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    machine = hardware()
    print(
        f"{machine['cpu']}, {machine['cpus']} CPUs, {torch.backends.cpu.get_cpu_capability()}; "
        f"1 thread; {arguments.clock} clock"
    )
    print(", ".join(f"{p} {version(p)}" for p in ("torch", "torch-dct", "scipy", "numpy")), end="; ")
    print(
        f"seed {SEED}, float32, median of {arguments.repetitions} interleaved repetitions of at least {MIN_SECONDS} s"
    )
    print(
        f"{'image':>9} {'batch':>5} {'levels':>14}"
        + "".join(f"{m + ' /s':>14}" for m in METHODS)
        + "   x torch-dct   x scipy.fft"
    )
    met = True
    for size, channels, batch, goal in CASES:
        images, sizes = torch.rand(batch, channels, size, size), level_sizes(size)
        for method in METHODS.values():
            for level, reference in zip(method(images, sizes), ours(images.double(), sizes), strict=True):
                torch.testing.assert_close(level.double(), reference, rtol=0, atol=1e-5)
        runs = max(1, round(MIN_SECONDS / _seconds(ours, images, sizes, 20, clock)))
        speeds: dict[str, list[float]] = {m: [] for m in METHODS}
        for _ in range(arguments.repetitions):
            for name, method in METHODS.items():
                # The slower methods need fewer runs to be measured for as long.
                repeated = runs if name == "ours" else max(1, runs // 4)
                speeds[name].append(batch / _seconds(method, images, sizes, repeated, clock))
        medians = {m: statistics.median(s) for m, s in speeds.items()}
        ratios = {m: statistics.median(a / b for a, b in zip(speeds["ours"], speeds[m], strict=True)) for m in METHODS}
        ok = ratios["torch-dct"] >= goal and ratios["scipy.fft"] >= 1
        met &= ok
        print(
            f"{f'{size}x{size}x{channels}':>9} {batch:>5} {str(sizes).replace(' ', ''):>14}"
            + "".join(f"{medians[m]:>14,.0f}" for m in METHODS)
            + f"   {ratios['torch-dct']:>5.1f} (>={goal:.0f})   {ratios['scipy.fft']:>5.2f} (>=1)   "
            + ("met" if ok else "MISSED")
        )
    return 0 if met else 1


def _seconds(
    method: Callable[[Tensor, Sequence[int]], list[Tensor]],
    images: Tensor,
    sizes: Sequence[int],
    runs: int,
    clock: Callable[[], float],
) -> float:
    """Return the mean seconds of a run."""
    start = clock()
    for _ in range(runs):
        method(images, sizes)
    return (clock() - start) / runs


if __name__ == "__main__":
    sys.exit(main())
