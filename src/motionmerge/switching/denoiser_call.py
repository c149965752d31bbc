"""One call of a denoiser with knobs in force: its passes run, changed, added, left out, combined.

u(I) + g (c(L I) - u(L I))     filtered images, ALG (arXiv 2506.08456)
u + g (c - u)                  otherwise; at g = 1 c alone, without the pass u

A pipeline combines what it is given by its own scale. It is given such c and u that the wanted
result comes out: for a scale of ours, both are that result.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FrameType

import torch
from diffusers.utils import BaseOutput
from torch import nn

from motionmerge.errors import ConfigError
from motionmerge.knobs import FirstFrame
from motionmerge.models.diffusers_state import has_cache
from motionmerge.models.video_pipeline import Config
from motionmerge.schedule import ExpertSchedule
from motionmerge.switching.condition_image import Arguments, BesideLatents, sample_of
from motionmerge.switching.denoising_steps import Moment
from motionmerge.switching.image_functions import (
    amplitude_of,
    filtered,
    filters_anything,
    motion_amplitude,
    noisy,
)
from motionmerge.switching.knob_families import (
    ATTENTION,
    KnobFamily,
    check_knobs,
    knob_family,
    wanted_knobs,
)
from motionmerge.switching.watched_call import WatchedCall

Forward = Callable[[Arguments], object]
"""Calls a denoiser as it is, and returns what it does: a tuple or an object with a `sample`."""

_EVERY_ROW = slice(None)


@dataclass(kw_only=True)
class _FirstPass:
    """The conditional pass of a step, whose unconditional one has not come yet.

    Attributes:
        run: That of the pipeline, see `DenoiserCalls`.
        needs_second: Whether the schedule guides this step.
        is_promised: Whether the pipeline said that it guides, so that only an error between the two
            passes can have kept the second away.
    """

    run: object
    sample: torch.Tensor
    timestep: float
    output: object
    needs_second: bool
    is_promised: bool

    def is_of_step(
        self, run: object, timestep: float, sample: torch.Tensor, *, guides: bool | None
    ) -> bool:
        """Check whether a call is the second of the same step.

        Args:
            run: That of the call.
            timestep: Of the call.
            sample: Of the call; some pipelines cast it anew for each pass.
            guides: Whether the pipeline runs a second pass; None if it does not tell.
        """
        if guides is False or run is not self.run or timestep != self.timestep:
            return False
        is_equal = sample.shape == self.sample.shape and torch.equal(sample, self.sample)
        return sample is self.sample or (guides is True and is_equal)


@dataclass(kw_only=True)
class DenoiserCalls:
    """Carries out the knobs of a schedule in the calls of a pipeline's denoisers.

    Runs of the pipeline are told apart by their timesteps, which the scheduler makes anew.

    Attributes:
        pipeline: Whose denoisers; its scale of guidance is read, never written.
        family: What their calls look like.
        wanted: Which of `KNOBS` there are.
    """

    pipeline: object
    family: KnobFamily
    wanted: list[str]
    _first: _FirstPass | None = None
    _run_of: object = None
    _is_batch_of_two: bool | None = None
    _watched: list[WatchedCall] = field(default_factory=list)

    @classmethod
    def of(cls, target: object, schedule: ExpertSchedule) -> DenoiserCalls:
        """Look at a pipeline, and refuse what it cannot do.

        Raises:
            ConfigError: It lacks a knob of the schedule, is a bare denoiser, or guides in another
                way than that of all.
        """
        if isinstance(target, nn.Module):
            raise ConfigError(
                "The schedule sets more than experts, for which a pipeline's passes must be known.",
                fix="Pass the pipeline instead of its denoiser, or leave these settings out.",
            )
        for name in ("guider", "guider_2"):
            guider = getattr(target, name, None)
            if guider is not None and type(guider).__name__ != "ClassifierFreeGuidance":
                raise ConfigError(
                    f"`{name}` is a {type(guider).__name__}, whose passes are combined in another "
                    "way than the schedule's settings expect.",
                    fix="Use ClassifierFreeGuidance, or leave these settings out.",
                )
        family = knob_family(type(target).__name__, _configs(target))
        check_knobs(schedule, family)
        return cls(pipeline=target, family=family, wanted=wanted_knobs(schedule))

    def watch(
        self,
        name: str,
        module: nn.Module,
        *,
        signature: inspect.Signature,
        before: Callable[[Arguments], Moment],
    ) -> WatchedCall:
        """Carry out all calls of a denoiser from now on, until `remove` of what is returned.

        Args:
            name: Its name in the pipeline.
            module: The denoiser.
            signature: Of its `forward`.
            before: Puts the experts of a call in place, and returns what is in force.

        Raises:
            ConfigError: The denoiser would not heed the knobs, or its scheduler does not go with
                them.
        """
        if self.family.attention is not None and ATTENTION in self.wanted:
            self.family.attention.check(name, module)

        def run(*args: object, **kwargs: object) -> object:
            bound = signature.bind(module, *args, **kwargs)
            given = dict(list(bound.arguments.items())[1:])
            moment = before(given)
            self._look_at_run()

            def call(arguments: Arguments) -> object:
                bound.arguments.update(arguments)
                return watched.plain(*bound.args[1:], **bound.kwargs)

            if moment.entry.knobs:
                return self._run(module, given, moment, call)
            self._check_second_came()
            return watched.plain(*args, **kwargs)

        watched = WatchedCall(module, run)
        self._watched.append(watched)
        return watched

    def check_finished(self) -> None:
        """Refuse what kept knobs from acting until the experts were detached.

        Raises:
            ConfigError: The last call had guidance and no second pass, or a denoiser was compiled
                meanwhile.
        """
        self._run_of = None
        self._check_second_came()
        if any(one.is_replaced for one in self._watched):
            raise ConfigError(
                "A denoiser was compiled while the schedule's settings were attached, and has not "
                "heeded them since.",
                fix="Compile it before the `with experts(...)` block.",
            )

    def _look_at_run(self) -> None:
        """Note whether a run that begins has batches of two passes: its scale may change later."""
        run = getattr(getattr(self.pipeline, "scheduler", None), "timesteps", None)
        if run is not self._run_of:
            self._run_of, self._is_batch_of_two = run, _guides(self.pipeline, self.family)

    def _check_second_came(self) -> None:
        """Refuse guidance that the pipeline had no second pass for.

        Raises:
            ConfigError: The last call with knobs was such a one.
        """
        first, self._first = self._first, None
        if first is None or not first.needs_second:
            return
        if first.run is self._run_of or not first.is_promised:
            raise no_second_pass()

    def _run(self, module: nn.Module, given: Arguments, moment: Moment, call: Forward) -> object:
        if has_cache(module):
            raise ConfigError(
                "The denoiser has one of diffusers' caches, which expects the plain passes.",
                fix="Call disable_cache() of the denoiser, or leave all but experts out of the "
                "schedule.",
            )
        if not _is_running(self.pipeline):
            raise ConfigError(
                f"A denoiser is called by something else than its {type(self.pipeline).__name__}, "
                "so that its passes are unknown.",
                fix="Attach the experts to the pipeline that is called, or leave all but experts "
                "out of the schedule.",
            )
        run = _Run(
            family=self.family, pipeline=self.pipeline, module=module, moment=moment, call=call
        )
        if self.family.passes == "batched":
            assert self._is_batch_of_two is not None
            has_two = self._is_batch_of_two and not self.family.is_conditional(given)
            return run.batched(given, is_guided=has_two)
        guides = _guides(self.pipeline, self.family)
        if getattr(getattr(self.pipeline, "scheduler", None), "order", 1) > 1:
            raise ConfigError(
                "The scheduler calls the denoiser several times a step, so that the passes of "
                "guidance cannot be told apart.",
                fix="Use a scheduler of one call a step, or only experts in the schedule.",
            )
        first, sample, own = self._first, sample_of(given), self._run_of
        if first is not None and first.is_of_step(own, moment.timestep, sample, guides=guides):
            self._first = None
            return run.second(given, first.output)
        self._check_second_came()
        needs_second = (moment.entry.guidance or 1) > 1
        if needs_second and guides is False:
            raise no_second_pass()
        output = run.first(given)
        self._first = _FirstPass(
            run=own,
            sample=sample,
            timestep=moment.timestep,
            output=output,
            needs_second=needs_second,
            is_promised=guides is True,
        )
        return output


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The passes of one call."""

    family: KnobFamily
    pipeline: object
    module: nn.Module
    moment: Moment
    call: Forward

    @property
    def guidance(self) -> float | None:
        return self.moment.entry.guidance

    @property
    def adds_pass(self) -> bool:
        """Whether u(L I) is computed beside u(I)."""
        knobs, x = self.moment.entry.image, self.moment.x
        return self.guidance != 1 and filters_anything(knobs, x=x)

    def first(self, given: Arguments) -> object:
        """Run the conditional pass of a pipeline that runs the unconditional one after it."""
        return self._conditional(self._with_image(given, filters=_EVERY_ROW), _EVERY_ROW)

    def second(self, given: Arguments, first: object) -> object:
        """Run the unconditional pass, if it is needed, and combine both."""
        if self.guidance == 1:
            return first
        output = self.call(self._with_image(given))
        c, u = prediction_of(first), prediction_of(output)
        wanted = c
        if self.adds_pass:
            filtered_u = self.call(self._with_image(given, filters=_EVERY_ROW))
            wanted = c + (u - prediction_of(filtered_u))
        if self.guidance is None:
            c.copy_(wanted)
            return output
        c.copy_(u + self.guidance * (wanted - u))
        return first

    def batched(self, given: Arguments, *, is_guided: bool) -> object:
        """Run both passes of a pipeline that has them in one batch; one where it does not guide."""
        if not is_guided:
            if (self.guidance or 1) > 1:
                raise no_second_pass()
            return self.first(given)
        half = len(sample_of(given)) // 2
        rows = slice(half, None)
        if self.guidance == 1 and self.family.is_cut_by_rows:
            kept = _half(given, rows, of=2 * half)
            return _doubled(self.first(kept))
        output = self._conditional(self._with_image(given, filters=rows), rows)
        prediction = prediction_of(output)
        u, c = (prediction.float() if self.family.combines_in_fp32 else prediction).chunk(2)
        if self.adds_pass:
            c = c + (u - self._filtered_u(_half(given, slice(half), of=2 * half), u))
        if self.guidance == 1:
            u = c
        elif self.guidance is not None:
            u = c = u + self._scale(self.guidance, u) * (c - u)
        return _with_prediction(output, torch.cat([u, c]))

    def _filtered_u(self, given: Arguments, u: torch.Tensor) -> torch.Tensor:
        """Return u(L I), which is u(I) where the unconditional pass sees no image."""
        assert self.family.image is not None
        plain = self._with_image(given)
        changed = self._with_image(given, filters=_EVERY_ROW)
        if torch.equal(self.family.image.read(plain), self.family.image.read(changed)):
            return u
        return prediction_of(self.call(changed)).to(u.dtype)

    def _scale(self, guidance: float, like: torch.Tensor) -> float | torch.Tensor:
        """Return guidance, or for each frame of `[batch, frames, ...]` its own."""
        if not self.family.ramps_guidance:
            return guidance
        ramp = torch.linspace(1, guidance, like.shape[1]).to(like)
        return ramp.reshape(1, -1, *[1] * (like.ndim - 2))

    def _conditional(self, arguments: Arguments, rows: slice) -> object:
        """Call the denoiser with a bias on the attention of some rows."""
        knob = self.moment.entry.attention
        if not isinstance(knob, FirstFrame):
            return self.call(arguments)
        assert self.family.attention is not None
        with self.family.attention.biased(self.module, knob.bias, arguments, rows=rows):
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
        config = _configs(self.pipeline)["vae"]
        mean, std = (
            torch.tensor(config[name]).reshape(1, -1, 1, 1, 1).to(image)
            for name in ("latents_mean", "latents_std")
        )
        return (motion_amplitude(image * std + mean, amplitude) - mean) / std


