"""The version, in one place: packaging reads it, and files that we write carry it."""

__version__ = "0.1.0"
