"""`motionmerge generate`: from a photo and a prompt to an mp4, with the pocket model or another."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from motionmerge.cli.flag_groups import with_flags
from motionmerge.cli.options import (
    JsonOption,
    OverwriteOption,
    destination,
    output_option,
    video_option,
)
from motionmerge.cli.printing import print_json
from motionmerge.cli.steps import show_steps
from motionmerge.cli.video_flags import (
    POCKET,
    StepPlanner,
    VideoFlags,
    loaded,
)
from motionmerge.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

    from motionmerge.sampling.pipelines.encoded import Conditions
    from motionmerge.sampling.request.model import ModelChoice
    from motionmerge.sampling.videos.settings import VideoSettings

EXAMPLE = 'Example: motionmerge generate photo.jpg --prompt "the camera pans left"'


@with_flags
def generate(
    photo: Annotated[
        Path, typer.Argument(metavar="PHOTO", help="The first frame: any image file.")
    ],
    prompt: Annotated[
        str | None,
        video_option(
            metavar="TEXT",
            help='What happens, e.g. "the camera pans left" or "the red ball moves up then left".',
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        video_option(metavar="FILE", help="A file of prompts, one a line: a video of each."),
    ] = None,
    flags: VideoFlags = VideoFlags(),
    last_image: Annotated[
        Path | None,
        video_option(
            metavar="FILE",
            help="An image that the video ends with: for DynamiCrafter's interpolation model, "
            "Wan 2.2-A14B and Wan 2.1-FLF2V.",
        ),
    ] = None,
    loop: Annotated[
        bool, video_option("--loop", help="End with PHOTO: the same as --last-image PHOTO.")
    ] = False,
    draw: Annotated[
        bool,
        video_option(
            "--draw",
            help="Paint the balls and boxes that the prompt names into the photo, at places that "
            "the seed decides: for the pocket model.",
        ),
    ] = False,
    analytic_init: Annotated[
        Path | None,
        video_option(
            metavar="FILE",
            help="For --start-step: a file with mean and variance of videos' latents "
            "(Expectation_X0, Tr_Cov_d), which the start then has.",
        ),
    ] = None,
    output: Annotated[
        Path,
        destination(
            metavar="FILE",
            help="The mp4 to write; of several, each has its prompt's number and seed in its name.",
        ),
    ] = Path("out.mp4"),
    sheet: Annotated[
        Path | None,
        output_option(metavar="FILE", help="Also write the frames side by side to this PNG."),
    ] = None,
    dry_run: Annotated[
        bool,
        output_option(
            "--dry-run", help="Check all that needs no model, and print what would be written."
        ),
    ] = False,
    as_json: JsonOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Animate PHOTO as the prompt says, and write an mp4.

    The pocket model ships with the package and takes seconds on a CPU; most others need a GPU.
    """
    from motionmerge.io.atomic import prepare_folder
    from motionmerge.io.video import (
        contact_sheet,
        eight_bit,
        load_image,
        spread_frames,
        write_video,
    )
    from motionmerge.models.pocket.text import check_prompt
    from motionmerge.sampling.batch.manifest import check_number

    image = load_image(photo)
    last = _last_image(photo, last_image, loop=loop)
    common = flags.settings()
    texts = _prompts(prompt, prompts)
    if flags.model == POCKET:
        for text in texts:
            check_prompt(text or "")
    check_number(len(texts) * flags.num_videos, source="--num-videos")
    wanted = [
        (number, common.changed(prompt=text, seed=common.seed + offset))
        for number, text in enumerate(texts, start=1)
        for offset in range(flags.num_videos)
    ]
    paths = _output_paths(output, wanted)
    read = [(last_image, "the last image"), (photo, "the photo")]
    may_ask = not (dry_run or as_json)
    folders = _check_files(paths, sheet, read, overwrite=overwrite, may_ask=may_ask)

    # What is above needs no model; what is below imports diffusers, which takes seconds.
    from motionmerge.sampling.request.model import FolderModel
    from motionmerge.sampling.videos.checks import check_settings
    from motionmerge.sampling.videos.make_video import encode_ahead, make_video
    from motionmerge.sampling.videos.provenance import made_with, provenance

    options = _start_options(analytic_init, flags.start_step)
    given = {"last_image": photo if loop else last_image, "analytic_init": analytic_init}
    files = {name: str(path) for name, path in given.items() if path is not None}
    chosen = flags.request.open_model()
    for _, settings in wanted:
        check_settings(settings, chosen.family, chosen.limits, has_last_image=last is not None)
        chosen.check_prompt(settings.prompt or "")
    images, drawn = _first_frames(image, chosen, [settings for _, settings in wanted], draw=draw)
    experts = flags.chosen_experts(chosen)
    planner = StepPlanner(chosen, experts)
    for _, settings in wanted:
        planner.add(settings)
    resolved = [settings.resolved(chosen.family, chosen.limits) for _, settings in wanted]
    of_all = {"model": chosen.name, **experts.description(), **files}
    if isinstance(chosen, FolderModel):
        of_all["dtype"] = str(chosen.weights_dtype)
    about = [
        {**of_all, **one.model_dump(exclude_none=True), **own}
        for one, own in zip(resolved, drawn, strict=True)
    ]
    planner.show()
    if dry_run:
        _print_plan(paths, about, as_json, dropped=chosen.limits.dropped_frames)
        return
    shared = made_with(chosen.family.name, chosen.fingerprint(), experts.fingerprint())
    for folder in folders:
        prepare_folder(folder)
    made: list[dict[str, Any]] = []
    rows: list[Any] = []
    conditions: list[Conditions | None] = []

    def encode(pipeline: Any) -> None:
        if draw:  # each video has a first frame of its own, and the pocket model room for all
            conditions.extend([None] * len(wanted))
            return
        each = [settings for _, settings in wanted]
        conditions.extend(encode_ahead(pipeline, image, each, last_image=last))

    with loaded(chosen, experts, encode=encode) as (pipeline, _):
        for (_, settings), path, first, painted, condition, made_from, own in zip(
            wanted, paths, images, drawn, conditions, resolved, about, strict=True
        ):
            several = f"video {len(made) + 1} of {len(wanted)}"
            show_steps(pipeline, label=several if len(wanted) > 1 else path.name)
            started = time.monotonic()
            video = make_video(
                pipeline, first, settings, last_image=last, conditions=condition, **options
            )
            rate = settings.frame_rate or chosen.limits.frame_rate
            metadata = {**provenance(shared, made_from), **files, **painted}
            write_video(path, video, fps=rate, metadata=metadata)
            seconds = round(time.monotonic() - started, 2)
            made.append({"output": str(path), "seconds": seconds, **own})
            if sheet is not None:
                rows.append(eight_bit(spread_frames(video)))
            if not as_json:
                _print_made(path, tuple(video.shape), seconds, settings.seed)
    if sheet is not None:
        labels = [f"{settings.prompt or ''} (seed {settings.seed})" for _, settings in wanted]
        contact_sheet(rows, labels=labels, path=sheet)
    if as_json:
        print_json(made if len(made) > 1 else made[0])


