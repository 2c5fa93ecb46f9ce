"""A process group over two nodes whose own names lead to 127.0.1.1, as Debian and Ubuntu set hosts up.

The nodes are network namespaces joined by a virtual cable: no Ray, but real sockets, interfaces and /etc/hosts.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.training import process_group

NODES = {"left": "10.213.77.1", "right": "10.213.77.2"}
RANK = """
import sys
from datetime import timedelta
import torch, torch.distributed as dist
from pipeline.training.process_group import name_interface
rank, mine, master = int(sys.argv[1]), sys.argv[2], sys.argv[3]
name_interface(mine)
dist.init_process_group("gloo", init_method=f"tcp://{master}:29517", rank=rank, world_size=2, timeout=timedelta(seconds=30))
total = torch.tensor([rank + 1.0])
dist.all_reduce(total)
print("sum", total.item())
dist.destroy_process_group()
"""


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[dict[str, list[str]]]:
    """A command prefix for each node, which runs what follows there."""
    if os.geteuid() or not all(map(shutil.which, ("ip", "unshare", "mount"))):
        pytest.skip("making network namespaces takes root, ip and unshare")
    names = {node: f"dpp-{os.getpid()}-{node}" for node in NODES}
    hosts = tmp_path / "hosts"
    hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {socket.gethostname()}\n")

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

    try:
        try:
            for name in names.values():
                ip("netns", "add", name)
            ip(
                "link",
                "add",
                "cable-l",
                "netns",
                names["left"],
                "type",
                "veth",
                "peer",
                "cable-r",
                "netns",
                names["right"],
            )
        except subprocess.CalledProcessError as e:
            pytest.skip(f"this machine does not allow network namespaces: {e.stderr}")
        for (node, address), cable in zip(NODES.items(), ("cable-l", "cable-r"), strict=True):
            ip("-n", names[node], "addr", "add", f"{address}/24", "dev", cable)
            ip("-n", names[node], "link", "set", cable, "up")
            ip("-n", names[node], "link", "set", "lo", "up")
        inside = f'mount --bind {hosts} /etc/hosts && exec "$0" "$@"'
        yield {n: ["ip", "netns", "exec", name, "unshare", "--mount", "sh", "-c", inside] for n, name in names.items()}
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.slow
def test_the_first_try_on_two_nodes_works(nodes: dict[str, list[str]]) -> None:
    ranks = [
        subprocess.Popen(
            [*nodes[node], sys.executable, "-c", RANK, str(rank), address, NODES["left"]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, (node, address) in enumerate(NODES.items())
    ]
    for process in ranks:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out == "sum 3.0\n"


def test_the_interface_is_the_one_that_bears_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for interface, addresses in psutil.net_if_addrs().items():
        for address in (a.address for a in addresses if a.family == socket.AF_INET):
            assert process_group.interface_of(address) == interface
    assert process_group.interface_of("192.0.2.1") == ""
    for variable in process_group.INTERFACE_VARIABLES:
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "chosen")
    process_group.name_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "chosen", "what the user has set stays"
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    process_group.name_interface("127.0.0.1")
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=lo"
    process_group.name_interface("192.0.2.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
