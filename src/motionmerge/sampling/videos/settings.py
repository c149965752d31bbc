"""The settings of a video: each is declared once, with its range and its other names."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from motionmerge.config import FrozenModel
from motionmerge.errors import ConfigError
from motionmerge.sampling.families.limits import Limits, VideoFamily


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is particular to a setting.

    Attributes:
        least, most: What any model could make; its family knows better.
        also: Names that the command line and other tools have for it; they are not accepted here.
        came_later: It is not written where it is None, so that the names of older videos of a
            batch, which hold a hash of all settings, stay as they are.
        is_argument: It is an argument of pipelines under its own name.
    """

    least: float = -math.inf
    most: float = math.inf
    also: tuple[str, ...] = ()
    came_later: bool = False
    is_argument: bool = False


_SIDE = Setting(least=1, most=2**16)
_MOST_STEPS = 1000


class VideoSettings(FrozenModel):
    """What happens in a video and how it is made; None leaves a setting to the model.

    Attributes:
        prompt: What happens; None for models without prompts.
        seed: Same seed, same video; 0 to 2**63 - 1.
        negative_prompt: What should not happen.
        height, width: In pixels.
        num_frames: Length.
        frame_rate: Frames per second, told to models that know frame rates.
        num_inference_steps: Denoising steps.
        guidance_scale: Strength of the prompt.
        guidance_scale_2: The same while there is little noise, for Wan 2.2-A14B, whose second
            transformer denoises then; by default `guidance_scale`.
        start_step: Where denoising begins, of 1000 timesteps, for DynamiCrafter and the pocket
            model: below 1000 they lean less on the image; see `DynamiCrafterPipeline.__call__`.
        image_guidance_scale: Strength of the first frame, for ConsistI2V.
        frame_stride: Frames of the training videos between two of this one, for ConsistI2V: larger
            means more motion.
        sigmas: The noise of each step from the first on, instead of the scheduler's own, without
            the 0 at the end; for pipelines that take `sigmas`. A shift is applied to them.
        shift: Of the scheduler's timesteps, instead of its own: a larger one has more steps while
            it is noisy. For flow models whose shift does not follow from the video's size.

    Raises:
        ConfigError: A number is out of range, or a text is not valid Unicode.
    """

    prompt: str | None = None
    seed: Annotated[int, Setting(least=0, most=2**63 - 1)] = 0
    negative_prompt: Annotated[str | None, Setting(also=("negative",))] = None
    height: Annotated[int | None, _SIDE] = None
    width: Annotated[int | None, _SIDE] = None
    num_frames: Annotated[int | None, Setting(least=1, most=2**16, also=("frames",))] = None
    frame_rate: Annotated[float | None, Setting(also=("fps",))] = None
    num_inference_steps: Annotated[
        int | None, Setting(least=1, most=_MOST_STEPS, also=("steps",))
    ] = None
    guidance_scale: Annotated[float | None, Setting(least=0, most=1000, also=("guidance",))] = None
    guidance_scale_2: Annotated[
        float | None,
        Setting(least=0, most=1000, also=("guidance_2",), came_later=True, is_argument=True),
    ] = None
    start_step: Annotated[
        int | None, Setting(least=1, most=1000, came_later=True, is_argument=True)
    ] = None
    image_guidance_scale: Annotated[
        float | None,
        Setting(least=0, most=1000, also=("image_guidance",), came_later=True, is_argument=True),
    ] = None
    frame_stride: Annotated[
        float | None, Setting(least=0.01, most=1000, came_later=True, is_argument=True)
    ] = None
    sigmas: Annotated[tuple[float, ...] | None, Setting(came_later=True)] = None
    shift: Annotated[float | None, Setting(least=0.01, most=100, came_later=True)] = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_names(cls, data: Any) -> Any:
        other = {also: name for name, one in table().items() for also in one.also}
        for name in data.keys() & other.keys() if isinstance(data, dict) else ():
            raise ConfigError(
                f"{cls.__name__} has no setting `{name}`.",
                fix=f"Write `{other[name]}` instead of `{name}`.",
            )
        return data

    @model_serializer(mode="wrap")
    def _leave_later_settings_out(self, write: SerializerFunctionWrapHandler) -> dict[str, object]:
        values: dict[str, object] = write(self)
        later = {name for name, one in table().items() if one.came_later}
        return {k: v for k, v in values.items() if k not in later or v is not None}

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: object, info: ValidationInfo) -> object:
        is_text = info.field_name in ("prompt", "negative_prompt")
        if (
            isinstance(value, bool)
            and info.field_name in VideoSettings.model_fields
            and not is_text
        ):
            raise ConfigError(
                f"{info.field_name} is {value}, which is no number.",
                fix=f"Write a number for `{info.field_name}`.",
            )
        return value

    @field_validator("*")
    @classmethod
    def _refuse_what_is_out_of_range(cls, value: object, info: ValidationInfo) -> object:
        name = info.field_name or ""
        own = table().get(name, Setting())
        if not isinstance(value, (int, float)) or math.isinf(own.least):
            return value
        if not own.least <= value <= own.most:
            several = "; the seeds of several videos count up from the first"
            raise ConfigError(
                f"{name} is {value}; expected {own.least} to {own.most}.",
                fix=f"Use a value of `{name}` in between{several if name == 'seed' else ''}.",
            )
        return value

    @field_validator("sigmas")
    @classmethod
    def _refuse_sigmas_that_do_not_fall(
        cls, sigmas: tuple[float, ...] | None
    ) -> tuple[float, ...] | None:
        if sigmas is None:
            return None
        if not 1 <= len(sigmas) <= _MOST_STEPS:
            raise ConfigError(
                f"Sigmas has {len(sigmas)} values; expected 1 to {_MOST_STEPS}.",
                fix="Write one for each step, e.g. 1,0.94,0.8,0.5.",
            )
        if len(sigmas) > 1 and sigmas[-1] == 0:
            raise ConfigError(
                "Sigmas ends with 0, which is after the last step and added by itself.",
                fix="Leave the 0 at the end out.",
            )
        for before, here in zip((math.inf, *sigmas), sigmas, strict=False):
            if not (math.isfinite(here) and 0 < here < before):
                raise ConfigError(
                    f"Sigmas has {here:g} after {before:g}: they must fall, and stay above 0."
                    if math.isfinite(before)
                    else f"Sigmas begins with {here:g}: they must be finite and above 0.",
                    fix="Write falling values such as 1,0.94,0.8,0.5.",
                )
        return sigmas

    @field_validator("*")
    @classmethod
    def _refuse_broken_text(cls, value: object, info: ValidationInfo) -> object:
        try:
            if isinstance(value, str):
                value.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"{info.field_name} has a broken character at position {error.start}: {value!r}.",
                fix="Write the text in UTF-8, without lone surrogates.",
            ) from error
        return value

    def changed(self, **settings: object) -> VideoSettings:
        """Return the same settings but for some.

        Raises:
            ConfigError: There is no such setting, or it has no such value.
        """
        kept = {name: getattr(self, name) for name in VideoSettings.model_fields}
        return VideoSettings.model_validate({**kept, **settings})

    def resolved(self, family: VideoFamily, limits: Limits) -> VideoSettings:
        """Fill in what the model does by itself, as far as we know it."""
        own: dict[str, object] = {
            "height": limits.height,
            "width": limits.width,
            "num_frames": limits.num_frames,
            "num_inference_steps": len(self.sigmas or ()) or family.num_inference_steps,
            "guidance_scale": family.guidance_scale,
        }
        return self.changed(
            **{name: value for name, value in own.items() if getattr(self, name) is None}
        )


@functools.cache
def table() -> dict[str, Setting]:
    """Return what is particular to each setting, by its name."""
    return {
        name: one
        for name, field in VideoSettings.model_fields.items()
        for one in field.metadata
        if isinstance(one, Setting)
    }
