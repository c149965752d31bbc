"""The DynamiCrafter U-Net, built from diffusers' leaf classes.

Equals the official `UNetModel` (Xing et al. 2023, arXiv 2310.12190) key for key after renaming; see
`conversion.py`. The text-to-temporal adapter (adapter.py) is a part that can be added to a loaded
model. The pocket model is this class with a small configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, TemporalConvLayer, Upsample2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from diffusers.models.unets.unet_3d_condition import UNet3DConditionOutput
from torch import nn
from torch.nn import functional as F

from motionmerge.errors import ConfigError, ShapeError
from motionmerge.models.group_offload import OffloadedNetwork

from .adapter import TemporalFusion, TextToTemporalAdapter
from .cross_attention import (
    ContextCache,
    CrossContext,
    NativeAttentionMixin,
    TextImageAttnProcessor,
)
from .fast_layers import attention_over_frames, use_fast_layers

ENTRY_ATTENTION_HEADS = 8  # official `init_attn`: eight heads whatever the width


class TemporalTransformer(TransformerTemporalModel):
    """Self-attention over the frames of each pixel, with room for the adapter's fusion layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fusion: TemporalFusion | None = None

    def add_fusion(self, context_dim: int, *, like: torch.Tensor) -> None:
        """Add the fusion layer, as the identity, with the dtype and device of `like`."""
        self.fusion = TemporalFusion(self.proj_in.out_features, context_dim).to(like)

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, temporal_context: torch.Tensor | None, num_frames: int
    ) -> torch.Tensor:
        """Attend over time.

        Args:
            hidden_states: `[batch * frames, channels, height, width]`.
            temporal_context: `[batch, frames, context_dim]`, or None in a model without adapter.
            num_frames: Frames a video.
        """
        height, width = hidden_states.shape[-2:]
        video = hidden_states.unflatten(0, (-1, num_frames)).transpose(1, 2)
        x = self.norm(video).permute(0, 3, 4, 2, 1).flatten(0, 2)  # [b*h*w, frames, channels]
        x = self.proj_in(x)
        if self.fusion is not None:
            x = self.fusion(x, temporal_context)
        with attention_over_frames(x):
            for block in self.transformer_blocks:
                x = block(x)
        x = self.proj_out(x).unflatten(0, (-1, height, width)).permute(0, 3, 4, 1, 2)
        return (hidden_states.unflatten(0, (-1, num_frames)) + x).flatten(0, 1)


