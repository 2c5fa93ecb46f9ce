"""Starting the process group of a training worker group on several nodes."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


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


def name_interface(address: str) -> None:
    """Make gloo and NCCL, which have not started yet, use the network interface that bears this node's address.

    Otherwise gloo resolves the host's own name, which Debian and Ubuntu map to 127.0.1.1: no other node can connect to it.
    A variable that the user has set is left as it is.
    """
    if interface := interface_of(address):
        for variable in INTERFACE_VARIABLES:
            os.environ.setdefault(variable, interface)


def interface_of(address: str) -> str:
    """Return the name of the network interface that bears an IPv4 or IPv6 address; empty if none does."""
    for interface, addresses in psutil.net_if_addrs().items():
        for a in addresses:
            if a.family in (socket.AF_INET, socket.AF_INET6) and a.address.partition("%")[0] == address:
                return interface
    return ""
