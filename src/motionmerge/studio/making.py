"""Make what a wish asks for: the same request, videos and measurements as on the command line."""

from __future__ import annotations

import functools
import shutil
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from motionmerge.errors import ConfigError
from motionmerge.evaluation.report.page import write_report
from motionmerge.evaluation.report.sets import ReportSet, made_by
from motionmerge.evaluation.runs import Measured, measure_videos
from motionmerge.evaluation.sources import VideoSource
from motionmerge.io.video import fit_image, load_image, write_video
from motionmerge.merging.compute.streaming import ReportProgress
from motionmerge.models.pocket.drawing import draw_things, named_things, places_for
from motionmerge.models.pocket.world import SIZE
from motionmerge.models.video_pipeline import VideoPipeline
from motionmerge.sampling.request.experts import ExpertChoice
from motionmerge.sampling.request.loading import hide_loading_bars, parts_with_bars
from motionmerge.sampling.request.model import ModelChoice
from motionmerge.sampling.videos.checks import check_settings
from motionmerge.sampling.videos.make_video import make_video
from motionmerge.sampling.videos.provenance import made_with, provenance
from motionmerge.sampling.videos.watched_steps import WatchedSteps
from motionmerge.studio.turns import Stopped, Turns
from motionmerge.studio.wishes import Teller, Wish, planned_steps
from motionmerge.studio.works import (
    EXPORT_FILE,
    PHOTO,
    RECIPE_FILE,
    REPORT_FILE,
    THUMBNAIL,
    Exported,
    MadeVideo,
    Work,
    Works,
)
from motionmerge.switching.expert_bank import chosen_schedule

SHOWN_NUMBERS = (
    "motion_degree",
    "camera_degree",
    "object_motion",
    "first_frame_psnr",
    "frozen_share",
)

EXPORT_RANK = 64  # of every layer, as `motionmerge export loras`

