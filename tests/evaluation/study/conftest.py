"""A study of two systems on three scenes, built once, and raters who know the truth."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from motionmerge.evaluation.sources import Photos
from motionmerge.evaluation.study.build import StudyPlan, build_study
from motionmerge.evaluation.study.pairs import find_systems
from motionmerge.io.video import write_video

ROOT = Path(__file__).parents[3]


def load_raters():
    """Load the script of simulated raters, which is no part of the package."""
    path = ROOT / "benchmarks" / "simulated_raters.py"
    spec = importlib.util.spec_from_file_location("simulated_raters", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def simulated_answers():
    return load_raters().simulated_answers


def write_systems(folder, *, num_scenes, names=("base", "full")):
    """Write a video per system and scene, each of another color."""
    for scene in range(num_scenes):
        for place, name in enumerate(names):
            frames = torch.full((4, 3, 32, 48), 0.1 + 0.02 * scene)
            frames[:, place % 3] += torch.linspace(0.2, 0.7, 4)[:, None, None]
            about = {"prompt": f"thing {scene} <b>&\"'", "seed": scene, "recipe": "SECRET"}
            write_video(folder / name / f"v{scene}.mp4", frames, fps=8, metadata=about)
    return [f"{name}={folder / name}" for name in names]


@pytest.fixture(scope="session")
def systems(tmp_path_factory):
    return write_systems(tmp_path_factory.mktemp("systems"), num_scenes=3)


PLAN = StudyPlan(per_rater=3, num_checks=1, num_repeats=1, questions=["motion", "overall"])


@pytest.fixture(scope="session")
def built(systems, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "study"
    return build_study(find_systems(systems, Photos()), to=folder, plan=PLAN), folder


@pytest.fixture
def study(built, tmp_path):
    """The study in a folder of its own, for tests that write answers."""
    return built[0], Path(shutil.copytree(built[1], tmp_path / "study"))
