"""Fixtures of tiny pipelines, and of a cluster."""

from ..tiny.cluster import add_host, ray_cluster
from ..tiny.fixtures import generate, own_wan, photo, pipeline, stored_wan

__all__ = [
    "add_host",
    "generate",
    "own_wan",
    "photo",
    "pipeline",
    "ray_cluster",
    "stored_wan",
]
