"""The flags that `generate` and `batch` share: which model and experts, what videos."""

from __future__ import annotations

import functools
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from motionmerge.cli.lora_flags import LORA_HELP, describe_loras, parse_lora
from motionmerge.cli.merge import parse_inputs, parse_parameters
from motionmerge.cli.options import (
    InputOption,
    MissingOption,
    SetOption,
    expert_option,
    model_option,
    recipe_names,
    video_option,
)
from motionmerge.errors import ConfigError

if TYPE_CHECKING:
    from motionmerge.sampling.request.experts import ExpertChoice
    from motionmerge.sampling.request.model import ModelChoice
    from motionmerge.sampling.request.request import VideoRequest
    from motionmerge.sampling.request.step_plan import StepPlan
    from motionmerge.sampling.videos.settings import VideoSettings

POCKET = "pocket"
_LEFT_OUT = ".*not in the model|.*one side lacks|.*own stays there"  # what --missing keep warns of
_of_the_model = functools.partial(video_option, metavar="NUMBER", show_default="model's own")


@dataclass(frozen=True, kw_only=True)
class VideoFlags:
    """What the command line says of a model, its experts and its videos; a field is a flag."""

    model: Annotated[
        str,
        model_option(
            metavar="MODEL", help="A diffusers folder, a hub id such as owner/name, or pocket."
        ),
    ] = POCKET
    variant: Annotated[
        str | None,
        model_option(metavar="NAME", help="Which of the model's weight files to take, e.g. fp16."),
    ] = None
    legacy_weights: Annotated[
        bool, model_option("--legacy-weights", help="Also read the model's .bin files, as tensors.")
    ] = False
    dtype: Annotated[
        Literal["fp32", "fp16", "bf16"] | None,
        model_option(
            help="Number format that the model computes in.",
            show_default="bf16 on a GPU, fp32 on a CPU",
        ),
    ] = None
    device: Annotated[
        str | None,
        model_option(
            metavar="DEVICE", help="cpu, cuda, cuda:1 ..", show_default="a GPU if there is one"
        ),
    ] = None
    motion: Annotated[
        float | None,
        expert_option(
            metavar="NUMBER",
            help="The knob, which is the recipe's parameter motion: how far to extrapolate away "
            "from the fine-tuned weights while noisy. 0 is the base's motion, -1 that of the "
            "fine-tuned weights. On pocket it stops at 1: more moves less there. Other models need "
            "--recipe, --base or --lora.",
            show_default="the recipe's own; for pocket 1",
        ),
    ] = None
    base: Annotated[
        Path | None,
        expert_option(
            metavar="PATH",
            help="What --model was fine-tuned from, for --motion: a folder or weights file.",
        ),
    ] = None
    lora: Annotated[list[str] | None, expert_option(metavar="FILE[=WEIGHT]", help=LORA_HELP)] = None
    recipe: Annotated[
        str | None,
        expert_option(
            metavar="RECIPE",
            help="A recipe file, or the name of a shipped recipe; `motionmerge recipes` lists "
            "them.",
            show_default="for pocket: pocket",
            autocompletion=recipe_names,
        ),
    ] = None
    changed: SetOption = None
    replaced: InputOption = None
    weights: Annotated[
        str | None,
        expert_option(
            metavar="WEIGHTS",
            help="One set of weights instead: base, tuned, naive, equal, or a merged file.",
        ),
    ] = None
    missing: MissingOption = "error"
    boundary: Annotated[
        float | None,
        expert_option(
            metavar="NUMBER",
            help="Noise level at which the expert changes, 0 to 1.",
            show_default="that of the recipe's schedule",
        ),
    ] = None
    seed: Annotated[
        int,
        video_option(
            metavar="NUMBER", help="Same seed, same video. A manifest's lines can have their own."
        ),
    ] = 0
    num_videos: Annotated[
        int,
        video_option(
            min=1, metavar="NUMBER", help="Videos of each prompt, with seeds from its own on."
        ),
    ] = 1
    negative_prompt: Annotated[
        str | None,
        video_option(metavar="TEXT", help="What should not happen; needs guidance above 1."),
    ] = None
    num_inference_steps: Annotated[
        int | None,
        _of_the_model(
            "--steps", help="Denoising steps: num_inference_steps in a manifest and in Python."
        ),
    ] = None
    guidance_scale: Annotated[
        float | None,
        _of_the_model(
            "--guidance", help="Strength of the prompt: guidance_scale in a manifest and in Python."
        ),
    ] = None
    guidance_scale_2: Annotated[
        float | None,
        video_option(
            "--guidance-2",
            metavar="NUMBER",
            help="The same at low noise, for the second transformer of Wan 2.2-A14B; 1 for "
            "distilled weights: guidance_scale_2.",
            show_default="that of --guidance",
        ),
    ] = None
    start_step: Annotated[
        int | None,
        video_option(
            metavar="NUMBER",
            help="Begin at this timestep instead of 1000: from 900 on, leans less on the image "
            "and may move more; too low looks bad. Only DynamiCrafter, VideoCrafter and pocket.",
        ),
    ] = None
    image_guidance_scale: Annotated[
        float | None,
        video_option(
            "--image-guidance",
            metavar="NUMBER",
            help="Strength of the first frame, for ConsistI2V: image_guidance_scale.",
            show_default="1",
        ),
    ] = None
    frame_stride: Annotated[
        float | None,
        video_option(
            metavar="NUMBER",
            help="Frames between two of the video, as told to ConsistI2V: 1 to 5 were trained, "
            "and larger means more motion.",
            show_default="3",
        ),
    ] = None
    sigmas: Annotated[
        str | None,
        video_option(
            metavar="A,B,C",
            help="The noise of each step, falling, without the 0 at the end; for pipelines "
            "that take sigmas. The scheduler's shift is applied to them.",
        ),
    ] = None
    shift: Annotated[
        float | None,
        video_option(
            metavar="NUMBER",
            help="Shift of a flow model's timesteps, for this run: the larger, the more steps "
            "are made while it is noisy.",
            show_default="the scheduler's own",
        ),
    ] = None
    size: Annotated[
        int | None, video_option(metavar="NUMBER", help="Pixels a side, for a square video.")
    ] = None
    height: Annotated[int | None, _of_the_model(help="Pixels.")] = None
    width: Annotated[int | None, _of_the_model(help="Pixels.")] = None
    num_frames: Annotated[int | None, _of_the_model(help="Frames.")] = None
    frame_rate: Annotated[
        float | None,
        _of_the_model(
            help="Frames per second of the mp4; models that know frame rates are told it."
        ),
    ] = None

    @functools.cached_property
    def request(self) -> VideoRequest:
        """What the flags ask for in Python's words."""
        from motionmerge.sampling.request.experts import WeightedLora
        from motionmerge.sampling.request.request import VideoRequest

        loras = map(parse_lora, self.lora or ())
        return VideoRequest(
            **self._shared_with(field.name for field in fields(VideoRequest)),
            legacy=self.legacy_weights,
            parameters=parse_parameters(self.changed, None),
            inputs=parse_inputs(self.replaced or []),
            loras=[WeightedLora(file, own[0], own[-1]) if own else file for file, own in loras],
        )

    def _shared_with(self, names: Iterable[str]) -> dict[str, Any]:
        """Return the flags that are called so in Python as well."""
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def chosen_experts(self, model: ModelChoice) -> ExpertChoice:
        """Find the weights that denoise; print each LoRA's, and warn of what is left out."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", _LEFT_OUT)
            choice = self.request.open_experts(model)
        loras = self.request.weighted_loras()
        for line in describe_loras(loras, boundary=self.boundary):
            typer.echo(line, err=True)
        for warning in caught:
            if re.match(_LEFT_OUT, str(warning.message)):
                typer.echo(f"Warning: {warning.message}", err=True)
        return choice

    def settings(self) -> VideoSettings:
        """Gather what the flags say of every video."""
        from motionmerge.sampling.videos.settings import VideoSettings

        if self.size is not None and (self.height is not None or self.width is not None):
            raise ConfigError(
                "--size was given with --height or --width.", fix="Give --size, or the other two."
            )
        given = self._shared_with(VideoSettings.model_fields)
        if self.size is not None:
            given |= {"height": self.size, "width": self.size}
        if self.sigmas is not None:
            given |= {"sigmas": parse_sigmas(self.sigmas)}
        return VideoSettings(**given)


def parse_sigmas(text: str) -> tuple[float, ...]:
    """Read A,B,C.

    Raises:
        ConfigError: One of them is no number.
    """
    try:
        return tuple(float(one) for one in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"--sigmas {text} holds what is no number.", fix="Write e.g. --sigmas 1,0.94,0.8,0.5."
        ) from error


class StepPlanner:
    """Plans which expert denoises which steps, and says it once for all videos that are alike."""

    def __init__(self, model: ModelChoice, experts: ExpertChoice) -> None:
        self._model, self._experts = model, experts
        self._scheduler = model.scheduler()
        self._plans: dict[VideoSettings, StepPlan | None] = {}
        self._counts: Counter[StepPlan] = Counter()

    def add(self, settings: VideoSettings) -> None:
        """Plan one video.

        Raises:
            ConfigError: The scheduler does not heed its settings, or has no noise levels.
        """
        own = settings.changed(prompt=None, negative_prompt=None, seed=0)  # they decide no steps
        own = own.resolved(self._model.family, self._model.limits)
        if own not in self._plans:
            self._plans[own] = self._experts.plan_steps(self._model, self._scheduler, own)
        plan = self._plans[own]
        if plan is not None:
            self._counts[plan] += 1

    def lines(self) -> list[str]:
        """Return which expert denoises which steps, a line for each plan and its noise levels."""
        found: list[str] = []
        for plan, count in self._counts.items():
            videos = f" ({count} videos)" if len(self._counts) > 1 else ""
            found.append(f"{plan.line}{videos}")
            found += [] if plan.sigmas is None else [plan.sigmas]
        return found

    def show(self) -> None:
        """Print the steps of each expert, and warn of those without any, on stderr."""
        for line in self.lines():
            typer.echo(line, err=True)
        self.warn()

    def warn(self) -> None:
        """Print a warning of each expert without any step, on stderr."""
        from motionmerge.switching.denoising_steps import UnusedExpertWarning

        for plan in self._counts:
            if plan.warning is not None:
                typer.echo(f"warning: {plan.warning}", err=True)
        if self._counts:  # told already
            warnings.filterwarnings("ignore", category=UnusedExpertWarning)


@contextmanager
def loaded(
    model: ModelChoice, experts: ExpertChoice, *, encode: Callable[[Any], None] | None = None
) -> Iterator[tuple[Any, Any]]:
    """Load a model, attach its experts; give the pipeline and the bank, which may be None.

    Args:
        model: The model.
        experts: Which weights denoise.
        encode: Called with the pipeline before experts take their part of the memory.
    """
    pipeline = load_model(model, encode=encode)
    with without_left_out():
        attached = experts.attach(pipeline)
    with attached as bank:
        if bank is not None and bank.placement and model.path is not None:
            typer.echo(f"experts of {bank.placement}", err=True)
        yield pipeline, bank


def load_model(model: ModelChoice, *, encode: Callable[[Any], None] | None = None) -> Any:
    """Load a model and return its pipeline; print where it is, unless it is the pocket model."""
    from motionmerge.sampling.request.loading import hide_loading_bars, show_progress

    is_quiet = model.path is None or not sys.stderr.isatty()
    if is_quiet:
        hide_loading_bars()
    pipeline, placement = model.load(encode)
    show_progress(pipeline, is_quiet=is_quiet)
    if model.path is not None:
        typer.echo(placement, err=True)
    return pipeline


@contextmanager
def without_left_out() -> Iterator[None]:
    """Print no warning of what `--missing keep` leaves out: it was said when it was checked."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _LEFT_OUT)
        yield
