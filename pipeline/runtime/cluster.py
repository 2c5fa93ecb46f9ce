"""Connection to a Ray cluster, and checks of its resources before a run."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
import warnings
from collections.abc import Iterator
from typing import Any

import ray
from ray._private import ray_constants
from ray.autoscaler.sdk import request_resources
from ray.exceptions import AuthenticationError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from components.config import ScalingConfig
from components.errors import UserError
from pipeline.runtime import interrupts
from pipeline.runtime.provenance import ROOT
from pipeline.runtime.storage import Storage, StorageError


class ResourceError(UserError):
    """The cluster lacks resources that the run needs."""


def connect() -> None:
    """Join the cluster at RAY_ADDRESS, or start one on this machine.

    RAY_ADDRESS is set in a job. Its value ``auto`` is the cluster on this machine.

    Raises:
        UserError: the cluster cannot be reached or started, or its token is missing.
    """
    if ray.is_initialized():
        return
    # Workers of a local cluster inherit PYTHONPATH, so they import the same checkout as the driver.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    if _starts_own():
        # A local cluster is never preempted, and the watcher costs each training run 7 s of CPU.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # A sweep has more waiting processes than a small machine has CPUs. Ray would print a
        # warning of that into the live table.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(8, os.cpu_count() or 1)))
    # Ray warns of future defaults that do not concern the users of this tool.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    # On Ctrl-C Tune would wait for its trials, which continue from their records anyway.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    try:
        if _starts_own():
            start_local()
        else:
            with interrupts.keeping_handlers(), _loopback_address():
                ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, AuthenticationError) as e:
        if _starts_own():
            raise UserError(
                f"Ray cannot be started on this machine ({e}). It needs a writable directory for its sockets and logs "
                "(/tmp/ray, or RAY_TMPDIR), free memory and, where RAY_AUTH_TOKEN_PATH is set, a file with a token "
                "there"
            ) from e
        raise UserError(
            f"Ray cluster {os.environ.get('RAY_ADDRESS', 'auto')!r} cannot be joined ({e}). Start one with "
            "infra/local-cluster.sh, export the same RAY_AUTH_MODE and token on both sides, or set RAY_ADDRESS=local "
            "for one of your own"
        ) from e


def start_local(**options: Any) -> None:
    """Start a Ray node for this process, which only this user's processes on this machine reach.

    Raises:
        UserError: the node did not start within Ray's limit of 30 s, twice.
    """
    # Without a token, Ray would write one to the home directory, which may not be writable.
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    for is_last in (False, True):
        try:
            with interrupts.keeping_handlers(), _loopback_address():
                ray.init("local", log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False, **options)
            return
        except Exception as e:
            if type(e) is not Exception:  # Ray raises a bare Exception if its node is late.
                raise
            ray.shutdown()
            if is_last:
                raise UserError(
                    f"Ray cannot be started on this machine ({e}). It was tried twice; free memory and CPU, then run "
                    "the same command again"
                ) from e


@contextlib.contextmanager
def _loopback_address() -> Iterator[None]:
    """Let Ray use 127.0.0.1 as a node's address, so that its processes listen on no other.

    Otherwise Ray replaces 127.0.0.1 by an address that other machines reach, both in a cluster that
    it starts and in one that it joins. Ray reads the switch from the environment when it is
    imported, which is too early.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _starts_own() -> bool:
    """Return whether this process starts a cluster of its own."""
    return os.environ.get("RAY_ADDRESS", "local") == "local"


def in_job() -> bool:
    """Return whether this process is a Ray job, whose working directory is a temporary copy."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def check_resources(scaling: ScalingConfig, wait_s: float = 0.0) -> None:
    """Refuse a run that the cluster has no room for, instead of waiting without end.

    Args:
        wait_s: how long to wait for the autoscaler of a growing cluster (seconds).

    Raises:
        ResourceError: the message says what is needed, what there is and which settings to change.
    """
    train = train_bundle(scaling)
    attack = attack_bundle(scaling)
    deadline = time.monotonic() + wait_s
    requested = False
    while True:
        shortage = _shortage(train, scaling.workers, "scaling.workers") or _shortage(attack, 1, "an attack task")
        if shortage is None:
            if requested:  # The request would keep the nodes up after the run.
                request_resources(bundles=[])
            return
        if time.monotonic() >= deadline:
            raise ResourceError(shortage)
        if not requested:
            request_resources(bundles=[train] * scaling.workers)
            requested = True
        time.sleep(2)


def check_shared(root: Storage) -> None:
    """Let every node read and write a file of the storage, before anything is computed.

    Raises:
        StorageError: a node does not see the file of this process, or the reverse.
    """
    nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) > 0]
    here = ray.get_runtime_context().get_node_id()
    if root.is_local and all(node["NodeID"] == here for node in nodes):
        return
    name = f"shared-test-{secrets.token_hex(8)}"
    try:
        root.write_bytes(f"{name}/driver", name.encode())
        task = ray.remote(_touch_storage)
        answers = {
            node["NodeID"]: task.options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(root.full_uri, name, node["NodeID"])
            for node in nodes
        }
        for node in nodes:
            reason = ray.get(answers[node["NodeID"]])
            if not reason and not root.exists(f"{name}/{node['NodeID']}"):
                reason = "what it writes there is not seen here"
            if reason:
                raise StorageError(
                    f"storage {root.uri} is not shared by node {node['NodeManagerAddress']} "
                    f"({node['NodeManagerHostname']}): {reason}. Give a directory that every node mounts, or an object "
                    "store (s3://BUCKET/PATH)"
                )
    finally:
        with contextlib.suppress(OSError):
            root.fs.delete_dir(root.path(name))


def _touch_storage(uri: str, name: str, node: str) -> str:
    """Read the driver's file and write another one, in a task. Return what went wrong, or ""."""
    try:
        root = Storage(uri)
        if root.read_bytes(f"{name}/driver") != name.encode():
            return "it reads something else there"
        root.write_bytes(f"{name}/{node}", b"")
    except UserError as e:
        return str(e)
    return ""


def train_bundle(scaling: ScalingConfig) -> dict[str, float]:
    """Return the resources that Ray reserves for a training worker."""
    return {"CPU": scaling.cpus_per_worker} | ({"GPU": 1.0} if scaling.gpu else {})


def attack_bundle(scaling: ScalingConfig) -> dict[str, float]:
    """Return the resources that Ray reserves for an attack task."""
    return {"CPU": scaling.cpus_per_attack} | ({"GPU": scaling.gpus_per_attack} if scaling.gpus_per_attack else {})


def room_for(bundle: dict[str, float]) -> int:
    """Return the number of bundles that the cluster holds. A bundle does not span nodes."""
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    return sum(int(min(node.get(k, 0.0) / v + 1e-9 for k, v in bundle.items())) for node in nodes)


def _shortage(bundle: dict[str, float], count: int, what: str) -> str | None:
    """Return the message for a cluster without room for ``count`` bundles, or None."""
    placed = room_for(bundle)
    if placed >= count:
        return None
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    have = {k: sum(n.get(k, 0.0) for n in nodes) for k in ("CPU", "GPU")}
    needs = " and ".join(f"{v:g} {k}" for k, v in bundle.items())
    return (
        f"{what}: {count} x ({needs}) asked for, room for {placed}: the cluster has {have['CPU']:g} CPU and "
        f"{have['GPU']:g} GPU on {len(nodes)} node(s). Lower --scaling.workers, --scaling.cpus-per-worker or "
        "--scaling.cpus-per-attack, use --scaling.no-gpu where there is none, add nodes, or give a growing cluster "
        "time with --scaling.wait-s"
    )
