"""Random weights by rule W1 of the vectors, so that no network needs to be stored."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch

_HALF = (
    "pos_embed", "positional_embedding", "cls_token", "class_embedding", "position_emb",
    "scale_emb", "hse",
)  # fmt: skip
SEED = 11


def random_state(
    shapes: Mapping[str, Sequence[int]],
    *,
    seed: int = SEED,
    gains: Mapping[str, float] | None = None,
) -> dict[str, torch.Tensor]:
    """Draw the tensors of a network; the result depends on names and shapes alone."""
    state = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
            continue
        value = _values(name, tuple(shape), seed=seed)
        gain = next((gain for part, gain in (gains or {}).items() if part in name), 1.0)
        state[name] = torch.from_numpy(np.asarray(value * gain, dtype=np.float32))
    return state


def _values(name: str, shape: tuple[int, ...], *, seed: int) -> np.ndarray:
    random = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    z = random.standard_normal(shape)
    if not shape:
        return np.array(2.6592)
    if name.endswith("running_var"):
        return 1 + 0.25 * np.abs(z)
    if name.endswith("running_mean"):
        return 0.1 * z
    if any(part in name for part in _HALF):
        return 0.5 * z
    if len(shape) == 1:
        return 1 + 0.1 * z if name.endswith("weight") else 0.05 * z
    return z / np.sqrt(np.prod(shape[1:]))
