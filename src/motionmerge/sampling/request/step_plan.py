"""The timesteps that a pipeline will use, known before it is loaded; other sigmas and shifts.

Numbers are those of the pipelines of diffusers 0.42: each asks its scheduler for timesteps in a way
of its own, some with a shift that follows from the video's size.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from motionmerge.errors import ConfigError
from motionmerge.models.video_pipeline import Scheduler, VideoPipeline
from motionmerge.noise_levels import denoises_in_stages, is_flow, level_of_step
from motionmerge.sampling.families.known_limits import CHUNK, video_compression
from motionmerge.sampling.families.limits import Configs
from motionmerge.sampling.videos.settings import VideoSettings
from motionmerge.schedule import ExpertSchedule
from motionmerge.switching.denoising_steps import (
    describe_steps,
    labels_of_steps,
    unused_entries,
)

_OWN_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")

_REFUSALS = (ValueError, TypeError, LookupError, ArithmeticError, AssertionError, AttributeError)
"""Errors with which schedulers refuse timesteps."""


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The expert of each denoising step.

    Attributes:
        line: `steps 1-3 of 8: dynamics, 4-8: consistency`, or why that is not known yet.
        warning: Which expert gets no step; None if all do.
        sigmas: What the scheduler makes of the sigmas that were given, if it changes them.
        experts, levels: What is in force in each step, and its noise level, where they are known.
    """

    line: str
    warning: str | None = None
    sigmas: str | None = None
    experts: tuple[str, ...] = ()
    levels: tuple[float, ...] = ()

    @property
    def text(self) -> str:
        """The line, and the warning behind it."""
        return self.line if self.warning is None else f"{self.line}. {self.warning}"


def shift_setting(scheduler: Scheduler) -> str:
    """Find what a scheduler calls the shift of its timesteps.

    Raises:
        ConfigError: It has none, or one that nothing reads.
    """
    name = type(scheduler).__name__
    config = getattr(scheduler, "config", None) or {}
    known = inspect.signature(type(scheduler).__init__).parameters
    if "flow_shift" in known:
        if config.get("use_flow_sigmas", False):
            return "flow_shift"
        raise ConfigError(
            f"The {name} of this model has a flow_shift for flow models alone, which it is not.",
            fix="Leave `shift` out.",
        )
    if "shift" not in known:
        raise ConfigError(f"The {name} of this model has no shift.", fix="Leave `shift` out.")
    if config.get("use_dynamic_shifting", False):
        raise ConfigError(
            f"The {name} of this model takes its shift from the size of the video "
            "(use_dynamic_shifting).",
            fix="Leave `shift` out, or set use_dynamic_shifting to false in the "
            "model's scheduler_config.json.",
        )
    return "shift"


def with_shift(scheduler: Scheduler, shift: float | None) -> Scheduler:
    """Return the scheduler, or one like it with another shift.

    Raises:
        ConfigError: It has no shift.
    """
    if shift is None:
        return scheduler
    setting = shift_setting(scheduler)
    return type(scheduler).from_config(scheduler.config, **{setting: shift})


@contextmanager
def shifted(pipeline: VideoPipeline, shift: float | None) -> Iterator[None]:
    """Replace the scheduler of a pipeline inside the block by one with another shift.

    Raises:
        ConfigError: Its scheduler has no shift.
    """
    if shift is None:
        yield
        return
    own = pipeline.scheduler
    pipeline.scheduler = with_shift(own, shift)
    try:
        yield
    finally:
        pipeline.scheduler = own


Sigmas = list[float] | npt.NDArray[np.float64]


def sigmas_argument(scheduler: Scheduler, sigmas: tuple[float, ...]) -> Sigmas:
    """Write sigmas as a pipeline with this scheduler takes them.

    Some want the 0 at the end, and HeliosScheduler an array.

    Raises:
        ConfigError: The scheduler makes others of them, or takes none.
    """
    name = type(scheduler).__name__
    config = getattr(scheduler, "config", None) or {}
    made = next((own for own in _OWN_SIGMAS if config.get(own)), None)
    known = inspect.signature(scheduler.set_timesteps).parameters
    if "sigmas" not in known or made is not None or denoises_in_stages(scheduler):
        why = f"makes sigmas of its own ({made})" if made is not None else "takes no sigmas"
        raise ConfigError(f"The {name} of this model {why}.", fix="Leave `sigmas` out.")
    if is_flow(scheduler) and sigmas[0] > 1:
        raise ConfigError(
            f"The sigmas begin at {sigmas[0]:g}, and those of a {name} are noise levels from 1 to "
            "0.",
            fix="Write values from 1 on down, e.g. 1,0.94,0.8,0.5.",
        )
    more: dict[str, float] = {"mu": 1.0} if config.get("use_dynamic_shifting") else {}
    if known["num_inference_steps"].default is inspect.Parameter.empty:
        more["num_inference_steps"] = len(sigmas)
    forms: tuple[Sigmas, ...] = (list(sigmas), [*sigmas, 0.0], np.array(sigmas))
    for written in forms:
        tried = copy.deepcopy(scheduler)
        try:
            tried.set_timesteps(sigmas=written, **more)
        except _REFUSALS:
            continue
        if len(tried.timesteps) == len(sigmas) == len(tried.sigmas) - 1:
            return written
    raise ConfigError(
        f"The {name} of this model cannot take these {len(sigmas)} sigmas.",
        fix="Leave `sigmas` out, and choose the number of steps instead.",
    )


