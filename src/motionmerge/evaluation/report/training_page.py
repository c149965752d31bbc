"""The page of a training run: its curves, and what it made of held-out clips, step beside step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from motionmerge.errors import ConfigError, DataError
from motionmerge.evaluation.flow import shared_scale
from motionmerge.evaluation.html import page_text
from motionmerge.evaluation.motion import REFERENCE_WIDTH
from motionmerge.evaluation.report.embedding import (
    EmbeddedVideo,
    embed_video,
    legend_uri,
    photo_uri,
    strip_uri,
)
from motionmerge.evaluation.report.training_charts import training_charts
from motionmerge.evaluation.report.training_run import TrainingRun, ValidationVideo
from motionmerge.io.atomic import write_whole

MOST_COLUMNS = 5
"""Steps whose videos are shown, evenly spread from the first to the last."""

MOST_ROWS = 50
"""Validations in the table, likewise."""

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class ShownStep:
    """A video as the page shows it, with its flow pictures."""

    video: ValidationVideo
    embedded: EmbeddedVideo
    strip: str | None


@dataclass(frozen=True)
class HeldOutScene:
    """The videos of one held-out clip, by step."""

    prompt: str
    photo: str | None
    steps: Sequence[ShownStep]


def write_training_page(
    run: TrainingRun, *, to: Path, title: str, max_megabytes: float
) -> tuple[int, int]:
    """Write the page, which needs no other file.

    Args:
        run: What was logged.
        to: The HTML file.
        title: Of the page.
        max_megabytes: About how large the page may get; the videos of clips beyond it are left out.

    Returns:
        How many clips are shown with their videos, and how many had no room.

    Raises:
        ConfigError: `to` is no page.
        DataError: Nothing was logged yet, or the file cannot be written.
    """
    if to.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"`{to.name}` is no page.", fix="End the name with .html.")
    if not run.losses and not run.validations:
        raise DataError("The run has logged nothing yet.", fix="Wait for its first line.")
    scenes, num_left_out, scale = _scenes(run, most_bytes=int(max_megabytes * 1e6))
    text = page_text(
        "training.html.j2",
        title=title,
        run=run,
        rows=_spread(run.validations, MOST_ROWS),
        bands=list(dict.fromkeys(band for one in run.validations for band in one.losses)),
        figures=training_charts(run),
        scenes=scenes,
        num_left_out=num_left_out,
        flow_scale=scale,
        legend=legend_uri(),
        reference_width=REFERENCE_WIDTH,
    )
    write_whole(to, text)
    return len(scenes), num_left_out


def _spread(items: Sequence[_Item], most: int) -> list[_Item]:
    """Choose items evenly, the first and the last among them."""
    places = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[place] for place in places]


def _scenes(run: TrainingRun, *, most_bytes: int) -> tuple[list[HeldOutScene], int, float]:
    """Encode the videos of the first clips that fit, with all flow on one scale."""
    steps = _spread([one for one in run.validations if one.videos], MOST_COLUMNS)
    clips: dict[str, list[ValidationVideo]] = {}
    for line in steps:
        for video in line.videos:
            clips.setdefault(video.name, []).append(video)
    chosen: list[tuple[list[ValidationVideo], list[EmbeddedVideo], str | None]] = []
    used = 0
    for videos in clips.values():
        embedded = [embed_video(one.path) for one in videos]
        photo = photo_uri(videos[0].photo)
        size = sum(one.num_bytes for one in embedded) + len(photo or "")
        if used + size > most_bytes:
            break
        used += size
        chosen.append((videos, embedded, photo))
    flows = [flow for _, embedded, _ in chosen for one in embedded for flow in one.flows]
    scale = shared_scale(flows) if flows else 1.0
    scenes = [
        HeldOutScene(
            videos[0].prompt,
            photo,
            [
                ShownStep(video, one, strip_uri(one.flows, scale=scale) if one.flows else None)
                for video, one in zip(videos, embedded, strict=True)
            ],
        )
        for videos, embedded, photo in chosen
    ]
    return scenes, len(clips) - len(scenes), scale
