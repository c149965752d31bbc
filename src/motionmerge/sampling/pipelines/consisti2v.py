"""From an image and a prompt to a video with ConsistI2V, as a diffusers pipeline.

Paper: Ren et al. 2024 (arXiv 2402.04324). Official: `pipeline_conditional_animation.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, SchedulerMixin
from transformers import CLIPTextModel, CLIPTokenizer

from motionmerge.errors import ConfigError, ShapeError
from motionmerge.models.consisti2v.settings import ours_for_the_hubs
from motionmerge.models.consisti2v.unet import ConsistI2VUNet
from motionmerge.models.dynamicrafter.cross_attention import ContextCache
from motionmerge.sampling.pipelines.encoded import Conditions
from motionmerge.sampling.pipelines.guidance import doubly_guided_prediction, guided_prediction
from motionmerge.sampling.pipelines.inputs import (
    Frames,
    ImageInput,
    check_settings,
    repeated,
    tensors_for,
)
from motionmerge.sampling.pipelines.loop import (
    DenoisingPipeline,
    Generators,
    StepCallback,
    VideoPipelineOutput,
)
from motionmerge.sampling.pipelines.start_latents import (
    FrameInit,
    StartLatents,
    check_start,
    start_latents,
)
from motionmerge.switching.denoising_steps import Moment

NOISE_CORRELATION = 1.0
"""How much of the start noise the frames share; the model was trained so."""

OFFICIAL_START = FrameInit(timestep=850)


class ConsistI2VPipeline(DenoisingPipeline):
    """Animate images as prompts say, from a first frame that stays as it is.

    The clean first frame stands before the noisy ones in every step, and the video begins with it.
    The loop is `DenoisingPipeline`'s; experts attached with `motionmerge.experts` are used at their
    noise levels. Folders are read as the hub has them, and none of the code in them is run.

    Args:
        unet: A `ConsistI2VUNet`.
        vae: `AutoencoderKL`, applied frame by frame.
        text_encoder: `CLIPTextModel`; its last hidden state is what the U-Net reads.
        tokenizer: Of the text encoder.
        scheduler: `DDIMScheduler`, or another one of diffusers.
        height, width: Default size in pixels.

    Attributes:
        batches_guidance: Run the U-Net once on all parts of guidance, instead of once for each.
            None does so on a GPU.
    """

    batches_guidance: bool | None = None
    model_cpu_offload_seq = "text_encoder->unet->vae"
    unet: ConsistI2VUNet

    def __init__(
        self,
        unet: ConsistI2VUNet,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: SchedulerMixin,
        height: int = 256,
        width: int = 256,
    ) -> None:
        super().__init__()
        self.register_modules(
            unet=unet,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
        )
        self.register_to_config(height=height, width=width)

    @classmethod
    def load_config(cls, *arguments: Any, **options: Any) -> Any:
        """Read `model_index.json`, and put our classes in place of the hub's."""
        loaded = super().load_config(*arguments, **options)
        if isinstance(loaded, Mapping):
            return ours_for_the_hubs(loaded)
        return (ours_for_the_hubs(loaded[0]), *loaded[1:])

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput | None = None,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        image_latents: torch.Tensor | None = None,
        conditions: Conditions | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        image_guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        frame_stride: float = 3,
        eta: float = 0.0,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        start: StartLatents | None = OFFICIAL_START,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> VideoPipelineOutput | tuple[Frames]:
        """Make videos that begin with `image`.

        Images and prompts pair up; one image goes with several prompts and the other way round.

        Args:
            image: An image or a list of them, made upright RGB, resized and centre-cropped to fit,
                of PIL, a file's path or an array of 8 bits; or a tensor `[batch, 3, height, width]`
                or an array with colors last, float in [0, 1], of the video's size.
            prompt: What should happen; the empty prompt if left out.
            negative_prompt: What should not; the empty prompt by default.
            image_latents: Latents of the first frames, `[pairs, channels, 1, height, width]`,
                instead of encoding `image`, whose size still counts.
            conditions: All of the above as `encode` gave it, instead of it; the size and the number
                of frames are theirs.
            height, width: Of the video in pixels; by default the pipeline's, or the tensor's.
            num_frames: 2 to 32, the first frame included; 16 by default.
            num_inference_steps: Denoising steps.
            guidance_scale: Strength of the prompt; at 1 or below there is no guidance by it.
            image_guidance_scale: Strength of the first frame; above 1 the model runs once more,
                with noise in its place.
            guidance_rescale: 0 to 1; see `guided_prediction`.
            frame_stride: Frames of the training videos between two of this one; 1 to 5 were
                trained, and larger means more motion.
            eta: Fresh noise in each step, 0 to 1.
            num_videos_per_prompt: Videos of each pair, next to one another in the result.
            generator: Draws start latents and noise; a list has one for each video, so that a
                video does not depend on the others of its batch.
            latents: Start latents `[videos, channels, frames, height, width]`, used as they are;
                frame 0 stands for no image in image guidance.
            prompt_embeds, negative_prompt_embeds: Text tokens `[pairs, tokens, dim]` instead of
                prompts.
            start: What the start noise is mixed with, by default as the paper does; None for noise
                alone.
            callback_on_step_end: Called as `(pipeline, step, timestep, {"latents": ...})` with the
                latents after the first frame's; those of the dict it returns are used on.
            callback_on_step_end_tensor_inputs: What the dict holds; only "latents" is known.
            output_type: "pil", "pt", "np" or "latent".
            return_dict: Return a one-tuple if false.

        Raises:
            ShapeError: Sizes or batches do not fit together, or a tensor is not float in [0, 1].
            DataError: An image cannot be read.
            ConfigError: A setting is out of range.
        """
        check_settings(
            num_videos_per_prompt=num_videos_per_prompt,
            num_inference_steps=num_inference_steps,
            start_step=None,
            frame_stride=frame_stride,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            guidance_rescale=guidance_rescale,
            eta=eta,
            output_type=output_type,
            callback_tensors=tensors_for(callback_on_step_end, callback_on_step_end_tensor_inputs),
        )
        check_start(latents, None if start is OFFICIAL_START else start)
        is_guided = guidance_scale > 1 or image_guidance_scale > 1
        conditions = self._encoded(
            conditions,
            guided=is_guided,
            image=image,
            prompt=prompt,
            negative_prompt=negative_prompt,
            image_latents=image_latents,
            height=height,
            width=width,
            num_frames=num_frames,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )
        each = num_videos_per_prompt
        still = conditions.image_latents.repeat_interleave(each, 0)
        videos = _Videos(
            pipeline=self,
            pixels=conditions.pixels.repeat_interleave(each, 0),
            first=still[:, :, :1],
            texts=conditions.halves(guided=is_guided).repeat_interleave(each, 0),
            whole_start=start_latents(
                still,
                latents,
                generator,
                num_channels=self.unet.config.out_channels,
                scheduler=self.scheduler,
                start=start,
                start_step=None,
                correlation=NOISE_CORRELATION,
            ),
            frame_stride=frame_stride,
            image_guidance_scale=image_guidance_scale,
            guidance_rescale=guidance_rescale,
        )
        return self._denoise(
            videos,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            eta=eta,
            generator=generator,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            output_type=output_type,
            return_dict=return_dict,
        )

    def _conditions(
        self,
        pixels: torch.Tensor,
        texts: torch.Tensor,
        negatives: torch.Tensor | None,
        *,
        num_frames: int,
        image_latents: torch.Tensor | None = None,
    ) -> Conditions:
        if num_frames < 2:
            raise ConfigError(
                f"`num_frames` is {num_frames}; a video has frames after its first one.",
                fix="Use 2 to 32.",
            )
        if image_latents is None:
            return super()._conditions(pixels, texts, negatives, num_frames=num_frames)
        size = [side // self.vae_scale_factor for side in pixels.shape[2:]]
        expected = [self.unet.config.in_channels, 1, *size]
        if list(image_latents.shape[1:]) != expected:
            raise ShapeError(
                f"`image_latents` has shape {list(image_latents.shape)}; expected [pairs, "
                f"{', '.join(map(str, expected))}].",
                fix="Pass the latents of one frame, of the image's size.",
            )
        still = repeated(image_latents, len(pixels), name="image_latents").to(pixels)
        return Conditions(
            pixels=pixels,
            image_latents=still.expand(-1, -1, num_frames, -1, -1),
            texts=texts,
            negative_texts=negatives,
        )


@dataclass(kw_only=True)
class _Videos:
    """The videos of a call; see `VideosToDenoise`. Latents are those after the first frame's."""

    pipeline: ConsistI2VPipeline
    pixels: torch.Tensor
    first: torch.Tensor
    texts: torch.Tensor
    whole_start: torch.Tensor
    frame_stride: float
    image_guidance_scale: float
    guidance_rescale: float
    caches: defaultdict[tuple[str | None, tuple[str, ...]], ContextCache] = field(
        default_factory=lambda: defaultdict(ContextCache)
    )

    def start(self) -> torch.Tensor:
        return self.whole_start[:, :, 1:]

    def predict(
        self, sample: torch.Tensor, timestep: torch.Tensor, moment: Moment | None
    ) -> torch.Tensor:
        expert = None if moment is None else moment.entry.expert
        predictions = self._predictions(sample, timestep, expert)
        if "no image" in predictions:
            return doubly_guided_prediction(
                predictions["both"],
                predictions["no text"],
                predictions["no image"],
                guidance_scale=self.pipeline.guidance_scale,
                image_guidance_scale=self.image_guidance_scale,
                guidance_rescale=self.guidance_rescale,
            )
        if "no text" in predictions:
            return guided_prediction(
                predictions["both"],
                predictions["no text"],
                guidance_scale=self.pipeline.guidance_scale,
                guidance_rescale=self.guidance_rescale,
            )
        return predictions["both"]

    def _predictions(
        self, sample: torch.Tensor, timestep: torch.Tensor, expert: str | None
    ) -> dict[str, torch.Tensor]:
        """Run the U-Net on the parts of guidance, in one call or one by one."""
        pipeline, none = self.pipeline, self.whole_start[:, :, :1]
        by_image = self.image_guidance_scale > 1
        texts = (
            self.texts if by_image else pipeline.guided_parts(self.texts, pipeline.guidance_scale)
        )
        parts = {"both": (self.first, texts[:, -1])}
        if texts.shape[1] > 1:
            parts["no text"] = (self.first, texts[:, 0])
        if by_image:
            parts["no image"] = (none, texts[:, 0])
        at_once = pipeline.batches_guidance
        if at_once is None:
            at_once = sample.device.type != "cpu"
        predictions: dict[str, torch.Tensor] = {}
        for names in [tuple(parts)] if at_once else [(name,) for name in parts]:
            firsts, tokens = (torch.cat([parts[name][i] for name in names]) for i in (0, 1))
            dtype = pipeline.unet.dtype
            predicted = pipeline.unet(
                torch.cat([sample.to(dtype)] * len(names)),
                timestep,
                tokens.to(dtype),
                self.frame_stride,
                firsts.to(dtype),
                context_cache=self.caches[expert, names],
                return_dict=False,
            )[0]
            pieces = predicted.float().chunk(len(names))
            predictions |= dict(zip(names, pieces, strict=True))
        return predictions

    def forget(self) -> None:
        self.caches.clear()

    def finish(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.first.to(latents), latents], dim=2)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.pipeline.decode_latents(latents, self.pixels)
