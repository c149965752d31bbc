"""Reference vectors of the official models, and the weights that they were computed with.

The vectors come from running the official code in fp32 on small random models. Their weights are
not stored: each tensor follows from a seed and its official name.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

DATA = Path(__file__).parents[1] / "data" / "models"


@cache
def official_keys(name: str) -> dict[str, Any]:
    """Config, seed and shapes by official tensor name of one reference model."""
    everything = json.loads(gzip.decompress((DATA / "official_keys.json.gz").read_bytes()))
    return everything[name]


@cache
def vectors(name: str) -> dict[str, torch.Tensor]:
    """Inputs and outputs of one reference model."""
    return load_file(DATA / f"{name}.safetensors")


def official_weights(name: str) -> dict[str, torch.Tensor]:
    """The weights of one reference model under their official names."""
    keys = official_keys(name)
    return fill(keys["shapes"], seed=keys["seed"])


def fill(shapes: Mapping[str, Sequence[int]], *, seed: int) -> dict[str, torch.Tensor]:
    """Draw each tensor from (seed, name): norms near one, biases small, matrices of unit gain."""
    return {name: _fill(name, list(shape), seed) for name, shape in shapes.items()}


def _fill(name: str, shape: list[int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    values = torch.randn(shape, generator=generator)
    leaf = name.rpartition(".")[2]
    if leaf == "alpha" and len(shape) == 1:  # shares of ConsistI2V's temporal layers
        return 0.4 + 0.5 * values
    if len(shape) <= 1:
        return 1 + 0.1 * values if leaf == "weight" else 0.05 * values
    if leaf == "queries":
        return values
    if leaf in ("latents", "class_embedding", "positional_embedding"):
        return values / shape[-1] ** 0.5
    return values / math.prod(shape[1:]) ** 0.5
