"""Weights by name instead of a path: `pocket:base` ships with us, `hub:owner/name` is elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from motionmerge.errors import CheckpointError
from motionmerge.io.paths import path_of_weights
from motionmerge.text import fix_unknown_name

PACKAGE = Path(__file__).resolve().parents[2]
Resolver = Callable[[str], Path]
_RESOLVERS: dict[str, Resolver] = {}


def register_resolver(prefix: str, resolve: Resolver) -> None:
    """Register a way to find inputs that are written as `prefix:name`.

    Args:
        prefix: At least two letters, so that it is no Windows drive.
        resolve: Turns the name into the path of weights; raises CheckpointError if it cannot.
    """
    _RESOLVERS[prefix] = resolve


def split_name(path: str) -> tuple[str, str] | None:
    """Return prefix and name of `prefix:name`, or None for a path."""
    prefix, colon, name = path.partition(":")
    return (prefix, name) if colon and prefix in _RESOLVERS else None


def resolve(path: str, folder: Path | None = None) -> Path:
    """Find what a path (relative to `folder`) or `prefix:name` refers to.

    Raises:
        CheckpointError: There is nothing of that name.
    """
    named = split_name(path)
    if named is not None:
        return _RESOLVERS[named[0]](named[1])
    return path_of_weights(path, folder=folder)


def _pocket_weights(name: str) -> Path:
    """Find weights that ship with the package."""
    folder = PACKAGE / "models" / "pocket" / "weights"
    known = sorted(path.stem for path in folder.glob("*.safetensors"))
    if name not in known:
        raise CheckpointError(
            f"No shipped weights are called `{name}`.", fix=fix_unknown_name(name, known)
        )
    return folder / f"{name}.safetensors"


def _weights_in_memory(name: str) -> Path:
    raise CheckpointError(
        f"The recipe leaves the input `{name}` to you: it names no file for it.",
        fix=f"Pass its weights: `inputs={{'{name}': FILE}}`.",
    )


def _hub_weights(name: str) -> Path:
    from motionmerge.merging.inputs.hub import hub_weights

    return hub_weights(name)


register_resolver("pocket", _pocket_weights)
register_resolver("hub", _hub_weights)
register_resolver("memory", _weights_in_memory)