def _last_image(photo: Path, last_image: Path | None, *, loop: bool) -> Image.Image | None:
    """Read what the videos end with, if that is given."""
    from motionmerge.io.video import load_image

    if loop and last_image is not None:
        raise ConfigError("--loop and --last-image were given together.", fix="Choose one of them.")
    path = photo if loop else last_image
    return None if path is None else load_image(path)


def _first_frames(
    image: Image.Image, model: ModelChoice, wanted: list[VideoSettings], *, draw: bool
) -> tuple[list[Image.Image], list[dict[str, Any]]]:
    """Paint what the prompts name into the photo, or say on stderr what it cannot show.

    Returns:
        The first frame of every video, and what its metadata say of what was painted.
    """
    from motionmerge.models.pocket.drawing import absent_things, named_things, paint_named

    if model.path is not None:
        if draw:
            raise ConfigError("--draw is for the pocket model.", fix="Leave it out.")
        return [image] * len(wanted), [{}] * len(wanted)
    if not draw:
        named = {thing: None for one in wanted for thing in named_things(one.prompt or "")}
        if absent := absent_things(image, list(named)):
            names = " and no ".join(" ".join(thing) for thing in absent)
            typer.echo(f"The photo shows no {names}: --draw paints what a prompt names.", err=True)
        return [image] * len(wanted), [{}] * len(wanted)
    images, drawn = [], []
    for settings in wanted:
        side = settings.resolved(model.family, model.limits).height
        painted, places = paint_named(image, settings.prompt or "", seed=settings.seed, side=side)
        images.append(painted)
        about = {" ".join(thing): [round(x, 2), round(y, 2)] for thing, (x, y) in places.items()}
        drawn.append({"drawn": about})
    return images, drawn


