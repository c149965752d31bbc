"""What the frozen parts of a model make of a view of a clip, before or while a model is trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch

from motionmerge.io.decoding import Picture
from motionmerge.models.dynamicrafter.encoders import preprocess_clip_image, tokenize_prompts
from motionmerge.sampling.pipelines.dynamicrafter import DynamiCrafterPipeline

from .denoisers.clean_latents import LatentScale, latent_scale
from .latents_cache import frame_moments, pixels_of
from .run_state import weights_hash
from .views import ClipView, own_frame_stride, whole_frame_rate

_MORE = "more."
"""Begins the names of what is kept of `EncodedView.more`."""


class EncodedView(NamedTuple):
    """What is kept of a view.

    Args:
        moments: Of the autoencoder's posterior, `[frames of latents, 2 * channels, height, width]`.
        prompt_embeds: Tokens of the caption, `[tokens, dim]`.
        image_embeds: Tokens of the image tower, of each frame that may be the condition,
            `[condition frames, tokens, dim]`.
        shown: The image's latents as the model's own pipeline lays them out, `[channels, frames,
            height, width]`; None where they are taken from those of the clip.
        more: What else the network is told, see `DenoiserCondition`, without the batch.
    """

    moments: torch.Tensor
    prompt_embeds: torch.Tensor
    image_embeds: torch.Tensor
    shown: torch.Tensor | None = None
    more: Mapping[str, torch.Tensor] = MappingProxyType({})

    def tensors(self) -> dict[str, torch.Tensor]:
        """List all tensors by name, for a file."""
        own = {name: value for name, value in self._asdict().items() if name != "more"}
        more = {f"{_MORE}{name}": value for name, value in self.more.items()}
        return {name: value for name, value in {**own, **more}.items() if value is not None}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> EncodedView:
        """Return what `tensors` listed."""
        own = {name: value for name, value in tensors.items() if not name.startswith(_MORE)}
        more = {
            name.removeprefix(_MORE): value
            for name, value in tensors.items()
            if name.startswith(_MORE)
        }
        return cls(**own, more=more)


class Blanks(NamedTuple):
    """What stands for a dropped caption or image.

    Args:
        prompt_embeds: For the caption, `[tokens, dim]`.
        image_embeds: For the image, `[tokens, dim]`.
        more: For the caption, in place of the view's own; None to keep that.
        shown: For the image's latents, broadcast; None to keep them.
    """

    prompt_embeds: torch.Tensor
    image_embeds: torch.Tensor
    more: Mapping[str, torch.Tensor] | None = None
    shown: torch.Tensor | None = None


class ClipEncoder(Protocol):
    """The frozen parts of a model."""

    @property
    def made_with(self) -> Mapping[str, str]:
        """Hashes and settings of all that decides what is made."""
        ...

    def to(self, device: torch.device) -> None:
        """Move the parts."""
        ...

    def encode(
        self, view: ClipView, frames: Picture, *, condition_frames: Sequence[int]
    ) -> EncodedView:
        """Encode a view and its frames `[frames, height, width, 3]`, without gradients."""
        ...

    def blanks(self) -> Blanks:
        """Encode the empty caption and the grey image."""
        ...

    @property
    def rate_of(self) -> Callable[[ClipView], float]:
        """What returns what the denoiser is told of a view's rate; it pickles."""
        ...

    @property
    def latent_scale(self) -> LatentScale:
        """How the denoiser's latents are made of the autoencoder's."""
        ...

    @property
    def token_shape(self) -> tuple[int, int]:
        """Number and width of the image tokens, as the denoiser reads them."""
        ...


def is_told_strides(scheduler: Any) -> bool:
    """Check whether a DynamiCrafter with this scheduler is told frame strides instead of rates."""
    # Of the official weights the 256 model alone predicts the noise; it is told strides.
    told: bool = scheduler.config.prediction_type == "epsilon"
    return told


class DynamiCrafterEncoder:
    """DynamiCrafter's autoencoder, text tower and image tower.

    Args:
        pipeline: Supplies them; it may be freed afterwards.
    """

    def __init__(self, pipeline: DynamiCrafterPipeline) -> None:
        self.vae, self.tokenizer = pipeline.vae, pipeline.tokenizer
        self.text_encoder, self.image_encoder = pipeline.text_encoder, pipeline.image_encoder
        projector = pipeline.image_projector.config
        self.token_shape = (projector.num_queries * projector.num_frames, projector.output_dims)
        self._is_told_strides = is_told_strides(pipeline.scheduler)

    @property
    def made_with(self) -> Mapping[str, str]:
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return {
            "vae": weights_hash(self.vae),
            "text_encoder": weights_hash(self.text_encoder),
            "image_encoder": weights_hash(self.image_encoder),
            "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        }

    def to(self, device: torch.device) -> None:
        for part in (self.vae, self.text_encoder, self.image_encoder):
            part.to(device)

    @torch.no_grad()
    def encode(
        self, view: ClipView, frames: Picture, *, condition_frames: Sequence[int]
    ) -> EncodedView:
        pixels = pixels_of(frames[list(condition_frames)])
        # One by one, as the autoencoder's: a batch of another length may round differently.
        states = torch.cat([self._image_embeds(one[None]) for one in pixels])
        text = self._prompt_embeds(view.shot.clip.caption)
        return EncodedView(frame_moments(self.vae, frames), text, states)

    @torch.no_grad()
    def blanks(self) -> Blanks:
        # What is dropped is what the tower sees, not what it answers.
        return Blanks(self._prompt_embeds(""), self._image_embeds(torch.zeros(1, 3, 32, 32))[0])

    @property
    def rate_of(self) -> Callable[[ClipView], float]:
        return own_frame_stride if self._is_told_strides else whole_frame_rate

    @property
    def latent_scale(self) -> LatentScale:
        return latent_scale(self.vae)

    def _prompt_embeds(self, caption: str) -> torch.Tensor:
        ids = tokenize_prompts(self.tokenizer, [caption]).to(self.text_encoder.device)
        tokens: torch.Tensor = self.text_encoder(ids).last_hidden_state[0]
        return tokens.cpu()

    def _image_embeds(self, pixels: torch.Tensor) -> torch.Tensor:
        tower = self.image_encoder
        pixels = pixels.to(tower.device, tower.dtype)
        seen = preprocess_clip_image(pixels, size=tower.config.image_size)
        tokens: torch.Tensor = tower(seen.to(tower.dtype)).last_hidden_state
        return tokens.cpu()
