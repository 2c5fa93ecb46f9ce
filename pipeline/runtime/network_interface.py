"""The network interface over which the ranks of a worker group reach one another."""

from __future__ import annotations

import os
import socket

import psutil

INTERFACE_VARIABLES = {"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "="}
"""What each library wants before the name. NCCL takes a bare name as a prefix: eth1 stands for eth10 too."""


def name_interface(address: str) -> None:
    """Make gloo and NCCL, which have not started yet, use the network interface that bears this node's address.

    Otherwise gloo resolves the host's own name, which Debian and Ubuntu map to 127.0.1.1: no other node can connect to it.
    A variable that the user has set is left as it is.
    """
    if interface := interface_of(address):
        for variable, prefix in INTERFACE_VARIABLES.items():
            os.environ.setdefault(variable, prefix + interface)


def interface_of(address: str) -> str:
    """Return the name of the network interface that bears an IPv4 or IPv6 address; empty if none does."""
    for interface, addresses in psutil.net_if_addrs().items():
        for a in addresses:
            if a.family in (socket.AF_INET, socket.AF_INET6) and a.address.partition("%")[0] == address:
                return interface
    return ""
