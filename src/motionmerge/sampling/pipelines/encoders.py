"""What a pipeline's text encoder and autoencoder make of prompts and images, and of latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline

from motionmerge.errors import ConfigError
from motionmerge.memory import return_freed_memory
from motionmerge.models.dynamicrafter.encoders import tokenize_prompts
from motionmerge.models.group_offload import OffloadedPipeline
from motionmerge.sampling.pipelines.encoded import Conditions
from motionmerge.sampling.pipelines.inputs import (
    NUM_FRAMES,
    ImageInput,
    check_num_frames,
    check_tokens,
    prepare_image,
    prompts_of,
    repeated,
)

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ModelMixin, SchedulerMixin
    from transformers import CLIPTextModel, CLIPTokenizer


class EncodingPipeline(OffloadedPipeline, DiffusionPipeline):  # type: ignore[misc]  # diffusers is untyped here
    """The half of a pipeline that runs before a video is made, and after.

    The methods `encode_prompt`, `encode_image_latents`, `decode_latents` and `_conditions` are all
    that knows about the encoders; a model with other encoders overrides them.
    """

    # diffusers registers these at run time.
    unet: ModelMixin
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: SchedulerMixin

    _encoders: tuple[str, ...] = ("text_encoder",)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels for each latent pixel, on an axis."""
        stages: Sequence[int] = self.vae.config.block_out_channels
        factor: int = 2 ** (len(stages) - 1)
        return factor

    @property
    def size_multiple(self) -> int:
        """What height and width in pixels must divide by: the VAE's and the U-Net's factors."""
        stages: Sequence[int] = self.unet.config.block_out_channels
        multiple: int = self.vae_scale_factor * 2 ** (len(stages) - 1)
        return multiple

    def encode_prompt(self, prompt: str | Sequence[str]) -> torch.Tensor:
        """Turn prompts into text tokens `[batch, tokens, dim]`; too long ones are cut."""
        tokens = tokenize_prompts(self.tokenizer, prompts_of(prompt))
        states: torch.Tensor = self.text_encoder(
            tokens.to(self._execution_device)
        ).last_hidden_state
        return states

    def encode_image_latents(self, image: torch.Tensor, num_frames: int) -> torch.Tensor:
        """Turn images `[batch, 3, height, width]` in [-1, 1] into latents of a still video.

        Each image is encoded once (the mean of the VAE's posterior) and shown to every frame.

        Returns:
            `[batch, channels, frames, height, width]`.
        """
        posterior = self.vae.encode(image.to(self.vae.dtype)).latent_dist
        latents: torch.Tensor = posterior.mode() * self.vae.config.scaling_factor
        return latents.unsqueeze(2).expand(-1, -1, num_frames, -1, -1)

    def decode_latents(self, latents: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Turn latents `[batch, channels, frames, height, width]` into video, frame by frame.

        Args:
            latents: What the loop ended with.
            image: The images that were animated, `[batch, 3, height, width]` in [-1, 1]; for
                models whose decoder looks at them. This one does not.

        Returns:
            `[batch, frames, 3, height, width]` in [0, 1].
        """
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        frames = [self.vae.decode(frame).sample for frame in latents.unbind(2)]
        return (torch.stack(frames, dim=1).float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(
        self,
        image: ImageInput,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int = NUM_FRAMES,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        guided: bool = True,
        **own: Any,
    ) -> Conditions:
        """Run the encoders alone: once for any number of videos, after which they may be freed.

            conditions = pipeline.encode(photo, "a cat jumps")
            pipeline.free_encoders()
            video = pipeline(conditions=conditions).frames

        Args:
            image, prompt, negative_prompt, height, width, num_frames, prompt_embeds,
                negative_prompt_embeds: As for a call of the pipeline.
            guided: Also encode the unconditional half, which guidance needs.
            own: What only some pipelines encode: `last_image`, `image_embeds`, `image_latents`.

        Raises:
            ShapeError: Sizes or batches do not fit together, or a tensor is not float in [0, 1].
            DataError: An image cannot be read.
            ConfigError: A setting is out of range, or an encoder was freed.
        """
        check_num_frames(num_frames)
        pixels = prepare_image(
            image,
            height=height,
            width=width,
            default_size=(self.config.height, self.config.width),
            multiple=self.size_multiple,
        ).to(self._execution_device)
        texts = self._text_tokens(prompt, prompt_embeds, name="prompt")
        pairs = max(len(pixels), len(texts))
        pixels = repeated(pixels, pairs, name="images")
        negatives = None
        if guided:
            negatives = self._text_tokens(
                negative_prompt, negative_prompt_embeds, name="negative_prompt"
            )
            negatives = repeated(negatives, pairs, name="negative prompts")
        texts = repeated(texts, pairs, name="prompts")
        return self._conditions(pixels, texts, negatives, num_frames=num_frames, **own)

    def _conditions(
        self,
        pixels: torch.Tensor,
        texts: torch.Tensor,
        negatives: torch.Tensor | None,
        *,
        num_frames: int,
    ) -> Conditions:
        """Encode images; `negatives` are None for videos without guidance."""
        latents = self.encode_image_latents(pixels, num_frames).float()
        return Conditions(
            pixels=pixels, image_latents=latents, texts=texts, negative_texts=negatives
        )

    def free_encoders(self) -> None:
        """Drop text and image encoders, four tenths of DynamiCrafter's weights.

        What `encode` gave makes videos as before; a prompt or an image is then refused.
        """
        self.register_modules(**dict.fromkeys(self._encoders))
        self.maybe_free_model_hooks()  # which hold on to what they move
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return_freed_memory()

    def _encoded(self, conditions: Conditions | None, *, guided: bool, **given: Any) -> Conditions:
        """Encode what a call was given, or take the conditions that stand for it."""
        given = {name: value for name, value in given.items() if value is not None}
        if conditions is not None:
            if given:
                raise ConfigError(
                    f"{', '.join(given)} and conditions were both given.",
                    fix="Leave out what `encode` was given already.",
                )
            return conditions
        if "image" not in given:
            raise ConfigError(
                "There is no image to animate.", fix="Pass one, or conditions of `encode`."
            )
        return self.encode(**given, guided=guided)

    def _require(self, encoder: str, instead: str) -> None:
        if getattr(self, encoder) is None:
            raise ConfigError(
                f"The pipeline has no {encoder} any more.",
                fix=f"Pass conditions that `encode` gave before, or {instead}; or load it again.",
            )

    def _text_tokens(
        self, prompt: str | Sequence[str] | None, embeds: torch.Tensor | None, *, name: str
    ) -> torch.Tensor:
        """Encode prompts, or take their embeddings: `[prompts, tokens, dim]`."""
        if embeds is None:
            self._require("text_encoder", f"{name}_embeds")
            return self.encode_prompt(prompt or "")
        if prompt is not None:
            raise ConfigError(f"Both {name} and {name}_embeds were given.", fix="Pass one of them.")
        check_tokens(embeds, self._text_shape(embeds), name=f"{name}_embeds")
        return embeds.to(self._execution_device)

    def _text_shape(self, embeds: torch.Tensor) -> tuple[int, int]:
        """Return how many text tokens the U-Net reads, and how wide they are."""
        return embeds.shape[1], self.unet.config.cross_attention_dim
