"""`motionmerge train`: fine-tune a model on clips, or repeat the pocket model's training."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from motionmerge.cli.batch import progress_printer
from motionmerge.cli.measure import needs_eval_extra
from motionmerge.cli.options import JsonOption, PlanOption, destination
from motionmerge.cli.printing import harmless, print_json
from motionmerge.cli.video_flags import load_model
from motionmerge.errors import ConfigError, MotionMergeError

if TYPE_CHECKING:
    from motionmerge.evaluation.sweeps.strength import ChosenStrength
    from motionmerge.training.clip_run import ClipRun
    from motionmerge.training.config_file import ConfigFile
    from motionmerge.training.held_out_videos import MeasureVideo, VideoFigures
    from motionmerge.training.pocket.runs import PocketRun
    from motionmerge.training.run_config import RunConfig
    from motionmerge.training.run_plan import RunPlan
    from motionmerge.training.run_result import RunResult
    from motionmerge.training.settings import TrainerSettings, TrainingProgress, TrainingResult

EXAMPLE = "Example: motionmerge train pocket-base --set settings.steps=2000"
_POCKET = "pocket-"
_SECONDS_BETWEEN_LINES = 5.0


def config_names() -> list[str]:
    """Return the names of the shipped configurations, for shell completion."""
    folder = Path(__file__).parents[1] / "training" / "configs"
    return sorted(path.stem for path in folder.glob("*.yaml"))


def train(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="A YAML file, or the name of one of the configurations above.",
            autocompletion=config_names,
        ),
    ],
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Another value of the configuration, e.g. settings.steps=500; repeatable.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        destination(
            metavar="FOLDER",
            help="Folder for states, log and result: the same as --set output=FOLDER. A run that "
            "was stopped goes on from there.",
            show_default="that of CONFIG",
        ),
    ] = None,
    wandb: Annotated[
        str | None,
        typer.Option(
            metavar="PROJECT",
            help="Send losses and validations to a project of Weights & Biases too (extra wandb); "
            "as TensorBoard's they are written where that is installed.",
        ),
    ] = None,
    dry_run: PlanOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a model on clips; what comes of it is a folder or LoRA, and a recipe for it.

    dynamicrafter-512-adapter  Stage 1: adapter and temporal blocks.
    dynamicrafter-512-naive    Control of it: all of the model, without adapter.
    dynamicrafter-512-cil      CIL: all of it, with TimeNoise on the image.
    svd-adapter                Stage 1 for SVD, with a text tower of your own.
    i2vgen-adapter             Stage 1 for I2VGen-XL.
    wan-lora                   A LoRA for Wan image-to-video.
    pocket-towers              Text and image tower of the pocket model.
    pocket-decoder             Its autoencoder's decoder.
    pocket-base                Its base: rich motion, weakly coupled.
    pocket-tuned               Its stage 1: adapter and U-Net, mostly slow clips.
    pocket-naive               Control of tuned: the U-Net, without adapter.
    pocket-equal               Control of tuned: clips as fast as the base's.
    pocket-temporal            Stage 1 for adapter and temporal blocks alone.
    pocket-temporal-naive      Control of temporal: without adapter.

    Clips are what `motionmerge data check CLIPS -o CHECKED` found: data.folder=CLIPS and
    data.manifest=CHECKED/clips.jsonl. The folder of the run keeps log.jsonl, and validation.jsonl:
    losses on clips that are held out, in bands of noise, and how much their videos move beside the
    base's; `motionmerge report FOLDER` shows both, with the videos. CogVideoX, LTX and Hunyuan
    train by a CONFIG of your own: begin with that of wan-lora. On several processes: torchrun
    --nproc-per-node 2 -m motionmerge.cli train CONFIG
    """
    from motionmerge.training.config_file import ConfigFile
    from motionmerge.training.pocket.runs import PocketRun
    from motionmerge.training.run_config import RunConfig

    given = _changes(changes or ())
    if output is not None:
        if "output" in given:
            raise ConfigError("The output is given twice.", fix="Leave out --set output=.. or -o.")
        given["output"] = str(output)
    file = ConfigFile.load(config, changes=given)
    if "pocket" in file.content:
        if wandb is not None:
            raise ConfigError(
                "Runs of the pocket model keep their log alone.", fix="Leave --wandb out."
            )
        pocket_run = file.read(PocketRun)
        _warn_of_warmup(pocket_run.settings)
        _train_pocket(file, pocket_run, dry_run=dry_run, as_json=as_json)
    else:
        run = file.read(RunConfig)
        _warn_of_warmup(run.settings)
        _train_on_clips(run, wandb, dry_run=dry_run, as_json=as_json)


