"""The objective of a sweep: clean and robust accuracy on validation images after each epoch."""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from components.attacks.registry import run_attack
from components.attacks.spec import AttackSpec
from components.evaluation.judge import verify_examples
from components.precision import true_float32
from components.random_streams import stream_seed
from pipeline.data import shards
from pipeline.data.splits import draw_order
from pipeline.runtime.storage import Storage
from pipeline.sweep.trials.plan import Objective
from pipeline.training.loop import Ranks

CHUNK = 50
"""Images per chunk. Each chunk has its own random stream, so results do not depend on the ranks."""


class RobustAccuracyMeter:
    """Meter of one objective on each rank, which attacks its share of the chunks. Raises DataError."""

    def __init__(self, objective: Objective, root: Storage, ranks: Ranks) -> None:
        self.objective, self.ranks = objective, ranks
        self.spec = AttackSpec.parse(objective.attack)
        validation = shards.load(root, objective.validation)
        # The images are drawn at random, since a source may be sorted by class.
        order = draw_order(np.arange(validation.num_rows, dtype=np.int64), seed=0)
        self.rows: list[int] = order[: objective.images].tolist()
        columns: dict[str, list[np.ndarray]] = {"image": [], "label": []}
        for shard in validation.iter_shards(["image", "label"]):
            for name, values in shard.items():
                columns[name].append(values)
        self.images = torch.from_numpy(np.concatenate(columns["image"])[self.rows])
        self.labels = torch.from_numpy(np.concatenate(columns["label"])[self.rows]).long()

    @true_float32()
    def robust_accuracy(self, classifier: nn.Module) -> float:
        """Return the share of the images that are classified correctly under the attack.

        All ranks must call it. The model is in eval mode and computes in true float32.

        Raises:
            AttackViolation: the attack broke its own rules.
        """
        was_training = classifier.training
        classifier.eval()
        correct = torch.zeros((), dtype=torch.int64, device=self.ranks.device)
        for chunk, start in enumerate(range(0, len(self.rows), CHUNK)):
            if chunk % self.ranks.world == self.ranks.rank:
                correct += self._count_correct(classifier, slice(start, start + CHUNK), chunk)
        if self.ranks.world > 1:
            dist.all_reduce(correct)
        classifier.train(was_training)
        return int(correct) / len(self.rows)

    def _count_correct(self, classifier: nn.Module, rows: slice, chunk: int) -> Tensor:
        images = self.images[rows].to(self.ranks.device).float() / 255
        labels = self.labels[rows].to(self.ranks.device)
        generator = torch.Generator().manual_seed(stream_seed(0, chunk))
        # Examples are judged on the model that they are made on, so the first success is enough.
        early = self.spec.can_stop_on_success
        examples = run_attack(self.spec, classifier, images, labels, stop_on_success=early, generator=generator)
        verify_examples(images, examples, self.rows[rows], self.spec)
        with torch.no_grad():
            correct: Tensor = (classifier(examples).argmax(1) == labels).sum()
        return correct

    def measure(
        self, classifier: nn.Module, home: Storage, *, epoch: int, clean: float, training_seconds: float
    ) -> None:
        """Measure a model, and write ``objectives/<hash>/epoch-*.json`` in its directory.

        All ranks must call it.

        Args:
            epoch: counts from 0.
            clean: accuracy on the whole validation split, in [0, 1].
        """
        begin = time.monotonic()
        robust = self.robust_accuracy(classifier)
        scores = {
            "epoch": epoch,
            "clean": clean,
            "robust": robust,
            "n": len(self.rows),
            "seconds": time.monotonic() - begin,
            "training_seconds": training_seconds,
        }
        if self.ranks.rank == 0:
            home.write_json(self.objective.file(epoch), scores)
