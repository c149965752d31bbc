"""Calls of a denoiser with knobs in force: whose run and which pass each of them is.

What a pass then computes is in `denoiser_passes`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FrameType

import torch
from torch import nn

from motionmerge.errors import ConfigError
from motionmerge.models.diffusers_state import has_cache
from motionmerge.models.video_pipeline import Config
from motionmerge.schedule import ExpertSchedule
from motionmerge.switching.condition_image import Arguments, sample_of
from motionmerge.switching.denoiser_passes import UNITS, Passes, no_second_pass
from motionmerge.switching.denoising_steps import Moment
from motionmerge.switching.knob_families import (
    AMPLITUDE,
    ATTENTION,
    KnobFamily,
    check_knobs,
    knob_family,
    wanted_knobs,
)
from motionmerge.switching.watched_call import WatchedCall


@dataclass(frozen=True, kw_only=True)
class _FirstPass:
    """The conditional pass of a step, whose unconditional one has not come yet.

    Attributes:
        run: That of the pipeline, see `DenoiserCalls`.
        sample: The noisy latents of the call.
        timestep: Of the call.
        output: What the denoiser returned.
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
        return sample is self.sample or torch.equal(sample, self.sample)


@dataclass(kw_only=True)
class DenoiserCalls:
    """Carries out the knobs of a schedule in the calls of a pipeline's denoisers.

    Runs of the pipeline are told apart by their timesteps, which the scheduler makes anew.

    Attributes:
        pipeline: Whose denoisers; its scale of guidance is read, never written.
        family: What their calls look like.
        vae: The configuration of its VAE.
        wanted: Which of `KNOBS` there are.
    """

    pipeline: object
    family: KnobFamily
    vae: Config
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
        configs = _configs(target)
        family, vae = knob_family(type(target).__name__, configs), configs.get("vae", {})
        check_knobs(schedule, family)
        wanted = wanted_knobs(schedule)
        if AMPLITUDE in wanted and not vae.keys() >= {*UNITS}:
            raise ConfigError(
                f"The schedule sets {AMPLITUDE}, whose units the pipeline's VAE must know, and it "
                f"has no VAE with {' and '.join(UNITS)}.",
                fix="Load the pipeline with its VAE, or leave motion_amplitude() out.",
            )
        return cls(pipeline=target, family=family, vae=vae, wanted=wanted)

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
        names = [*signature.parameters][1:]

        def run(*args: object, **kwargs: object) -> object:
            bound = signature.bind(module, *args, **kwargs)
            given = dict(list(bound.arguments.items())[1:])
            moment = before(given)
            self._look_at_run()
            if not moment.entry.knobs:
                self._check_second_came()
                return watched.plain(*args, **kwargs)

            def call(arguments: Arguments) -> object:
                bound.arguments.update(arguments)
                own = {**dict(zip(names, bound.args[1:], strict=False)), **bound.kwargs}
                by_place = [own.pop(name) for name in names[: len(args)]]
                return watched.plain(*by_place, **own)  # as the pipeline does: hooks look at it

            self._check_call(module)
            passes = Passes(
                family=self.family,
                vae=self.vae,
                denoiser=module,
                moment=moment,
                call=call,
            )
            return self._carry_out(passes, given)

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

    def check_pipeline(self, pipeline: object) -> None:
        """Refuse a run of another pipeline, which shares the denoiser.

        Raises:
            ConfigError: It is another.
        """
        if pipeline is not self.pipeline:
            raise self._called_by_another()

    def _called_by_another(self) -> ConfigError:
        return ConfigError(
            f"A denoiser is called by something else than its {type(self.pipeline).__name__}, "
            "so that its passes are unknown.",
            fix="Attach the experts to the pipeline that is called, or leave all but experts "
            "out of the schedule.",
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

    def _check_call(self, denoiser: nn.Module) -> None:
        """Refuse a call whose passes are not those of the pipeline, one after the other.

        Raises:
            ConfigError: A cache is on, something else calls, or the scheduler calls several times.
        """
        if has_cache(denoiser):
            raise ConfigError(
                "The denoiser has one of diffusers' caches, which expects the plain passes.",
                fix="Call disable_cache() of the denoiser, or leave all but experts out of the "
                "schedule.",
            )
        if not is_called_by(self.pipeline, denoiser):
            raise self._called_by_another()
        calls = getattr(getattr(self.pipeline, "scheduler", None), "order", 1)
        if calls > 1 and self.family.passes == "separate":
            raise ConfigError(
                "The scheduler calls the denoiser several times a step, so that the passes of "
                "guidance cannot be told apart.",
                fix="Use a scheduler of one call a step, or only experts in the schedule.",
            )

    def _carry_out(self, passes: Passes, given: Arguments) -> object:
        """Run the passes that a call of the pipeline is, and return what it is to get.

        Raises:
            ConfigError: The schedule guides, and the pipeline runs no unconditional pass.
        """
        if self.family.passes == "batched":
            assert self._is_batch_of_two is not None
            has_two = self._is_batch_of_two and not self.family.is_conditional(given)
            return passes.batched(given, is_guided=has_two)
        guides, sample, moment = (
            _guides(self.pipeline, self.family),
            sample_of(given),
            passes.moment,
        )
        first, run = self._first, self._run_of
        if first is not None and first.is_of_step(run, moment.timestep, sample, guides=guides):
            self._first = None
            return passes.second(given, first.output)
        self._check_second_came()
        if passes.needs_second and guides is False:
            raise no_second_pass()
        output = passes.first(given)
        self._first = _FirstPass(
            run=run,
            sample=sample,
            timestep=moment.timestep,
            output=output,
            needs_second=passes.needs_second,
            is_promised=guides is True,
        )
        return output


def is_called_by(pipeline: object, denoiser: nn.Module) -> bool:
    """Check whether a denoiser is called by a pipeline, not by something else that has it as well.

    Only then are its timesteps and passes those of this run. A callback of the pipeline may run
    another one meanwhile, so that the innermost of those which have the denoiser counts.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            caller = _self_of(frame)
            if caller is pipeline:
                return True
            if any(part is denoiser for part in getattr(caller, "__dict__", {}).values()):
                return False
        frame = frame.f_back
    return False


def _self_of(frame: FrameType) -> object:
    """Return the `self` of a call that is under way, without keeping its other values alive."""
    values = frame.f_locals
    found: object = values.get("self")
    # Before Python 3.13 this is a copy that lives as long as the frame, which a debugger or a call
    # of `locals()` may have as well: then there are more references than ours and the frame's.
    if isinstance(values, dict) and sys.getrefcount(values) <= 3:
        values.clear()
    return found


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
