"""Videos of the clips that are held out, on fixed seeds, and how much they move beside the base's.

A model that is fine-tuned on slow clips forgets to move long before its loss says so. Here the
first frame and the caption of held-out clips are animated at every validation, from the same noise:
what changes from one to the next is the model. How videos are measured is the caller's choice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch import nn

from motionmerge.errors import ConfigError, DataError
from motionmerge.io.atomic import atomic_path
from motionmerge.io.video import named_write_errors, write_video
from motionmerge.models.video_pipeline import VideoPipeline
from motionmerge.sampling.families.limits import Limits, VideoFamily
from motionmerge.sampling.pipelines.encoded import Conditions
from motionmerge.sampling.pipelines.encoders import EncodingPipeline
from motionmerge.sampling.request.loading import show_progress
from motionmerge.sampling.videos.make_video import conditions_of, make_video, pipeline_arguments
from motionmerge.sampling.videos.settings import VideoSettings

from .denoisers.encoding import settings_like
from .run_log import VALIDATION_LOG, read_log
from .views import ClipView

VIDEOS = "videos"
"""Folder of the videos inside a run's."""

LEAST_MOTION = 0.5
"""Pixels a second in a frame 512 wide: a base that moves less has no motion to compare with."""


@dataclass(frozen=True, kw_only=True)
class VideoFigures:
    """What is measured on one video.

    Args:
        motion_degree: Pixels a second in a frame 512 wide; None where it is not known.
        first_frame_psnr: Of the first frame against the photo, in decibels; None likewise.
        failure: Why nothing could be measured.
    """

    motion_degree: float | None = None
    first_frame_psnr: float | None = None
    failure: str | None = None


MeasureVideo = Callable[[Path, Path], VideoFigures]
"""Measures a video; takes its file and that of the photo it begins with."""


@dataclass(frozen=True, kw_only=True)
class HeldOutVideo:
    """One video that is made again and again.

    Args:
        name: Of its file.
        photo: What it begins with.
        last_image: What it ends with, for a model that interpolates.
        settings: Its prompt, seed, size and length.
        frame_rate: Frames per second of the clip, and so of the video.
    """

    name: str
    photo: Image.Image
    last_image: Image.Image | None
    settings: VideoSettings
    frame_rate: float

    def photo_in(self, folder: Path) -> Path:
        """Return the file of the photo, below a run's folder; it is written when missing.

        Raises:
            DataError: The disk refuses.
        """
        path = folder / VIDEOS / f"{self.name}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with named_write_errors(path), atomic_path(path) as temporary:
                self.photo.save(temporary, "PNG")
        return path


def videos_of_views(
    views: Sequence[ClipView],
    family: VideoFamily,
    limits: Limits,
    *,
    rate_of: Callable[[ClipView], float],
    num_steps: int,
    seed: int,
    interpolates: bool,
) -> list[HeldOutVideo]:
    """Return a video for each view, with its first frame and its caption.

    Args:
        views: Of the clips; each supplies size, length and rate of its video.
        family, limits: Of the pipeline that makes the videos.
        rate_of: Returns what the pipeline is told of a view's rate.
        num_steps: Of denoising.
        seed: Of every video.
        interpolates: Whether videos end with the last frame of their view too.

    Raises:
        DataError: A clip cannot be read.
    """
    videos = []
    for number, view in enumerate(views, 1):
        frames, clip = view.read(), view.shot.clip
        settings = settings_like(
            family,
            limits,
            prompt=clip.caption,
            seed=seed,
            height=view.size[0],
            width=view.size[1],
            num_frames=len(frames),
            frame_rate=rate_of(view),
            num_inference_steps=num_steps,
        )
        videos.append(
            HeldOutVideo(
                name=f"{number}-{_file_name(clip.name)}",
                photo=Image.fromarray(frames[0]),
                last_image=Image.fromarray(frames[-1]) if interpolates else None,
                settings=settings,
                frame_rate=view.frame_rate,
            )
        )
    return videos


