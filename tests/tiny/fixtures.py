"""Fixtures: a tiny pipeline, a photo, and a function that makes a short video."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from motionmerge.sampling.pipelines.dynamicrafter import DynamiCrafterPipeline

from .dynamicrafter import NUM_FRAMES, tiny_pipeline
from .folders import save_tiny


@pytest.fixture
def pipeline() -> DynamiCrafterPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="session")
def stored_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Wan 2.1, for those who only read it."""
    folder = tmp_path_factory.mktemp("wan")
    save_tiny("Wan 2.1", folder)
    return folder


@pytest.fixture
def own_wan(stored_wan: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(stored_wan, tmp_path / "wan"))


@pytest.fixture
def photo() -> Image.Image:
    return Image.radial_gradient("L").resize((24, 20)).convert("RGB")


@pytest.fixture
def generate(photo: Image.Image) -> Callable[..., torch.Tensor]:
    """Run a pipeline with few steps; returns video `[batch, frames, 3, height, width]`."""

    def run(
        pipeline: DynamiCrafterPipeline, prompt: object = "a cat", **options: object
    ) -> torch.Tensor:
        settings = {
            "image": photo,
            "num_frames": NUM_FRAMES,
            "num_inference_steps": 4,
            "generator": torch.Generator().manual_seed(7),
            "output_type": "pt",
        }
        return pipeline(prompt=prompt, **{**settings, **options}).frames

    return run
