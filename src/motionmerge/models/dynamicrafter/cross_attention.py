"""Cross-attention to text and image tokens, without doing again what frames and steps share.

Text is the same for every frame, so all pixels of a video attend to it in one sequence; the keys
and values of text and image do not change while a video is denoised by the same weights, so they
can be kept from step to step. The sum text + image is IP-Adapter's (Ye et al. 2023, arXiv
2308.06721), as DynamiCrafter has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from torch import nn
from torch.nn import functional as F

from motionmerge.errors import ConfigError


@dataclass
class ContextCache:
    """What depends on tokens and weights alone, kept from one denoising step to the next.

    Use one for each prompt, image and expert; it knows nothing of changes to either.

    Args:
        kept: Tensors by the module that made them.
    """

    kept: dict[nn.Module, tuple[torch.Tensor, ...]] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget everything, after the weights or the tokens have changed."""
        self.kept.clear()


def computed_once(
    cache: ContextCache | None, module: nn.Module, make: Callable[[], tuple[torch.Tensor, ...]]
) -> tuple[torch.Tensor, ...]:
    """Return what a module makes of the tokens; with a cache, it is computed only once."""
    if cache is None:
        return make()
    if module not in cache.kept:
        cache.kept[module] = make()
    return cache.kept[module]


@dataclass(frozen=True)
class CrossContext:
    """What the pixels of a video attend to.

    Args:
        text: `[batch, text tokens, dim]`.
        image: `[batch * frames, image tokens, dim]`; `[batch, ...]` if all frames see the same.
        cache: Where keys and values are kept; None computes them anew.
    """

    text: torch.Tensor
    image: torch.Tensor
    cache: ContextCache | None = None

    def once(
        self, module: nn.Module, make: Callable[[], tuple[torch.Tensor, ...]]
    ) -> tuple[torch.Tensor, ...]:
        """Return a module's output for the tokens; with a cache, it is computed only once."""
        return computed_once(self.cache, module, make)


class TextImageAttnProcessor(IPAdapterAttnProcessor2_0):
    """Attend to text and to image tokens and add both.

    out = softmax(q k_text') v_text + scale * softmax(q k_image') v_image

    The same parameters and numbers (up to rounding) as diffusers' `IPAdapterAttnProcessor2_0` on
    tokens that are repeated for every frame.
    """

    def __call__(  # type: ignore[override]
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: CrossContext,
        attention_mask: None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            attn: The module that this is the processor of.
            hidden_states: `[batch * frames, pixels, dim]`.
            encoder_hidden_states: The tokens.
            attention_mask: None; diffusers' blocks pass it.
        """
        query = attn.to_q(hidden_states)
        context = encoder_hidden_states
        text_key, text_value, image_key, image_value = context.once(
            self,
            lambda: (
                attn.to_k(context.text),
                attn.to_v(context.text),
                self.to_k_ip[0](context.image),
                self.to_v_ip[0](context.image),
            ),
        )
        out = attend(query, text_key, text_value, num_heads=attn.heads)
        out = out + self.scale[0] * attend(query, image_key, image_value, num_heads=attn.heads)
        return attn.to_out[1](attn.to_out[0](out))


class NativeAttentionMixin:
    """A U-Net that attends by torch's own function, whichever kernels that chooses."""

    def set_attention_backend(self, backend: str) -> None:
        """Accept diffusers' name of torch's own function.

        Raises:
            ConfigError: It is another one, which diffusers would leave out without a word.
        """
        if backend.lower() != "native":
            raise ConfigError(
                f"{type(self).__name__} attends by torch's own function; the attention backend "
                f"`{backend}` would have no effect.",
                fix='Pass "native", or none.',
            )
        base: Any = super()
        base.set_attention_backend(backend)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, num_heads: int
) -> torch.Tensor:
    """Compute multi-head attention; rows of `query` that share a row of `key` are one sequence.

    Args:
        query: `[rows * shared, length, dim]`.
        key, value: `[rows, tokens, dim]`.
        num_heads: Heads.

    Returns:
        As `query`.
    """
    rows = key.shape[0]
    q, k, v = (
        x.reshape(rows, -1, num_heads, x.shape[-1] // num_heads).transpose(1, 2)
        for x in (query, key, value)
    )
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(query.shape)
