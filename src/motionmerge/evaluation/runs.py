"""Measure many videos, in shards if wanted, and keep the results so that none is measured twice.

A result is a row (clip, metric, value, configuration): the clip by the SHA-256 of its bytes, the
configuration by a hash of everything else that decides the value. A clip's rows are written at
once. Of a video that cannot be measured nothing is kept: what failed may pass, so that the next
run tries it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from motionmerge.errors import DataError, MotionMergeError
from motionmerge.evaluation import camera, clips, motion
from motionmerge.evaluation.metrics import FAILURE, METRICS, NOTES, Group, Value
from motionmerge.evaluation.row_files import (
    WHOLE,
    Shard,
    append_rows,
    config_hash,
    joined,
    read_row_files,
)
from motionmerge.evaluation.similarity import psnr, ssim
from motionmerge.evaluation.sources import VideoSource
from motionmerge.evaluation.vbench.rules import SAMPLES_PER_SECOND
from motionmerge.evaluation.vbench.suite import CAMERA_MOVES
from motionmerge.io.hashing import hash_file
from motionmerge.io.paths import is_plain_file
from motionmerge.io.video import fit_image, load_image

if TYPE_CHECKING:  # only those who ask for features need torch
    from motionmerge.evaluation.backbones.xfeat import XFeat
    from motionmerge.evaluation.semantic import SemanticFeatures

FORMAT = 2
"""Raise it when a metric changes its meaning: kept rows are then not used."""

ROWS = "rows"
"""Stem of the files of rows."""

Values = Mapping[str, Value]

UNFORESEEN = (
    *(cv2.error, ArithmeticError, LookupError, RuntimeError, ValueError),
    *(MemoryError, OSError),
)
"""Errors of libraries and of the machine: the video is reported, and the run goes on."""


@dataclass(frozen=True)
class Row:
    """One value.

    Args:
        clip: SHA-256 of the file.
        metric: A name of `METRICS`, or of another set of metrics.
        value: See `Value`.
        config: Hash of everything else that decides the value, see `config_hash`.
    """

    clip: str
    metric: str
    value: Value
    config: str

    @property
    def key(self) -> tuple[str, str, str]:
        """Clip, metric and configuration: two rows with the same key must agree."""
        return self.clip, self.metric, self.config

    @property
    def is_fault(self) -> bool:
        """Whether it says why a clip could not be measured; older versions kept such rows."""
        return self.metric == FAILURE

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Row:
        """Build a row from what a file holds, checking types and ranges.

        Raises:
            ValueError: No run can have written it; TypeError likewise.
        """
        row = cls(**content)
        if not all(isinstance(part, str) for part in row.key):
            raise ValueError("its parts are of other types")
        if not _is_possible(row.metric, row.value):
            raise ValueError(f"{row.metric[:60]} cannot be {str(row.value)[:60]!r}")
        return row


def labels_of(metric: str) -> tuple[str, ...]:
    """Return the words that a metric can have, besides those joined by `+`."""
    if metric == "camera_labels_dis":
        return (*CAMERA_MOVES.values(), "None", "none")
    return camera.LABELS


_SHARES = (
    *("camera_following", "temporal_flickering", "warp_valid", "dynamic_degree_dis"),
    *("camera_agreement", "camera_motion_dis"),
    *("subject_consistency_efflite0", "i2v_subject_efflite0"),
)
"""Metrics in 0..1 whose names do not end with `_share`; a share of the width may be above 1."""

_SIGNED = ("camera_pan", "camera_tilt", "camera_roll", "first_frame", "drift")
"""How the names of metrics begin that may be negative."""

_LARGEST = 1e12


def _is_possible(name: str, value: object) -> bool:
    """Check the type and range of a value that comes from a file."""
    metric = METRICS.get(name)
    if name in (NOTES, FAILURE):
        return value is None or isinstance(value, str)
    if value is None or metric is None:  # of a metric that this version does not have
        return value is None or isinstance(value, (str, int, float))
    if metric.is_label:
        return isinstance(value, str) and set(value.split("+")) <= set(labels_of(name))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    is_share = (name.endswith("_share") and name != "motion_share") or name in _SHARES
    least = -_LARGEST if name.startswith(_SIGNED) else 0.0
    return least <= value <= (1.0 if is_share else _LARGEST)


@dataclass
class Kept:
    """The results measured so far, and the file to which new ones are appended.

    Args:
        path: The file to append to; None keeps nothing.
        found: Values by (clip, configuration).
    """

    path: Path | None = None
    found: dict[tuple[str, str], dict[str, Value]] = field(default_factory=dict)

    @classmethod
    def in_folder(cls, folder: Path, shard: Shard) -> Kept:
        """Read the rows of all parts in a folder.

        Raises:
            DataError: A line is no row, or two rows contradict each other.
        """
        kept = cls(folder / shard.file_name(ROWS))
        for row in joined(read_row_files(folder, ROWS, Row.of)).values():
            if not row.is_fault:
                kept.found.setdefault((row.clip, row.config), {})[row.metric] = row.value
        return kept

    def values(self, clip: str, config: str, needed: Iterable[str]) -> dict[str, Value] | None:
        """Return a clip's values if all needed ones are kept, else None."""
        values = self.found.get((clip, config), {})
        return values if set(needed) <= set(values) else None

    def add(self, clip: str, config: str, values: Values) -> None:
        """Keep values: one write for all of them.

        Raises:
            DataError: The file cannot be written.
        """
        self.found.setdefault((clip, config), {}).update(values)
        if self.path is not None:
            rows = [Row(clip, metric, value, config) for metric, value in values.items()]
            append_rows(self.path, [asdict(row) for row in rows])


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A video and its values.

    Args:
        source: The video and what is known of it.
        clip: SHA-256 of the file; None if it cannot be read.
        values: By metric; empty where `failure` says why.
        notes: What is odd about it.
        failure: Why it cannot be measured.
    """

    source: VideoSource
    clip: str | None
    values: Values
    notes: tuple[str, ...] = ()
    failure: str | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should look at first: frozen, loops, and the notes."""
        return (*_warnings(self.values), *self.notes)

    def number(self, metric: str) -> float | None:
        """Return a value that is a number."""
        value = self.values.get(metric)
        return None if value is None or isinstance(value, str) else float(value)


