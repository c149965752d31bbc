"""A few tiny clips to train on, with their manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from motionmerge.io.clips import survey_clip
from motionmerge.io.decoding import ClipPlace
from motionmerge.io.video import write_video
from motionmerge.training.clips_manifest import ClipShot, TrainingClip, write_clips_manifest

_SIZES_AND_CAPTIONS = (
    ((16, 16), "a cat jumps"),
    ((16, 32), "the camera pans left"),
    ((16, 16), "up"),
)
_FRAMES = 8


def save_clips(folder: Path) -> Path:
    """Write three clips of noise, one of another shape; give their manifest."""
    folder.mkdir()
    clips = []
    for number, (size, caption) in enumerate(_SIZES_AND_CAPTIONS):
        place = ClipPlace(folder / f"{number}.mp4")
        frames = np.random.default_rng(number).integers(0, 256, (_FRAMES, *size, 3), dtype=np.uint8)
        write_video(place.path, frames, fps=8)
        clips.append(
            TrainingClip(
                name=place.path.name,
                place=place,
                clip=f"{number:064x}",
                num_bytes=place.path.stat().st_size,
                caption=caption,
                size=size,
                times=survey_clip(place).times,
                shots=(ClipShot(0, _FRAMES, float(number)),),
            )
        )
    manifest = folder / "clips.jsonl"
    write_clips_manifest(manifest, clips, folder=folder)
    return manifest
