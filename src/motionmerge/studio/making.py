"""Make what a wish asks for: the same request, videos and measurements as on the command line."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from motionmerge.errors import ConfigError
from motionmerge.evaluation.report.page import write_report
from motionmerge.evaluation.report.sets import ReportSet, made_by
from motionmerge.evaluation.runs import Measured, measure_videos
from motionmerge.evaluation.sources import VideoSource
from motionmerge.io.video import load_image, write_video
from motionmerge.models.pocket.drawing import named_things, paint_named
from motionmerge.models.video_pipeline import VideoPipeline
from motionmerge.sampling.request.experts import ExpertChoice
from motionmerge.sampling.request.loading import hide_loading_bars, parts_with_bars
from motionmerge.sampling.request.model import ModelChoice
from motionmerge.sampling.videos.checks import check_settings
from motionmerge.sampling.videos.make_video import make_video
from motionmerge.sampling.videos.provenance import made_with, provenance
from motionmerge.sampling.videos.watched_steps import WatchedSteps
from motionmerge.studio.exporting import write_archive
from motionmerge.studio.turns import Stopped, Turns
from motionmerge.studio.wishes import Wish, planned_steps
from motionmerge.studio.works import (
    NUMBERS,
    PHOTO,
    RECIPE_FILE,
    REPORT_FILE,
    THUMBNAIL,
    Exported,
    MadeVideo,
    Work,
    Works,
)

_THUMBNAIL_SIDE = 256

Teller = Callable[[str, float], None]
"""Told what is being done, and which share of all is done."""


@dataclass
class Maker:
    """Makes works one after another; the last model stays loaded.

    Args:
        works: Where they go.
    """

    works: Works
    _turns: Turns = field(default_factory=Turns)
    _loaded: tuple[str, VideoPipeline] | None = None

    def make(self, wish: Wish, *, tell: Teller, stop: threading.Event) -> Work:
        """Make, measure and keep the videos of a wish.

        Args:
            wish: What is asked for.
            tell: Told after every step.
            stop: Once it is set, the next step is the last.

        Raises:
            MotionMergeError: The wish cannot be fulfilled; nothing is kept.
            Stopped: `stop` was set.
        """
        image = load_image(wish.photo)
        with self._turn(tell, stop), TemporaryDirectory(prefix="motionmerge-") as name:
            started, folder = time.monotonic(), Path(name)
            model = wish.open_model()
            check_settings(wish.settings, model.family, model.limits, has_last_image=False)
            model.check_prompt(wish.settings.prompt or "")
            experts = wish.experts(model)
            image = _painted(image, wish, model)
            image.save(folder / PHOTO)
            filming = Filming(
                wish=wish, model=model, experts=experts, folder=folder, tell=tell, stop=stop
            )
            made = filming.film(self._pipeline(wish, model, tell), image)
            tell("Measuring", 1.0)
            made = _measured(made, wish, folder)
            _write_recipe(made, folder)
            _thumbnail(image).save(folder / THUMBNAIL, quality=88)
            work = Work(
                id=self.works.new_id(),
                kind=wish.kind,
                prompt=wish.settings.prompt or "",
                seed=wish.settings.seed,
                model=wish.model,
                seconds=round(time.monotonic() - started, 1),
                videos=tuple(made),
            )
            self.works.save(work, folder)
        return work

    def export(self, wish: Wish, *, tell: Teller, stop: threading.Event) -> Exported:
        """Write the last set of weights of a wish as LoRA files for ComfyUI, in one archive.

        Raises:
            MotionMergeError: ComfyUI takes no such files, or as `make`.
            Stopped: `stop` was set.
        """

        def watch(done: int, total: int) -> None:
            if stop.is_set():
                raise Stopped
            tell("Writing", done / max(1, total))

        with self._turn(tell, stop), TemporaryDirectory(prefix="motionmerge-") as name:
            model = wish.open_model()
            if model.path is None:
                raise ConfigError(
                    "ComfyUI has no pocket model.", fix="Name a model's folder under Model."
                )
            recipe = list(wish.experts(model).values())[-1].whole_recipe
            if recipe is None:
                raise ConfigError(
                    "The model as it is has nothing that a LoRA could hold.",
                    fix="Give a LoRA, a base or a recipe.",
                )
            tell("Writing", 0.0)
            scratch, kept = Path(name, "files"), Path(name, "kept")
            kept.mkdir()
            usage = write_archive(recipe, model.path, kept, scratch=scratch, progress=watch)
            identity = self.works.new_id()
            self.works.keep(identity, kept)
            return Exported(identity, usage)

    def _turn(self, tell: Teller, stop: threading.Event) -> AbstractContextManager[None]:
        """Wait until nobody else makes anything.

        Models are also only looked at by one thread at a time: `init_empty_weights` changes torch's
        modules for all threads.
        """

        def say(before: int) -> None:
            whose = "1 other is" if before == 1 else f"{before} others are"
            tell(f"Waiting: {whose} made before this one", 0.0)

        return self._turns.turn(tell=say, stop=stop)

    def _pipeline(self, wish: Wish, model: ModelChoice, tell: Teller) -> VideoPipeline:
        """Return the loaded model; another one is forgotten before."""
        if self._loaded is None or self._loaded[0] != wish.model:
            tell(f"Loading {model.name}", 0.0)
            self._loaded = None
            hide_loading_bars()
            self._loaded = (wish.model, model.load()[0])
        return self._loaded[1]


@dataclass(frozen=True, kw_only=True)
class Filming:
    """The videos of one wish, while they are made.

    Args:
        wish: What is asked for.
        model: Its model.
        experts: Its sets of weights, by what they are called.
        folder: Where the videos go.
        tell, stop: See `Maker.make`.
    """

    wish: Wish
    model: ModelChoice
    experts: Mapping[str, ExpertChoice]
    folder: Path
    tell: Teller
    stop: threading.Event

    def film(self, pipeline: VideoPipeline, image: Image.Image) -> list[MadeVideo]:
        """Make a video of an image with every set of weights and every seed."""
        each, fingerprint = self.wish.each_seed, self.model.fingerprint()
        made: list[MadeVideo] = []
        points: Sequence[float | None] = self.wish.points or [None] * len(self.experts)
        for (name, choice), point in zip(self.experts.items(), points, strict=True):
            shared = made_with(self.model.family.name, fingerprint, choice.fingerprint())
            about = self._about(name, choice, point)
            with choice.attach(pipeline, restore=True):
                for settings in each:
                    self._watch_steps(pipeline, name, num_made=len(made))
                    video = make_video(pipeline, image, settings)
                    one = replace(about, file=f"{len(made) + 1}.mp4", seed=settings.seed)
                    resolved = settings.resolved(self.model.family, self.model.limits)
                    write_video(
                        self.folder / one.file,
                        video,
                        fps=self.model.limits.frame_rate,
                        metadata=provenance(shared, resolved),
                    )
                    made.append(one)
        return made

    def _about(self, name: str, choice: ExpertChoice, point: float | None) -> MadeVideo:
        """Return what the videos of a set of weights have in common."""
        recipe = choice.whole_recipe
        plan = planned_steps(self.model, choice, self.wish.settings)
        return MadeVideo(
            name=name,
            file="",
            seed=self.wish.settings.seed,
            recipe=None if recipe is None else recipe.print(),
            steps=None if plan is None else plan.text,
            point=point,
        )

    def _watch_steps(self, pipeline: VideoPipeline, name: str, *, num_made: int) -> None:
        """Watch the steps of a pipeline's next call, which ends where somebody stops it."""
        num_videos = len(self.experts) * self.wish.num_seeds

        def watch(done: int, total: int) -> None:
            self._leave_if_stopped()
            self.tell(f"{name}: step {done} of {total}", (num_made + done / total) / num_videos)

        self._leave_if_stopped()
        for part in parts_with_bars(pipeline):
            part.progress_bar = functools.partial(WatchedSteps, watcher=watch)

    def _leave_if_stopped(self) -> None:
        if self.stop.is_set():
            raise Stopped