_THUMBNAIL_SIDE = 256


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
        # One thread at a time, also while a model is only looked at: `init_empty_weights` changes
        # torch's modules for all threads.
        with self._turn(tell, stop), TemporaryDirectory(prefix="motionmerge-") as name:
            started = time.monotonic()
            model = wish.shared.open_model()
            check_settings(wish.settings, model.family, model.limits, has_last_image=False)
            model.check_prompt(wish.settings.prompt or "")
            experts = wish.experts(model)
            image, folder = _painted(image, wish, model), Path(name)
            image.save(folder / PHOTO)
            made = self._videos(wish, model, experts, image, folder, tell, stop)
            tell("Measuring", 1.0)
            work = self._measured(wish, made, folder)
            work = replace(work, seconds=round(time.monotonic() - started, 1))
            _thumbnail(image).save(folder / THUMBNAIL, quality=88)
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
            model = wish.shared.open_model()
            if model.path is None:
                raise ConfigError(
                    "ComfyUI has no pocket model.", fix="Name a model's folder under Model."
                )
            choice = list(wish.experts(model).values())[-1]
            tell("Writing", 0.0)
            return self._exported(choice, model.path, Path(name), watch)

    def _turn(self, tell: Teller, stop: threading.Event) -> AbstractContextManager[None]:
        def say(before: int) -> None:
            whose = "1 other is" if before == 1 else f"{before} others are"
            tell(f"Waiting: {whose} made before this one", 0.0)

        return self._turns.turn(tell=say, stop=stop)

    def _exported(
        self, choice: ExpertChoice, model: Path, scratch: Path, progress: ReportProgress
    ) -> Exported:
        from motionmerge.exports.loras import export_loras
        from motionmerge.exports.targets import own_model

        recipe = choice.recipe
        if recipe is None:
            raise ConfigError(
                "The model as it is has nothing that a LoRA could hold.",
                fix="Give a LoRA, a base or a recipe.",
            )
        if choice.boundary is not None:
            names = list(recipe.experts)
            schedule = chosen_schedule(names, None, choice.boundary, recipe.schedule)
            recipe = replace(recipe, schedule=schedule)
        files, kept = scratch / "files", scratch / "kept"
        written = export_loras(
            recipe,
            files,
            rank=EXPORT_RANK,
            target="comfyui",
            inputs=own_model(recipe, model, None),
            progress=progress,
        )
        usage = "\n".join([*map(str, written.values()), *written.usage]).replace(f"{files}/", "")
        (files / RECIPE_FILE).write_text(recipe.print(), encoding="utf-8")
        (files / "how-to-load.txt").write_text(usage + "\n", encoding="utf-8")
        kept.mkdir()
        shutil.make_archive(str(kept / Path(EXPORT_FILE).stem), "zip", files)
        identity = self.works.new_id()
        self.works.keep(identity, kept)
        return Exported(identity, usage)

    def _pipeline(self, wish: Wish, model: ModelChoice, tell: Teller) -> VideoPipeline:
        """Return the loaded model; another one is forgotten before."""
        if self._loaded is None or self._loaded[0] != wish.model:
            tell(f"Loading {model.name}", 0.0)
            self._loaded = None
            hide_loading_bars()
            self._loaded = (wish.model, model.load()[0])
        return self._loaded[1]

    def _videos(
        self,
        wish: Wish,
        model: ModelChoice,
        experts: Mapping[str, ExpertChoice],
        image: Image.Image,
        folder: Path,
        tell: Teller,
        stop: threading.Event,
    ) -> list[MadeVideo]:
        pipeline = self._pipeline(wish, model, tell)
        fingerprint = model.fingerprint()
        each = [
            wish.settings.changed(seed=wish.settings.seed + more) for more in range(wish.num_seeds)
        ]
        made: list[MadeVideo] = []

        def watch(done: int, total: int) -> None:
            if stop.is_set():
                raise Stopped
            share = (len(made) + done / total) / (len(experts) * len(each))
            tell(f"{list(experts)[len(made) // len(each)]}: step {done} of {total}", share)

        for part in parts_with_bars(pipeline):
            part.progress_bar = functools.partial(WatchedSteps, watcher=watch)
        for place, (name, choice) in enumerate(experts.items()):
            shared = made_with(model.family.name, fingerprint, choice.fingerprint())
            plan = planned_steps(model, choice, wish.settings)
            about = MadeVideo(
                name=name,
                file="",
                seed=wish.settings.seed,
                recipe=None if choice.recipe is None else choice.recipe.print(),
                steps=None if plan is None else plan.text,
                point=wish.points[place] if wish.points else None,
            )
            with choice.attach(pipeline, restore=True):
                for settings in each:
                    if stop.is_set():
                        raise Stopped
                    video = make_video(pipeline, image, settings)
                    resolved = settings.resolved(model.family, model.limits)
                    rate = settings.frame_rate or model.limits.frame_rate
                    file = f"{len(made) + 1}.mp4"
                    metadata = provenance(shared, resolved)
                    write_video(folder / file, video, fps=rate, metadata=metadata)
                    made.append(replace(about, file=file, seed=settings.seed))
        return made

    def _measured(self, wish: Wish, made: list[MadeVideo], folder: Path) -> Work:
        """Measure all videos, write the report and the recipe beside them."""
        prompt, seed = wish.settings.prompt or "", wish.settings.seed
        sources = [VideoSource(folder / one.file, prompt, folder / PHOTO, one.seed) for one in made]
        measured = measure_videos(sources)
        sets = [
            ReportSet(
                name=name,
                measured=[measured[place] for place in places],
                about=made_by([sources[place] for place in places]),
            )
            for name, places in _places_by_name(made).items()
        ]
        write_report(sets, to=folder / REPORT_FILE, title=prompt[:80] or "Videos")
        last = next((one.recipe for one in reversed(made) if one.recipe is not None), None)
        if last is not None:
            (folder / RECIPE_FILE).write_text(last, encoding="utf-8")
        return Work(
            id=self.works.new_id(),
            kind=wish.kind,
            prompt=prompt,
            seed=seed,
            model=wish.model,
            seconds=0.0,
            videos=tuple(_with_numbers(*pair) for pair in zip(made, measured, strict=True)),
        )


def _places_by_name(made: Iterable[MadeVideo]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for place, one in enumerate(made):
        found.setdefault(one.name, []).append(place)
    return found


def _with_numbers(made: MadeVideo, measured: Measured) -> MadeVideo:
    numbers = {name: measured.number(name) for name in SHOWN_NUMBERS}
    known = {name: round(value, 3) for name, value in numbers.items() if value is not None}
    return replace(made, numbers=known, failure=measured.failure)


def _painted(image: Image.Image, wish: Wish, model: ModelChoice) -> Image.Image:
    """Paint the objects of a prompt into the photo, for the pocket model."""
    if model.path is not None or not wish.paints or not named_things(wish.settings.prompt or ""):
        return image
    places = places_for(wish.settings.prompt or "", seed=wish.settings.seed)
    side = wish.settings.resolved(model.family, model.limits).height or SIZE
    return draw_things(fit_image(image, side, side), places)


def _thumbnail(image: Image.Image) -> Image.Image:
    small = image.copy()
    small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    return small
