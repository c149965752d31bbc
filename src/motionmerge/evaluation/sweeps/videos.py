"""Videos of the same photos and prompts with many sets of weights: made, resumed, and measured."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from motionmerge.errors import ConfigError, DataError
from motionmerge.evaluation.row_files import WHOLE, config_hash
from motionmerge.evaluation.runs import Kept, Measured, measure_videos
from motionmerge.evaluation.sources import VideoSource, photos_in
from motionmerge.evaluation.sweeps.observed import Goal, Observed
from motionmerge.evaluation.sweeps.pace import Pace, work_of
from motionmerge.io.hashing import hash_file
from motionmerge.sampling.batch.batch import BatchProgress, Failure, Tally, missing
from motionmerge.sampling.batch.manifest import (
    VideoJob,
    parse_manifest,
    read_list,
    read_manifest,
    read_prompts,
)
from motionmerge.sampling.batch.variants import PlannedVariant, Variant, VariantMaker
from motionmerge.sampling.families.limits import VideoFamily
from motionmerge.sampling.request.model import ModelChoice
from motionmerge.sampling.videos.settings import VideoSettings

OBJECTIVES = {
    "motion": Goal(metric="motion_degree", unit="px/s", digits=1),
    "object_motion": Goal(metric="object_motion", unit="px/s", digits=1),
    "first_frame": Goal(metric="first_frame_ssim", digits=3),
    "camera": Goal(metric="camera_agreement"),
    "drift": Goal(metric="drift_ssim_8", digits=3),
}
"""What can be measured of any model's videos without further weights."""


def read_jobs(
    model: ModelChoice,
    *,
    photos: Path | None,
    prompts: Path | None,
    manifest: Path | None,
    defaults: VideoSettings,
    num_videos: int = 1,
) -> list[VideoJob]:
    """Read the videos to make, of a manifest or of all photos with all prompts, and check them.

    Models that read no text have photos alone.

    Returns:
        Jobs whose settings are filled in.

    Raises:
        ConfigError: Neither photos with prompts nor a manifest are given, or prompts are given
            to a model that reads none.
        DataError: A list cannot be read, or the model cannot make a video.
    """
    if manifest is not None and photos is None and prompts is None:
        jobs = read_manifest(manifest, defaults=defaults, num_videos=num_videos)
    elif manifest is not None or photos is None or model.family.takes_text == (prompts is None):
        raise _wrong_scenes(model.family, prompts)
    else:
        jobs = parse_manifest(
            "\n".join(_lines(photos, prompts)),
            source="all photos with all prompts",
            folder=Path(),
            defaults=defaults,
            num_videos=num_videos,
        )
    for job in jobs:
        job.check(model.family, model.limits)
        with job.named_errors():
            model.check_prompt(job.settings.prompt or "")
    return [
        replace(job, settings=job.settings.resolved(model.family, model.limits)) for job in jobs
    ]


def _wrong_scenes(family: VideoFamily, prompts: Path | None) -> ConfigError:
    if family.takes_text:
        return ConfigError(
            "Videos need photos and prompts.", fix="Give `photos=` and `prompts=`, or `manifest=`."
        )
    if prompts is not None:
        return ConfigError(
            f"{family.name} makes videos from the image alone; it has no prompts.",
            fix="Leave `prompts=` out.",
        )
    return ConfigError("Videos need photos.", fix="Give `photos=` or `manifest=`.")


def _lines(photos: Path, prompts: Path | None) -> Iterator[str]:
    """Yield the lines of a manifest of all photos, with all prompts if there are any."""
    texts = None if prompts is None else read_prompts(read_list(prompts), source=str(prompts))
    for photo in photos_in(photos):
        name, image = _id_of(photo), str(photo.absolute())
        if texts is None:
            yield json.dumps({"image": image, "id": name}, ensure_ascii=False)
            continue
        for number, text in enumerate(texts, start=1):
            row = {"image": image, "prompt": text, "id": f"{name}-{number:03}"}
            yield json.dumps(row, ensure_ascii=False)


def _id_of(photo: Path) -> str:
    """Name a photo in the letters of ids; its bytes tell photos of one name apart, wherever."""
    plain = re.sub(r"[^A-Za-z0-9._]+", "_", photo.stem)[:40]
    return f"{plain}-{hash_file(photo)[:6]}"


