"""The four attentions of ConsistI2V, as processors of diffusers' blocks.

Source: Ren et al. 2024 (arXiv 2402.04324), section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed
from torch.nn import functional as F

from motionmerge.models.dynamicrafter.cross_attention import ContextCache, attend, computed_once


@dataclass(frozen=True)
class VideoLayout:
    """The axes of videos that attention sees flattened."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class TextTokens:
    """What a video attends to besides itself.

    Args:
        text: `[videos, tokens, dim]`.
        cache: Where keys and values are kept; None computes them anew.
    """

    text: torch.Tensor
    cache: ContextCache | None = None

    def keys_and_values(self, attn: Attention) -> tuple[torch.Tensor, torch.Tensor]:
        """Project the tokens, once for all frames and pixels."""
        make: Callable[[], tuple[torch.Tensor, ...]] = lambda: (  # noqa: E731
            attn.to_k(self.text),
            attn.to_v(self.text),
        )
        keys, values = computed_once(self.cache, attn, make)
        return keys, values


def rotated(values: torch.Tensor) -> torch.Tensor:
    """Turn pairs of neighbouring channels by angles that grow with the frame.

    Before heads are split, and in the first half of the channels only: of eight heads four turn,
    each with frequencies of its own.

    Args:
        values: `[rows, frames, channels]`.
    """
    turning, still = values.chunk(2, dim=-1)
    frames = torch.arange(values.shape[1], device=values.device)
    angles = get_1d_rotary_pos_embed(turning.shape[-1], frames, use_real=True)
    turned = apply_rotary_emb(turning[:, None], angles, use_real_unbind_dim=-1)[:, 0]
    return torch.cat([turned, still], dim=-1)


def neighbours_in_first_frame(values: torch.Tensor, layout: VideoLayout) -> torch.Tensor:
    """Gather the eight pixels around each one in frame 0, row by row; edges are repeated.

    Args:
        values: `[videos * height * width, frames, channels]`.
        layout: Of the videos.

    Returns:
        `[videos * height * width, 8, channels]`.
    """
    first = values[:, 0].unflatten(0, (-1, layout.height, layout.width)).permute(0, 3, 1, 2)
    padded = F.pad(first, (1, 1, 1, 1), mode="replicate")
    around = F.unfold(padded, 3).unflatten(1, (-1, 9))  # [videos, channels, 9, pixels]
    around = torch.cat([around[:, :, :4], around[:, :, 5:]], dim=2)
    return around.permute(0, 3, 2, 1).flatten(0, 1)


class FirstFrameAttnProcessor:
    """Spatial self-attention: keys and values of the own frame, then of frame 0."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        layout: VideoLayout | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            attn: The module that this is the processor of.
            hidden_states: `[videos * frames, pixels, dim]`.
            encoder_hidden_states, attention_mask: None; diffusers' blocks pass them.
            layout: Of the videos.
        """
        assert layout is not None
        keys, values = (
            torch.cat([own, _first_of_each(own, layout.frames)], dim=1)
            for own in (attn.to_k(hidden_states), attn.to_v(hidden_states))
        )
        return _output(attn, attend(attn.to_q(hidden_states), keys, values, num_heads=attn.heads))


class NeighbourAttnProcessor:
    """Temporal self-attention: a pixel in all frames, then its eight neighbours in frame 0.

    Queries and keys are rotated by their frame; that of the neighbours is 0, which leaves them.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        layout: VideoLayout | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            attn: The module that this is the processor of.
            hidden_states: `[videos * height * width, frames, dim]`.
            encoder_hidden_states, attention_mask: None; diffusers' blocks pass them.
            layout: Of the videos.
        """
        assert layout is not None
        keys, values = attn.to_k(hidden_states), attn.to_v(hidden_states)
        near_keys, near_values = (neighbours_in_first_frame(one, layout) for one in (keys, values))
        out = attend(
            rotated(attn.to_q(hidden_states)),
            torch.cat([rotated(keys), near_keys], dim=1),
            torch.cat([values, near_values], dim=1),
            num_heads=attn.heads,
        )
        return _output(attn, out)


class TextAttnProcessor:
    """Attention to the text."""

    def query(self, attn: Attention, hidden_states: torch.Tensor) -> torch.Tensor:
        """Project the queries."""
        return attn.to_q(hidden_states)

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: TextTokens,
        attention_mask: None = None,
        layout: VideoLayout | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            attn: The module that this is the processor of.
            hidden_states: `[videos * rows, length, dim]`.
            encoder_hidden_states: The tokens.
            attention_mask: None; diffusers' blocks pass it.
            layout: Not needed; processors of a block get the same keywords.
        """
        keys, values = encoder_hidden_states.keys_and_values(attn)
        query = self.query(attn, hidden_states)
        return _output(attn, attend(query, keys, values, num_heads=attn.heads))


class RotatedTextAttnProcessor(TextAttnProcessor):
    """Attention of frames to the text, with queries that are rotated and keys that are not."""

    def query(self, attn: Attention, hidden_states: torch.Tensor) -> torch.Tensor:
        return rotated(attn.to_q(hidden_states))


def _first_of_each(values: torch.Tensor, frames: int) -> torch.Tensor:
    """Repeat frame 0 of each video for all of its frames."""
    videos = values.unflatten(0, (-1, frames))
    return videos[:, :1].expand_as(videos).flatten(0, 1)


def _output(attn: Attention, attended: torch.Tensor) -> torch.Tensor:
    return attn.to_out[1](attn.to_out[0](attended))
