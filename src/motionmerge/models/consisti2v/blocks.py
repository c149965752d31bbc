"""The blocks of ConsistI2V's U-Net: those of Stable Diffusion 2.1, with temporal layers between.

Official names, so that files of the hub and LoRAs for Stable Diffusion 2.1 fit as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch.nn import functional as F

from motionmerge.models.dynamicrafter.fast_layers import attention_over_frames

from .attention import (
    FirstFrameAttnProcessor,
    NeighbourAttnProcessor,
    RotatedTextAttnProcessor,
    TextAttnProcessor,
    TextTokens,
    VideoLayout,
)

_TEMPORAL_EPS = 1e-6
_TEMPORAL_GROUPS = 32  # of the temporal convolutions, whatever the U-Net's


@dataclass(frozen=True, kw_only=True)
class BlockSettings:
    """What all blocks of a U-Net have in common."""

    time_embed_dim: int
    cross_attention_dim: int
    num_temporal_heads: int
    norm_num_groups: int
    norm_eps: float


class TemporalMix(nn.Module):
    """A layer that is added to its input with a learned share.

    x + (1 - clamp(alpha, 0, 1)) y,   alpha = 1 (no temporal layer) at the beginning of training
    """

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))

    def mixed(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Add `y`; the parameter itself is never clamped, unlike in the official code."""
        return x + (1 - self.alpha.clamp(0, 1)) * y


class FrameConv(TemporalMix):
    """Two convolutions over the frames of each pixel; the norms see one frame at a time."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_TEMPORAL_GROUPS, channels, eps=_TEMPORAL_EPS)
        self.conv1 = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))
        self.norm2 = nn.GroupNorm(_TEMPORAL_GROUPS, channels, eps=_TEMPORAL_EPS)
        self.conv2 = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: torch.Tensor, num_frames: int) -> torch.Tensor:
        """Convolve `[videos * frames, channels, height, width]`."""

        def over_frames(conv: nn.Conv3d, images: torch.Tensor) -> torch.Tensor:
            videos = images.unflatten(0, (-1, num_frames)).transpose(1, 2)
            return conv(videos).transpose(1, 2).flatten(0, 1)

        y = over_frames(self.conv1, F.silu(self.norm1(x)))
        return self.mixed(x, over_frames(self.conv2, F.silu(self.norm2(y))))


class FrameTransformer(TemporalMix):
    """Attention over the frames of each pixel, to its surroundings in frame 0 and to the text."""

    def __init__(self, channels: int, settings: BlockSettings) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(settings.norm_num_groups, channels, eps=_TEMPORAL_EPS)
        self.proj_in = nn.Linear(channels, channels)
        block = BasicTransformerBlock(
            channels,
            settings.num_temporal_heads,
            channels // settings.num_temporal_heads,
            cross_attention_dim=settings.cross_attention_dim,
        )
        block.attn1.set_processor(NeighbourAttnProcessor())
        block.attn2.set_processor(RotatedTextAttnProcessor())
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor, tokens: TextTokens, layout: VideoLayout) -> torch.Tensor:
        """Attend `[videos * frames, channels, height, width]`."""
        pixels = self.norm(x).unflatten(0, (-1, layout.frames)).permute(0, 3, 4, 1, 2)
        y = self.proj_in(pixels.flatten(0, 2))  # [videos * height * width, frames, channels]
        with attention_over_frames(y):
            for block in self.transformer_blocks:
                y = block(
                    y, encoder_hidden_states=tokens, cross_attention_kwargs={"layout": layout}
                )
        y = self.proj_out(y).unflatten(0, (-1, layout.height, layout.width))
        return self.mixed(x, y.permute(0, 3, 4, 1, 2).flatten(0, 1))


class StagesBlock(nn.Module):
    """Stages one after another: residual block, temporal convolution, spatial, temporal attention.

    Args:
        widths: Channels into and out of each stage.
        num_heads: Of the spatial attention; None without attention.
        num_attentions: How many stages have it, the first ones; all by default.
        is_temporal: These stages have temporal attention as well.
        settings: See `BlockSettings`.
    """

    def __init__(
        self,
        widths: Sequence[tuple[int, int]],
        *,
        num_heads: int | None,
        settings: BlockSettings,
        num_attentions: int | None = None,
        is_temporal: bool = True,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., torch.Tensor]  # set by diffusers
        self.resnets, self.conv3ds = nn.ModuleList(), nn.ModuleList()
        self.attentions, self.tempo_attns = nn.ModuleList(), nn.ModuleList()
        for in_width, width in widths:
            self.resnets.append(
                ResnetBlock2D(
                    in_channels=in_width,
                    out_channels=width,
                    temb_channels=settings.time_embed_dim,
                    eps=settings.norm_eps,
                    groups=settings.norm_num_groups,
                )
            )
            self.conv3ds.append(FrameConv(width))
        for _, width in widths[:num_attentions]:
            if num_heads is None:
                break
            self.attentions.append(_spatial_transformer(width, num_heads, settings))
            if is_temporal:
                self.tempo_attns.append(FrameTransformer(width, settings))

    def forward(self, x: torch.Tensor, *inputs: Any) -> torch.Tensor:
        """Run all stages; `inputs` are those of `_stage`."""
        for number in range(len(self.resnets)):
            x = self.stage(number, x, *inputs)
        return x

    def stage(self, number: int, x: torch.Tensor, *inputs: Any) -> torch.Tensor:
        """Run one stage, again in the backward pass if memory is to be saved."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(self._stage, number, x, *inputs)
        return self._stage(number, x, *inputs)

    def _stage(
        self,
        number: int,
        x: torch.Tensor,
        embedding: torch.Tensor,
        tokens: TextTokens,
        num_frames: int,
    ) -> torch.Tensor:
        x = self.resnets[number](x, embedding)
        x = self.conv3ds[number](x, num_frames)
        layout = VideoLayout(num_frames, *x.shape[-2:])
        if number < len(self.attentions):
            x = self.attentions[number](
                x,
                encoder_hidden_states=tokens,
                cross_attention_kwargs={"layout": layout},
                return_dict=False,
            )[0]
        if number < len(self.tempo_attns):
            x = self.tempo_attns[number](x, tokens, layout)
        return x