def _is_first_process() -> bool:
    """Check whether nobody else prints for this run, as torchrun and accelerate number them."""
    return os.environ.get("RANK", "0") == "0"


def _warn_of_warmup(settings: TrainerSettings) -> None:
    """Warn where a run ends before its learning rate is what was asked for."""
    from motionmerge.training.settings import learning_rate_at

    steps, warmup = settings.steps, settings.warmup_steps
    if warmup > steps and _is_first_process():
        share = learning_rate_at(steps - 1, replace(settings, learning_rate=1.0))
        typer.echo(
            f"warning: the run has {steps} steps, and `settings.warmup_steps` is {warmup}: it ends "
            f"at {share:.1%} of the learning rate.",
            err=True,
        )


def _changes(pairs: Sequence[str]) -> dict[str, Any]:
    """Read the `KEY=VALUE` of --set; a value is YAML."""
    from motionmerge.text import parse_yaml

    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(
                f"--set {pair} is not KEY=VALUE.", fix="Write e.g. `--set settings.steps=500`."
            )
        if key in found:
            raise ConfigError(f"`{key}` is given twice.", fix="Give it once.")
        # YAML takes `*.attn1.*` for the name of another value, of which there is none here.
        is_glob = value.startswith("*")
        found[key] = value if is_glob else parse_yaml(value, source=f"--set {key}")
    return found


def _train_on_clips(config: RunConfig, wandb: str | None, *, dry_run: bool, as_json: bool) -> None:
    from motionmerge.io.atomic import check_folder
    from motionmerge.training.clip_run import open_clip_run
    from motionmerge.training.run_plan import plan_run
    from motionmerge.training.scalars import scalars_of

    check_folder(config.output)
    run = open_clip_run(config)
    measure_video = _measure_of(run)
    if dry_run:
        plan = plan_run(run)
        if as_json:
            print_json(asdict(plan))
        else:
            _print_plan(plan)
        return
    _tell_where_it_goes_on(config.output)
    print_progress = _progress_line(config.settings.batch_size)
    with _told_how_to_go_on(), scalars_of(config.output, wandb_project=wandb) as scalars:

        def on_progress(progress: TrainingProgress) -> None:
            print_progress(progress)
            if scalars is not None:
                scalars.add_progress(progress)

        def on_validated(step: int, figures: Mapping[str, Any]) -> None:
            _validation_lines(step, figures)
            if scalars is not None:
                scalars.add_validation(step, figures)

        result, made = run.train(
            on_encoded=_EncodingLines(),
            on_progress=on_progress,
            on_validated=on_validated,
            measure_video=measure_video,
        )
    if made is None:
        return
    strength = None
    if run.num_videos and config.validation is not None and config.validation.strengths:
        try:
            strength = _chosen_strength(run, made, config.validation.strengths)
        except MotionMergeError as error:  # what was trained is written
            typer.echo(f"warning: no strength was chosen: {harmless(error.message)}", err=True)
    if as_json:
        paths = {name: str(value) for name, value in asdict(made).items()}
        motion = None if strength is None else strength.motion
        done = {"output": str(config.output), **paths, "motion": motion, **asdict(result)}
        print_json(done)
        return
    _print_end(made.weights, result)
    if strength is not None:
        print(f"recipe: {strength.why}")
    print(harmless(shlex.join(_words_to_generate(run, made))))


