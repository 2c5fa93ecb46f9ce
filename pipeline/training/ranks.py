"""Ranks of a training worker group, and their common decisions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks that train a model together.

    Only rank 0 asks the storage what is left to train and where to continue. Each rank could get
    another answer on a network file system that caches directories, or beside another run.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def agreed(self, ask: Callable[[], T]) -> T:
        """Call ``ask`` on rank 0, and return its answer or raise its error on every rank."""
        if self.world == 1:
            return ask()
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = ask()
            except Exception as e:
                answer[1] = e
        dist.broadcast_object_list(answer, src=0, device=self.device)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]  # type: ignore[no-any-return]