def check_steps(scheduler: Scheduler | None, settings: VideoSettings) -> None:
    """Refuse sigmas and a shift that a scheduler would not heed.

    Raises:
        ConfigError: Names the setting.
    """
    if scheduler is None:
        if settings.shift is None and settings.sigmas is None:
            return
        raise ConfigError(
            "The model has no scheduler whose sigmas or shift could be chosen.",
            fix="Leave `sigmas` and `shift` out.",
        )
    if settings.sigmas is not None:
        sigmas_argument(with_shift(scheduler, settings.shift), settings.sigmas)
    elif settings.shift is not None:
        shift_setting(scheduler)


def plan_steps(
    family: str,
    scheduler: Scheduler | None,
    settings: VideoSettings,
    *,
    schedule: ExpertSchedule | None,
    configs: Configs,
) -> StepPlan | None:
    """Plan what will be in force at which steps; nothing is denoised.

    Args:
        family: Name of the family, whose pipeline asks for timesteps in its own way.
        scheduler: The pipeline's; it is not changed.
        settings: The video, resolved.
        schedule: What is in force when; None where one set of weights denoises all.
        configs: Configurations of the pipeline's parts.

    Returns:
        None if there is nothing to say.

    Raises:
        ConfigError: The scheduler has no noise levels, or does not heed what is asked.
    """
    check_steps(scheduler, settings)
    if schedule is None and settings.sigmas is None:
        return None
    if scheduler is None:
        return StepPlan(line="the steps of each expert are not known before: there is no scheduler")
    planned = copy.deepcopy(with_shift(scheduler, settings.shift))
    reason = _set_timesteps(family, planned, settings, configs)
    if reason is None and denoises_in_stages(planned):
        reason = "the model denoises at several resolutions"
    if reason is not None:
        return StepPlan(line=f"the steps of each expert are not known before: {reason}")
    sigmas = _changed_sigmas(planned, settings)
    if schedule is None:
        return (
            None
            if sigmas is None
            else StepPlan(line="one set of weights for all steps", sigmas=sigmas)
        )
    labels = labels_of_steps(schedule, planned)
    return StepPlan(
        line=describe_steps(labels),
        warning=unused_entries(schedule, planned, labels),
        sigmas=sigmas,
        experts=tuple(labels),
        levels=tuple(level_of_step(planned, index) for index in range(len(labels))),
    )


def _changed_sigmas(scheduler: Scheduler, settings: VideoSettings) -> str | None:
    """Describe what a scheduler made of the sigmas that were given; None if it kept them."""
    if settings.sigmas is None:
        return None
    used = np.asarray(scheduler.sigmas, dtype=np.float64)[: len(settings.sigmas)]
    if np.allclose(used, settings.sigmas, atol=1e-4):
        return None
    numbers = ", ".join(f"{sigma:.4g}" for sigma in used)
    return f"the shift of {type(scheduler).__name__} makes the sigmas {numbers}"


def _set_timesteps(
    family: str, scheduler: Scheduler, settings: VideoSettings, configs: Configs
) -> str | None:
    """Set the timesteps as the pipeline of a family will; return why that is not possible."""
    arguments_of = _ARGUMENTS.get(family)
    if arguments_of is None:
        return f"how a pipeline of {family} asks for its timesteps is not known"
    try:
        scheduler.set_timesteps(**arguments_of(scheduler, settings, configs))
    except _REFUSALS as error:
        return f"{type(scheduler).__name__} says {str(error)[:200]!r}"
    return None


Arguments = Callable[[Scheduler, VideoSettings, Configs], Mapping[str, object]]
"""Returns the arguments of `set_timesteps` that a pipeline passes."""


def _given(scheduler: Scheduler, settings: VideoSettings) -> Sigmas | None:
    return None if settings.sigmas is None else sigmas_argument(scheduler, settings.sigmas)


def _number(settings: VideoSettings) -> int:
    """Return the number of steps, which resolved settings have."""
    assert settings.num_inference_steps is not None
    return settings.num_inference_steps


def _falling_to_one_step(settings: VideoSettings) -> npt.NDArray[np.float64]:
    return np.linspace(1.0, 1 / _number(settings), _number(settings))