class UNetStage(nn.Module):
    """A step of the U-Net: residual block, temporal convolution, spatial, temporal attention."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_embed_dim: int,
        has_attention: bool,
        attention_head_dim: int,
        cross_attention_dim: int,
        num_image_tokens: int,
        dropout: float,
        norm_num_groups: int,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., torch.Tensor]  # set by diffusers
        self.resnet = ResnetBlock2D(
            in_channels=in_channels,
            out_channels=out_channels,
            temb_channels=time_embed_dim,
            eps=1e-5,
            dropout=dropout,
            groups=norm_num_groups,
        )
        self.temporal_conv = TemporalConvLayer(
            out_channels, out_channels, dropout=dropout, norm_num_groups=norm_num_groups
        )
        self.attention: Transformer2DModel | None = None
        self.temporal_attention: TemporalTransformer | None = None
        if has_attention:
            num_heads = out_channels // attention_head_dim
            self.attention = Transformer2DModel(
                num_heads,
                attention_head_dim,
                in_channels=out_channels,
                cross_attention_dim=cross_attention_dim,
                norm_num_groups=norm_num_groups,
                use_linear_projection=True,
            )
            for block in self.attention.transformer_blocks:
                block.attn2.set_processor(
                    TextImageAttnProcessor(
                        out_channels, cross_attention_dim, num_tokens=(num_image_tokens,)
                    )
                )
            self.temporal_attention = TemporalTransformer(
                num_heads,
                attention_head_dim,
                in_channels=out_channels,
                norm_num_groups=norm_num_groups,
            )

    def forward(self, *inputs: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(self._run, *inputs)
        return self._run(*inputs)

    def _run(
        self,
        hidden_states: torch.Tensor,
        time_embed: torch.Tensor,
        context: CrossContext,
        temporal_context: torch.Tensor | None,
        num_frames: int,
    ) -> torch.Tensor:
        x = self.resnet(hidden_states, time_embed)
        x = self.temporal_conv(x, num_frames=num_frames)
        if self.attention is not None and self.temporal_attention is not None:
            x = self.attention(x, encoder_hidden_states=context, return_dict=False)[0]
            x = self.temporal_attention(x, temporal_context, num_frames)
        return x


class DynamiCrafterUNet(
    OffloadedNetwork,
    NativeAttentionMixin,
    ModelMixin,
    ConfigMixin,
    AttentionMixin,
    PeftAdapterMixin,
):
    """Predict the denoising target of a video from noisy latents, a still image and a prompt.

    Args:
        in_channels: Noisy latents and image latents, concatenated.
        out_channels: Latent channels of the prediction.
        block_out_channels: Width of each resolution level.
        attention_levels: Which levels have attention. Official: `attention_resolutions`.
        layers_per_block: Residual blocks a level on the way down; one more on the way up.
        attention_head_dim: Width of one head.
        cross_attention_dim: Width of text and image tokens.
        num_text_tokens: How many of the first tokens are text.
        num_image_tokens: Image tokens a frame.
        dropout: In residual blocks and temporal convolutions, while training.
        norm_num_groups: Groups of every group norm.
        temporal_context_dim, adapter_text_dim, adapter_heads, adapter_head_dim, adapter_frames:
            Shape of the temporal adapter; `temporal_context_dim=None` means no adapter. Set by
            `add_temporal_adapter`.

    Raises:
        ConfigError: the per-level lists disagree.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("UNetStage", "TemporalTransformer")
    _repeated_blocks = ("BasicTransformerBlock",)

    @register_to_config
    def __init__(
        self,
        in_channels: int = 8,
        out_channels: int = 4,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        attention_levels: Sequence[bool] = (True, True, True, False),
        layers_per_block: int = 2,
        attention_head_dim: int = 64,
        cross_attention_dim: int = 1024,
        num_text_tokens: int = 77,
        num_image_tokens: int = 16,
        dropout: float = 0.1,
        norm_num_groups: int = 32,
        temporal_context_dim: int | None = None,
        adapter_text_dim: int | None = None,
        adapter_heads: int = 8,
        adapter_head_dim: int = 128,
        adapter_frames: int = 16,
    ) -> None:
        super().__init__()
        if len(block_out_channels) != len(attention_levels):
            raise ConfigError(
                f"`block_out_channels` has {len(block_out_channels)} levels, attention_levels "
                f"{len(attention_levels)}",
                fix="Give one entry a level in both.",
            )
        width = block_out_channels[0]
        time_embed_dim = 4 * width

        def stage(in_width: int, out_width: int, has_attention: bool) -> UNetStage:
            return UNetStage(
                in_width,
                out_width,
                time_embed_dim=time_embed_dim,
                has_attention=has_attention,
                attention_head_dim=attention_head_dim,
                cross_attention_dim=cross_attention_dim,
                num_image_tokens=num_image_tokens,
                dropout=dropout,
                norm_num_groups=norm_num_groups,
            )

        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(width, time_embed_dim)
        self.fps_embedding = TimestepEmbedding(width, time_embed_dim)
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.temporal_in = TemporalTransformer(
            ENTRY_ATTENTION_HEADS,
            attention_head_dim,
            in_channels=width,
            norm_num_groups=norm_num_groups,
        )

        self.down_stages, self.downsamplers = nn.ModuleList(), nn.ModuleList()
        skip_widths = [width]
        last = len(block_out_channels) - 1
        for level, (out_width, attends) in enumerate(
            zip(block_out_channels, attention_levels, strict=True)
        ):
            for _ in range(layers_per_block):
                self.down_stages.append(stage(width, out_width, attends))
                width = out_width
                skip_widths.append(width)
            if level < last:
                self.downsamplers.append(Downsample2D(width, use_conv=True, name="op"))
                skip_widths.append(width)

        self.mid_stages = nn.ModuleList([stage(width, width, True), stage(width, width, False)])

        self.up_stages, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        for level in range(last, -1, -1):
            for _ in range(layers_per_block + 1):
                out_width = block_out_channels[level]
                self.up_stages.append(
                    stage(width + skip_widths.pop(), out_width, attention_levels[level])
                )
                width = out_width
            if level:
                self.upsamplers.append(Upsample2D(width, use_conv=True))
        self.norm_out = nn.GroupNorm(norm_num_groups, width)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        use_fast_layers(self)

        self.temporal_adapter: TextToTemporalAdapter | None = None
        if temporal_context_dim is not None:
            self._build_temporal_adapter(generator=None)

    def temporal_transformers(self) -> list[TemporalTransformer]:
        """Return every temporal transformer, the entry one included (17 in DynamiCrafter-512)."""
        return [module for module in self.modules() if isinstance(module, TemporalTransformer)]

    def add_temporal_adapter(
        self,
        *,
        text_dim: int | None = None,
        context_dim: int | None = None,
        num_frames: int = 16,
        num_heads: int = 8,
        head_dim: int = 128,
        seed: int = 0,
    ) -> None:
        """Add a text-to-temporal adapter to the model; it starts as the identity.

        The output of the model does not change by this; training the adapter changes it.

        Args:
            text_dim: Width of the text tokens; by default `cross_attention_dim`.
            context_dim: Width of the temporal context; by default `text_dim`.
            num_frames: Learned queries; other numbers of frames are interpolated.
            num_heads, head_dim: Shape of the adapter's attention.
            seed: Seeds the q-former's initial weights.

        Raises:
            ConfigError: the model has an adapter already.
        """
        if self.temporal_adapter is not None:
            raise ConfigError(
                "This U-Net has a temporal adapter already.",
                fix="Train or replace the one it has (`unet.temporal_adapter`).",
            )
        text_dim = text_dim or self.config.cross_attention_dim
        self.register_to_config(
            temporal_context_dim=context_dim or text_dim,
            adapter_text_dim=text_dim,
            adapter_heads=num_heads,
            adapter_head_dim=head_dim,
            adapter_frames=num_frames,
        )
        self._build_temporal_adapter(generator=torch.Generator().manual_seed(seed))

    def _build_temporal_adapter(self, *, generator: torch.Generator | None) -> None:
        config, reference = self.config, self.conv_in.weight
        adapter = TextToTemporalAdapter(
            config.adapter_text_dim or config.cross_attention_dim,
            context_dim=config.temporal_context_dim,
            num_frames=config.adapter_frames,
            num_heads=config.adapter_heads,
            head_dim=config.adapter_head_dim,
            generator=generator,
        )
        self.temporal_adapter = adapter.to(reference)
        for transformer in self.temporal_transformers():
            transformer.add_fusion(config.temporal_context_dim, like=reference)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        frame_rate: torch.Tensor | float,
        temporal_context: torch.Tensor | None = None,
        return_dict: bool = True,
        *,
        context_cache: ContextCache | None = None,
    ) -> UNet3DConditionOutput | tuple[torch.Tensor]:
        """Run the network once.

        Args:
            sample: Noisy latents and image latents, `[batch, in_channels, frames, height, width]`;
                height and width divide by 2 to the power of (levels - 1).
            timestep: `[batch]` or one number, the scheduler's own value.
            encoder_hidden_states: Text tokens, then image tokens:
                `[batch, num_text_tokens + image tokens, cross_attention_dim]`. Image tokens are
                `num_image_tokens` (shown to every frame) or that many a frame, frame by frame.
            frame_rate: Frames per second, `[batch]` or one number (frame stride for the 256 model).
            temporal_context: `[batch, frames, temporal_context_dim]`; computed from the text tokens
                by the model's own adapter when left out. Refused by a model without adapter.
            return_dict: Whether to wrap the result.
            context_cache: Keeps what depends on the tokens and the weights alone, for the next call
                with the same ones.

        Returns:
            The prediction `[batch, out_channels, frames, height, width]` as `.sample`, or as a
            one-tuple.

        Raises:
            ShapeError: the sample, the tokens or the context do not fit.
        """
        self._check_sample(sample)
        batch, _, frames, _, _ = sample.shape
        context = self._cross_context(encoder_hidden_states, frames, context_cache)
        if temporal_context is None:
            temporal_context = self._temporal_context(context, frames)
        self._check_temporal_context(temporal_context, batch, frames)

        time_embed = self._embed(timestep, self.time_embedding, sample)
        time_embed = time_embed + self._embed(frame_rate, self.fps_embedding, sample)
        time_embed = time_embed.repeat_interleave(frames, 0)

        layers = self.config.layers_per_block
        x = self.conv_in(sample.transpose(1, 2).flatten(0, 1))
        x = self.temporal_in(x, temporal_context, frames)
        skips = [x]
        for i, stage in enumerate(self.down_stages, 1):
            x = stage(x, time_embed, context, temporal_context, frames)
            skips.append(x)
            if i % layers == 0 and i // layers <= len(self.downsamplers):
                x = self.downsamplers[i // layers - 1](x)
                skips.append(x)
        for stage in self.mid_stages:
            x = stage(x, time_embed, context, temporal_context, frames)
        for i, stage in enumerate(self.up_stages, 1):
            x = torch.cat([x, skips.pop()], dim=1)
            x = stage(x, time_embed, context, temporal_context, frames)
            if i % (layers + 1) == 0 and i // (layers + 1) <= len(self.upsamplers):
                x = self.upsamplers[i // (layers + 1) - 1](x)
        x = self.conv_out(F.silu(self.norm_out(x)))
        x = x.unflatten(0, (batch, frames)).transpose(1, 2)
        return UNet3DConditionOutput(sample=x) if return_dict else (x,)

    def _embed(
        self, value: torch.Tensor | float, embedding: nn.Module, sample: torch.Tensor
    ) -> torch.Tensor:
        value = torch.as_tensor(value, device=sample.device).reshape(-1).expand(sample.shape[0])
        return embedding(self.time_proj(value).to(sample.dtype))

    def _cross_context(
        self, tokens: torch.Tensor, frames: int, cache: ContextCache | None
    ) -> CrossContext:
        """Split text from image tokens, and the image tokens among the frames if they differ."""
        num_text, per_frame = self.config.num_text_tokens, self.config.num_image_tokens
        text, image = tokens[:, :num_text], tokens[:, num_text:]
        if image.shape[1] == per_frame * frames:
            image = image.unflatten(1, (frames, per_frame)).flatten(0, 1)
        elif image.shape[1] != per_frame:
            raise ShapeError(
                f"`encoder_hidden_states` has {tokens.shape[1]} tokens: {num_text} of text leave "
                f"{image.shape[1]} of the image; for {frames} frames the model takes "
                f"{per_frame * frames} ({per_frame} a frame) or {per_frame} (shared).",
                fix="Run the image projector with the same number of frames as the sample.",
            )
        return CrossContext(text, image, cache)

    def _temporal_context(self, context: CrossContext, frames: int) -> torch.Tensor | None:
        adapter = self.temporal_adapter
        if adapter is None:
            return None
        return context.once(adapter, lambda: (adapter(context.text, frames),))[0]

    def _check_sample(self, sample: torch.Tensor) -> None:
        multiple = 2 ** len(self.downsamplers)
        fits = (
            sample.ndim == 5
            and sample.shape[1] == self.config.in_channels
            and sample.shape[3] % multiple == 0
            and sample.shape[4] % multiple == 0
        )
        if not fits:
            raise ShapeError(
                f"The sample has shape {list(sample.shape)}; expected [batch, "
                f"{self.config.in_channels}, frames, height, width] with height and width "
                f"divisible by {multiple}",
                fix="Concatenate noisy and image latents on dim 1 and choose an image size that "
                "divides.",
            )

    def _check_temporal_context(
        self, context: torch.Tensor | None, batch: int, frames: int
    ) -> None:
        if context is None:
            return
        dim = self.config.temporal_context_dim
        if dim is None:
            raise ShapeError(
                "`temporal_context` was given, but this U-Net has no temporal adapter.",
                fix="Call `unet.add_temporal_adapter()` first, or leave it out.",
            )
        if list(context.shape) != [batch, frames, dim]:
            raise ShapeError(
                f"`temporal_context` has shape {list(context.shape)}, expected "
                f"{[batch, frames, dim]}",
                fix="Make it with `unet.temporal_adapter(text, num_frames)`.",
            )
