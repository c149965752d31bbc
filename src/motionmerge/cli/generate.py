"""`motionmerge generate`: from a photo and a prompt to an mp4, with the pocket model or another."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from motionmerge.cli.video_flags import VideoFlags, loaded, versions, with_video_flags
from motionmerge.errors import ConfigError, DataError

if TYPE_CHECKING:
    from motionmerge.sampling.expert_choice import ExpertChoice
    from motionmerge.sampling.make_video import VideoSettings
    from motionmerge.sampling.model_choice import ModelChoice


@with_video_flags
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
    flags: VideoFlags = VideoFlags(),
    sheet: Annotated[
        Path | None, typer.Option(help="Also write the frames side by side to this PNG.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Animate PHOTO as the prompt says: the pocket model needs a CPU, others what they need."""
    from motionmerge.io.video import contact_sheet, eight_bit, load_image, write_video
    from motionmerge.sampling.make_video import encode_ahead, make_video

    image = load_image(photo)
    chosen = flags.chosen_model()
    experts = flags.chosen_experts(chosen)
    common = flags.settings()
    wanted = [
        (number, common.changed(prompt=text, seed=common.seed + offset))
        for number, text in enumerate(_prompts(prompt, prompts), start=1)
        for offset in range(flags.num_videos)
    ]
    for _, settings in wanted:
        settings.check(chosen.family, chosen.limits)
    paths = _output_paths(output, wanted)
    _check_files(paths, sheet, photo)
    made, rows, conditions = [], [], []

    def encode(pipeline: Any) -> None:
        conditions.extend(encode_ahead(pipeline, image, [settings for _, settings in wanted]))

    with loaded(chosen, experts, encode=encode) as (pipeline, _):
        for (_, settings), path, condition in zip(wanted, paths, conditions, strict=True):
            started = time.monotonic()
            video = make_video(pipeline, image, settings, conditions=condition)
            about = _description(chosen, experts, settings, weights=flags.weights)
            rate = settings.frame_rate or chosen.limits.frame_rate
            write_video(path, video, fps=rate, metadata={**versions(), **about})
            seconds = round(time.monotonic() - started, 2)
            made.append({"output": str(path), "seconds": seconds, **about})
            if sheet is not None:
                rows.append(eight_bit(video[:: max(1, len(video) // 8)]))
            if not as_json:
                frames, _, high, wide = video.shape
                print(
                    f"wrote {typer.format_filename(path)}: {frames} frames of {wide} x {high}, "
                    f"{seconds:.1f} s, seed {settings.seed}"
                )
    if sheet is not None:
        labels = [f"{settings.prompt or ''} (seed {settings.seed})" for _, settings in wanted]
        contact_sheet(rows, labels=labels, path=sheet)
    if as_json:
        print(json.dumps(made if len(made) > 1 else made[0]))


def _output_paths(output: Path, wanted: list[tuple[int, VideoSettings]]) -> list[Path]:
    """Name the file of every video, when it can be written."""
    from motionmerge.io.atomic import check_file, prepare_file

    prepare_file(output)
    if len(wanted) == 1:
        return [output]
    paths = [
        output.with_stem(f"{output.stem}-{number:02}-seed{settings.seed}")
        for number, settings in wanted
    ]
    for path in paths:
        check_file(path)
    return paths


def _check_files(videos: list[Path], sheet: Path | None, photo: Path) -> None:
    """Refuse a sheet that cannot be written, and files of which one would replace another."""
    from motionmerge.io.atomic import prepare_file

    files = [(path, "a video") for path in videos]
    if sheet is not None:
        prepare_file(sheet)
        files.append((sheet, "the sheet"))
    taken = {photo.resolve(): "the photo"}
    for path, what in files:
        other = taken.setdefault(path.resolve(), what)
        if other != what:
            raise ConfigError(
                f"{path} would be {what}, and is {other} already.",
                fix="give --output and --sheet names of their own.",
            )


def _description(
    model: ModelChoice, experts: ExpertChoice, settings: VideoSettings, *, weights: str | None
) -> dict[str, Any]:
    """Say how a video is made."""
    own = settings.resolved(model.family, model.limits).model_dump()
    about = {name: value for name, value in own.items() if value is not None}
    about["steps"] = about.pop("num_inference_steps")
    if own["height"] is not None and own["height"] == own["width"]:
        about["size"] = own["height"]
    if experts.recipe is None and weights is not None:
        about["weights"] = weights
    return {"model": model.name, **about, **experts.description()}


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
