"""From an image and a prompt to a video with DynamiCrafter, as a diffusers pipeline.

Paper: Xing et al. 2023 (arXiv 2310.12190); guidance rescale: Lin et al. 2023 (arXiv 2305.08891).
Official: `scripts/evaluation/inference.py`.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

import torch
from diffusers import AutoencoderKL, SchedulerMixin
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModel

from motionmerge.errors import ConfigError
from motionmerge.models.cuda_graphs import CapturedUNet, can_capture
from motionmerge.models.dynamicrafter.cross_attention import ContextCache
from motionmerge.models.dynamicrafter.image_projector import ImageProjector
from motionmerge.models.dynamicrafter.unet import DynamiCrafterUNet
from motionmerge.sampling.pipelines.denoising import guided_unet
from motionmerge.sampling.pipelines.encoded import Conditions
from motionmerge.sampling.pipelines.image_tokens import ImageTokenPipeline
from motionmerge.sampling.pipelines.inputs import (
    Frames,
    ImageInput,
    check_settings,
    tensors_for,
)
from motionmerge.sampling.pipelines.loop import Generators, StepCallback, VideoPipelineOutput
from motionmerge.sampling.pipelines.start_latents import (
    AnalyticInit,
    StartLatents,
    check_start,
    start_latents,
)
from motionmerge.switching.denoising_steps import Moment
from motionmerge.switching.expert_bank import attached_bank
from motionmerge.switching.image_functions import shown_images

Call = TypeVar("Call", bound=Callable[..., object])


class DynamiCrafterPipeline(ImageTokenPipeline):
    """Animate images as prompts say.

    The loop is `DenoisingPipeline`'s, and one step `guided_unet`'s. Experts attached with
    `motionmerge.experts` are used at their noise levels, and the image tokens come from the
    projector of the expert that is denoising. Each encoder runs once for each image, and
    `encode` runs them alone, so that they can be freed before the video is made.

    Args:
        unet: A `DynamiCrafterUNet`.
        vae: `AutoencoderKL`, applied frame by frame.
        text_encoder: `CLIPTextModel`; its last hidden state is what the U-Net reads.
        tokenizer: Of the text encoder.
        image_encoder: `CLIPVisionModel`; all its tokens go into the projector.
        image_projector: `ImageProjector`.
        scheduler: `DynamicRescaleDDIMScheduler`, or another one of diffusers.
        height, width: Default size in pixels.

    Raises:
        ShapeError: The parts are of different models.

    Attributes:
        batches_guidance: Run the U-Net once on both halves of guidance, instead of once for each.
            None does so on a GPU, where that is quicker; on a CPU it takes as long, and 10 to 30 %
            more memory.
    """

    batches_guidance: bool | None = None
    model_cpu_offload_seq = "text_encoder->image_encoder->image_projector->unet->vae"
    _captures = False
    _captured: CapturedUNet | None = None

    def __init__(
        self,
        unet: DynamiCrafterUNet,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        image_encoder: CLIPVisionModel,
        image_projector: ImageProjector,
        scheduler: SchedulerMixin,
        height: int = 320,
        width: int = 512,
    ) -> None:
        super().__init__()
        self.register_modules(
            unet=unet,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            image_encoder=image_encoder,
            image_projector=image_projector,
            scheduler=scheduler,
        )
        self.register_to_config(height=height, width=width)
        self._check_parts_fit()

    def capture_steps(self) -> None:
        """Replay the U-Net as a CUDA graph on a GPU; see `CapturedUNet`. Harmless elsewhere.

        The first step of a new shape takes three times as long, and its memory stays taken. Where
        a graph cannot do what a call does (`can_capture`), videos are made as without.
        """
        self._captures = True

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput | None = None,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        last_image: ImageInput | None = None,
        conditions: Conditions | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.7,
        frame_rate: float = 24,
        eta: float = 1.0,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        start_step: int | None = None,
        start: StartLatents | None = None,
        analytic_init: AnalyticInit | None = None,
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
            last_image: What the videos end with, for the interpolation model; the same as `image`
                makes a loop. The frames between are then given no image latents.
            conditions: All of the above as `encode` gave it, instead of it; the size and the number
                of frames are theirs.
            height, width: Of the video in pixels; by default the pipeline's, or the tensor's.
            num_frames: 1 to 32; 16 by default.
            num_inference_steps: Denoising steps.
            guidance_scale: Strength of the conditions; at 1 or below the model runs without the
                unconditional half, twice as fast. Unconditional means the negative prompt and the
                image tokens of a grey image.
            guidance_rescale: 0 to 1; see `guided_prediction`.
            frame_rate: Frames per second that the model is told (the 256 model: frame stride).
            eta: Fresh noise in each step, 0 to 1.
            num_videos_per_prompt: Videos of each pair, next to one another in the result.
            generator: Draws start latents and noise; a list has one for each video, so that a
                video does not depend on the others of its batch.
            latents: Start latents `[videos, channels, frames, height, width]`, e.g. of
                `scheduler.analytic_init`.
            prompt_embeds, negative_prompt_embeds: Text tokens `[pairs, tokens, dim]` instead of
                prompts.
            image_embeds: Image tokens `[pairs, tokens, dim]` of `encode_image_tokens`, used for
                every expert instead of encoding `image`.
            start_step: Begin at this timestep minus 1, below `num_train_timesteps`, to lean less on
                the image (CIL, Zhao et al. 2024); 900 and more are usual. See
                `DynamicRescaleDDIMScheduler.set_timesteps`.
            start: What the start noise is mixed with, `FrameInit` or `AnalyticInit`.
            analytic_init: The same; what `read_statistics` reads.
            callback_on_step_end: Called as `(pipeline, step, timestep, {"latents": ...})`; the
                latents of the dict it returns are used on. It may set `pipeline._interrupt` and
                `pipeline._guidance_scale`.
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
            start_step=start_step,
            frame_rate=frame_rate,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            eta=eta,
            output_type=output_type,
            callback_tensors=tensors_for(callback_on_step_end, callback_on_step_end_tensor_inputs),
        )
        if start is not None and analytic_init is not None:
            raise ConfigError("Both start and analytic_init were given.", fix="Pass one of them.")
        start = start or analytic_init
        check_start(latents, start)
        start_step = self._start_step(start_step)
        is_guided = guidance_scale > 1
        conditions = self._encoded(
            conditions,
            guided=is_guided,
            image=image,
            prompt=prompt,
            negative_prompt=negative_prompt,
            last_image=last_image,
            height=height,
            width=width,
            num_frames=num_frames,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            image_embeds=image_embeds,
        )
        each = num_videos_per_prompt
        texts = conditions.halves(guided=is_guided)
        videos = _Videos(
            pipeline=self,
            pixels=conditions.pixels.repeat_interleave(each, 0),
            image_latents=conditions.image_latents.repeat_interleave(each, 0),
            contexts={
                expert: torch.cat([texts, tokens.to(texts)], dim=2).repeat_interleave(each, 0)
                for expert, tokens in self._image_tokens(conditions, guided=is_guided).items()
            },
            given=latents,
            mix=start,
            start_step=start_step,
            generator=generator,
            frame_rate=frame_rate,
            guidance_rescale=guidance_rescale,
            captured=self._captured_unet(),
        )
        return self._denoise(
            videos,
            num_inference_steps=num_inference_steps,
            start_step=start_step,
            guidance_scale=guidance_scale,
            eta=eta,
            generator=generator,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            output_type=output_type,
            return_dict=return_dict,
        )

    def _captured_unet(self) -> CapturedUNet | None:
        """Return the U-Net as it is replayed now; None if it is called."""
        if not self._captures or not can_capture(self.unet):
            self._captured = None
        elif self._captured is None or self._captured.unet is not self.unet:
            self._captured = CapturedUNet(self.unet)
        if self._captured is not None:
            self._captured.refresh()
        return self._captured


def with_defaults(defaults: Mapping[str, object]) -> Callable[[Call], Call]:
    """Show a pipeline's `__call__` with `DynamiCrafterPipeline`'s arguments and other defaults."""
    shown = inspect.signature(DynamiCrafterPipeline.__call__)
    own = [
        one.replace(default=defaults.get(one.name, one.default))
        for one in shown.parameters.values()
        if one.name != "last_image"
    ]

    def decorate(call: Call) -> Call:
        vars(call)["__signature__"] = shown.replace(parameters=own)
        return call

    return decorate


Caches: TypeAlias = "defaultdict[tuple[str | None, bool], tuple[ContextCache, ContextCache]]"
"""For each expert, with guidance and without, one cache for each half."""


def _two_caches() -> Caches:
    return defaultdict(lambda: (ContextCache(), ContextCache()))


@dataclass(kw_only=True)
class _Videos:
    """The videos of a call; see `VideosToDenoise`."""

    pipeline: DynamiCrafterPipeline
    pixels: torch.Tensor
    image_latents: torch.Tensor
    contexts: dict[str | None, torch.Tensor]
    given: torch.Tensor | None
    mix: StartLatents | None
    start_step: int | None
    generator: Generators
    frame_rate: float
    guidance_rescale: float
    captured: CapturedUNet | None
    caches: Caches = field(default_factory=_two_caches)

    def start(self) -> torch.Tensor:
        return start_latents(
            self.image_latents[:, :, :1].expand_as(self.image_latents),
            self.given,
            self.generator,
            num_channels=self.pipeline.unet.config.out_channels,
            scheduler=self.pipeline.scheduler,
            start=self.mix,
            start_step=self.start_step,
        )

    def predict(
        self, sample: torch.Tensor, timestep: torch.Tensor, moment: Moment | None
    ) -> torch.Tensor:
        unet = self.pipeline.unet
        expert = None if moment is None else moment.entry.expert
        bank = attached_bank(unet)
        if bank and expert and self.captured:
            bank.put_in_place(expert)
        conditional_sample = None
        if unet.config.in_channels > unet.config.out_channels:  # VideoCrafter's reads tokens alone
            shown, blurred = shown_images(self.image_latents, moment)
            if blurred is not None:
                conditional_sample = torch.cat([sample, blurred], dim=1)
            sample = torch.cat([sample, shown], dim=1)
        guidance_scale = self.pipeline.guidance_at(moment)
        return guided_unet(
            unet,
            sample,
            timestep,
            conditional_sample=conditional_sample,
            context=self.pipeline.guided_parts(
                self.contexts[expert if expert in self.contexts else None], guidance_scale
            ),
            context_caches=self.caches[expert, guidance_scale > 1],
            frame_rate=self.frame_rate,
            guidance_scale=guidance_scale,
            guidance_rescale=self.guidance_rescale,
            batches_guidance=self.pipeline.batches_guidance,
            captured=self.captured,
        )

    def forget(self) -> None:
        self.caches.clear()

    def finish(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.pipeline.decode_latents(latents, self.pixels)
