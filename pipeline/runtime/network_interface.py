"""The network interface between the ranks of a worker group."""

from __future__ import annotations

import os
import socket

import psutil

INTERFACE_VARIABLES = {"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "="}
"""Prefix of the name in each library's variable. To NCCL, eth1 without it also means eth10."""


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
