"""Speed of training through Ray Train with one worker, against the same step in a plain PyTorch loop.

    python benchmarks/bench_train.py [--width 64] [--epochs 2] [--images 2000] [--repetitions 3]

Both use the same number of threads. The output is the images/s of both and their ratio, pair by pair. The
goal is a ratio of at least 0.95. The figures count the time inside an epoch, as a run's record does:
start-up, data loading and checkpoints are not included.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace

import torch
import torch.nn.functional as F

from components.config.data import Shapes
from components.network import build_net
from components.training.losses import reconstruction_loss, reconstruction_terms
from components.training.schedule import learning_rate
from pipeline.data import pyramids
from pipeline.recipes.mnist import mnist_demo
from pipeline.runtime import cluster, provenance
from pipeline.runtime.storage import Storage
from pipeline.training import loop, train
from pipeline.training.jobs import TrainingData


def plain_loop(data: loop.RankData, config, shapes: Shapes) -> float:  # type: ignore[no-untyped-def]
    """Return the images/s of the joint step in a plain loop, without the pipeline's training code."""
    net = build_net(config, shapes).train()
    optimizer = torch.optim.SGD(
        net.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    steps = len(data) // config.batch_size
    rates = []
    for epoch in range(config.epochs):
        order = torch.randperm(len(data))
        begin = time.time()
        for i in range(steps):
            batch = data.batch(order[i * config.batch_size : (i + 1) * config.batch_size])
            images = batch.images.float() / 255
            logits, outputs = net.joint(images)
            targets = [images, *(level.float() for level in batch.levels)]
            rec = reconstruction_loss(reconstruction_terms(outputs, targets, "mean"), config.lam)
            loss = F.cross_entropy(logits, batch.labels) + config.reconstruction_weight * rec
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch * steps + i, steps, config)
            optimizer.step()
        rates.append(steps * config.batch_size / (time.time() - begin))
    return statistics.mean(rates)


def main() -> None:
    """Train with both, pair by pair, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base = mnist_demo()
    config = replace(base.train, width=arguments.width, epochs=arguments.epochs, defense="defend++")
    experiment = replace(
        base,
        data=replace(base.data, train_limit=arguments.images, validation_fraction=0.0),
        train=config,
        models=("defend",),
        evaluation=replace(base.evaluation, threat_models=("white_box",)),
        scaling=replace(base.scaling, workers=1, threads_per_worker=arguments.threads),
    )
    shapes = Shapes(image_size=28, channels=1, num_classes=10, sizes=(28, 14, 7))
    print(provenance.hardware()["cpu"], provenance.versions())
    print(
        f"width {arguments.width}, {arguments.images} images, batch {config.batch_size}, threads {arguments.threads}, "
        f"seed {config.seed}"
    )
    cluster.connect()
    with tempfile.TemporaryDirectory() as directory:
        root = Storage(directory)
        shards = pyramids.build(experiment.data, experiment.pyramids, root, "train")
        data = loop.RankData(shards, 0, 1, torch.device("cpu"), levels=True)
        read = TrainingData(train={config.targets: shards.address}, without_levels=shards.address)
        ratios = []
        for i in range(arguments.repetitions):
            plain = plain_loop(data, config, shapes)
            model = train.train(experiment, shapes, read, root)["defend"]
            root.fs.delete_dir((root / model["path"]).root)  # A finished model would be reused.
            ratios.append(model["images_per_second"] / plain)
            print(
                f"pair {i}: plain {plain:.1f} images/s, Ray Train {model['images_per_second']:.1f} images/s, "
                f"ratio {ratios[-1]:.3f}"
            )
    print(f"median ratio {statistics.median(ratios):.3f} (goal: at least 0.95), n = {arguments.repetitions} pairs")


if __name__ == "__main__":
    main()
