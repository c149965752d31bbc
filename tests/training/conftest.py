"""Clips to train on that are no files: times, shots and motion alone."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from motionmerge.io.clips import FrameTimes
from motionmerge.io.decoding import ClipPlace
from motionmerge.training.clips_manifest import ClipShot, TrainingClip


@pytest.fixture
def make_clip():
    """Make a clip whose frames are shown at these milliseconds, with shots of frames."""

    def make(milliseconds, *shots, name="a.mp4", size=(180, 320), place=None, **other):
        ticks = tuple(int(one) for one in milliseconds)
        values = {
            "name": name,
            "place": place or ClipPlace(Path("/nowhere") / name),
            "clip": f"{np.frombuffer(name.encode(), np.uint8).sum():064x}",
            "num_bytes": 9,
            "caption": "a cat",
            "size": size,
            "times": FrameTimes(len(ticks), Fraction(1, 1000), ticks),
            "shots": shots or (ClipShot(0, len(ticks), 10.0),),
        }
        return TrainingClip(**(values | other))

    return make
