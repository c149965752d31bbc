"""A bias on attention to the first frame, while a denoiser is called.

score(query, key) + bias    for keys of the first latent frame

Source: DyMoS, arXiv 2605.19398 (bias -0.6), which biases all queries in the conditional pass.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from motionmerge.errors import ConfigError
from motionmerge.models.diffusers_state import attention_backend, is_compiled, is_context_parallel
from motionmerge.models.video_pipeline import Config
from motionmerge.switching.condition_image import Arguments, InFirstTokens, sample_of

_TAKES_MASKS = ("native", "_native_cudnn", "_native_efficient", "_native_math")
"""Backends of attention that can be told a mask of numbers."""


@dataclass(frozen=True, kw_only=True)
class SelfAttention:
    """Where the self-attention of a denoiser is, and how it is told a mask.

    Attributes:
        blocks: Attributes of the denoiser that list its blocks.
        module: What a block calls it.
        processors: Classes of processors that are known to heed a mask.
        first_frame: Counts the tokens of the first frame, from a call and the configuration.
        is_text_first: Whether keys of the text come before those of the video, not after.
        has_head_axis: Whether a mask is `[batch, 1, 1, keys]`, not `[batch, 1, keys]`.
    """

    blocks: tuple[str, ...]
    module: str
    processors: tuple[str, ...]
    first_frame: Callable[[Arguments, Config], int]
    is_text_first: bool = False
    has_head_axis: bool = False

    def check(self, name: str, denoiser: nn.Module) -> None:
        """Refuse a denoiser that a bias would not reach.

        Raises:
            ConfigError: It is compiled, or as `modules`.
        """
        if is_compiled(denoiser):
            raise ConfigError(
                f"`{name}` is compiled, and would not heed a bias on its attention.",
                fix="Leave `attention` out, or do not compile the model.",
            )
        self.modules(denoiser)

    def modules(self, denoiser: nn.Module) -> list[nn.Module]:
        """List the self-attention of a denoiser.

        Raises:
            ConfigError: There is none, or a mask would not reach it.
        """
        found = [
            getattr(block, self.module)
            for name in self.blocks
            for block in getattr(denoiser, name, ())
        ]
        if not found:
            raise ConfigError(
                f"{type(denoiser).__name__} has no self-attention where it is expected.",
                fix="Leave `attention` out.",
            )
        for one in found:
            self._check(one)
        return found

    def _check(self, attention: nn.Module) -> None:
        processor = getattr(attention, "processor", None)
        name = type(processor).__name__
        if name not in self.processors or getattr(attention, "fused_projections", False):
            raise ConfigError(
                f"The denoiser's attention is computed by {name}, which may not heed a bias.",
                fix=f"Use {self.processors[0]}, unfused, or leave `attention` out.",
            )
        backend = attention_backend(processor)
        if backend not in _TAKES_MASKS:
            raise ConfigError(
                f"The attention backend `{backend}` takes no bias.",
                fix='Call set_attention_backend("native") of the denoiser, or leave `attention` '
                "out.",
            )
        if is_context_parallel(processor):
            raise ConfigError(
                "The denoiser's frames are split between devices, where a bias is not known.",
                fix="Leave `attention` out, or do not enable parallelism.",
            )

    @contextmanager
    def biased(
        self, denoiser: nn.Module, bias: float, arguments: Arguments, *, rows: slice
    ) -> Iterator[None]:
        """Add a bias to the scores of the first frame's keys inside the block.

        Args:
            denoiser: What is called in the block, once.
            bias: The number; 0 changes nothing.
            arguments: Of the call.
            rows: The samples of the batch that are biased.

        Raises:
            ConfigError: As `modules`.
        """
        if bias == 0:
            yield
            return
        hooks: list[RemovableHandle] = []
        config: Config = getattr(denoiser, "config", {})
        first = self.first_frame(arguments, config)
        try:
            for module in self.modules(denoiser):
                hook = _MaskHook(self, bias, first, rows)
                hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in hooks:
                handle.remove()


@dataclass(frozen=True)
class _MaskHook:
    """Gives one self-attention a mask with the bias, added to its own."""

    place: SelfAttention
    bias: float
    first: int
    rows: slice

    def __call__(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        names = [*inspect.signature(type(module).forward).parameters][1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        given["attention_mask"] = self._mask(given)
        return (), given

    def _mask(self, given: Mapping[str, object]) -> torch.Tensor:
        hidden, text = given["hidden_states"], given.get("encoder_hidden_states")
        own = given.get("attention_mask")
        assert isinstance(hidden, torch.Tensor)
        texts = text.shape[1] if isinstance(text, torch.Tensor) else 0
        before = texts if self.place.is_text_first else 0
        keys = hidden.shape[1] + texts
        mask = torch.zeros(len(hidden), 1, keys, dtype=hidden.dtype, device=hidden.device)
        mask[self.rows, :, before : before + self.first] = self.bias
        if self.place.has_head_axis:
            mask = mask[:, None]
        if isinstance(own, torch.Tensor) and own.dtype == torch.bool:
            return torch.where(own, mask, -math.inf)
        return mask + own if isinstance(own, torch.Tensor) else mask


def tokens_of_patches(arguments: Arguments, config: Config) -> int:
    """Count the patches of a frame of `[batch, channels, frames, height, width]`."""
    patch = config["patch_size"]
    height, width = sample_of(arguments).shape[-2:]
    sides = patch[-2:] if isinstance(patch, (list, tuple)) else (patch, patch)
    return int(height // sides[0]) * int(width // sides[1])


def tokens_of_ltx(arguments: Arguments, config: Config) -> int:
    """Count the tokens of a frame of LTX, which is told their height and width."""
    height, width = InFirstTokens.size(arguments)
    return height * width
