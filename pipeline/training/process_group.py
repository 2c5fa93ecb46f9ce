"""Process group of a training worker group on several nodes."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

INTERFACE_VARIABLES = {"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "="}
"""Prefix of the name in each library's variable. To NCCL, eth1 without it also means eth10."""


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
    """Let gloo and NCCL use the network interface of this node's address, before they start.

    Otherwise gloo resolves the host's name, which Debian and Ubuntu map to 127.0.1.1, where no
    other node can connect. Variables of the user stay as they are.
    """
    if interface := interface_of(address):
        for variable, prefix in INTERFACE_VARIABLES.items():
            os.environ.setdefault(variable, prefix + interface)


def interface_of(address: str) -> str:
    """Return the name of the network interface of an IPv4 or IPv6 address, or ""."""
    for interface, addresses in psutil.net_if_addrs().items():
        for a in addresses:
            if a.family in (socket.AF_INET, socket.AF_INET6) and a.address.partition("%")[0] == address:
                return str(interface)
    return ""