def _words_to_generate(run: ClipRun, made: RunResult) -> list[str]:
    """Return the command that makes a video with the result, of a clip that was held out."""
    from motionmerge.sampling.request.folder import find_pipeline

    words = ["motionmerge", "generate", "photo.jpg", "--model", made.model]
    words += ["--recipe", str(made.recipe)]
    views = run.views.settings
    height, width = views.sizes[0]
    words += ["--height", str(height), "--width", str(width), "--num-frames", str(views.num_frames)]
    if find_pipeline(made.model).family.takes_text:
        words += ["--prompt", run.held_out[0].clip.caption if run.held_out else "what happens"]
    return words


def _measure_of(run: ClipRun) -> MeasureVideo | None:
    """Return what measures the videos of a validation; None where none are made.

    Training and evaluation do not know of each other.
    """
    if not run.num_videos:
        return None
    with needs_eval_extra():
        from motionmerge.evaluation.runs import measure_videos
        from motionmerge.evaluation.sources import VideoSource
    from motionmerge.training.held_out_videos import VideoFigures

    def measure(path: Path, photo: Path) -> VideoFigures:
        (one,) = measure_videos([VideoSource(path, photo=photo)])
        return VideoFigures(
            motion_degree=one.number("motion_degree"),
            first_frame_psnr=one.number("first_frame_psnr"),
            failure=one.failure,
        )

    return measure


def _chosen_strength(
    run: ClipRun, made: RunResult, values: Sequence[float]
) -> ChosenStrength | None:
    """Choose the recipe's strength on the photos and captions that are held out; write it.

    What was made and measured before is kept in `strengths`.
    """
    from motionmerge.evaluation.sweeps.strength import choose_strength
    from motionmerge.evaluation.sweeps.videos import VideoBench
    from motionmerge.io.atomic import write_whole
    from motionmerge.merging.recipes.recipe import Recipe
    from motionmerge.sampling.batch.manifest import VideoJob
    from motionmerge.sampling.batch.variants import Variant, VariantMaker
    from motionmerge.sampling.request.request import VideoRequest

    if run.config.objective.interpolates:
        return None  # the videos of a bench have no last image
    output = run.config.output
    request = VideoRequest(model=made.model)
    model = request.open_model()
    jobs = [
        VideoJob(
            line=line,
            id=video.name,
            number=0,
            image=video.photo_in(output),
            settings=video.settings.resolved(model.family, model.limits),
        )
        for line, video in enumerate(run.videos_with(model.family, model.limits), 1)
    ]
    folder = output / "strengths"
    maker = VariantMaker(model, folder / "videos", load=lambda: load_model(model))
    bench = VideoBench(maker, jobs, folder, on_progress=progress_printer(0, 1, 0))

    def build(name: str, recipe: Recipe | None) -> Variant:
        return Variant(name, replace(request, recipe=recipe).open_experts(model))

    recipe = Recipe.load(made.recipe)
    strength = choose_strength(bench, build("the base", None), recipe, values, build=build)
    write_whole(made.recipe, strength.recipe.relocated(output).print())
    return strength


def _train_pocket(file: ConfigFile, config: PocketRun, *, dry_run: bool, as_json: bool) -> None:
    from motionmerge.io.atomic import check_folder
    from motionmerge.training.pocket.runs import folders_of, run, weights_of

    name = file.name.removeprefix(_POCKET)
    check_folder(config.output)
    if dry_run:
        plan = {"run": name, **config.model_dump(mode="json", exclude_none=True)}
        print_json(plan)
        return
    _tell_where_it_goes_on(*folders_of(config))
    with _told_how_to_go_on():
        result = run(name, config, on_progress=_progress_line(config.settings.batch_size))
    if not result.is_main_process:
        return
    output = weights_of(name, config)
    if as_json:
        print_json({"output": str(output), **asdict(result)})
    else:
        _print_end(output, result)


def _tell_where_it_goes_on(*folders: Path) -> None:
    """Print from which state a run goes on, on the first of several processes."""
    from motionmerge.training.run_state import states_in

    if not _is_first_process():
        return
    for folder in folders:
        if states := states_in(folder):
            typer.echo(f"going on from {harmless(str(states[0]))}", err=True)


