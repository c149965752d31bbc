"""SVD's and I2VGen-XL's U-Nets with DynamiCrafter's text-to-temporal adapter.

The first block of every temporal transformer gets a `fusion` layer, which mixes one context token a
frame into what it attends to; `temporal_adapter` makes the tokens of the prompt. Both start as the
identity. SVD has no text of its own: it is handed text tokens, see `SvdAdapterUNet`.

Paper: Tian et al. 2025 (arXiv 2503.00948), stage 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

# diffusers loads a class of a module that is not its own where it finds `ModelMixin` beside it.
from diffusers import I2VGenXLUNet, ModelMixin, UNetSpatioTemporalConditionModel
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from diffusers.models.transformers.transformer_temporal import (
    TransformerSpatioTemporalModel,
    TransformerTemporalModel,
)

from motionmerge.errors import CheckpointError, ConfigError, ShapeError
from motionmerge.models.group_offload import OffloadedNetwork

from .dynamicrafter.adapter import TemporalFusion, TextToTemporalAdapter

_SETTING = "text_adapter"
"""What the adapter's shape is called in a configuration."""


class FusedTemporalBlock(TemporalBasicTransformerBlock):
    """SVD's block over time, after a fusion layer. A block becomes one by its class."""

    fusion: TemporalFusion
    context: torch.Tensor

    def forward(
        self,
        hidden_states: torch.Tensor,
        num_frames: int,
        encoder_hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Fuse and attend, `[batch * frames, pixels, dim]`."""
        video = hidden_states.unflatten(0, (-1, num_frames)).transpose(1, 2)
        fused = self.fusion(video.flatten(0, 1), self.context).unflatten(0, video.shape[:2])
        mixed: torch.Tensor = super().forward(
            fused.transpose(1, 2).flatten(0, 1), num_frames, encoder_hidden_states
        )
        return mixed


class FusedFramesBlock(BasicTransformerBlock):
    """I2VGen-XL's block over time, after a fusion layer. A block becomes one by its class."""

    fusion: TemporalFusion
    context: torch.Tensor

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Fuse and attend, `[batch * pixels, frames, dim]`."""
        fused = self.fusion(hidden_states, self.context)
        attended: torch.Tensor = super().forward(fused, *args, **kwargs)
        return attended


class _AdaptedUNet(OffloadedNetwork, PeftAdapterMixin):  # type: ignore[misc]  # diffusers is untyped here
    """What both U-Nets share: they are built with their adapter, and show the prompt to it."""

    temporal_adapter: TextToTemporalAdapter

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Build the U-Net of a configuration, the adapter included.

        Raises:
            CheckpointError: The configuration does not have the adapter's shape.
        """
        own = dict(config)
        shape = own.pop(_SETTING, None)
        if not isinstance(shape, Mapping):
            raise CheckpointError(
                f"The configuration of a {cls.__name__} has no `{_SETTING}`.",
                fix="Download it again.",
            )
        base: Any = super()
        made = base.from_config(own, return_unused_kwargs=return_unused_kwargs, **kwargs)
        _build(made[0] if isinstance(made, tuple) else made, shape, generator=None)
        return made

    def _show(self, text: torch.Tensor, *, videos: int, frames: int) -> None:
        if len(text) != videos:
            raise ShapeError(
                f"There are text tokens of {len(text)} prompts, and {videos} videos.",
                fix="Pass one prompt a video, and with guidance one more each.",
            )
        context = self.temporal_adapter(text, frames)
        module: Any = self
        for block in module.modules():
            if isinstance(block, FusedTemporalBlock | FusedFramesBlock):
                block.context = context


class SvdAdapterUNet(_AdaptedUNet, UNetSpatioTemporalConditionModel):
    """SVD's U-Net with the adapter.

    Attributes:
        text_tokens: Shown to the adapter where a call has none: the pipeline does not know text.
    """

    text_tokens: torch.Tensor | None = None

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        added_time_ids: torch.Tensor,
        return_dict: bool = True,
        *,
        text: torch.Tensor | None = None,
    ) -> Any:
        """Run the network once.

        Args:
            sample, timestep, encoder_hidden_states, added_time_ids, return_dict: As SVD's.
            text: Text tokens, `[batch, tokens, dim]`; by default `text_tokens`.

        Raises:
            ConfigError: There are no text tokens.
            ShapeError: They are not of as many prompts as there are videos.
        """
        text = self.text_tokens if text is None else text
        if text is None:
            raise ConfigError(
                "This SVD has a text-to-temporal adapter, and there is no prompt for it.",
                fix="Make videos with `SvdAdapterPipeline`, or set `unet.text_tokens`.",
            )
        self._show(text, videos=len(sample), frames=sample.shape[1])
        return super().forward(sample, timestep, encoder_hidden_states, added_time_ids, return_dict)


