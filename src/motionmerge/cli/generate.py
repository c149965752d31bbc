"""`motionmerge generate`: from a photo and a prompt to an mp4, with the pocket model or another."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from motionmerge.cli.merge import parse_inputs
from motionmerge.errors import ConfigError, DataError

if TYPE_CHECKING:
    from motionmerge.sampling.expert_choice import ExpertChoice
    from motionmerge.sampling.make_video import VideoSettings
    from motionmerge.sampling.model_choice import ModelChoice

DEFAULT_RECIPE = "pocket"
POCKET = "pocket"

ModelOption = Annotated[
    str,
    typer.Option(help="A diffusers folder, a hub id such as owner/name, or pocket."),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(help="A recipe file or the name of a shipped one. [default for pocket: pocket]"),
]
InputOption = Annotated[
    list[str] | None,
    typer.Option("--input", help="NAME=PATH, instead of the recipe's input; repeatable."),
]
MotionOption = Annotated[
    float | None,
    typer.Option(
        help="The knob: how far to extrapolate away from the fine-tuned weights while noisy. "
        "0.5 moves more, -0.5 calms; replaces the recipe. Other models need --base or --lora."
    ),
]
BaseOption = Annotated[
    Path | None,
    typer.Option(help="What --model was fine-tuned from, for --motion: a folder or weights file."),
]
LoraOption = Annotated[
    list[Path] | None,
    typer.Option(help="A LoRA on the model, with --motion away from it while noisy; repeatable."),
]
WeightsOption = Annotated[
    str | None,
    typer.Option(help="One set of weights instead: base, tuned, naive, equal, or a merged file."),
]
BoundaryOption = Annotated[
    float | None, typer.Option(help="Noise level at which the expert changes, 0 to 1.")
]
NegativeOption = Annotated[str | None, typer.Option(help="What should not happen.")]
StepsOption = Annotated[
    int | None, typer.Option(min=1, max=1000, help="Denoising steps. [default: the model's own]")
]
GuidanceOption = Annotated[
    float | None, typer.Option(min=0, help="Strength of the prompt. [default: the model's own]")
]
SizeOption = Annotated[int | None, typer.Option(help="Pixels a side, for a square video.")]
HeightOption = Annotated[int | None, typer.Option(help="Pixels. [default: the model's own]")]
WidthOption = Annotated[int | None, typer.Option(help="Pixels. [default: the model's own]")]
FramesOption = Annotated[
    int | None, typer.Option("--num-frames", help="Frames. [default: the model's own]")
]
FrameRateOption = Annotated[
    float | None,
    typer.Option(help="Frames per second of the mp4; models that know frame rates are told it."),
]
DtypeOption = Annotated[
    str | None, typer.Option(help="fp32, fp16 or bf16. [default: bf16 on a GPU, fp32 on a CPU]")
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 .. [default: the GPU if there is one]")
]
VariantOption = Annotated[str | None, typer.Option(help="Files of the model to take, e.g. fp16.")]
LegacyOption = Annotated[
    bool, typer.Option("--legacy-weights", help="Also read the model's .bin files, as tensors.")
]


def generate(
    photo: Annotated[Path, typer.Argument(help="The first frame: any image file.")],
    prompt: Annotated[
        str | None,
        typer.Option(
            help='What happens, e.g. "the camera pans left" or "the red ball moves up then left".'
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file of prompts, one a line: a video of each.")
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="The mp4 to write; of several, each has its prompt's number and seed in its name.",
        ),
    ] = Path("out.mp4"),
    model: ModelOption = POCKET,
    motion: MotionOption = None,
    recipe: RecipeOption = None,
    replaced: InputOption = None,
    base: BaseOption = None,
    lora: LoraOption = None,
    weights: WeightsOption = None,
    boundary: BoundaryOption = None,
    seed: Annotated[int, typer.Option(help="Same seed, same video.")] = 0,
    num_videos: Annotated[
        int, typer.Option(min=1, help="Videos of each prompt, with seeds from --seed on.")
    ] = 1,
    negative_prompt: NegativeOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    size: SizeOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    num_frames: FramesOption = None,
    frame_rate: FrameRateOption = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Also write the frames side by side to this PNG.")
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    variant: VariantOption = None,
    legacy_weights: LegacyOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Animate PHOTO as the prompt says: the pocket model needs a CPU, others what they need."""
    from motionmerge.io.video import contact_sheet, load_image, write_video
    from motionmerge.sampling.make_video import make_video

    image = load_image(photo)
    chosen = choose_model(
        model, weights=weights, dtype=dtype, device=device, variant=variant, legacy=legacy_weights
    )
    experts = choose_experts(
        chosen,
        recipe=recipe,
        inputs=parse_inputs(replaced or []),
        motion=motion,
        base=base,
        lora=lora or [],
        weights=weights,
        boundary=boundary,
    )
    common = common_settings(
        seed=seed,
        negative_prompt=negative_prompt,
        steps=steps,
        guidance=guidance,
        size=size,
        height=height,
        width=width,
        num_frames=num_frames,
        frame_rate=frame_rate,
    )
    wanted = [
        (number, replace(common, prompt=text, seed=seed + offset))
        for number, text in enumerate(_prompts(prompt, prompts), start=1)
        for offset in range(num_videos)
    ]
    for _, settings in wanted:
        settings.check(chosen.family, chosen.limits)
    made, rows = [], []
    with loaded(chosen, experts) as (pipeline, _):
        for number, settings in wanted:
            started = time.monotonic()
            video = make_video(pipeline, image, settings)
            path = output
            if len(wanted) > 1:
                path = output.with_stem(f"{output.stem}-{number:02}-seed{settings.seed}")
            about = describe(chosen, experts, settings, weights=weights)
            rate = frame_rate or chosen.limits.frame_rate
            write_video(path, video, fps=rate, metadata={**versions(), **about})
            seconds = round(time.monotonic() - started, 2)
            made.append({"output": str(path), "seconds": seconds, **about})
            if sheet is not None:
                rows.append(video)
            if not as_json:
                frames, _, high, wide = video.shape
                print(
                    f"wrote {path}: {frames} frames of {wide} x {high}, {seconds:.1f} s, "
                    f"seed {settings.seed}"
                )
    if sheet is not None:
        labels = [f"{settings.prompt or ''} (seed {settings.seed})" for _, settings in wanted]
        contact_sheet(rows, labels=labels, every=max(1, len(rows[0]) // 8), path=sheet)
    if as_json:
        print(json.dumps(made if len(made) > 1 else made[0]))


def choose_model(
    name: str,
    *,
    weights: str | None,
    dtype: str | None,
    device: str | None,
    variant: str | None,
    legacy: bool,
) -> ModelChoice:
    """Find the model that --model means; nothing is loaded yet."""
    import torch

    from motionmerge.sampling.loading import default_device, dtype_named
    from motionmerge.sampling.model_choice import FolderModel, ShippedModel
    from motionmerge.sampling.pipeline_folder import find_pipeline

    if name == POCKET:
        given = {"--dtype": dtype, "--device": device, "--variant": variant}
        for flag, value in given.items():
            if value is not None:
                raise ConfigError(f"{flag} is not for the pocket model.", fix="leave it out.")
        return ShippedModel(weights or "base")
    try:
        where = default_device() if device is None else torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"There is no device `{device}`.", fix="use cpu or cuda.") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("There is no GPU that torch can use.", fix="use --device cpu.")
    return FolderModel(
        find_pipeline(name, variant=variant, legacy=legacy),
        None if dtype is None else dtype_named(dtype),
        where,
        variant,
        legacy,
    )


def choose_experts(
    model: ModelChoice,
    *,
    recipe: str | None,
    inputs: Mapping[str, str],
    motion: float | None,
    base: Path | None,
    lora: list[Path],
    weights: str | None,
    boundary: float | None,
) -> ExpertChoice:
    """Turn the flags that say which weights denoise into one choice, and look for its files."""
    from motionmerge.sampling import expert_choice

    given = {"--recipe": recipe, "--motion": motion, "--weights": weights}
    used = [name for name, value in given.items() if value is not None]
    if len(used) > 1:
        raise ConfigError(
            f"{' and '.join(used)} were given together", fix="choose one of the three."
        )
    if lora and (recipe or weights or base):
        raise ConfigError(
            "--lora goes alone or with --motion.", fix="write the LoRA into a recipe instead."
        )
    if base is not None and motion is None:
        raise ConfigError("--base is for --motion.", fix="say how much with --motion, e.g. 0.25.")
    if inputs and recipe is None:
        raise ConfigError("--input replaces a recipe's input.", fix="name the --recipe.")
    if boundary is not None and weights is not None:
        raise ConfigError("--boundary needs experts, not --weights", fix="leave it out.")
    if recipe is not None:
        choice = expert_choice.from_recipe(recipe, inputs=inputs, boundary=boundary)
    elif lora:
        choice = expert_choice.from_loras(lora, motion=motion, boundary=boundary)
    elif motion is not None:
        choice = _turned_knob(model, motion, base=base, boundary=boundary)
    elif weights is not None and model.path is not None:
        choice = expert_choice.from_weights(Path(weights))
    elif weights is None and model.path is None:
        choice = expert_choice.from_recipe(DEFAULT_RECIPE, boundary=boundary)
    else:
        choice = expert_choice.ExpertChoice(boundary=boundary)
    choice.check_inputs()
    return choice


def _turned_knob(
    model: ModelChoice, motion: float, *, base: Path | None, boundary: float | None
) -> ExpertChoice:
    """Extrapolate the pocket model's weights, or another's away from what it was tuned from."""
    from motionmerge.sampling.expert_choice import from_base, from_recipe
    from motionmerge.sampling.pipeline_folder import find_pipeline
    from motionmerge.sampling.pocket_pipeline import knob_recipe

    if model.path is None:
        if base is not None:
            raise ConfigError(
                "--base is not for the pocket model, which has its own.", fix="leave it out."
            )
        return from_recipe(knob_recipe(motion), boundary=boundary)
    if base is None:
        raise ConfigError(
            "--motion extrapolates away from what a model was fine-tuned from, which is not known.",
            fix="add --base FOLDER_OR_FILE, or --lora FILE.",
        )
    found = base if base.exists() else find_pipeline(str(base)).path
    return from_base(found, model.path, motion=motion, boundary=boundary)


def common_settings(
    *,
    seed: int,
    negative_prompt: str | None,
    steps: int | None,
    guidance: float | None,
    size: int | None,
    height: int | None,
    width: int | None,
    num_frames: int | None,
    frame_rate: float | None,
) -> VideoSettings:
    """Gather what the flags say of every video."""
    from motionmerge.sampling.make_video import VideoSettings

    if size is not None and (height is not None or width is not None):
        raise ConfigError(
            "--size was given with --height or --width.", fix="give --size, or the other two."
        )
    return VideoSettings(
        seed=seed,
        negative_prompt=negative_prompt,
        height=height if size is None else size,
        width=width if size is None else size,
        num_frames=num_frames,
        frame_rate=frame_rate,
        num_inference_steps=steps,
        guidance_scale=guidance,
    )


@contextmanager
def loaded(model: ModelChoice, experts: ExpertChoice) -> Iterator[tuple[Any, Any]]:
    """Load a model, attach its experts; give the pipeline and the bank, which may be None."""
    from diffusers.utils import logging

    is_quiet = model.path is None or not sys.stderr.isatty()
    if is_quiet:
        logging.disable_progress_bar()
    pipeline, placement = model.load()
    pipeline.set_progress_bar_config(disable=is_quiet)
    if model.path is not None:
        typer.echo(placement, err=True)
    with experts.attach(pipeline) as bank:
        yield pipeline, bank


def describe(
    model: ModelChoice, experts: ExpertChoice, settings: VideoSettings, *, weights: str | None
) -> dict[str, Any]:
    """Say how a video is made."""
    own = asdict(settings.resolved(model.family, model.limits))
    about = {name: value for name, value in own.items() if value is not None}
    about["steps"] = about.pop("num_inference_steps")
    if own["height"] is not None and own["height"] == own["width"]:
        about["size"] = own["height"]
    if experts.recipe is None and weights is not None:
        about["weights"] = weights
    return {"model": model.name, **about, **experts.description()}


def versions() -> dict[str, str]:
    """Versions that a video's bytes depend on."""
    import diffusers
    import torch

    from motionmerge import __version__

    return {
        "motionmerge": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def _prompts(prompt: str | None, prompts: Path | None) -> list[str | None]:
    from motionmerge.sampling.make_video import read_prompts

    if prompts is None:
        return [prompt]
    if prompt is not None:
        raise ConfigError("--prompt and --prompts were given together", fix="choose one of them.")
    try:
        text = prompts.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read {prompts}: {error}", fix="check the path.") from error
    return list(read_prompts(text, source=str(prompts)))
