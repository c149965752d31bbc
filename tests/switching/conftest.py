"""Fixtures of tiny pipelines."""

from ..tiny.fixtures import generate, own_wan, photo, pipeline, stored_wan

__all__ = ["generate", "own_wan", "photo", "pipeline", "stored_wan"]
