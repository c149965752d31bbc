"""Keep what the frozen parts of a model make of each view, so that training need not run them.

One safetensors file a view, whole or not there. Its name is a hash of all that decides its content:
the clip's bytes, the frames, the size, the caption, and the weights and settings of the frozen
parts. So nothing that is out of date is ever read; `LatentsCache.survey` finds it.

What is kept of the autoencoder are the moments of its posterior, in the dtype in which they were
computed; the noise is drawn anew for each sample. Latents are then the same bit for bit as without
the cache, if both draw from (seed, sample).
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from motionmerge.errors import CheckpointError, DataError
from motionmerge.io.decoding import Picture
from motionmerge.io.weights import open_weights, save_weights
from motionmerge.rng import generator_for
from motionmerge.training.views import ClipView

FORMAT = 2
"""Raise it when the meaning of what is kept changes."""

_KEY, _CHECKSUM = "motionmerge.view", "motionmerge.crc32"
_MOST_FILES = 2_000_000


def frame_moments(vae: Any, frames: Picture) -> torch.Tensor:
    """Encode every frame alone with an autoencoder for pictures.

    Args:
        vae: An `AutoencoderKL`; it is run in its own dtype, on its own device, without gradients.
        frames: `[frames, height, width, 3]`.

    Returns:
        Mean and logarithm of the variance, `[frames, 2 * channels, height / 8, width / 8]`.
    """
    pixels = pixels_of(frames)
    with torch.no_grad():
        # One by one: a batch of another length may round differently.
        parts = [
            vae.encode(one[None].to(vae.device, vae.dtype)).latent_dist.parameters for one in pixels
        ]
    return torch.cat(parts).cpu()


def pixels_of(frames: Picture) -> torch.Tensor:
    """Return frames as `[frames, 3, height, width]` in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1


def drawn_latents(moments: torch.Tensor, *, seed: int, sample: int) -> torch.Tensor:
    """Draw latents from a posterior; the noise depends on (seed, sample) alone.

    latents = mean + std * noise, in the dtype of the moments, not scaled
    """
    posterior = DiagonalGaussianDistribution(moments)
    generator = generator_for(seed, "posterior", str(sample))
    noise = torch.randn(posterior.mean.shape, generator=generator)
    return posterior.mean + posterior.std * noise.to(moments.dtype)


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """Compute the CRC-32 of all bytes, in the order of names."""
    found = 0
    for _, tensor in sorted(tensors.items()):
        numbers: npt.NDArray[np.uint8] = tensor.reshape(-1).view(torch.uint8).numpy()
        found = zlib.crc32(numbers.data, found)
    return f"{found:08x}"


@dataclass(frozen=True, kw_only=True)
class CacheState:
    """What is in a cache.

    Args:
        whole: Views that are there.
        missing: Views that are not, or whose files are damaged.
        stale: Files of other views, or made with other weights or settings.
        num_bytes: Of all files.
    """

    whole: int
    missing: tuple[ClipView, ...]
    stale: tuple[Path, ...]
    num_bytes: int


class LatentsCache:
    """Files of views in a folder.

    Args:
        folder: Made when the first view is kept.
        made_with: Hashes and settings of all that makes the content: weights of the autoencoder,
            of the text and image towers, their dtypes.
    """

    def __init__(self, folder: Path, *, made_with: Mapping[str, str]) -> None:
        self.folder = folder
        self.made_with = dict(sorted(made_with.items()))

    def key(self, view: ClipView) -> str:
        """Write all that decides what is kept of a view, as JSON."""
        clip = view.shot.clip
        content = {
            "format": FORMAT,
            "clip": clip.clip,
            "indices": list(view.indices),
            "size": list(view.size),
            "caption": clip.caption,
            "made_with": self.made_with,
        }
        return json.dumps(content, sort_keys=True)

    def path(self, view: ClipView) -> Path:
        """Return the file of a view."""
        name = hashlib.sha256(self.key(view).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, view: ClipView) -> dict[str, torch.Tensor] | None:
        """Read what is kept of a view; None if nothing is, or its file is torn or another's.

        Raises:
            DataError: Bytes in it have changed.
        """
        path = self.path(view)
        if not path.is_file():
            return None
        try:
            with open_weights(path) as file:
                if file.metadata.get(_KEY) != self.key(view):
                    return None
                found = {name: file.read(name) for name in file.keys()}  # noqa: SIM118
                expected = file.metadata.get(_CHECKSUM)
        except CheckpointError:
            return None
        if expected != _checksum(found):  # `survey`, which reads no content, finds nothing
            raise DataError(
                f"{path} is damaged: its checksum is another.",
                fix="Remove it, and start the same command again: it encodes the view anew.",
            )
        return found

    def read_or_make(
        self, view: ClipView, make: Callable[[ClipView], Mapping[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Read a view, or make it and keep it; what is returned is what was written.

        Raises:
            CheckpointError: It cannot be written. What `make` raises passes through.
            DataError: See `read`.
        """
        found = self.read(view)
        if found is not None:
            return found
        made = {name: tensor.detach().cpu().contiguous() for name, tensor in make(view).items()}
        about = {_KEY: self.key(view), _CHECKSUM: _checksum(made)}
        save_weights(self.path(view), made, about)
        return made

    def survey(self, views: Iterable[ClipView]) -> CacheState:
        """Compare what is there with what is wanted; only headers are read.

        Raises:
            DataError: The folder holds more than two million files.
        """
        views = list(views)
        expected = {self.path(view): view for view in views}
        there = set()
        for path in self.folder.glob("[0-9a-f][0-9a-f]/*.safetensors"):
            there.add(path)
            if len(there) > _MOST_FILES:
                raise DataError(f"{self.folder} holds too many files.", fix="Use another folder.")
        missing = [view for path, view in expected.items() if not self._is_whole(path, view)]
        return CacheState(
            whole=len(expected) - len(missing),
            missing=tuple(missing),
            stale=tuple(sorted(there - expected.keys())),
            num_bytes=sum(path.stat().st_size for path in there),
        )

    def _is_whole(self, path: Path, view: ClipView) -> bool:
        if not path.is_file():
            return False
        try:
            with open_weights(path) as file:
                return file.metadata.get(_KEY) == self.key(view)
        except CheckpointError:
            return False

    def remove(self, paths: Iterable[Path]) -> int:
        """Remove files of the cache, such as stale ones; return how many bytes that freed.

        Raises:
            DataError: A path is no file of this cache.
        """
        freed = 0
        for path in paths:
            if path.parent.parent != self.folder or path.suffix != ".safetensors":
                raise DataError(f"{path} is no file of the cache.", fix="Give those of `survey`.")
            freed += path.stat().st_size
            path.unlink()
        return freed
