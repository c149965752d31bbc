"""The same videos with one set of weights after another, in a model that is loaded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from motionmerge.models.video_pipeline import VideoPipeline
from motionmerge.sampling.batch.batch import BatchOptions, Tally, missing, run_batch
from motionmerge.sampling.batch.manifest import PlannedVideo, VideoJob, plan
from motionmerge.sampling.request.experts import ExpertChoice
from motionmerge.sampling.request.model import ModelChoice
from motionmerge.sampling.videos.provenance import made_with


@dataclass(frozen=True)
class Variant:
    """One of several sets of weights that are compared.

    Attributes:
        name: In words, such as `motion 0.5, boundary 0.64`.
        experts: The weights.
    """

    name: str
    experts: ExpertChoice


@dataclass(frozen=True)
class PlannedVariant:
    """A set of weights and its videos, in the order of the jobs."""

    experts: ExpertChoice
    metadata: dict[str, object]
    videos: Sequence[PlannedVideo]


def missing_of(planned: Sequence[PlannedVariant]) -> list[list[PlannedVideo]]:
    """List each variant's missing videos; a video that several variants share is listed once."""
    seen: set[Path] = set()
    left = []
    for one in planned:
        fresh = [video for video in one.videos if video.path not in seen]
        seen.update(video.path for video in fresh)
        left.append(missing(fresh))
    return left


class VariantMaker:
    """Makes videos in one folder with one set of weights after another.

    The model is loaded when the first video is missing, and gets its own weights back after each
    variant; they wait in main memory meanwhile.

    Args:
        model: What makes the videos.
        folder: Where they go.
        load: Loads the model; by default as `ModelChoice.load` does.
    """

    def __init__(
        self,
        model: ModelChoice,
        folder: Path,
        *,
        load: Callable[[], VideoPipeline] | None = None,
    ) -> None:
        self.model, self.folder = model, folder
        self.kind = model.name
        """Videos of one kind take the same time."""
        self._load = load or (lambda: model.load()[0])

    def plan(self, variant: Variant, jobs: Sequence[VideoJob]) -> PlannedVariant:
        """Name the videos of a variant; equal variants share theirs.

        Raises:
            CheckpointError: An input is missing or is not the one that the recipe pins.
        """
        made_by = variant.experts.fingerprint()
        return PlannedVariant(
            experts=variant.experts,
            metadata=made_with(self.model.family.name, self._made_of, made_by),
            videos=plan(jobs, self.folder, fingerprint={**self._made_of, **made_by}),
        )

    def prepare(self) -> None:
        """Load the model now, as that is done once and not for every variant."""
        _ = self.pipeline

    def make(
        self, planned: PlannedVariant, videos: Sequence[PlannedVideo], *, tally: Tally
    ) -> None:
        """Make videos of a variant in this process.

        Raises:
            MotionMergeError: As `ExpertChoice.attach` and `run_batch`.
        """
        if not videos:
            return
        tally.begins_loading()
        with planned.experts.attach(self.pipeline, restore=True) as bank:
            tally.has_loaded()
            run_batch(self.pipeline, videos, self.options(planned), bank=bank, tally=tally)

    def options(self, planned: PlannedVariant) -> BatchOptions:
        """Return how the videos of a variant are made."""
        return BatchOptions(metadata=planned.metadata, frame_rate=self.model.limits.frame_rate)

    @cached_property
    def pipeline(self) -> VideoPipeline:
        """The loaded model."""
        return self._load()

    @cached_property
    def _made_of(self) -> dict[str, object]:
        return self.model.fingerprint()
