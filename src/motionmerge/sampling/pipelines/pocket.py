"""From a photo and a prompt to a video with the pocket model that ships in the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from motionmerge.errors import ConfigError, ShapeError
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.models.pocket.components import (
    PocketModel,
    attention_kernel,
    build_pocket_model,
    denoiser_parts,
    fill_parts,
    load_decoder,
    load_denoiser,
    load_towers,
    weights_path,
)
from motionmerge.models.pocket.towers import normalize_image
from motionmerge.models.pocket.world import FRAME_RATE, SIZE
from motionmerge.sampling.pipelines.dynamicrafter import DynamiCrafterPipeline, with_defaults
from motionmerge.sampling.pipelines.encoded import Conditions
from motionmerge.sampling.pipelines.inputs import Frames, ImageInput, prompts_of, refuse_last_image
from motionmerge.sampling.pipelines.loop import VideoPipelineOutput

DEFAULT_STEPS = 12
DEFAULT_GUIDANCE = 1.0
DEFAULT_ETA = 0.0
DEFAULTS = {
    "num_inference_steps": DEFAULT_STEPS,
    "guidance_scale": DEFAULT_GUIDANCE,
    "guidance_rescale": 0.0,
    "frame_rate": FRAME_RATE,
    "eta": DEFAULT_ETA,
}


class PocketPipeline(DynamiCrafterPipeline):
    """`DynamiCrafterPipeline` around the pocket model's encoders.

    Differences that a user sees: 16 frames at 8 per second, square videos of a multiple of 64
    pixels, defaults of `__call__` that suit the small model, and a vocabulary of its own (an
    unknown word is an error). Everything else, experts included, is the parent's.
    """

    batches_guidance = True  # its calls are small: one of both halves is quicker than two

    @property
    def size_multiple(self) -> int:
        return SIZE

    def encode(
        self, image: ImageInput, prompt: str | Sequence[str] | None = None, **options: Any
    ) -> Conditions:
        """Run the encoders alone; see `DynamiCrafterPipeline.encode` for the options.

        Raises:
            ConfigError: `last_image` is given; the model knows no last images.
        """
        refuse_last_image(options.get("last_image"), model="The pocket model")
        with attention_kernel(self._execution_device):
            return super().encode(image, prompt, **options)

    @with_defaults(DEFAULTS)
    def __call__(
        self,
        image: ImageInput | None = None,
        prompt: str | Sequence[str] | None = None,
        **options: Any,
    ) -> VideoPipelineOutput | tuple[Frames]:
        """Make videos; see `DynamiCrafterPipeline.__call__` for the options.

        Raises:
            ConfigError: `last_image` is given; the model knows no last images.
        """
        with attention_kernel(self._execution_device):
            return super().__call__(image, prompt, **(DEFAULTS | options))

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Refuse to write a folder, which `from_pretrained` could not read.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "The pocket model is not a folder that diffusers could load again.",
            fix="Save `denoiser_weights(pipeline)` of motionmerge.models.pocket.components with "
            "safetensors' save_file; load_pocket(file) reads it.",
        )

    def encode_prompt(self, prompt: str | Sequence[str]) -> torch.Tensor:
        tokens = self.tokenizer(prompts_of(prompt)).to(self._execution_device)
        states: torch.Tensor = self.text_encoder(tokens).last_hidden_state
        return states

    def encode_image(self, image: torch.Tensor, num_frames: int) -> torch.Tensor:
        self._check_frames(num_frames)
        shown = F.adaptive_avg_pool2d(image / 2 + 0.5, SIZE)
        pixels = normalize_image(shown).to(self.image_encoder.dtype)
        states: torch.Tensor = self.image_encoder(pixels).last_hidden_state
        return states

    def encode_image_latents(self, image: torch.Tensor, num_frames: int) -> torch.Tensor:
        self._check_frames(num_frames)
        if image.shape[-2] != image.shape[-1]:
            raise ShapeError(
                f"The video is to be {image.shape[-2]} x {image.shape[-1]} pixels; the pocket "
                "model makes square ones.",
                fix="Leave height and width out, or make them equal.",
            )
        latents: torch.Tensor = self.vae.encode_image(image / 2 + 0.5)
        return latents.unsqueeze(2).expand(-1, -1, self.vae.config.num_keyframes, -1, -1)

    def decode_latents(self, latents: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        dtype = self.vae.dtype
        video: torch.Tensor = self.vae.decode(latents.to(dtype), (image / 2 + 0.5).to(dtype))
        return video.float()

    def _check_frames(self, num_frames: int) -> None:
        own = self.vae.config.num_frames
        if num_frames != own:
            raise ConfigError(
                f"`num_frames` is {num_frames}; the pocket model makes clips of {own} frames.",
                fix=f"Leave num_frames out, or pass {own}.",
            )


def pipeline_from_model(model: PocketModel) -> PocketPipeline:
    """Build a pipeline from the parts of a pocket model."""
    return PocketPipeline(
        unet=model.unet,
        vae=model.autoencoder,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        image_encoder=model.image_encoder,
        image_projector=model.image_projector,
        scheduler=model.scheduler,
        height=SIZE,
        width=SIZE,
    )


def load_pocket(weights: str | Path = "base") -> PocketPipeline:
    """Load the pocket model, ready to run.

    Args:
        weights: A shipped variant ("base", "tuned", "naive", "equal"), or a file of U-Net and image
            projector written by `motionmerge train` or `motionmerge merge`.

    Raises:
        CheckpointError: no such weights, or they do not fit.
    """
    model = build_pocket_model()
    load_towers(model)
    load_decoder(model)
    if Path(weights).suffix:  # of one's own: codes and scales are read as what they stand for
        fill_parts(denoiser_parts(model), Checkpoint.load(weights).tensors(), path=weights)
    else:
        load_denoiser(model, weights_path(str(weights)))
    return pipeline_from_model(model)