class I2VGenXLAdapterUNet(_AdaptedUNet, I2VGenXLUNet):
    """I2VGen-XL's U-Net with the adapter, which reads the prompt that the U-Net is given."""

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        fps: torch.Tensor,
        image_latents: torch.Tensor,
        image_embeddings: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Run the network once.

        Raises:
            ConfigError: There are no text tokens (`encoder_hidden_states`).
            ShapeError: They are not of as many prompts as there are videos.
        """
        if encoder_hidden_states is None:
            raise ConfigError(
                "This I2VGen-XL has a text-to-temporal adapter, and there is no prompt for it.",
                fix="Pass `encoder_hidden_states`.",
            )
        self._show(encoder_hidden_states, videos=len(sample), frames=sample.shape[2])
        return super().forward(
            sample,
            timestep,
            fps,
            image_latents,
            image_embeddings,
            encoder_hidden_states,
            **options,
        )


_ADAPTED: Mapping[type[ModelMixin], type[ModelMixin]] = {
    UNetSpatioTemporalConditionModel: SvdAdapterUNet,
    I2VGenXLUNet: I2VGenXLAdapterUNet,
}


def add_text_adapter(
    unet: ModelMixin,
    *,
    text_dim: int,
    context_dim: int | None = None,
    num_frames: int = 16,
    num_heads: int = 8,
    head_dim: int = 128,
    seed: int = 0,
) -> None:
    """Add a text-to-temporal adapter to SVD's or I2VGen-XL's U-Net, in place.

    The output does not change by this; training the adapter changes it. The U-Net becomes a
    `SvdAdapterUNet` or `I2VGenXLAdapterUNet`, which is saved and loaded with the adapter; register
    it with its pipeline again, so that this is saved as well.

    Args:
        unet: It keeps its parameters.
        text_dim: Width of the text tokens.
        context_dim: Width of the temporal context; by default `text_dim`.
        num_frames: Learned queries; other numbers of frames are interpolated.
        num_heads, head_dim: Shape of the adapter's attention.
        seed: Seeds the q-former's initial weights.

    Raises:
        ConfigError: The U-Net is of another class, or has an adapter already.
    """
    if type(unet) not in _ADAPTED:
        raise ConfigError(
            f"No text-to-temporal adapter can be added to a {type(unet).__name__}.",
            fix="Pass the U-Net of SVD or I2VGen-XL, without an adapter; DynamiCrafter's has a "
            "method for it.",
        )
    shape = {
        "text_dim": text_dim,
        "context_dim": context_dim or text_dim,
        "num_frames": num_frames,
        "num_heads": num_heads,
        "head_dim": head_dim,
    }
    unet.__class__ = _ADAPTED[type(unet)]
    _build(unet, shape, generator=torch.Generator().manual_seed(seed))


def _build(unet: Any, shape: Mapping[str, int], *, generator: torch.Generator | None) -> None:
    unet.register_to_config(**{_SETTING: dict(shape)})
    like = unet.conv_in.weight
    adapter = TextToTemporalAdapter(
        shape["text_dim"],
        context_dim=shape["context_dim"],
        num_frames=shape["num_frames"],
        num_heads=shape["num_heads"],
        head_dim=shape["head_dim"],
        generator=generator,
    )
    unet.temporal_adapter = adapter.to(like)
    for module in list(unet.modules()):
        block: Any
        if isinstance(module, TransformerSpatioTemporalModel):
            block = module.temporal_transformer_blocks[0]
            block.__class__, width = FusedTemporalBlock, block.norm_in.normalized_shape[0]
        elif isinstance(module, TransformerTemporalModel):
            block = module.transformer_blocks[0]
            block.__class__, width = FusedFramesBlock, block.norm1.normalized_shape[0]
        else:
            continue
        block.fusion = TemporalFusion(width, shape["context_dim"]).to(like)
