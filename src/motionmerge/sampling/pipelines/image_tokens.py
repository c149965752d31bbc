"""What DynamiCrafter's image tower makes of photos, and each expert's projector of that."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from motionmerge.errors import ConfigError, ShapeError
from motionmerge.models.dynamicrafter.encoders import preprocess_clip_image
from motionmerge.sampling.pipelines.encoded import Conditions
from motionmerge.sampling.pipelines.inputs import (
    ImageInput,
    check_tokens,
    prepare_image,
    repeated,
)
from motionmerge.sampling.pipelines.loop import DenoisingPipeline
from motionmerge.switching.expert_bank import attached_bank

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

    from motionmerge.models.dynamicrafter.image_projector import ImageProjector
    from motionmerge.models.dynamicrafter.unet import DynamiCrafterUNet

_WIDTHS = (
    (("text_encoder", "hidden_size"), ("unet", "cross_attention_dim")),
    (("image_encoder", "hidden_size"), ("image_projector", "embed_dims")),
    (("image_projector", "output_dims"), ("unet", "cross_attention_dim")),
    (("vae", "latent_channels"), ("unet", "out_channels")),
)
"""What a part makes, and what the part that reads it expects."""


class ImageTokenPipeline(DenoisingPipeline):
    """A pipeline whose U-Net reads image tokens besides text.

    `encode_image` is all that knows about the image tower; a model with another one overrides it.
    """

    unet: DynamiCrafterUNet
    image_encoder: CLIPVisionModel
    image_projector: ImageProjector

    _encoders = ("text_encoder", "image_encoder")

    def _check_parts_fit(self) -> None:
        """Refuse parts of different models; one that is missing, or says no width, fits.

        Raises:
            ShapeError: One part makes vectors of another width than the next one reads.
        """
        for (maker, made), (reader, read) in _WIDTHS:
            widths = [
                getattr(getattr(getattr(self, part), "config", None), width, None)
                for part, width in ((maker, made), (reader, read))
            ]
            if None not in widths and widths[0] != widths[1]:
                raise ShapeError(
                    f"The {maker}'s `{made}` is {widths[0]}, the {reader}'s `{read}` {widths[1]}: "
                    "they are parts of different models.",
                    fix=f"Take the {maker} that the {reader} was trained with.",
                )

    def encode_image_tokens(self, image: torch.Tensor, num_frames: int) -> torch.Tensor:
        """Turn images `[batch, 3, height, width]` in [-1, 1] into image tokens.

        Returns:
            `[batch, tokens, dim]`, a set of tokens for each frame, or one for all of them.

        Raises:
            ShapeError: The projector has tokens for another number of frames.
        """
        return self._project(self.encode_image(image, num_frames))

    def encode_image(self, image: torch.Tensor, num_frames: int) -> torch.Tensor:
        """Encode images `[batch, 3, height, width]` in [-1, 1] by the image tower.

        The tower is frozen: what it sees is the same for all experts, whose projectors differ.

        Returns:
            `[batch, patches, dim]`, what the image projector reads.

        Raises:
            ShapeError: The projector has tokens for another number of frames.
        """
        own_frames = self.image_projector.config.num_frames
        if own_frames not in (1, num_frames):
            raise ShapeError(
                f"`num_frames` is {num_frames}; the image projector has tokens for {own_frames}.",
                fix=f"Pass num_frames={own_frames}.",
            )
        pixels = preprocess_clip_image(image, size=self.image_encoder.config.image_size)
        states: torch.Tensor = self.image_encoder(
            pixels.to(self.image_encoder.dtype)
        ).last_hidden_state
        return states

    def _project(self, states: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = self.image_projector(states.to(self.image_projector.dtype))
        return tokens

    def _conditions(
        self,
        pixels: torch.Tensor,
        texts: torch.Tensor,
        negatives: torch.Tensor | None,
        *,
        num_frames: int,
        last_image: ImageInput | None = None,
        image_embeds: torch.Tensor | None = None,
    ) -> Conditions:
        image_latents = self._image_latents(pixels, last_image, num_frames)
        guided = negatives is not None
        if image_embeds is None or guided:
            self._require("image_encoder", "image_embeds")
        states = self.encode_image(pixels, num_frames) if image_embeds is None else None
        grey = self.encode_image(torch.zeros_like(pixels[:1]), num_frames) if guided else None
        return Conditions(
            pixels=pixels,
            image_latents=image_latents,
            texts=texts,
            negative_texts=negatives,
            image_states=states,
            grey_states=grey,
            image_tokens=None if image_embeds is None else image_embeds.to(pixels.device),
        )

    def _text_shape(self, embeds: torch.Tensor) -> tuple[int, int]:
        return self.unet.config.num_text_tokens, self.unet.config.cross_attention_dim

    def _image_tokens(
        self, conditions: Conditions, *, guided: bool
    ) -> dict[str | None, torch.Tensor]:
        """Project what the image encoder saw: the images, and a grey one before each for guidance.

        Returns:
            `[pairs, 1 or 2, tokens, dim]` for each expert if their projectors differ, else for
            None.
        """
        pairs = len(conditions.pixels)

        def project() -> torch.Tensor:
            tokens, states = conditions.image_tokens, conditions.image_states
            if states is not None:
                tokens = self._project(states)
            assert tokens is not None
            tokens = repeated(tokens, pairs, name="image_embeds")
            if not guided or conditions.grey_states is None:
                return tokens[:, None]
            grey = self._project(conditions.grey_states)
            check_tokens(tokens, tuple(grey.shape[1:]), name="image_embeds")
            return torch.stack([grey.to(tokens).expand_as(tokens), tokens], dim=1)

        bank = attached_bank(self.unet)
        if bank is None or not bank.switches("image_projector"):
            return {None: project()}
        encoded: dict[str | None, torch.Tensor] = {}
        for expert in bank.experts:
            with bank.with_expert(expert, modules=["image_projector"]):
                encoded[expert] = project()
        return encoded

    def _image_latents(
        self, pixels: torch.Tensor, last_image: ImageInput | None, num_frames: int
    ) -> torch.Tensor:
        """Return every frame's conditioning latents: all of one image, or two ends and zeros.

        Source: official `inference.py`, `--loop` and `--interp`.
        """
        if last_image is None:
            return self.encode_image_latents(pixels, num_frames).float()
        if num_frames < 2:
            raise ConfigError(
                f"`num_frames` is {num_frames}; a video with a last image has at least 2.",
                fix="Ask for more frames, or leave last_image out.",
            )
        height, width = pixels.shape[-2:]
        last = prepare_image(
            last_image,
            height=height,
            width=width,
            default_size=(height, width),
            multiple=self.size_multiple,
        ).to(pixels)
        last = repeated(last, len(pixels), name="last images")
        start, end = (self.encode_image_latents(one, 1).float() for one in (pixels, last))
        between = start.new_zeros(1).expand(*start.shape[:2], num_frames - 2, *start.shape[3:])
        return torch.cat([start, between, end], dim=2)