FROZEN_WARNING, LOOPING_WARNING, UNFOLLOWED_WARNING = 0.5, 0.25, 0.001
"""Shares from which a video is called frozen or looping, or its motion larger than measured."""


def _warnings(values: Values) -> Iterator[str]:
    for metric, limit, text in (
        ("frozen_share", FROZEN_WARNING, "FROZEN: nothing moves in {:.0%} of it"),
        ("cut_share", 1e-9, "CUTS: {:.0%} of its steps cannot be followed, and are left out"),
        ("unfollowed_share", UNFOLLOWED_WARNING, "{:.1%} of the picture moves too fast to follow"),
        ("looping_share", LOOPING_WARNING, "LOOPS: {:.0%} of its frames look like an earlier one"),
    ):
        value = values.get(metric)
        if isinstance(value, (int, float)) and value >= limit:
            yield text.format(value)


def metrics_of(group: Group) -> list[str]:
    """Return the names of a group's metrics."""
    return [metric.name for metric in METRICS.values() if metric.group == group]


def measure_videos(
    sources: Iterable[VideoSource],
    *,
    kept: Kept | None = None,
    shard: Shard | None = None,
    features: SemanticFeatures | None = None,
    xfeat: XFeat | None = None,
    progress: Callable[[VideoSource], None] | None = None,
) -> list[Measured]:
    """Measure the videos of one shard, except those whose results are kept.

    Args:
        sources: The videos.
        kept: Where rows are found and kept; by default nothing is.
        shard: Which part of the videos.
        features: Measures what its network sees as well.
        xfeat: Finds large moves where SIFT finds none.
        progress: Called after each, also after those of other shards.

    Raises:
        DataError: Rows cannot be written. A video that cannot be measured is no error: its
            `failure` says why.
    """
    kept, shard = kept or Kept(), shard or WHOLE
    measured = []
    for source in sources:
        one = _measure(source, kept, shard, features, xfeat)
        if one is not None:
            measured.append(one)
        if progress is not None:
            progress(source)
    return measured


def _measure(
    source: VideoSource,
    kept: Kept,
    shard: Shard,
    features: SemanticFeatures | None,
    xfeat: XFeat | None,
) -> Measured | None:
    try:
        if not is_plain_file(source.path):
            raise DataError("It is no file.", fix="Leave it out.")
        name = hash_file(source.path)
    except (OSError, DataError) as error:
        if shard.number != 1:  # without bytes it belongs to the first
            return None
        return Measured(source=source, clip=None, values={}, failure=reason_of(error))
    if not shard.holds(name):
        return None
    one = _OneVideo(source, name, kept)
    try:
        values = one.values(
            clip_config()
            if xfeat is None
            else config_hash(clip=clip_config(), xfeat=xfeat.fingerprint),
            [*metrics_of("clip"), NOTES],
            lambda clip: _measure_clip(clip, xfeat),
        )
        if features is not None:
            config = config_hash(clip=clip_config(), weights=features.loaded.fingerprint)
            found = one.values(
                config, metrics_of("features"), lambda clip: features.of_clip(clip.samples)
            )
            values = {**values, **found}
    except (MotionMergeError, *UNFORESEEN) as error:
        return Measured(source=source, clip=name, values={}, failure=reason_of(error))
    notes = tuple(str(values[NOTES] or "").split("; ")) if values[NOTES] else ()
    own = {metric: value for metric, value in values.items() if metric != NOTES}
    with_photo, photo_note = _compare_photo(one, features)
    own |= with_photo
    own |= camera_agreement(source.prompt, own)
    return Measured(source=source, clip=name, values=own, notes=(*notes, *photo_note))