def spread(jobs: Sequence[VideoJob], *, seed: int) -> list[VideoJob]:
    """Shuffle jobs by a seed, so that the first few are of many photos and prompts."""
    order = np.random.default_rng(seed).permutation(len(jobs))
    return [jobs[place] for place in order]


def measure_planned(
    planned: Sequence[PlannedVariant],
    kept: Kept,
    *,
    progress: Callable[[str], None] | None = None,
) -> list[list[Measured]]:
    """Measure every video once, and sort the results by variant."""
    sources = {
        video.path: VideoSource(
            video.path, video.job.settings.prompt, video.job.image, video.job.settings.seed
        )
        for one in planned
        for video in one.videos
    }
    tell = progress or (lambda _: None)
    found = measure_videos(
        sources.values(), kept=kept, progress=lambda source: tell(source.path.name)
    )
    by_path = {one.source.path: one for one in found}
    return [[by_path[video.path] for video in one.videos] for one in planned]


class VideoBench:
    """Photos with prompts, on which sets of weights are tried; see `Bench`.

    Args:
        maker: Makes the videos.
        jobs: Which, see `spread`; the first few stand for all.
        folder: Where rows and timings are kept.
        on_progress: Told of every video.
    """

    objectives: Mapping[str, Goal] = OBJECTIVES

    def __init__(
        self,
        maker: VariantMaker,
        jobs: Sequence[VideoJob],
        folder: Path,
        *,
        on_progress: Callable[[BatchProgress], None] | None = None,
    ) -> None:
        self._maker, self._jobs = maker, list(jobs)
        self._kept = Kept.in_folder(folder, WHOLE)
        self._pace = Pace(folder, maker.kind)
        self._on_progress = on_progress
        self.failures: list[Failure] = []
        self.num_clips = len(self._jobs)
        self.num_steps = max(job.settings.num_inference_steps or 1 for job in self._jobs)
        num_photos = len({job.image for job in self._jobs})
        photos = "1 photo" if num_photos == 1 else f"{num_photos} photos"
        self.about = f"{self.num_clips} video{'s' * (self.num_clips != 1)} of {photos}"

    def observe(self, variant: Variant, *, num_clips: int, num_steps: int) -> Observed:
        """Make what is missing of the first videos, and measure them.

        Raises:
            DataError: Not one could be made and measured.
        """
        planned = self._maker.plan(variant, self._chosen(num_clips, num_steps))
        todo = missing(planned.videos, overwrite=False)
        if todo:
            self._maker.prepare()
            tally = Tally(len(todo), on_progress=self._on_progress)
            self._maker.make(planned, todo, tally=tally)
            report = tally.report()
            self.failures += report.failures
            if report.done and not report.failures:
                work, loading = work_of([video.job for video in todo]), tally.seconds_loading
                self._pace.add(work, report.seconds - loading, loads=1, loading=loading)
        [measured] = measure_planned([planned], self._kept)
        observed = Observed.of_videos(measured, [one.metric for one in OBJECTIVES.values()])
        if observed.num_failed == len(measured):
            reason = self.failures[-1].error if self.failures else measured[0].failure
            raise DataError(
                f"No video of `{variant.name}` could be made and measured: {reason}",
                fix="Try one by itself first: `motionmerge generate`.",
            )
        return observed

    def seconds(self, *, num_clips: int, num_steps: int) -> float | None:
        """Estimate the time of so many videos; None where none was timed in this folder."""
        return self._pace.seconds(work_of(self._chosen(num_clips, num_steps)), loads=1)

    def key(self, variant: Variant, *, num_clips: int, num_steps: int) -> str:
        """Hash the configurations of the videos."""
        planned = self._maker.plan(variant, self._chosen(num_clips, num_steps))
        return config_hash(videos=[video.configuration for video in planned.videos])

    def _chosen(self, num_clips: int, num_steps: int) -> list[VideoJob]:
        """Return the first jobs, with fewer steps where theirs are more."""
        return [_with_steps(job, num_steps) for job in self._jobs[:num_clips]]


def _with_steps(job: VideoJob, most: int) -> VideoJob:
    own = job.settings
    if own.sigmas is not None or (own.num_inference_steps or 1) <= most:
        return job
    return replace(job, settings=own.changed(num_inference_steps=most))
