"""The denoising loop, the same for every pipeline of ours: experts, callbacks, schedulers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from diffusers.utils import BaseOutput

from motionmerge.errors import ConfigError
from motionmerge.models.dynamicrafter.scheduler import DynamicRescaleDDIMScheduler
from motionmerge.sampling.pipelines.encoders import EncodingPipeline
from motionmerge.sampling.pipelines.inputs import Frames, video_to_output
from motionmerge.sampling.pipelines.lora_weights import LoraPipeline
from motionmerge.switching.bank import Bank, attached_bank
from motionmerge.switching.denoiser_passes import no_second_pass
from motionmerge.switching.denoising_steps import Moment, start_step_of

Generators: TypeAlias = "torch.Generator | list[torch.Generator] | None"
Latents: TypeAlias = "dict[str, torch.Tensor]"
StepCallback: TypeAlias = "Callable[[DenoisingPipeline, int, torch.Tensor, Latents], Latents]"
"""Sees, and may replace, what a step made: `(pipeline, step, timestep, {"latents": ...})`."""


@dataclass
class VideoPipelineOutput(BaseOutput):  # type: ignore[misc]  # diffusers is untyped here
    """The videos that a pipeline made.

    Attributes:
        frames: For "pil" a list of lists of images; for "pt" `[batch, frames, 3, height, width]`
            and for "np" `[batch, frames, height, width, 3]` in [0, 1]; for "latent"
            `[batch, channels, frames, height, width]`.
    """

    frames: Frames


class VideosToDenoise(Protocol):
    """The videos of one call: all in which the pipelines differ while they denoise."""

    def start(self) -> torch.Tensor:
        """Draw or take the latents that denoising begins with."""

    def predict(
        self, sample: torch.Tensor, timestep: torch.Tensor, moment: Moment | None
    ) -> torch.Tensor:
        """Predict the noise, or whatever the scheduler expects, under guidance.

        Args:
            sample: Latents as the scheduler scales them for the model.
            timestep: The scheduler's.
            moment: What is in force; None without experts.
        """

    def forget(self) -> None:
        """Drop what was kept from step to step, as the weights may have changed."""

    def finish(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the latents of all frames, `[videos, channels, frames, height, width]`."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Turn what `finish` returned into `[videos, frames, 3, height, width]` in [0, 1]."""


class DenoisingPipeline(EncodingPipeline, LoraPipeline):
    """A pipeline of ours. Experts attached with `motionmerge.experts` denoise at their levels.

    As in diffusers' pipelines, who calls back may set `_interrupt` to end after this step, and
    `_guidance_scale` for the steps that follow.
    """

    _callback_tensor_inputs = ("latents",)
    _guidance_scale = 1.0
    _num_timesteps = 0
    _interrupt = False

    @property
    def guidance_scale(self) -> float:
        """Guidance by the prompt in the call under way, or in the last one."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Steps of the call under way, or of the last one."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the steps that are left are skipped."""
        return self._interrupt

    def _denoise(
        self,
        videos: VideosToDenoise,
        *,
        num_inference_steps: int,
        start_step: int | None = None,
        guidance_scale: float,
        eta: float,
        generator: Generators,
        callback_on_step_end: StepCallback | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
        output_type: str,
        return_dict: bool,
    ) -> VideoPipelineOutput | tuple[Frames]:
        """Denoise videos from their start to their frames; the arguments are those of a call."""
        self._guidance_scale, self._interrupt = guidance_scale, False
        latents = videos.start()
        self.set_timesteps(num_inference_steps, start_step)
        self._num_timesteps = len(self.scheduler.timesteps)
        step_options = self._step_options(eta, generator)
        bank = self._bank()
        with self.progress_bar(total=self.num_timesteps) as progress:
            for step, timestep in enumerate(self.scheduler.timesteps):
                if self.interrupt:
                    break
                moment = bank.moment_for(timestep) if bank else None
                sample = self.scheduler.scale_model_input(latents, timestep)
                prediction = videos.predict(sample, timestep, moment)
                latents = self.scheduler.step(
                    prediction, timestep, latents, **step_options, return_dict=False
                )[0]
                if callback_on_step_end is not None:
                    tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                    answer = callback_on_step_end(self, step, timestep, tensors)
                    latents = answer.pop("latents", latents)
                    videos.forget()  # who calls back may have changed the weights
                progress.update()

        made = videos.finish(latents)
        frames = (
            made if output_type == "latent" else video_to_output(videos.decode(made), output_type)
        )
        self.maybe_free_model_hooks()
        return VideoPipelineOutput(frames=frames) if return_dict else (frames,)

    def guidance_at(self, moment: Moment | None) -> float:
        """Return the guidance that the schedule sets for this step; else that of the call."""
        own = moment.entry.guidance if moment else None
        return self.guidance_scale if own is None else own

    def guided_parts(self, parts: torch.Tensor, guidance_scale: float) -> torch.Tensor:
        """Leave the unconditional part out of a step whose guidance is 1 or less.

        Args:
            parts: `[videos, 1 or 2, ...]`; the conditional part is the last one.
            guidance_scale: That of the step.

        Raises:
            ConfigError: The step is guided, and the call began without an unconditional part.
        """
        if guidance_scale <= 1:
            return parts[:, -1:]
        if parts.shape[1] == 1:
            raise no_second_pass()
        return parts

    def set_timesteps(self, num_inference_steps: int, start_step: int | None = None) -> None:
        """Set the scheduler's timesteps of a video, as a call does.

        Raises:
            ConfigError: The scheduler has no such steps, or cannot start late.
        """
        start_step = self._start_step(start_step)
        options: dict[str, object] = {} if start_step is None else {"start_step": start_step}
        known = inspect.signature(self.scheduler.set_timesteps).parameters
        if not options.keys() <= known.keys():
            raise ConfigError(
                f"{type(self.scheduler).__name__} cannot start late.",
                fix="Use DynamicRescaleDDIMScheduler, or leave start_step out.",
            )
        if not isinstance(self.scheduler, DynamicRescaleDDIMScheduler):
            options["device"] = self._execution_device
        # Ours reads its timesteps on the CPU: on a GPU every look would wait for all that it does.
        self.scheduler.set_timesteps(num_inference_steps, **options)

    def _bank(self) -> Bank | None:
        """Return the experts that are attached to the U-Net, if any.

        Raises:
            ConfigError: They have knobs, for another pipeline that shares it.
        """
        bank = attached_bank(self.unet)
        if bank is not None:
            bank.check_pipeline(self)
        return bank

    def _start_step(self, given: int | None) -> int | None:
        """Return where denoising begins: as a call says, or as the schedule of its experts does.

        Raises:
            ConfigError: No timestep has as little noise as the schedule says; or as `_bank`.
        """
        bank = self._bank()
        if given is not None or bank is None:
            return given
        return start_step_of(bank.schedule, self.scheduler)

    def _step_options(self, eta: float, generator: Generators) -> dict[str, object]:
        """Pass on what the scheduler's `step` knows: not every one has `eta`."""
        known = inspect.signature(self.scheduler.step).parameters
        options = {"eta": eta, "generator": generator}
        return {name: value for name, value in options.items() if name in known}