class DownBlock(StagesBlock):
    """A level on the way down."""

    def __init__(self, widths: Sequence[tuple[int, int]], *, resamples: bool, **own: Any) -> None:
        super().__init__(widths, **own)
        width = widths[-1][1]
        found = [Downsample2D(width, use_conv=True, name="op")] if resamples else []
        self.downsamplers = nn.ModuleList(found)

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, *inputs: Any
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run all stages; the second result is what the way up sees of them."""
        skips = []
        for number in range(len(self.resnets)):
            x = self.stage(number, x, *inputs)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        return x, skips


class UpBlock(StagesBlock):
    """A level on the way up."""

    def __init__(self, widths: Sequence[tuple[int, int]], *, resamples: bool, **own: Any) -> None:
        super().__init__(widths, **own)
        width = widths[-1][1]
        self.upsamplers = nn.ModuleList([Upsample2D(width, use_conv=True)] if resamples else [])

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, skips: list[torch.Tensor], *inputs: Any
    ) -> torch.Tensor:
        """Run all stages, each on its input and the last of `skips` that is left."""
        for number in range(len(self.resnets)):
            x = self.stage(number, torch.cat([x, skips[-1 - number]], dim=1), *inputs)
        for upsampler in self.upsamplers:
            x = upsampler(x)
        return x


def _spatial_transformer(width: int, num_heads: int, settings: BlockSettings) -> Transformer2DModel:
    transformer = Transformer2DModel(
        num_heads,
        width // num_heads,
        in_channels=width,
        cross_attention_dim=settings.cross_attention_dim,
        norm_num_groups=settings.norm_num_groups,
        use_linear_projection=True,
    )
    for block in transformer.transformer_blocks:
        block.attn1.set_processor(FirstFrameAttnProcessor())
        block.attn2.set_processor(TextAttnProcessor())
    return transformer
