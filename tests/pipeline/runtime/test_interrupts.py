"""How an interrupted command ends while its threads still use Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest
from repository import ROOT

from pipeline.runtime import interrupts

DRIVER = """
import threading, time
import psutil, ray
from pipeline.runtime import cluster, interrupts

interrupts.install()
cluster.connect()

@ray.remote(num_cpus=0)
class Busy:
    def pid(self):
        import os
        return os.getpid()

busy = Busy.remote()
worker = ray.get(busy.pid.remote())

def work():
    while True:
        try:
            ray.get(busy.pid.remote())
        except Exception:
            pass

with interrupts.cleaning_up(lambda: print("cleaned up")):
    for _ in range(4):
        threading.Thread(target=work, daemon=True).start()
    time.sleep(0.5)
    print(worker, *(p.pid for p in psutil.Process().children(recursive=True)), flush=True)
    interrupts.leave(STATUS)
"""


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.cluster
@pytest.mark.parametrize(("node", "status"), [("joined", 2), ("its own", interrupts.INTERRUPTED)])
def test_threads_that_use_ray_do_not_change_the_status_and_nothing_is_left(
    node: str, status: int, ray_cluster: str
) -> None:
    address = ray_cluster if node == "joined" else "local"
    done = subprocess.run(
        [sys.executable, "-c", DRIVER.replace("STATUS", str(status))],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=120,
    )
    pids, *rest = done.stdout.splitlines()
    assert (done.returncode, rest, done.stderr) == (status, ["cleaned up"], "")
    deadline = time.monotonic() + 20
    while left := [int(pid) for pid in pids.split() if is_running(int(pid))]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