def _file_name(clip: str) -> str:
    """Return what of a clip's name can be in that of any file; others chose it."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", Path(clip).stem).strip("-")[:60] or "clip"


class HeldOutVideos:
    """Makes the videos, and compares their motion to that of step 0.

    Args:
        pipeline: On the CPU. It holds the denoiser that is trained. Encoders of a pipeline of ours
            run now, and are freed.
        videos: What `videos_of_views` made.
        folder: Of the run.
        measure: See `MeasureVideo`.
        warn_below: Share of the base's motion that is kept beside the numbers, for those who warn.

    Raises:
        ConfigError: The model cannot make such a video.
    """

    def __init__(
        self,
        pipeline: VideoPipeline,
        videos: Sequence[HeldOutVideo],
        *,
        folder: Path,
        measure: MeasureVideo,
        warn_below: float,
    ) -> None:
        self._pipeline, self._videos, self._folder = pipeline, videos, folder
        self._measure, self._warn_below = measure, warn_below
        self._base: Mapping[str, float | None] | None = None
        show_progress(pipeline, is_quiet=True)
        self._conditions: Sequence[Conditions | None] = [None] * len(videos)
        if isinstance(pipeline, EncodingPipeline):
            arguments = (
                pipeline_arguments(pipeline, one.photo, one.settings, last_image=one.last_image)
                for one in videos
            )
            self._conditions = [conditions_of(pipeline, one) for one in arguments]
            pipeline.free_encoders()

    @torch.no_grad()
    def __call__(self, module: nn.Module, step: int) -> dict[str, Any]:
        """Write the videos of a step and return their numbers, and the median of `relative_motion`.

        Args:
            module: The denoiser; its device counts.
            step: Of the run. 0 is the base.

        Raises:
            ConfigError: At step 0, a video cannot be made; memory ran out, for example.
        """
        device = next(module.parameters()).device
        with _on(device, self._pipeline):
            lines = [
                self._line(video, conditions, step, device)
                for video, conditions in zip(self._videos, self._conditions, strict=True)
            ]
        if step == 0:
            self._base = {line["name"]: line["motion_degree"] for line in lines}
        elif self._base is None:
            self._base = self._base_of_log()
        for line in lines:
            line["relative_motion"] = _ratio(line["motion_degree"], self._base.get(line["name"]))
        known = [one for line in lines if (one := line["relative_motion"]) is not None]
        return {
            "videos": lines,
            "relative_motion": median(known) if known else None,
            "warn_below": self._warn_below,
        }

    def _line(
        self,
        video: HeldOutVideo,
        conditions: Conditions | None,
        step: int,
        device: torch.device,
    ) -> dict[str, Any]:
        """Make and measure one video; that it cannot be made is no reason to end a run."""
        path = self._folder / VIDEOS / f"step-{step:06d}" / f"{video.name}.mp4"
        try:
            photo = video.photo_in(self._folder)
            frames = make_video(
                self._pipeline,
                video.photo,
                video.settings,
                last_image=video.last_image,
                conditions=None if conditions is None else conditions.to(device),
            )
            if not PartialState().is_main_process:  # it computed its part of a sharded network
                return {"name": video.name, "motion_degree": None}
            about = {"step": step, **video.settings.model_dump(exclude_none=True)}
            write_video(path, frames, fps=video.frame_rate, metadata=about)
            found = self._measure(path, photo)
        except (ConfigError, DataError) as error:
            if step == 0 and isinstance(error, ConfigError):  # nothing is lost yet
                raise ConfigError(
                    f"A video of the validation cannot be made: {error.message}",
                    fix="Set `validation.videos` to 0, or train on smaller or shorter views.",
                ) from error
            found = VideoFigures(failure=error.message)
        line: dict[str, Any] = {
            "name": video.name,
            "file": path.relative_to(self._folder).as_posix(),
            "prompt": video.settings.prompt,
            "video_steps": video.settings.num_inference_steps,
            "motion_degree": found.motion_degree,
            "first_frame_psnr": found.first_frame_psnr,
        }
        return line if found.failure is None else {**line, "failure": found.failure}

    def _base_of_log(self) -> dict[str, float | None]:
        """Return the motion at step 0, which an earlier sitting measured."""
        for line in read_log(self._folder / VALIDATION_LOG):
            if line["step"] == 0:
                return {
                    one["name"]: one["motion_degree"]
                    for one in line.get("videos", ())
                    # Videos of other steps move otherwise, whatever the weights.
                    if one.get("video_steps") == self._video_steps
                }
        return {}

    @property
    def _video_steps(self) -> int | None:
        return next((one.settings.num_inference_steps for one in self._videos), None)


def _ratio(motion: float | None, base: float | None) -> float | None:
    if motion is None or base is None or base < LEAST_MOTION:
        return None
    return motion / base


@contextmanager
def _on(device: torch.device, pipeline: VideoPipeline) -> Iterator[None]:
    """Have all parts of a pipeline on a device; afterwards they are where they were."""
    parts = [one for one in pipeline.components.values() if isinstance(one, nn.Module)]
    before = [next((value.device for value in one.parameters()), device) for one in parts]
    for one in parts:
        one.to(device)
    try:
        yield
    finally:
        for one, where in zip(parts, before, strict=True):
            one.to(where)
