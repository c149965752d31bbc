"""The passes of guidance in a call of a denoiser, by what is in force: changed, added, left out.

u(I) + g (c(L I) - u(L I))     filtered images, ALG (arXiv 2506.08456)
u + g (c - u)                  otherwise; at g = 1 c alone, without the pass u

A pipeline combines what it is given by its own scale. It is given such c and u that the wanted
result comes out: for a scale of ours, both are that result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput
from torch import nn

from motionmerge.errors import ConfigError
from motionmerge.models.video_pipeline import Config
from motionmerge.switching.condition_image import Arguments, BesideLatents, sample_of
from motionmerge.switching.denoising_steps import Moment
from motionmerge.switching.image_functions import (
    amplitude_of,
    filtered,
    filters_anything,
    motion_amplitude,
    noisy,
)
from motionmerge.switching.knob_families import KnobFamily

Forward = Callable[[Arguments], object]
"""Calls a denoiser as it is, and returns what it does: a tuple or an object with a `sample`."""

UNITS = ("latents_mean", "latents_std")
"""What the configuration of a VAE calls the units of its latents, which a family may leave out."""

_EVERY_ROW = slice(None)


@dataclass(frozen=True, kw_only=True)
class Passes:
    """The passes of one call of a denoiser.

    Attributes:
        family: What its pipeline's calls look like.
        vae: The configuration of its VAE, which knows the units of the image.
        denoiser: What is called.
        moment: What is in force.
        call: Calls it as it is.
    """

    family: KnobFamily
    vae: Config
    denoiser: nn.Module
    moment: Moment
    call: Forward

    @property
    def guidance(self) -> float | None:
        """The schedule's scale; None where the pipeline's own counts."""
        return self.moment.entry.guidance

    @property
    def needs_second(self) -> bool:
        """Whether the schedule guides, for which the pipeline must run an unconditional pass."""
        return self.guidance is not None and self.guidance > 1

    @property
    def adds_pass(self) -> bool:
        """Whether u(L I) is computed beside u(I), where there is guidance."""
        return filters_anything(self.moment.entry.image, x=self.moment.x)

    def first(self, given: Arguments) -> object:
        """Run the conditional pass of a pipeline that runs the unconditional one after it."""
        return self._conditional(self._with_image(given, filters=_EVERY_ROW), _EVERY_ROW)

    def second(self, given: Arguments, first: object) -> object:
        """Run the unconditional pass, if it is needed, and combine both."""
        if self.guidance == 1:
            return first
        output = self.call(self._with_image(given))
        c, u = _prediction(first), _prediction(output)
        wanted = c
        if self.adds_pass:
            filtered_u = self.call(self._with_image(given, filters=_EVERY_ROW))
            wanted = c + (u - _prediction(filtered_u))
        if self.guidance is None:
            c.copy_(wanted)
            return output
        c.copy_(u + self.guidance * (wanted - u))
        return first

    def batched(self, given: Arguments, *, is_guided: bool) -> object:
        """Run both passes of a pipeline that has them in one batch; one where it does not guide."""
        if not is_guided:
            if self.needs_second:
                raise no_second_pass()
            return self.first(given)
        half = len(sample_of(given)) // 2
        rows = slice(half, None)
        if self.guidance == 1 and self.family.is_cut_by_rows:
            kept = _half(given, rows, of=2 * half)
            return _doubled(self.first(kept))
        output = self._conditional(self._with_image(given, filters=rows), rows)
        prediction = _prediction(output)
        u, c = (prediction.float() if self.family.combines_in_fp32 else prediction).chunk(2)
        if self.guidance == 1:
            return _with_prediction(output, torch.cat([c, c]))
        if self.adds_pass:
            c = c + (u - self._filtered_u(_half(given, slice(half), of=2 * half), u))
        if self.guidance is not None:
            u = c = u + self._scale(self.guidance, u) * (c - u)
        return _with_prediction(output, torch.cat([u, c]))

    def _filtered_u(self, given: Arguments, u: torch.Tensor) -> torch.Tensor:
        """Return u(L I), which is u(I) where the unconditional pass sees no image."""
        assert self.family.image is not None
        plain = self._with_image(given)
        changed = self._with_image(given, filters=_EVERY_ROW)
        if torch.equal(self.family.image.read(plain), self.family.image.read(changed)):
            return u
        return _prediction(self.call(changed)).to(u.dtype)

    def _scale(self, guidance: float, like: torch.Tensor) -> float | torch.Tensor:
        """Return guidance, or for each frame of `[batch, frames, ...]` its own."""
        if not self.family.ramps_guidance:
            return guidance
        ramp = torch.linspace(1, guidance, like.shape[1]).to(like)
        return ramp.reshape(1, -1, *[1] * (like.ndim - 2))

    def _conditional(self, arguments: Arguments, rows: slice) -> object:
        """Call the denoiser with a bias on the attention of some rows."""
        knob = self.moment.entry.attention
        if knob is None:
            return self.call(arguments)
        assert self.family.attention is not None
        with self.family.attention.biased(self.denoiser, knob.bias, arguments, rows=rows):
            return self.call(arguments)

    def _with_image(self, given: Arguments, *, filters: slice | None = None) -> Arguments:
        """Change the image: for all rows what acts on all passes, and filters on some of them."""
        knobs, place = self.moment.entry.image, self.family.image
        if not knobs:
            return given
        assert place is not None
        image = before = place.read(given)
        amplitude = amplitude_of(knobs)
        if amplitude != 1:
            image = self._amplified(image, given, amplitude)
        image = noisy(image, knobs, level=self.moment.level)
        if filters is not None:
            some = filtered(image[filters], knobs, x=self.moment.x)
            image = torch.cat([image[: len(image) - len(some)], some])
        return given if image is before else place.write(given, image)

    def _amplified(self, image: torch.Tensor, given: Arguments, amplitude: float) -> torch.Tensor:
        """Apply motion amplitude in the units of the VAE.

        Raises:
            ConfigError: The video ends with an image of its own, which would be pushed as well.
        """
        assert isinstance(self.family.image, BesideLatents)
        if bool(self.family.image.mask(given)[:, :, 1:].any()):
            raise ConfigError(
                "The knob motion_amplitude() is for a first image alone, and this video has more.",
                fix="Leave the last image out, or motion_amplitude().",
            )
        mean, std = (
            torch.tensor(self.vae[name]).reshape(1, -1, 1, 1, 1).to(image) for name in UNITS
        )
        return (motion_amplitude(image * std + mean, amplitude) - mean) / std


def _prediction(output: object) -> torch.Tensor:
    """Return the prediction in what a denoiser returned."""
    found = output[0] if isinstance(output, tuple) else getattr(output, "sample", None)
    assert isinstance(found, torch.Tensor)
    return found


def _half(given: Arguments, rows: slice, *, of: int) -> Arguments:
    """Return the arguments for some rows of the batch; all tensors of as many rows have them."""

    def cut(value: object) -> object:
        is_batch = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == of
        return value[rows] if is_batch and isinstance(value, torch.Tensor) else value

    return {name: cut(value) for name, value in given.items()}


def _doubled(output: object) -> object:
    """Return the output of half a batch for both halves."""
    return _with_prediction(output, torch.cat([_prediction(output)] * 2))


def _with_prediction(output: object, prediction: torch.Tensor) -> object:
    """Return what a denoiser returned with another prediction."""
    if isinstance(output, tuple):
        return (prediction, *output[1:])
    assert isinstance(output, BaseOutput)
    output["sample"] = prediction
    return output


def no_second_pass() -> ConfigError:
    """Return the error for guidance in a call that began without any."""
    return ConfigError(
        "Guidance above 1 is set for a step, in a call that began without any: there is no "
        "unconditional pass.",
        fix="Ask the pipeline for guidance: a guidance scale above 1 (of Hunyuan, true_cfg_scale "
        "and a negative prompt).",
    )
