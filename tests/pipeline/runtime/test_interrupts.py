"""How an interrupted command ends while its threads still use Ray."""

from __future__ import annotations

import os
import signal
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


INTERRUPTED = """
import os, signal, threading, time
from pipeline.runtime import cluster, interrupts, tasks
from pipeline.runtime.console import stage

class Interrupted:
    def __del__(self):  # Python drops whatever is raised in here.
        os.kill(os.getpid(), signal.NUMBER)

def jobs():
    Interrupted()
    while True:
        yield {}, 0

interrupts.install()
try:
    PLACE
except KeyboardInterrupt as e:
    interrupts.leave(interrupts.exit_status(e))
"""
IN_TASKS = """
    cluster.connect()
    for _ in tasks.run_tasks(lambda job: None, jobs(), {"CPU": 1.0}, name="test", on_straggler=print):
        pass
"""
IN_A_STAGE = """
    with stage("test"):
        Interrupted()
"""
WHILE_RAY_WAITS = """
    cluster.connect()
    threading.Timer(1, os.kill, (os.getpid(), signal.NUMBER)).start()
    job = ({}, 0)
    for _ in tasks.run_tasks(lambda job: time.sleep(60), [job], {"CPU": 1.0}, name="test", on_straggler=print):
        pass
"""


def interrupted(place: str, number: signal.Signals, ray_cluster: str) -> subprocess.CompletedProcess[str]:
    script = INTERRUPTED.replace("PLACE", place.strip()).replace("NUMBER", number.name)
    environment = {**os.environ, "RAY_ADDRESS": ray_cluster}
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.cluster
def test_sigterm_while_ray_waits_ends_with_its_own_status(ray_cluster: str) -> None:
    assert interrupted(WHILE_RAY_WAITS, signal.SIGTERM, ray_cluster).returncode == interrupts.TERMINATED


@pytest.mark.cluster
@pytest.mark.parametrize(("place", "number"), [(IN_TASKS, signal.SIGINT), (IN_A_STAGE, signal.SIGTERM)])
def test_a_signal_whose_exception_is_lost_interrupts_all_the_same(
    place: str, number: signal.Signals, ray_cluster: str
) -> None:
    done = interrupted(place, number, ray_cluster)
    assert "Exception ignored in" in done.stderr
    assert done.returncode == 128 + number
