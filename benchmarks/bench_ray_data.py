"""Throughput per core of the pyramids stage on Ray Data, against a plain loop in one process.

    python benchmarks/bench_ray_data.py --data ../shared/data/mnist       # about 2 minutes
    python benchmarks/bench_ray_data.py                                   # the bundled sample, 6,000 images

Both decode the images, compute the levels and write the same shards, which are compared byte for byte
at the end. They take turns in every repetition. Ray's workers have started and imported torch before
anything is timed; the time of this start-up is printed separately.

"Per core" is images per second and per CPU that Ray was given. "Per CPU second" counts the processor
time of all of Ray's processes, its services included, so it also holds on a machine that does other
work. The exit status is 1 if the chosen clock misses the goal of 0.7.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray  # noqa: E402

from components.config import DataConfig, PyramidConfig  # noqa: E402
from pipeline.data import pyramids, shard_plan  # noqa: E402
from pipeline.runtime import cluster  # noqa: E402
from pipeline.runtime.provenance import hardware  # noqa: E402
from pipeline.runtime.storage import Storage  # noqa: E402

GOAL = 0.7
SEED = 0


def plain_loop(data: DataConfig, config: PyramidConfig, storage: Storage) -> int:
    """Build the training shards without Ray, and return the number of images."""
    plan = shard_plan.plan_shard_set(data, config, "train", "lowpass")
    directory = storage / plan.address
    entries = [pyramids.write_shard(directory, i, plan.table(i)) for i in range(plan.num_shards)]
    pyramids.write_manifest(plan, directory, entries)
    return len(plan.rows)


def on_ray(data: DataConfig, config: PyramidConfig, storage: Storage) -> int:
    """Build the training shards on Ray Data, and return the number of images."""
    return pyramids.build(data, config, storage, "train").num_rows


def cpu_seconds() -> float:
    """Return the processor time so far of this process and its descendants, Ray's services included."""
    ticks, parents = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # The command's name, in parentheses, may contain blanks.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # The process has just ended.
                continue
            parents[int(entry.name)] = int(fields[1])
            ticks[int(entry.name)] = int(fields[11]) + int(fields[12])
    total = 0
    for pid in ticks:
        ancestor = pid
        while ancestor not in (os.getpid(), 0, 1) and ancestor in parents:
            ancestor = parents[ancestor]
        total += ticks[pid] if ancestor == os.getpid() else 0
    return total / os.sysconf("SC_CLK_TCK")


def main() -> int:
    """Print the throughput of both. Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="directory of Hugging Face Parquet files; empty: the bundled sample")
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--images", type=int, default=0, help="first so many training images; 0: all")
    parser.add_argument("--cpus", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="which figure the goal is held against"
    )
    arguments = parser.parse_args()
    data = DataConfig(
        source=f"parquet:{arguments.data}" if arguments.data else "sample:mnist",
        image_size=arguments.size,
        channels=arguments.channels,
        train_limit=arguments.images,
        validation_fraction=0,
        split_seed=SEED,
    )
    config = PyramidConfig()
    machine = hardware()
    print(f"{machine['cpu']}, {machine['cpus']} CPUs, {arguments.cpus} given to Ray")
    print(", ".join(f"{p} {version(p)}" for p in ("ray", "torch", "pyarrow", "pillow")), end="; ")
    print(f"{data.source}, {arguments.size}x{arguments.size}x{arguments.channels}, shards by size, seed {SEED}")
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        cluster.start_local(num_cpus=arguments.cpus)
        cluster_s = time.perf_counter() - start
        start = time.perf_counter()
        # Twice as many shards as CPUs make every worker import torch.
        small = DataConfig(train_limit=2 * arguments.cpus * 50, validation_fraction=0)
        on_ray(small, PyramidConfig(rows_per_shard=50), Storage(f"{scratch}/warm"))
        print(
            f"start-up, not counted below: ray.init {cluster_s:.1f} s, "
            f"first build with its imports {time.perf_counter() - start:.1f} s"
        )
        plain_loop(small, PyramidConfig(rows_per_shard=50), Storage(f"{scratch}/warm-loop"))

        walls: dict[str, list[float]] = {"plain loop": [], "Ray Data": []}
        cpus: dict[str, list[float]] = {"plain loop": [], "Ray Data": []}
        images = 0
        for i in range(arguments.repetitions):
            methods: dict[str, Callable[[DataConfig, PyramidConfig, Storage], int]] = {
                "plain loop": plain_loop,
                "Ray Data": on_ray,
            }
            for name, method in methods.items():
                wall, cpu = time.perf_counter(), cpu_seconds()
                images = method(data, config, Storage(f"{scratch}/{name}/{i}"))
                walls[name].append(time.perf_counter() - wall)
                cpus[name].append(cpu_seconds() - cpu)
            address = pyramids.address_of(data, config, "train")
            plain_shards, ray_shards = (Path(scratch, name, str(i), address) for name in methods)
            names = sorted(p.name for p in plain_shards.iterdir())
            equal, _, _ = filecmp.cmpfiles(plain_shards, ray_shards, names, shallow=False)
            assert equal == names, "the two wrote different files"
        ray.shutdown()

    print(f"{images} images, median of {arguments.repetitions} interleaved repetitions")
    print(f"{'':12}{'seconds':>9}{'images/s':>10}{'per core':>10}{'CPU s':>8}{'per CPU second':>16}")
    per_core, per_cpu = {}, {}
    for name in walls:
        wall, cpu = statistics.median(walls[name]), statistics.median(cpus[name])
        cores = 1 if name == "plain loop" else arguments.cpus
        per_core[name], per_cpu[name] = images / wall / cores, images / cpu
        print(f"{name:12}{wall:>9.2f}{images / wall:>10,.0f}{per_core[name]:>10,.0f}{cpu:>8.2f}{per_cpu[name]:>16,.0f}")
    ratios = {"wall": per_core["Ray Data"] / per_core["plain loop"], "cpu": per_cpu["Ray Data"] / per_cpu["plain loop"]}
    met = ratios[arguments.clock] >= GOAL
    print(
        f"Ray Data / plain loop: {ratios['wall']:.2f} per core (wall), {ratios['cpu']:.2f} per CPU second; "
        f"goal {GOAL} by {arguments.clock}: {'met' if met else 'MISSED'}"
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
