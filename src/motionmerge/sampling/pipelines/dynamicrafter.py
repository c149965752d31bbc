"""From an image and a prompt to a video with DynamiCrafter, as a diffusers pipeline.

Paper: Xing et al. 2023 (arXiv 2310.12190); guidance rescale: Lin et al. 2023 (arXiv 2305.08891).
Official: `scripts/evaluation/inference.py`.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from motionmerge.errors import ConfigError, ShapeError
from motionmerge.memory import return_freed_memory
from motionmerge.models.cuda_graphs import CapturedUNet, can_capture
from motionmerge.models.dynamicrafter.cross_attention import ContextCache
from motionmerge.models.dynamicrafter.encoders import preprocess_clip_image, tokenize_prompts
from motionmerge.models.dynamicrafter.scheduler import DynamicRescaleDDIMScheduler
from motionmerge.sampling.pipelines.encoded import Conditions
from motionmerge.sampling.pipelines.guidance import guided_prediction
from motionmerge.sampling.pipelines.inputs import (
    NUM_FRAMES,
    ImageInput,
    LatentStatistics,
    check_num_frames,
    check_settings,
    check_tokens,
    prepare_image,
    repeated,
    video_to_output,
)
from motionmerge.switching.expert_bank import attached_bank


@dataclass
class DynamiCrafterPipelineOutput(BaseOutput):
    """The videos that a pipeline made.

    Attributes:
        frames: For "pil" a list of lists of images; for "pt" `[batch, frames, 3, height, width]`
            and for "np" `[batch, frames, height, width, 3]` in [0, 1]; for "latent"
            `[batch, channels, frames, height, width]`.
    """

    frames: Any


class DynamiCrafterPipeline(DiffusionPipeline):
    """Animate images as prompts say.

    The four methods `encode_prompt`, `encode_image`, `encode_image_latents` and `decode_latents`
    are all that knows about the encoders; a model with other encoders overrides them. Experts
    attached with `motionmerge.experts` are used at their noise levels, and the image tokens come
    from the projector of the expert that is denoising. Each encoder runs once for each image, and
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

    Attributes:
        batches_guidance: Run the U-Net once on both halves of guidance, instead of once for each.
            None does so on a GPU, where that is quicker; on a CPU it takes as long, and 10 to 30 %
            more memory.
    """

    batches_guidance: bool | None = None
    model_cpu_offload_seq = "text_encoder->image_encoder->image_projector->unet->vae"
    _callback_tensor_inputs = ("latents",)
    _captures = False
    _captured: CapturedUNet | None = None

    def __init__(
        self,
        unet: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        image_encoder: Any,
        image_projector: Any,
        scheduler: Any,
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

    @property
    def vae_scale_factor(self) -> int:
        """Pixels for each latent pixel, on an axis."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def size_multiple(self) -> int:
        """What height and width in pixels must divide by: the VAE's and the U-Net's factors."""
        return self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    def encode_prompt(self, prompt: Sequence[str]) -> torch.Tensor:
        """Turn prompts into text tokens `[batch, tokens, dim]`; too long ones are cut."""
        tokens = tokenize_prompts(self.tokenizer, prompt)
        return self.text_encoder(tokens.to(self._execution_device)).last_hidden_state

    def encode_image_tokens(self, image: torch.Tensor, num_frames: int) -> torch.Tensor:
        """Turn images `[batch, 3, height, width]` in [-1, 1] into image tokens.

        Returns:
            `[batch, tokens, dim]`, a set of tokens for each frame, or one for all of them.

        Raises:
            ShapeError: The projector has tokens for another number of frames.
        """
        return self._project(self.encode_image(image, num_frames))

    def encode_image(self, image: torch.Tensor, num_frames: int) -> torch.Tensor:
        """Let the image tower look at images `[batch, 3, height, width]` in [-1, 1].

        The tower is frozen: what it sees is the same for all experts, whose projectors differ.

        Returns:
            `[batch, patches, dim]`, what the image projector reads.

        Raises:
            ShapeError: The projector has tokens for another number of frames.
        """
        own_frames = self.image_projector.config.num_frames
        if own_frames not in (1, num_frames):
            raise ShapeError(
                f"num_frames is {num_frames}; the image projector has tokens for {own_frames}.",
                fix=f"pass num_frames={own_frames}.",
            )
        pixels = preprocess_clip_image(image, size=self.image_encoder.config.image_size)
        return self.image_encoder(pixels.to(self.image_encoder.dtype)).last_hidden_state

    def _project(self, states: torch.Tensor) -> torch.Tensor:
        return self.image_projector(states.to(self.image_projector.dtype))

    def encode_image_latents(self, image: torch.Tensor, num_frames: int) -> torch.Tensor:
        """Turn images `[batch, 3, height, width]` in [-1, 1] into conditioning latents.

        Each image is encoded once (the mean of the VAE's posterior) and shown to every frame.

        Returns:
            `[batch, channels, frames, height, width]`.
        """
        posterior = self.vae.encode(image.to(self.vae.dtype)).latent_dist
        latents = posterior.mode() * self.vae.config.scaling_factor
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
            pixels,
            image_latents,
            repeated(texts, pairs, name="prompts"),
            negatives,
            states,
            grey,
            image_embeds,
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

    def capture_steps(self) -> None:
        """On a GPU, replay the U-Net as a CUDA graph; see `CapturedUNet`. Harmless elsewhere.

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
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        start_step: int | None = None,
        analytic_init: LatentStatistics | None = None,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
        | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> DynamiCrafterPipelineOutput | tuple[Any]:
        """Make videos that begin with `image`.

        Images and prompts pair up; one image goes with several prompts and the other way round.

        Args:
            image: An image or a list of them, made upright RGB, resized and centre-cropped to fit;
                or a tensor `[batch, 3, height, width]`, float in [0, 1], of the video's size.
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
            analytic_init: Mean and variance of clean latents: the start latents then have those of
                noised data at `start_step`, instead of 0 and 1.
            callback_on_step_end: Called as `(pipeline, step, timestep, {"latents": ...})`; the
                latents of the dict it returns are used on.
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
            callback_tensors=callback_on_step_end_tensor_inputs,
        )
        if latents is not None and analytic_init is not None:
            raise ConfigError("Both latents and analytic_init were given.", fix="pass one of them.")
        given = {
            "image": image,
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "last_image": last_image,
            "height": height,
            "width": width,
            "num_frames": num_frames,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "image_embeds": image_embeds,
        }
        given = {name: value for name, value in given.items() if value is not None}
        is_guided = guidance_scale > 1
        if conditions is None:
            conditions = self._encode(given, guided=is_guided)
        elif given:
            raise ConfigError(
                f"{', '.join(given)} and conditions were both given.",
                fix="leave out what `encode` was given already.",
            )

        each = num_videos_per_prompt
        texts = conditions.halves(guided=is_guided)
        image_latents = conditions.image_latents.repeat_interleave(each, 0)
        contexts = {
            expert: torch.cat([texts, tokens.to(texts)], dim=2).repeat_interleave(each, 0)
            for expert, tokens in self._image_tokens(conditions, guided=is_guided).items()
        }

        latents = self._start_latents(image_latents, latents, generator)
        if analytic_init is not None:
            latents = self._at_start_step(latents, analytic_init, start_step)
        self.set_timesteps(num_inference_steps, start_step)
        step_options = self._step_options(eta, generator)
        bank = attached_bank(self.unet)
        caches: dict[str | None, tuple[ContextCache, ContextCache]] = defaultdict(
            lambda: (ContextCache(), ContextCache())  # one for each half of guidance
        )
        captured = self._captured_unet()
        with self.progress_bar(total=len(self.scheduler.timesteps)) as progress:
            for step, timestep in enumerate(self.scheduler.timesteps):
                expert = bank.expert_for(timestep) if bank else None
                if bank and expert and captured:
                    bank.put_in_place(expert)
                sample = self.scheduler.scale_model_input(latents, timestep)
                prediction = self._predict(
                    torch.cat([sample, image_latents], dim=1),
                    timestep,
                    context=contexts[expert if expert in contexts else None],
                    context_caches=caches[expert],
                    frame_rate=frame_rate,
                    guidance_scale=guidance_scale,
                    guidance_rescale=guidance_rescale,
                    captured=captured,
                )
                latents = self.scheduler.step(
                    prediction, timestep, latents, **step_options, return_dict=False
                )[0]
                if callback_on_step_end is not None:
                    tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                    answer = callback_on_step_end(self, step, timestep, tensors)
                    latents = answer.pop("latents", latents)
                    caches.clear()  # who calls back may have changed the weights
                progress.update()

        frames = latents
        if output_type != "latent":
            video = self.decode_latents(latents, conditions.pixels.repeat_interleave(each, 0))
            frames = video_to_output(video, output_type)
        self.maybe_free_model_hooks()
        return DynamiCrafterPipelineOutput(frames=frames) if return_dict else (frames,)

    def _encode(self, given: dict[str, Any], *, guided: bool) -> Conditions:
        if "image" not in given:
            raise ConfigError(
                "There is no image to animate.", fix="pass one, or conditions of `encode`."
            )
        return self.encode(**given, guided=guided)

    def _require(self, encoder: str, instead: str) -> None:
        if getattr(self, encoder) is None:
            raise ConfigError(
                f"The pipeline has no {encoder} any more.",
                fix=f"pass conditions that `encode` gave before, or {instead}; or load it again.",
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
            raise ConfigError(f"Both {name} and {name}_embeds were given.", fix="pass one of them.")
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
        """Conditioning latents of every frame: all of one image, or two ends and zeros between.

        Source: official `inference.py`, `--loop` and `--interp`.
        """
        if last_image is None:
            return self.encode_image_latents(pixels, num_frames).float()
        if num_frames < 2:
            raise ConfigError(
                f"num_frames is {num_frames}; a video with a last image has at least 2.",
                fix="ask for more frames, or leave last_image out.",
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

    def _start_latents(
        self,
        image_latents: torch.Tensor,
        latents: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        batch, _, *video = image_latents.shape
        shape = (batch, self.unet.config.out_channels, *video)
        if isinstance(generator, list) and len(generator) != batch:
            raise ConfigError(
                f"There are {len(generator)} generators for {batch} videos.",
                fix="pass one generator, or one for each video.",
            )
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=image_latents.device)
        elif tuple(latents.shape) != shape:
            raise ShapeError(
                f"latents have shape {list(latents.shape)}; expected {list(shape)}.",
                fix="draw them for this number of videos, frames and pixels.",
            )
        return latents.to(image_latents.device).float() * self.scheduler.init_noise_sigma

    def _at_start_step(
        self, noise: torch.Tensor, statistics: LatentStatistics, start_step: int | None
    ) -> torch.Tensor:
        """Give noise the mean and variance of noised data at the start step."""
        if not isinstance(self.scheduler, DynamicRescaleDDIMScheduler):
            raise ConfigError(
                f"{type(self.scheduler).__name__} has no Analytic-Init.",
                fix="use DynamicRescaleDDIMScheduler, or leave analytic_init out.",
            )
        expectation = statistics.expectation.to(noise)
        sizes = zip(expectation.shape[::-1], noise.shape[::-1], strict=False)
        if expectation.ndim > noise.ndim or any(own not in (1, size) for own, size in sizes):
            raise ShapeError(
                f"The mean of the latents has shape {list(expectation.shape)}; expected "
                f"{[1, *noise.shape[1:]]}, as this video's.",
                fix="use the statistics of videos of this size and length.",
            )
        last = self.scheduler.config.num_train_timesteps if start_step is None else start_step
        return self.scheduler.analytic_init(
            expectation, variance=statistics.variance, noise=noise, start_step=last
        )

    def set_timesteps(self, num_inference_steps: int, start_step: int | None = None) -> None:
        """Let the scheduler choose the timesteps of a video, as a call does.

        Raises:
            ConfigError: The scheduler has no such steps, or cannot start late.
        """
        options: dict[str, Any] = {} if start_step is None else {"start_step": start_step}
        known = inspect.signature(self.scheduler.set_timesteps).parameters
        if not options.keys() <= known.keys():
            raise ConfigError(
                f"{type(self.scheduler).__name__} cannot start late.",
                fix="use DynamicRescaleDDIMScheduler, or leave start_step out.",
            )
        if not isinstance(self.scheduler, DynamicRescaleDDIMScheduler):
            options["device"] = self._execution_device
        # Ours reads its timesteps on the CPU: on a GPU every look would wait for all that it does.
        self.scheduler.set_timesteps(num_inference_steps, **options)

    def _step_options(
        self, eta: float, generator: torch.Generator | list[torch.Generator] | None
    ) -> dict[str, Any]:
        """Pass on what the scheduler's `step` knows: not every one has `eta`."""
        known = inspect.signature(self.scheduler.step).parameters
        options = {"eta": eta, "generator": generator}
        return {name: value for name, value in options.items() if name in known}

    def _captured_unet(self) -> CapturedUNet | None:
        """The U-Net as it is replayed now; None if it is called."""
        if not self._captures or not can_capture(self.unet):
            self._captured = None
        elif self._captured is None or self._captured.unet is not self.unet:
            self._captured = CapturedUNet(self.unet)
        if self._captured is not None:
            self._captured.refresh()
        return self._captured

    def _predict(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        *,
        context: torch.Tensor,
        context_caches: Sequence[ContextCache],
        frame_rate: float,
        guidance_scale: float,
        guidance_rescale: float,
        captured: CapturedUNet | None,
    ) -> torch.Tensor:
        """Run the U-Net on the halves of guidance, in one call or one by one; combine them."""
        halves = context.to(self.unet.dtype).unbind(1)
        sample = sample.to(self.unet.dtype)
        at_once = self.batches_guidance
        if at_once is None:
            at_once = sample.device.type != "cpu"
        calls = [halves] if at_once or captured is not None else [(half,) for half in halves]
        predictions: list[torch.Tensor] = []
        for parts, context_cache in zip(calls, context_caches, strict=False):
            batch, tokens = torch.cat([sample] * len(parts)), torch.cat(parts)
            if captured is not None:
                predicted = captured(batch, timestep, tokens, frame_rate)
            else:
                predicted = self.unet(
                    batch,
                    timestep,
                    tokens,
                    frame_rate=frame_rate,
                    context_cache=context_cache,
                    return_dict=False,
                )[0]
            predictions += predicted.float().chunk(len(parts))
        if len(predictions) == 1:
            return predictions[0]
        unconditional, conditional = predictions
        return guided_prediction(
            conditional,
            unconditional,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
        )