@dataclass
class _OneVideo:
    """A video whose rows are looked up, and which is decoded once where one is missing."""

    source: VideoSource
    name: str
    kept: Kept
    _clip: clips.Clip | None = None

    @property
    def clip(self) -> clips.Clip:
        """The decoded video.

        Raises:
            DataError: It cannot be decoded.
        """
        if self._clip is None:
            self._clip = clips.read_clip(self.source.path)
        return self._clip

    def values(
        self, config: str, metrics: list[str], compute: Callable[[clips.Clip], dict[str, Value]]
    ) -> dict[str, Value]:
        """Return these metrics from the kept rows, or compute and keep them.

        Raises:
            DataError: The video cannot be measured, or a value is not finite.
        """
        found = self.kept.values(self.name, config, metrics)
        if found is None:
            found = compute(self.clip)
            for name, value in found.items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise DataError(f"Its {name} came out as {value}.", fix="Make the video again.")
            self.kept.add(self.name, config, found)
        return {metric: found[metric] for metric in metrics}


def clip_config() -> str:
    """Hash what decides the metrics of the video alone."""
    return config_hash(
        format=FORMAT,
        opencv=cv2.__version__.split(".")[:2],
        longer=clips.LONGER_SIDE,
        shorter=clips.SHORTER_SIDE,
        rate=SAMPLES_PER_SECOND,
        most=clips.MAX_SAMPLES,
    )


def _measure_clip(clip: clips.Clip, xfeat: XFeat | None) -> dict[str, Value]:
    """Measure what needs the video alone."""
    height, width = clip.size
    return {
        "width": width,
        "height": height,
        "num_frames": clip.num_frames,
        "frame_rate": clip.frame_rate,
        "seconds": clip.seconds,
        "temporal_flickering": clip.flicker,
        **motion.measure_motion(clip, matchers=(camera.sift_matches, *([xfeat] if xfeat else []))),
        NOTES: "; ".join(clip.notes),
    }


def reason_of(error: Exception) -> str:
    """Return in one line why a video cannot be used; an error of a library is named."""
    if isinstance(error, MotionMergeError):
        return error.message
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _compare_photo(
    one: _OneVideo, features: SemanticFeatures | None
) -> tuple[dict[str, Value], tuple[str, ...]]:
    """Compare the video to its photo, fitted as the model's input is: covered and cut."""
    nothing: dict[str, Value] = dict.fromkeys(metrics_of("photo"))
    path = one.source.photo
    if path is None:
        return nothing, ()

    def photo_of(clip: clips.Clip) -> clips.Picture:
        return np.asarray(fit_image(load_image(path), *clip.size))

    def first_frame(clip: clips.Clip) -> dict[str, Value]:
        photo = photo_of(clip)
        return {
            "first_frame_psnr": psnr(clip.first, photo),
            "first_frame_ssim": ssim(clip.first, photo),
        }

    try:
        photo_hash = hash_file(path)
        config = config_hash(format=FORMAT, photo=photo_hash)
        values = one.values(config, list(nothing), first_frame)
        if features is not None:
            weights = features.loaded.fingerprint
            values |= one.values(
                config_hash(clip=clip_config(), photo=photo_hash, weights=weights),
                metrics_of("photo features"),
                lambda clip: features.of_photo(clip.samples, photo_of(clip)),
            )
    except (OSError, MotionMergeError) as error:
        return nothing, (f"its photo cannot be used: {reason_of(error).rstrip('.')}",)
    return values, ()


def camera_agreement(prompt: str | None, values: Values) -> dict[str, Value]:
    """Compare the camera's move to the one that a prompt names; None where it names none.

    A clip whose move is unclear agrees with nothing.
    """
    named = camera.named_move(prompt or "")
    if named is None:
        return dict.fromkeys(metrics_of("prompt"))
    seen = str(values["camera_labels_dis"]).split("+")
    return {
        "camera_agreement": float(values["camera_label"] == named),
        "camera_motion_dis": float(named in seen),
    }