def _start_options(analytic_init: Path | None, start_step: int | None) -> dict[str, Any]:
    """Read what the start latents are to be like, if that is given."""
    from motionmerge.sampling.pipelines.start_latents import read_statistics

    if analytic_init is None:
        return {}
    if start_step is None:
        raise ConfigError(
            "--analytic-init changes a late start, and there is none.",
            fix="Say where to begin, e.g. --start-step 940.",
        )
    return {"analytic_init": read_statistics(analytic_init)}


def _print_made(path: Path, shape: tuple[int, ...], seconds: float, seed: int) -> None:
    """Print which video was made."""
    frames, _, high, wide = shape
    print(
        f"wrote {typer.format_filename(path)}: {frames} frames of {wide} x {high}, "
        f"{seconds:.1f} s, seed {seed}"
    )


def _print_plan(
    paths: list[Path], about: list[dict[str, Any]], as_json: bool, *, dropped: int
) -> None:
    """Print which videos would be made."""
    if as_json:
        plan = [{"output": str(path), **own} for path, own in zip(paths, about, strict=True)]
        print_json(plan if len(plan) > 1 else plan[0])
        return
    for path, own in zip(paths, about, strict=True):
        asked = own.get("num_frames")
        frames = "frames" if asked is None else f"{asked - dropped} frames"
        size = f" of {own['width']} x {own['height']}" if own.get("width") else ""
        steps = f", {own['num_inference_steps']} steps" if own.get("num_inference_steps") else ""
        name = typer.format_filename(path)
        print(f"would write {name}: {frames}{size}{steps}, seed {own['seed']}")


def _output_paths(output: Path, wanted: list[tuple[int, VideoSettings]]) -> list[Path]:
    """Name the file of every video."""
    from motionmerge.io.atomic import check_file

    check_file(output)
    if len(wanted) == 1:
        return [output]
    return [
        output.with_stem(f"{output.stem}-{number:02}-seed{settings.seed}")
        for number, settings in wanted
    ]


def _check_files(
    videos: list[Path],
    sheet: Path | None,
    read: list[tuple[Path | None, str]],
    *,
    overwrite: bool,
    may_ask: bool,
) -> list[Path]:
    """Refuse files that cannot be written, and those of which one would replace another.

    Args:
        videos: The mp4s to write.
        sheet: The sheet to write, if one is wanted.
        read: The files that are read, and what each is.
        overwrite: Whether files that exist already may be replaced.
        may_ask: Whether a person at a terminal may be asked that.

    Returns:
        The folders that the files are in.
    """
    from motionmerge.io.atomic import check_file, check_new_file
    from motionmerge.io.paths import behind_links

    files = [(path, "a video") for path in videos]
    if sheet is not None:
        files.append((sheet, "the sheet"))
    taken = {behind_links(path): what for path, what in read if path is not None}
    for path, what in files:
        check_file(path)
        other = taken.setdefault(behind_links(path), what)
        if other != what:
            raise ConfigError(
                f"{path} would be {what}, and is {other} already.",
                fix="Give --output and --sheet names of their own.",
            )
    endings = [(path, ".mp4", "an mp4", "--output") for path in videos]
    if sheet is not None:
        endings.append((sheet, ".png", "a PNG", "--sheet"))
    for path, ending, kind, flag in endings:
        if path.suffix.lower() != ending:
            raise ConfigError(
                f"{path} is no name of {kind}, and {kind} is what would be written.",
                fix=f"Write e.g. {flag} {path.stem}{ending}.",
            )
    taken_names = [path for path, _ in files if path.exists()]
    if taken_names and not overwrite and may_ask:
        overwrite = _may_replace(taken_names)
    for path, _ in files:
        check_new_file(path, overwrite=overwrite)
    return list(dict.fromkeys(path.parent for path, _ in files))


def _may_replace(files: list[Path]) -> bool:
    """Ask a person at a terminal whether files may be replaced; elsewhere they may not."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    name = typer.format_filename(files[0])
    question = (
        f"{name} exists already. Replace it?"
        if len(files) == 1
        else f"{name} and {len(files) - 1} more exist already. Replace them?"
    )
    return typer.confirm(question, err=True)


def _prompts(prompt: str | None, prompts: Path | None) -> list[str | None]:
    from motionmerge.sampling.batch.manifest import read_list, read_prompts

    if prompts is None:
        return [prompt]
    if prompt is not None:
        raise ConfigError("--prompt and --prompts were given together.", fix="Choose one of them.")
    return list(read_prompts(read_list(prompts), source=str(prompts)))
