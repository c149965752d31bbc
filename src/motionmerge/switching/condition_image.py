"""Where the condition image is in a denoiser's call, for every family: read it, and write it back.

An image is read as `[..., height, width]` in the latents' units of the call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

Arguments: TypeAlias = "dict[str, object]"
"""The arguments of a denoiser's call by name, the noisy latents first."""


class ImagePlace(Protocol):
    """A place in the arguments of a call."""

    def read(self, arguments: Arguments) -> torch.Tensor:
        """Return the image, `[batch, ..., height, width]`."""

    def write(self, arguments: Arguments, image: torch.Tensor) -> Arguments:
        """Return the arguments with another image; those that were given are left alone."""


def sample_of(arguments: Mapping[str, object]) -> torch.Tensor:
    """Return the noisy latents of a call, its first argument."""
    sample = next(iter(arguments.values()))
    assert isinstance(sample, torch.Tensor)
    return sample


def _with_sample(arguments: Arguments, sample: torch.Tensor) -> Arguments:
    return {**arguments, next(iter(arguments)): sample}


class _PartOfSample:
    """An image that is a part of the sample, which a view of it shows."""

    def read(self, arguments: Arguments) -> torch.Tensor:
        return self._image(sample_of(arguments))

    def write(self, arguments: Arguments, image: torch.Tensor) -> Arguments:
        sample = sample_of(arguments).clone()
        self._image(sample).copy_(image)
        return _with_sample(arguments, sample)

    def _image(self, sample: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class BesideLatents(_PartOfSample):
    """Channels of the sample beside the noisy ones: as many, with a mask before or after them.

    Attributes:
        axis: That of the channels.
        mask_before, mask_after: Channels of a mask before and after the image's.
    """

    axis: int = 1
    mask_before: int = 0
    mask_after: int = 0

    def mask(self, arguments: Arguments) -> torch.Tensor:
        """Return the channels of the mask that is before the image."""
        sample = sample_of(arguments)
        return sample.narrow(self.axis, self._width(sample), self.mask_before)

    def _width(self, sample: torch.Tensor) -> int:
        return (sample.shape[self.axis] - self.mask_before - self.mask_after) // 2

    def _image(self, sample: torch.Tensor) -> torch.Tensor:
        width = self._width(sample)
        return sample.narrow(self.axis, width + self.mask_before, width)


class InFirstFrame(_PartOfSample):
    """The first frame of the sample, `[batch, channels, frames, height, width]`."""

    def _image(self, sample: torch.Tensor) -> torch.Tensor:
        return sample[:, :, :1]


class InFirstFrameChannelsLast(_PartOfSample):
    """The noisy channels in the first frame of `[batch, frames, height, width, 2 channels + 1]`."""

    def _image(self, sample: torch.Tensor) -> torch.Tensor:
        return sample[:, :1, ..., : (sample.shape[-1] - 1) // 2].movedim(-1, 1)


class InFirstTokens:
    """The tokens of the first frame, `[batch, frames height width, channels]`, a token a latent."""

    def read(self, arguments: Arguments) -> torch.Tensor:
        height, width = self.size(arguments)
        first = sample_of(arguments)[:, : height * width]
        return first.movedim(-1, 1).reshape(len(first), -1, height, width)

    def write(self, arguments: Arguments, image: torch.Tensor) -> Arguments:
        sample = sample_of(arguments).clone()
        tokens = image.flatten(-2).movedim(1, -1)
        sample[:, : tokens.shape[1]] = tokens
        return _with_sample(arguments, sample)

    @staticmethod
    def size(arguments: Arguments) -> tuple[int, int]:
        """Return the height and width of a frame in tokens, which the call names."""
        height, width = arguments["height"], arguments["width"]
        assert isinstance(height, int)
        assert isinstance(width, int)
        return height, width


@dataclass(frozen=True)
class InArgument:
    """An argument of its own."""

    name: str

    def read(self, arguments: Arguments) -> torch.Tensor:
        image = arguments[self.name]
        assert isinstance(image, torch.Tensor)
        return image

    def write(self, arguments: Arguments, image: torch.Tensor) -> Arguments:
        return {**arguments, self.name: image}
