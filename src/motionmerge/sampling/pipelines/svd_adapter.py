"""SVD with a text-to-temporal adapter: the pipeline of diffusers, and a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from motionmerge.errors import ConfigError
from motionmerge.models.group_offload import OffloadedPipeline
from motionmerge.models.text_adapters import SvdAdapterUNet
from motionmerge.sampling.pipelines.inputs import prompts_of
from motionmerge.sampling.pipelines.lora_weights import LoraPipeline

_SVD_PARTS = ("vae", "image_encoder", "unet", "scheduler", "feature_extractor")


class SvdAdapterPipeline(OffloadedPipeline, StableVideoDiffusionPipeline, LoraPipeline):  # type: ignore[misc]  # untyped
    """Animate an image as a prompt says.

    Args:
        vae, image_encoder, unet, scheduler, feature_extractor: As of SVD; the U-Net is one that
            `add_text_adapter` changed.
        text_encoder: Its `last_hidden_state` is what the adapter reads.
        tokenizer: Of the text encoder.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vae"

    def __init__(
        self,
        vae: AutoencoderKLTemporalDecoder,
        image_encoder: CLIPVisionModelWithProjection,
        unet: SvdAdapterUNet,
        scheduler: EulerDiscreteScheduler,
        feature_extractor: CLIPImageProcessor,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
    ) -> None:
        super().__init__(vae, image_encoder, unet, scheduler, feature_extractor)
        self.register_modules(text_encoder=text_encoder, tokenizer=tokenizer)

    @classmethod
    def around(
        cls, pipeline: Any, *, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
    ) -> SvdAdapterPipeline:
        """Make one of a loaded SVD pipeline whose U-Net has an adapter; they share their parts."""
        parts = {name: pipeline.components[name] for name in _SVD_PARTS}
        return cls(**parts, text_encoder=text_encoder, tokenizer=tokenizer)

    @torch.no_grad()
    def encode_prompt(self, prompt: str | Sequence[str]) -> torch.Tensor:
        """Encode prompts: `[prompts, tokens, dim]`."""
        tokens = self.tokenizer(
            prompts_of(prompt),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        states: torch.Tensor = self.text_encoder(tokens.to(self._execution_device))[0]
        return states

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        prompt: str | Sequence[str] = "",
        *,
        negative_prompt: str | Sequence[str] = "",
        max_guidance_scale: float = 3.0,
        num_videos_per_prompt: int = 1,
        sigmas: list[float] | None = None,
        **options: Any,
    ) -> Any:
        """Make videos.

        Args:
            image: As SVD takes it: one image, or a list of them.
            prompt: What happens; one for all images, or one each.
            negative_prompt: What is shown to the adapter in the unconditional half of guidance.
            max_guidance_scale: Guidance of the last frame; 1 or less is none.
            num_videos_per_prompt: Videos of each image.
            sigmas: The noise of the steps, instead of the scheduler's own.
            options: Other arguments of SVD's pipeline.

        Raises:
            ConfigError: There are other numbers of prompts and images.
        """
        count = len(image) if isinstance(image, list | torch.Tensor) else 1
        texts = [_one_each(prompt, count, name="prompt")]
        if max_guidance_scale > 1:
            texts.insert(0, _one_each(negative_prompt, count, name="negative_prompt"))
        tokens = [self.encode_prompt(text) for text in texts]
        self.unet.text_tokens = torch.cat(
            [one.repeat_interleave(num_videos_per_prompt, 0) for one in tokens]
        ).to(self.unet.dtype)
        try:
            return super().__call__(
                image,
                max_guidance_scale=max_guidance_scale,
                num_videos_per_prompt=num_videos_per_prompt,
                sigmas=sigmas,
                **options,
            )
        finally:
            self.unet.text_tokens = None


def _one_each(text: str | Sequence[str], count: int, *, name: str) -> list[str]:
    texts = [text] * count if isinstance(text, str) else list(text)
    if len(texts) != count:
        raise ConfigError(
            f"There are {len(texts)} texts in `{name}`, and {count} images.",
            fix="Pass one text for all images, or one for each.",
        )
    return texts
