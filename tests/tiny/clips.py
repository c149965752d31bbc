"""A few tiny clips to train on, with their manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from motionmerge.io.clips import survey_clip
from motionmerge.io.decoding import ClipPlace
from motionmerge.io.video import write_video
from motionmerge.io.weights import open_weights
from motionmerge.training.clip_run import ClipRun, open_clip_run
from motionmerge.training.clips_manifest import ClipShot, TrainingClip, write_clips_manifest
from motionmerge.training.run_config import RunConfig

_SIZES_AND_CAPTIONS = (
    ((16, 16), "a cat jumps"),
    ((16, 32), "the camera pans left"),
    ((16, 16), "up"),
)
_FRAMES = 9


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


def clip_run(
    model: Path,
    manifest: Path,
    output: Path,
    *,
    data: dict[str, Any],
    settings: dict[str, Any],
    **changes: Any,
) -> ClipRun:
    """Open a short run in fp32 on tiny clips; runs beside each other share their encoded views."""
    own_data = {
        "folder": manifest.parent,
        "manifest": manifest,
        "sizes": [[16, 16], [16, 32]],
        "cache_folder": output.parent / "views",
    }
    own_settings = {
        "batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 0, "decay": "none",
        "ema_decay": None, "precision": "fp32", "log_every": 1,
    }  # fmt: skip
    content = {
        "model": str(model),
        "output": output,
        "data": own_data | data,
        "settings": own_settings | settings,
    }
    return open_clip_run(RunConfig.model_validate(content | changes))


def losses_of(run: ClipRun) -> list[float]:
    """Train, and list the logged losses."""
    seen: list[float] = []
    run.train(on_progress=lambda progress: seen.append(progress.loss))
    return seen


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a file or folder."""
    with open_weights(path) as file:
        return {name: file.read(name) for name in file.keys()}  # noqa: SIM118
