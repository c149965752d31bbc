"""Which Ray cluster is joined or started, and how many workers have room on it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

from motionmerge.errors import ConfigError

_OBJECT_STORE_BYTES = 200_000_000
"""Videos do not pass through Ray, so the store of a cluster that we start can be small."""

_SECONDS_TO_REACH_A_CLUSTER = 10.0
"""How long we try to open a connection."""

_START_ON_A_NODE = (
    "Something answers at this address, so start the driver on a node of the cluster (`ray start "
    "--address=..` makes this machine one, with --num-cpus=0 if it is not to compute)"
)
"""What helps where a cluster is up, but the driver cannot join it."""

_NUM_TRIES = "RAY_NUM_REDIS_GET_RETRIES"
"""Ray's variable for how often it tries to reach a cluster."""


def cluster_device() -> str:
    """Join the cluster, or start one on this machine; give where its workers compute.

    It is the cluster of `RAY_ADDRESS`, or one that runs on this machine.

    Raises:
        ConfigError: Ray is not installed, or the cluster cannot be joined.
    """
    return "cuda" if joined_cluster().cluster_resources().get("GPU", 0) else "cpu"


def joined_cluster() -> Any:
    """Return the module `ray`, connected to a cluster: a running one, or else a new one here.

    Raises:
        ConfigError: Ray is not installed, or the cluster cannot be joined.
    """
    ray = _imported()
    if ray.is_initialized():
        return ray
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, object] = {"log_to_driver": False, "logging_level": "error"}
    address = os.environ.get("RAY_ADDRESS") or "auto"
    if address == "local" or not _joins(ray, address, quiet):
        small = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        ray.init(address="local", **small, **quiet)
    return ray


def num_places(ray: Any, needs: Mapping[str, int]) -> int:
    """Count the workers for which the machines have room when nothing else runs there.

    Raises:
        ConfigError: There is room for none.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    places = sum(num_places_of(machine, needs) for machine in machines)
    if places == 0:
        largest = {name: max((of.get(name, 0) for of in machines), default=0) for name in needs}
        raise ConfigError(
            f"No machine of the Ray cluster has room for a worker, which takes {words(needs)}; "
            f"the most that one has: {words(largest)}.",
            fix="Compute on the CPU, `device='cpu'`, or add machines with GPUs."
            if "GPU" in needs
            else f"Set OMP_NUM_THREADS={max(1, int(largest['CPU']))}, or add larger machines.",
        )
    return places


def num_places_of(machine: Mapping[str, float], needs: Mapping[str, int]) -> int:
    """Count the workers for which one machine has room when nothing else runs there."""
    return min(int(machine.get(name, 0) // amount) for name, amount in needs.items())


def words(resources: Mapping[str, float]) -> str:
    """Write resources for people."""
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())


def _imported() -> Any:
    """Import Ray, told to give a cluster up after 3 tries of up to 40 s each instead of 20."""
    own = os.environ.get(_NUM_TRIES)
    os.environ[_NUM_TRIES] = own or "3"  # Ray reads it when it is imported
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "Ray is not installed.", fix="Run `pip install 'motionmerge[ray]'`."
        ) from error
    finally:
        if own is None:
            del os.environ[_NUM_TRIES]  # it is not for the processes of a cluster that we start
    return ray


def _joins(ray: Any, address: str, quiet: Mapping[str, object]) -> bool:
    """Join a cluster; tell whether there is one, of which only "auto" can be in doubt.

    Raises:
        ConfigError: It cannot be joined.
    """
    is_up = False
    try:
        is_up = _knock(address)
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        is_nowhere = isinstance(error, ConnectionError) and error.__cause__ is None
        if address == "auto" and is_nowhere:
            return False
        where = "that runs here" if address == "auto" else f"of RAY_ADDRESS={address}"
        raise ConfigError(
            f"The Ray cluster {where} cannot be joined: {error}",
            fix=f"{_START_ON_A_NODE if is_up else 'See that it is up'}; set RAY_AUTH_MODE=token "
            "if it wants a token; set RAY_ADDRESS=local for a cluster that is started here.",
        ) from error
    return True


def _knock(address: str) -> bool:
    """Open a connection to `host:port`: where nobody listens, Ray itself would try for minutes.

    Returns:
        Whether somebody answered; False where there is no port to ask.

    Raises:
        OSError: Nobody answers.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit() and "/" not in host:
        target = (host.strip("[]"), int(port))
        socket.create_connection(target, timeout=_SECONDS_TO_REACH_A_CLUSTER).close()
        return True
    return False
