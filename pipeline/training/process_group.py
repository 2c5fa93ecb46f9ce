"""Process group of a training worker group on several nodes."""

from __future__ import annotations

from dataclasses import dataclass

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from pipeline.runtime.network_interface import name_interface


class _Backend(_TorchBackend):
    def on_start(self, worker_group, backend_config):  # type: ignore[no-untyped-def]
        worker_group.execute(_name_interface_of_node)
        super().on_start(worker_group, backend_config)


@dataclass
class NodeTorchConfig(TorchConfig):
    """Ray Train's setup of torch.distributed, after each worker has named its network interface."""

    @property
    def backend_cls(self):  # type: ignore[no-untyped-def]
        return _Backend


def _name_interface_of_node() -> None:
    name_interface(ray.util.get_node_ip_address())