def _plain(scheduler: Scheduler, settings: VideoSettings, configs: Configs) -> Mapping[str, object]:
    given = _given(scheduler, settings)
    return {"num_inference_steps": _number(settings)} if given is None else {"sigmas": given}


def _hunyuan(
    scheduler: Scheduler, settings: VideoSettings, configs: Configs
) -> Mapping[str, object]:
    own = np.linspace(1.0, 0.0, _number(settings) + 1)[:-1]
    given = _given(scheduler, settings)
    return {"sigmas": own if given is None else given}


def _ltx(scheduler: Scheduler, settings: VideoSettings, configs: Configs) -> Mapping[str, object]:
    own = _falling_to_one_step(settings)
    given = _given(scheduler, settings)
    temporal, spatial = video_compression(configs)
    tokens = _latent_frames(settings, temporal) * _latent_pixels(settings, spatial)
    return {"sigmas": own if given is None else given, "mu": _shift_of(tokens, scheduler)}


def _motif(scheduler: Scheduler, settings: VideoSettings, configs: Configs) -> Mapping[str, object]:
    vae, model = configs.get("vae", {}), configs.get("transformer", {})
    frames = _latent_frames(settings, vae.get("scale_factor_temporal", 4))
    side = vae.get("scale_factor_spatial", 8) * model.get("patch_size", 2)
    tokens = frames // model.get("patch_size_t", 1) * _latent_pixels(settings, side)
    own = _falling_to_one_step(settings)
    return {"sigmas": own, "mu": _shift_of(tokens, scheduler)}


def _helios(
    scheduler: Scheduler, settings: VideoSettings, configs: Configs
) -> Mapping[str, object]:
    """Shift by the tokens of a chunk, of which a video has several."""
    patch = configs.get("transformer", {}).get("patch_size", (1, 2, 2))
    spatial = configs.get("vae", {}).get("scale_factor_spatial", 8)
    tokens = CHUNK * _latent_pixels(settings, spatial) // math.prod(patch)
    own = np.linspace(0.999, 0.0, _number(settings) + 1)[:-1]
    given = _given(scheduler, settings)
    return {
        "num_inference_steps": _number(settings),
        "sigmas": own if given is None else given,
        "mu": _shift_of(tokens, scheduler),
    }


def _framepack(
    scheduler: Scheduler, settings: VideoSettings, configs: Configs
) -> Mapping[str, object]:
    """Shift by the tokens of a section, of which a video has several; at most by 7."""
    patch = configs.get("transformer", {}).get("patch_size", 2)
    spatial = configs.get("vae", {}).get("spatial_compression_ratio", 8)
    tokens = CHUNK * _latent_pixels(settings, spatial) / patch**2
    mu = min(_shift_of(tokens, scheduler), math.log(7.0))
    return {**_hunyuan(scheduler, settings, configs), "mu": mu}


def _cosmos_2(
    scheduler: Scheduler, settings: VideoSettings, configs: Configs
) -> Mapping[str, object]:
    return {"sigmas": np.linspace(0.0, 1.0, _number(settings))}


def _latent_frames(settings: VideoSettings, temporal: int) -> int:
    return ((settings.num_frames or 1) - 1) // temporal + 1


def _latent_pixels(settings: VideoSettings, spatial: int) -> int:
    return ((settings.height or 0) // spatial) * ((settings.width or 0) // spatial)


def _shift_of(tokens: float, scheduler: Scheduler) -> float:
    """Return `mu`, which is on the line through two numbers of tokens and their shifts."""
    config = scheduler.config
    least: float = config.get("base_image_seq_len", 256)
    most: float = config.get("max_image_seq_len", 4096)
    low: float = config.get("base_shift", 0.5)
    high: float = config.get("max_shift", 1.15)
    slope = (high - low) / (most - least)
    return tokens * slope + (low - slope * least)


def _ours(scheduler: Scheduler, settings: VideoSettings, configs: Configs) -> Mapping[str, object]:
    late = {} if settings.start_step is None else {"start_step": settings.start_step}
    return {"num_inference_steps": _number(settings), **late}


_PLAIN = (
    "consisti2v",
    "svd",
    "i2vgen-xl",
    "cogvideox",
    "wan",
    "skyreels-v2",
    "kandinsky-5",
    "kandinsky-6",
    "anyflow",
    "chronoedit",
    "sana-video",
    "minimax-h3",
)

_ARGUMENTS: dict[str, Arguments] = {
    **dict.fromkeys(_PLAIN, _plain),
    **dict.fromkeys(("hunyuan-video", "hunyuan-video-1.5"), _hunyuan),
    **dict.fromkeys(("ltx", "ltx-2"), _ltx),
    "motif": _motif,
    "helios": _helios,
    "framepack": _framepack,
    "cosmos-2": _cosmos_2,
    **dict.fromkeys(("dynamicrafter", "videocrafter", "pocket"), _ours),
}
"""By the name of the family."""