def _print_end(output: Path, result: TrainingResult) -> None:
    loss = "unknown, as the log lacks its end" if result.loss is None else f"{result.loss:.4f}"
    print(f"wrote {output}: loss {loss}, {result.steps} steps, {result.seconds:.0f} s")


def _print_plan(plan: RunPlan) -> None:
    from motionmerge.memory import gigabytes

    for group, count in plan.trained.items():
        print(f"trains {count:>14,}  {group}")
    print(f"frozen {plan.frozen:>14,}")
    parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in plan.memory.items())
    print(f"memory {gigabytes(sum(plan.memory.values()))} ({parts}), without what a step computes")
    print(f"clips  {plan.shots:,} shots, {plan.views:,} views; {plan.left_out:,} are too short")
    print(f"steps  {plan.steps:,}: {plan.samples:,} samples, {plan.epochs:.1f} epochs")
    if plan.hours is not None:
        print(f"left   {plan.hours:.1f} h at the rate so far")


class _EncodingLines:
    """Prints how many views are encoded, every few seconds."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if done == total or time.monotonic() > self._last + _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            typer.echo(f"encoded {done} of {total} views", err=True)


def _progress_line(batch_size: int) -> Callable[[TrainingProgress], None]:
    """Return what prints a line for each logged step."""

    def report(progress: TrainingProgress) -> None:
        rate = batch_size / max(progress.step_seconds, 1e-6)
        typer.echo(
            f"step {progress.step}/{progress.steps}  loss {progress.loss:.4f}  "
            f"{rate:.3g} samples/s  {_memory()}  {_span(progress.seconds)}, "
            f"{_span(progress.seconds_left)} left",
            err=True,
        )

    return report


def _validation_lines(step: int, figures: Mapping[str, Any]) -> None:
    """Print what was measured after a step, and a warning where motion is lost."""
    losses = ", ".join(f"{band} {loss:.4f}" for band, loss in figures["held_out"].items())
    typer.echo(f"step {step}, held out: loss by noise {losses}", err=True)
    videos = figures.get("videos", ())
    if not videos:
        return
    motion, least = figures["relative_motion"], figures["warn_below"]
    share = "unknown beside the base's" if motion is None else f"{motion:.0%} of the base's"
    if motion is not None and len(videos) > 1:
        shares = [one["relative_motion"] for one in videos if one["relative_motion"] is not None]
        share += f" (of {len(shares)}: {min(shares):.0%} to {max(shares):.0%})"
    decibels = [one["first_frame_psnr"] for one in videos if one["first_frame_psnr"] is not None]
    fidelity = f", first frame {median(decibels):.1f} dB" if decibels else ""
    typer.echo(f"step {step}, {_videos(len(videos))}: motion {share}{fidelity}", err=True)
    for one in videos:
        if "failure" in one:
            typer.echo(f"warning: {harmless(one['file'])}: {harmless(one['failure'])}", err=True)
    if motion is not None and motion < least:
        typer.echo(
            f"warning: after step {step} videos move {motion:.0%} as much as the base's, less than "
            f"the {least:.0%} of validation.warn_below",
            err=True,
        )


def _videos(number: int) -> str:
    return "1 video" if number == 1 else f"{number} videos"


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _memory() -> str:
    """Write the most memory that was taken: of the GPU if there is one."""
    import torch

    from motionmerge.memory import gigabytes, most_memory

    if torch.cuda.is_available():
        return gigabytes(torch.cuda.max_memory_allocated())
    most = most_memory()
    return "" if most is None else gigabytes(most)


@contextmanager
def _told_how_to_go_on() -> Iterator[None]:
    from motionmerge.training.settings import RunStopped

    try:
        yield
    except RunStopped as stopped:
        typer.echo(
            f"stopped after step {stopped.step}, the state is in {stopped.folder}: "
            "the same command goes on",
            err=True,
        )
        raise
