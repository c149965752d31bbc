"""What DynamiCrafter's encoders make of images and prompts, once for any number of videos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline

from motionmerge.errors import ConfigError, ShapeError
from motionmerge.memory import return_freed_memory
from motionmerge.models.dynamicrafter.encoders import preprocess_clip_image, tokenize_prompts
from motionmerge.sampling.pipelines.encoded import Conditions
from motionmerge.sampling.pipelines.inputs import (
    NUM_FRAMES,
    ImageInput,
    check_num_frames,
    check_tokens,
    prepare_image,
    repeated,
)
from motionmerge.switching.expert_bank import attached_bank

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SchedulerMixin
    from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModel

    from motionmerge.models.dynamicrafter.image_projector import ImageProjector
    from motionmerge.models.dynamicrafter.unet import DynamiCrafterUNet


class EncodingPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers is untyped here
    """The half of a pipeline that runs before a video is made, and after.

    The methods `encode_prompt`, `encode_image`, `encode_image_latents` and `decode_latents` are all
    that knows about the encoders; a model with other encoders overrides them.
    """

    # diffusers registers these at run time.
    unet: DynamiCrafterUNet
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    image_encoder: CLIPVisionModel
    image_projector: ImageProjector
    scheduler: SchedulerMixin

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

    def encode_prompt(self, prompt: Sequence[str]) -> torch.Tensor:
        """Turn prompts into text tokens `[batch, tokens, dim]`; too long ones are cut."""
        tokens = tokenize_prompts(self.tokenizer, prompt)
        states: torch.Tensor = self.text_encoder(
            tokens.to(self._execution_device)
        ).last_hidden_state
        return states

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

    def encode_image_latents(self, image: torch.Tensor, num_frames: int) -> torch.Tensor:
        """Turn images `[batch, 3, height, width]` in [-1, 1] into conditioning latents.

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
        last_image: ImageInput | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int = NUM_FRAMES,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        guided: bool = True,
    ) -> Conditions:
        """Run the encoders alone: once for any number of videos, after which they may be freed.

            conditions = pipeline.encode(photo, "a cat jumps")
            pipeline.free_encoders()
            video = pipeline(conditions=conditions).frames

        Args:
            image, prompt, negative_prompt, last_image, height, width, num_frames, prompt_embeds,
                negative_prompt_embeds, image_embeds: As for a call of the pipeline.
            guided: Also encode the unconditional half, which guidance needs.

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
        negatives = grey = None
        if guided:
            negatives = self._text_tokens(
                negative_prompt, negative_prompt_embeds, name="negative_prompt"
            )
            negatives = repeated(negatives, pairs, name="negative prompts")
        image_latents = self._image_latents(pixels, last_image, num_frames)
        if image_embeds is None or guided:
            self._require("image_encoder", "image_embeds")
        states = self.encode_image(pixels, num_frames) if image_embeds is None else None
        if guided:
            grey = self.encode_image(torch.zeros_like(pixels[:1]), num_frames)
        if image_embeds is not None:
            image_embeds = image_embeds.to(pixels.device)
        return Conditions(
            pixels=pixels,
            image_latents=image_latents,
            texts=repeated(texts, pairs, name="prompts"),
            negative_texts=negatives,
            image_states=states,
            grey_states=grey,
            image_tokens=image_embeds,
        )

    def free_encoders(self) -> None:
        """Drop the text and the image encoder, four tenths of DynamiCrafter's weights.

        What `encode` gave makes videos as before; a prompt or an image is then refused.
        """
        self.register_modules(text_encoder=None, image_encoder=None)
        self.maybe_free_model_hooks()  # which hold on to what they move
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return_freed_memory()

    def _encode(self, given: dict[str, Any], *, guided: bool) -> Conditions:
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
            prompt = prompt or ""
            return self.encode_prompt([prompt] if isinstance(prompt, str) else prompt)
        if prompt is not None:
            raise ConfigError(f"Both {name} and {name}_embeds were given.", fix="Pass one of them.")
        shape = (self.unet.config.num_text_tokens, self.unet.config.cross_attention_dim)
        check_tokens(embeds, shape, name=f"{name}_embeds")
        return embeds.to(self._execution_device)

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
