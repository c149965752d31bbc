"""A Ray cluster on this machine, one for all tests of a process; tests add hosts to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

TOKEN = "0123456789abcdef" * 4

CHEAP = {
    "include_dashboard": False,
    "include_log_monitor": False,
    "no_monitor": True,
    "object_store_memory": 80_000_000,
}


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """A cluster that wants a token, of one host with a place for one worker.

    There is one for all tests of a process: it takes seconds to start, and once a process has used
    a token, Ray cancels the actors that it starts in a cluster without.
    """
    ray = pytest.importorskip("ray", reason="pip install 'motionmerge[ray]'")
    from ray._raylet import AuthenticationTokenLoader, Config
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # by default workers yield to all other processes
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)
        Config.initialize("")  # it has read its variables when it was imported
        AuthenticationTokenLoader.instance().reset_cache()
        cluster = Cluster()
        cluster.add_node(num_cpus=torch.get_num_threads(), env_vars={"HOST": "first"}, **CHEAP)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def add_host(ray_cluster: Any) -> Iterator[Callable[..., Any]]:
    """Add hosts with a place for one worker, which find their names in `HOST`."""
    added = []

    def add(name: str, *, num_cpus: int | None = None, **variables: str) -> Any:
        cpus = torch.get_num_threads() if num_cpus is None else num_cpus
        own = {"HOST": name, **variables}
        added.append(ray_cluster.add_node(num_cpus=cpus, env_vars=own, **CHEAP))
        return added[-1]

    yield add
    for host in added:
        if host in ray_cluster.worker_nodes:
            ray_cluster.remove_node(host)
