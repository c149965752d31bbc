"""The U-Net of ConsistI2V, built from diffusers' leaf classes under official names.

Equals the official `VideoLDMUNet3DConditionModel` (Ren et al. 2024, arXiv 2402.04324), whose files
it reads as they are; 104 tensors in them do nothing and are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_3d_condition import UNet3DConditionOutput
from torch import nn
from torch.nn import functional as F

from motionmerge.errors import ShapeError
from motionmerge.models.dynamicrafter.cross_attention import ContextCache, NativeAttentionMixin
from motionmerge.models.dynamicrafter.fast_layers import use_fast_layers
from motionmerge.models.group_offload import OffloadedNetwork

from .attention import TextTokens
from .blocks import BlockSettings, DownBlock, StagesBlock, UpBlock
from .settings import arguments_of, check_settings


class ConsistI2VUNet(
    OffloadedNetwork,
    NativeAttentionMixin,
    ModelMixin,
    ConfigMixin,
    AttentionMixin,
    PeftAdapterMixin,
):
    """Predict the noise of a video's frames from its clean first frame and a prompt.

    The defaults are those of the released model; settings that all of its kind share are accepted
    and checked, so that its `config.json` is read as it is.

    Args:
        sample_size, n_frames: Of the videos that it was trained on; others work too.
        in_channels, out_channels: Latent channels.
        down_block_types, up_block_types: Which levels have attention; Stable Diffusion's names.
        block_out_channels: Width of each level.
        layers_per_block: Residual blocks a level on the way down; one more on the way up.
        cross_attention_dim: Width of text tokens.
        attention_head_dim: Number of spatial heads at each level, in spite of its name.
        n_temp_heads: Number of temporal heads at every level.
        norm_num_groups, norm_eps: Of group norms, except temporal convolutions'.
        use_linear_projection, use_temporal, first_frame_condition_mode,
            augment_temporal_attention, temp_pos_embedding, use_frame_stride_condition: See
            `settings`.

    Raises:
        ConfigError: A setting is none of this model's.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("StagesBlock", "DownBlock", "UpBlock")
    _repeated_blocks = ("BasicTransformerBlock",)
    _keys_to_ignore_on_load_unexpected = (
        r"\.rotary_bias\.",
        r"\.rotary_emb\.freqs$",
        r"conv3ds\.\d+\.time_emb_proj\.",
    )

    @register_to_config
    def __init__(
        self,
        sample_size: int | None = 64,
        in_channels: int = 4,
        out_channels: int = 4,
        down_block_types: Sequence[str] = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        up_block_types: Sequence[str] = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        cross_attention_dim: int = 1024,
        attention_head_dim: int | Sequence[int] = (5, 10, 20, 20),
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        n_frames: int = 16,
        n_temp_heads: int = 8,
        use_linear_projection: bool = True,
        use_temporal: bool = True,
        first_frame_condition_mode: str = "concat",
        augment_temporal_attention: bool = True,
        temp_pos_embedding: str = "rotary",
        use_frame_stride_condition: bool = True,
    ) -> None:
        super().__init__()
        check_settings(
            use_linear_projection=use_linear_projection,
            use_temporal=use_temporal,
            first_frame_condition_mode=first_frame_condition_mode,
            augment_temporal_attention=augment_temporal_attention,
            temp_pos_embedding=temp_pos_embedding,
            use_frame_stride_condition=use_frame_stride_condition,
        )
        attends, heads = arguments_of(
            down_block_types, up_block_types, block_out_channels, attention_head_dim
        )
        widths = list(block_out_channels)
        settings = BlockSettings(
            time_embed_dim=4 * widths[0],
            cross_attention_dim=cross_attention_dim,
            num_temporal_heads=n_temp_heads,
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
        )
        self.time_proj = Timesteps(widths[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(widths[0], settings.time_embed_dim)
        self.frame_stride_embedding = TimestepEmbedding(widths[0], settings.time_embed_dim)
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)

        last, width, skips = len(widths) - 1, widths[0], [widths[0]]
        self.down_blocks = nn.ModuleList()
        for level, own in enumerate(widths):
            stages = [(width if n == 0 else own, own) for n in range(layers_per_block)]
            kind = {"num_heads": heads[level] if attends[level] else None, "settings": settings}
            self.down_blocks.append(DownBlock(stages, resamples=level < last, **kind))
            skips += [own] * (layers_per_block + (level < last))
            width = own
        self.mid_block = StagesBlock(
            [(width, width)] * 2,
            num_heads=heads[-1],
            settings=settings,
            num_attentions=1,
            is_temporal=False,
        )
        self.up_blocks = nn.ModuleList()
        for level in range(last, -1, -1):
            stages, own = [], widths[level]
            for _ in range(layers_per_block + 1):
                stages.append((width + skips.pop(), own))
                width = own
            kind = {"num_heads": heads[level] if attends[level] else None, "settings": settings}
            self.up_blocks.append(UpBlock(stages, resamples=level > 0, **kind))
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, width, eps=norm_eps)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        use_fast_layers(self)
        self.register_load_state_dict_pre_hook(_drop_tensors_without_effect)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **options: Any) -> Any:
        """Build the network from a configuration, ours or that of the hub's folder.

        Raises:
            ConfigError: It asks for something that this network has not.
        """
        return super().from_config(check_settings(**config), **options)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        frame_stride: torch.Tensor | float,
        first_frame_latents: torch.Tensor | None = None,
        return_dict: bool = True,
        *,
        context_cache: ContextCache | None = None,
    ) -> UNet3DConditionOutput | tuple[torch.Tensor]:
        """Run the network once.

        Args:
            sample: Noisy latents of frames 1 and later, `[videos, channels, frames, height,
                width]`; height and width divide by 2 to the power of (levels - 1).
            timestep: `[videos]` or one number, the scheduler's own value.
            encoder_hidden_states: Text tokens, `[videos, tokens, cross_attention_dim]`.
            frame_stride: Frames of the training videos between two of this one, `[videos]` or one
                number; 1 to 5 were trained, and larger means more motion.
            first_frame_latents: Clean latents of frame 0, `[videos, channels, 1, height, width]`;
                None if they stand before the noisy ones in `sample`.
            return_dict: Whether to wrap the result.
            context_cache: Keeps what depends on the text and the weights alone, for the next call
                with the same ones.

        Returns:
            The noise of frames 1 and later, as `.sample` or as a one-tuple.

        Raises:
            ShapeError: The latents do not fit.
        """
        if first_frame_latents is not None:
            self._check_first_frame(sample, first_frame_latents)
            sample = torch.cat([first_frame_latents.to(sample), sample], dim=2)
        self._check_sample(sample)
        videos, _, frames, _, _ = sample.shape
        embedding = self._embed(timestep, self.time_embedding, sample)
        embedding = embedding + self._embed(frame_stride, self.frame_stride_embedding, sample)
        embedding = embedding.repeat_interleave(frames, 0)
        inputs = embedding, TextTokens(encoder_hidden_states, context_cache), frames

        x = self.conv_in(sample.transpose(1, 2).flatten(0, 1))
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, *inputs)
            skips += more
        x = self.mid_block(x, *inputs)
        for block in self.up_blocks:
            own = self.config.layers_per_block + 1
            x = block(x, skips[-own:], *inputs)
            del skips[-own:]
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        x = x.unflatten(0, (videos, frames)).transpose(1, 2)[:, :, 1:]
        return UNet3DConditionOutput(sample=x) if return_dict else (x,)

    def _embed(
        self, value: torch.Tensor | float, embedding: nn.Module, sample: torch.Tensor
    ) -> torch.Tensor:
        value = torch.as_tensor(value, device=sample.device).reshape(-1).expand(sample.shape[0])
        return embedding(self.time_proj(value).to(sample.dtype))

    def _check_first_frame(self, sample: torch.Tensor, first: torch.Tensor) -> None:
        expected = (*sample.shape[:2], 1, *sample.shape[3:])
        if tuple(first.shape) != expected:
            raise ShapeError(
                f"`first_frame_latents` has shape {list(first.shape)}; expected {list(expected)}.",
                fix="Pass the clean latents of one frame of each video.",
            )

    def _check_sample(self, sample: torch.Tensor) -> None:
        multiple = 2 ** (len(self.down_blocks) - 1)
        fits = (
            sample.ndim == 5
            and sample.shape[1] == self.config.in_channels
            and sample.shape[2] > 1
            and all(side % multiple == 0 for side in sample.shape[3:])
        )
        if not fits:
            raise ShapeError(
                f"The latents have shape {list(sample.shape)} with the first frame; expected "
                f"[videos, {self.config.in_channels}, 2 or more frames, height, width] with height "
                f"and width divisible by {multiple}.",
                fix="Choose an image size that divides, and at least 2 frames.",
            )


def _drop_tensors_without_effect(
    module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: Any
) -> None:
    """Leave out of official weights what the network has no use for."""
    patterns = ConsistI2VUNet._keys_to_ignore_on_load_unexpected
    for name in [name for name in state if any(re.search(one, name) for one in patterns)]:
        del state[name]
