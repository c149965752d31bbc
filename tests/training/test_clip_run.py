"""A training run from clips to a recipe, on a tiny DynamiCrafter."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from motionmerge.io.clips import survey_clip
from motionmerge.io.decoding import ClipPlace
from motionmerge.io.video import write_video
from motionmerge.io.weights import open_weights
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.parameter_groups import group_of
from motionmerge.training.clip_run import ClipRun, open_clip_run
from motionmerge.training.clips_manifest import ClipShot, TrainingClip, write_clips_manifest
from motionmerge.training.run_config import RunConfig

from ..tiny.dynamicrafter import NUM_FRAMES
from ..tiny.folders import save_dynamicrafter


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_dynamicrafter(folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips, one of another shape, and their manifest."""
    folder = tmp_path_factory.mktemp("clips")
    found = []
    for number, (size, caption) in enumerate(
        [((16, 16), "a cat jumps"), ((16, 32), "the camera pans left"), ((16, 16), "a cat")]
    ):
        place = ClipPlace(folder / f"{number}.mp4")
        frames = np.random.default_rng(number).integers(0, 256, (8, *size, 3), dtype=np.uint8)
        write_video(place.path, frames, fps=8)
        survey = survey_clip(place)
        found.append(
            TrainingClip(
                name=place.path.name,
                place=place,
                clip=f"{number:064x}",
                num_bytes=place.path.stat().st_size,
                caption=caption,
                size=size,
                times=survey.times,
                shots=(ClipShot(0, 8, float(number)),),
            )
        )
    write_clips_manifest(folder / "clips.jsonl", found, folder=folder)
    return folder


@pytest.fixture
def run_of(model: Path, clips: Path, tmp_path: Path):
    def make(name: str = "run", **changes: Any) -> ClipRun:
        data = {
            "folder": clips,
            "manifest": clips / "clips.jsonl",
            "sizes": [[16, 16], [16, 32]],
            "num_frames": NUM_FRAMES,
            "frame_stride": [1, 2],
            "views": 2,
            "condition_frames": 2,
            "cache_folder": tmp_path / "views",
        }
        settings = {
            "steps": 4, "batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 0,
            "decay": "none", "ema_decay": None, "precision": "no", "log_every": 1, "save_every": 2,
        }  # fmt: skip
        content = {
            "model": str(model),
            "output": tmp_path / name,
            "data": data | changes.pop("data", {}),
            "settings": settings | changes.pop("settings", {}),
        }
        return open_clip_run(RunConfig.model_validate(content | changes))

    return make


def losses_of(run: ClipRun) -> list[float]:
    seen: list[float] = []
    run.train(on_progress=lambda progress: seen.append(progress.loss))
    return seen


def tuned_of(run: ClipRun) -> dict[str, torch.Tensor]:
    with open_weights(run.config.output / "tuned/unet") as file:
        return {name: file.read(name) for name in file.keys()}  # noqa: SIM118


def test_views_that_were_kept_and_those_encoded_at_first_use_train_alike_bit_for_bit(run_of):
    noise = {"objective": {"time_noise": {}, "drop": 0.2}}
    kept, fresh = run_of("kept", **noise), run_of("fresh", data={"cache": False}, **noise)
    assert losses_of(kept) == losses_of(fresh)
    for name, value in tuned_of(kept).items():
        assert torch.equal(value, tuned_of(fresh)[name]), name
