"""Which Ray cluster is joined: an address that cannot be reached is refused at once."""

from __future__ import annotations

import socket
import time

import pytest

from motionmerge.errors import ConfigError
from motionmerge.sampling.batch.ray_cluster import cluster_device

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'motionmerge[ray]'")


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://localhost:{}"])
def test_an_address_without_a_cluster_is_refused_at_once(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = form.format(closed_port())
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # other tests may have joined one
    start = time.monotonic()
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS={address} cannot be joined"):
        cluster_device()
    assert time.monotonic() - start < 30