def _measured(made: Sequence[MadeVideo], wish: Wish, folder: Path) -> list[MadeVideo]:
    """Measure all videos, and write the report beside them."""
    prompt = wish.settings.prompt or ""
    sources = [VideoSource(folder / one.file, prompt, folder / PHOTO, one.seed) for one in made]
    measured = measure_videos(sources)
    with_numbers = [_with_numbers(*pair) for pair in zip(made, measured, strict=True)]
    rows = zip(made, sources, measured, strict=True)
    sets = []
    for name, own in groupby(rows, key=lambda row: row[0].name):  # the seeds of a set of weights
        _, own_sources, own_measured = zip(*own, strict=True)
        sets.append(ReportSet(name=name, measured=own_measured, about=made_by(own_sources)))
    write_report(sets, to=folder / REPORT_FILE, title=prompt[:80] or "Videos")
    return with_numbers


def _with_numbers(made: MadeVideo, measured: Measured) -> MadeVideo:
    numbers = {name: measured.number(name) for name in NUMBERS}
    known = {name: round(value, 3) for name, value in numbers.items() if value is not None}
    return replace(made, numbers=known, failure=measured.failure)


def _write_recipe(made: Sequence[MadeVideo], folder: Path) -> None:
    """Write the recipe of the last videos that have one."""
    recipes = [one.recipe for one in made if one.recipe is not None]
    if recipes:
        (folder / RECIPE_FILE).write_text(recipes[-1], encoding="utf-8")


def _painted(image: Image.Image, wish: Wish, model: ModelChoice) -> Image.Image:
    """Paint the objects of a prompt into the photo, for the pocket model."""
    prompt = wish.settings.prompt or ""
    if model.path is not None or not wish.paints or not named_things(prompt):
        return image
    side = wish.settings.resolved(model.family, model.limits).height
    return paint_named(image, prompt, seed=wish.settings.seed, side=side)[0]


def _thumbnail(image: Image.Image) -> Image.Image:
    small = image.copy()
    small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    return small
