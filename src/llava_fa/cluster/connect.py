"""A cluster of Ray found or started, and what is asked of it."""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llava_fa.errors import FourierError, explained

_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DEDUP_LOGS": "0"}
"""No word to Ray's makers, and none about settings that nobody has asked for."""

_SECONDS = 10.0
"""In which the head of a cluster must answer."""
BUSY = "Look at `ray status`: others may use all of the cluster"
"""What to do about workers that do not start."""


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """While it lasts this process is the driver of a cluster.

    Args:
        address: of its head, ``host:port``; None: of the one that RAY_ADDRESS says or that runs on this machine, or
            else one of this machine alone, which ends with it.

    Raises:
        FourierError: nobody answers, or another version of Ray or Python does.
    """
    if address is not None and "://" in address:
        raise FourierError(
            "Ray's client is not supported",
            remedy="Run the command on a machine of the cluster, and give HOST:PORT of its head",
            where=address,
        )
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    where = address or os.environ.get("RAY_ADDRESS", "")
    host, _, port = where.rpartition(":")
    answering = explained(
        "no cluster of Ray answers there" if where else "Ray does not start",
        remedy="Start one: `ray start --head` on one machine, `ray start --address HEAD:6379` on the others",
        where=where,
    )
    with answering:
        if port.isdecimal():  # Ray itself would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS).close()
        quiet = {"logging_level": "ERROR", "log_to_driver": False, "namespace": f"llava-fa-{uuid.uuid4().hex}"}
        ray.init(address=address, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def alive() -> list[Mapping[str, Any]]:
    """The nodes of the cluster that answer."""
    return [node for node in ray.nodes() if node["Alive"]]


def here() -> NodeAffinitySchedulingStrategy:
    """On the node of this process."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def check_versions() -> None:
    """`FourierError` where a node has another llava-fa or torch, or none."""
    names = ("llava-fa", "torch", "transformers")

    def versions() -> dict[str, str]:  # sent as it is: nothing of the package needs to be there
        from importlib import metadata

        found = {}
        for name in names:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = "none"
        return found

    ask = ray.remote(num_cpus=0)(versions)
    own = {name: version(name) for name in names}
    for node in alive():
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
        theirs = ray.get(ask.options(scheduling_strategy=strategy).remote())
        for name in names:
            if theirs[name] != own[name]:
                raise FourierError(
                    f"it has {name} {theirs[name]}, and this machine has {own[name]}",
                    remedy="Install the same versions on all nodes",
                    where=f"node {node['NodeManagerHostname']}",
                )


def room(asked: Mapping[str, float]) -> int:
    """How many workers the cluster has room for.

    Args:
        asked: of Ray, for each: ``CPU``, ``GPU``, ``memory`` (bytes).

    Raises:
        FourierError: for none.
    """
    found = 0
    for node in alive():
        has = node["Resources"]
        found += min(int(has.get(name, 0) / need + 1e-9) for name, need in asked.items() if need)
    if not found:
        wanted = ", ".join(f"{need:g} {name}" for name, need in asked.items() if need)
        raise FourierError(
            f"no node of the cluster has room for a worker, which takes {wanted}",
            remedy="Give fewer threads (OMP_NUM_THREADS), less --memory or a smaller --ray-gpus; or add a node",
        )
    return found


def mendable(error: RayTaskError) -> Exception:
    """What a worker has raised, as it was there."""
    return error.cause if isinstance(error.cause, FourierError) else error


def gpus_for(device: str) -> float:
    """GPUs of a worker, where nobody says how many: one, if the device is not the CPU and the cluster has any."""
    return float(device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1)


def device_of(device: str, gpus: float) -> str:
    """Where a worker with so many GPUs runs: what ``auto`` means is the same for all."""
    if device != "auto":
        return device
    return "cuda" if gpus else "cpu"