def prediction_of(output: object) -> torch.Tensor:
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
    return _with_prediction(output, torch.cat([prediction_of(output)] * 2))


def _with_prediction(output: object, prediction: torch.Tensor) -> object:
    """Return what a denoiser returned with another prediction."""
    if isinstance(output, tuple):
        return (prediction, *output[1:])
    assert isinstance(output, BaseOutput)
    output["sample"] = prediction
    return output


def _is_running(pipeline: object) -> bool:
    """Check whether a pipeline is being called.

    Only then is its scale that of this run, not of one before: pipelines may share denoisers.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        # Reading the locals of a frame keeps their values alive: only of frames that may be it.
        is_call = frame.f_code.co_name == "__call__"
        if is_call and frame.f_locals.get("self") is pipeline:
            return True
        frame = frame.f_back
    return False


def _guides(pipeline: object, family: KnobFamily) -> bool | None:
    """Return whether a pipeline runs an unconditional pass now; None if it does not tell."""
    guider = getattr(pipeline, "guider", None)
    if guider is not None:
        return bool(guider.num_conditions > 1)
    if family.scale is not None:
        scale = getattr(pipeline, family.scale, None)
        return None if scale is None else bool(scale > 1)
    found = getattr(pipeline, "do_classifier_free_guidance", None)
    return None if found is None else bool(found)


def _configs(pipeline: object) -> dict[str, Config]:
    """Read the configurations of a loaded pipeline's parts, and its own."""
    parts: dict[str, object] = {"": pipeline, **getattr(pipeline, "components", {})}
    configs = {name: getattr(part, "config", None) for name, part in parts.items()}
    return {name: dict(one) for name, one in configs.items() if isinstance(one, Mapping)}


def no_second_pass() -> ConfigError:
    """Return the error for guidance in a call that began without any."""
    return ConfigError(
        "Guidance above 1 is set for a step, in a call that began without any: there is no "
        "unconditional pass.",
        fix="Ask the pipeline for guidance: a guidance scale above 1 (of Hunyuan, true_cfg_scale "
        "and a negative prompt).",
    )
