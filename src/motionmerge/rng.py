"""Random numbers keyed by names: the same draw whatever the order, shard, thread or batch.

Source: the faults list of the official code (masks drawn unseeded, in the order of a Python set).
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import numpy.typing as npt

from motionmerge.lazy_torch import torch

MASK_BLOCK = 131_072
"""Elements per block of mask v1. Part of the format: changing it changes every mask."""

_RAW_UINT64 = np.dtype("<u8")
_RAW_UINT16 = np.dtype("<u2")


def generator_for(seed: int, *names: str) -> torch.Generator:
    """Make a CPU generator whose stream depends on `seed` and `names` and on nothing else.

    torch's CPU engine keeps 32 bits of a seed, so this separates tensors and clips, not secrets.

    Args:
        seed: Any integer.
        names: What the numbers are for, e.g. `"latents", "prompt 17"`. `("a", "b")` and `("ab",)`
            give different streams.
    """
    key = json.dumps([seed, *names]).encode()
    digest = hashlib.blake2b(key, digest_size=4, person=b"motionmerge rng").digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def whole_number_for(seed: int, *names: str) -> int:
    """Return a whole number from 0 to 2^63 - 1 that depends on `seed` and `names` and on no more.

    Neither torch nor NumPy draws it: it is the same in every version of both.
    """
    key = json.dumps([seed, *names]).encode()
    digest = hashlib.blake2b(key, digest_size=8, person=b"motionmerge int").digest()
    return int.from_bytes(digest, "little") >> 1


def mask_bits(seed: int, tensor_name: str, block: int, count: int) -> npt.NDArray[np.uint16]:
    """Draw the 16-bit values that decide which entries of one block of a tensor are kept (mask v1).

    SFC64, seeded with the 128-bit blake2b digest of `motionmerge mask v1|seed|tensor_name|block`;
    each raw 64-bit output gives four values, low bits first. NumPy guarantees this raw stream.

    Args:
        seed: Seed of the mask.
        tensor_name: Full name of the tensor in its checkpoint.
        block: Index of the block of `MASK_BLOCK` elements in the flattened tensor.
        count: How many values; a shorter draw is a prefix of a longer one.

    Returns:
        `[count]`, uniform over 0 .. 65535. Keep an entry iff its value is below the threshold.
    """
    return draw_bits(mask_digest(seed, tensor_name, block), count)


def draw_bits(digest: bytes, count: int) -> npt.NDArray[np.uint16]:
    """Draw the values of the block whose `mask_digest` is given, see `mask_bits`."""
    stream = np.random.SFC64(int.from_bytes(digest, "little"))
    raw = np.asarray(stream.random_raw(-(-count // 4)), dtype=_RAW_UINT64)
    return raw.view(_RAW_UINT16)[:count].astype(np.uint16, copy=False)


def mask_digest(seed: int, tensor_name: str, block: int) -> bytes:
    """Compute the 16 bytes that seed the generator of one block, see `mask_bits`."""
    key = f"motionmerge mask v1|{seed}|{tensor_name}|{block}".encode()
    return hashlib.blake2b(key, digest_size=16).digest()
