"""What measuring costs: the weight-free set, beside VBench's own loops that need no network.

    python benchmarks/evaluation.py            # a 320 x 512 clip of 16 frames, one thread

CPU seconds, the least of several runs. VBench's loops are restated from its code: flickering
(vbench/temporal_flickering.py) as it is; dynamic degree (vbench/dynamic_degree.py) with DIS in
place of RAFT, whose 15 pairs take 72 s on a core.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np

from motionmerge import load_photo
from motionmerge.evaluation.clips import read_clip
from motionmerge.evaluation.flow import dense_flow
from motionmerge.evaluation.motion import measure_motion
from motionmerge.evaluation.runs import measure_videos
from motionmerge.evaluation.sources import VideoSource
from motionmerge.evaluation.statistics import bootstrap_mean
from motionmerge.io.video import write_video


def panning(height: int, width: int, num_frames: int) -> np.ndarray:
    """A photo that moves 8 pixels a frame."""
    size = (width + 8 * num_frames, height + 8)
    photo = cv2.resize(np.asarray(load_photo("chelsea")), size, interpolation=cv2.INTER_CUBIC)
    return np.stack([photo[:height, 8 * i : 8 * i + width] for i in range(num_frames)])


def vbench_flickering(path: Path) -> float:
    """Restate VBench's loop: frames by OpenCV, mean absolute differences."""
    video, frames = cv2.VideoCapture(str(path)), []
    while (read := video.read())[0]:
        frames.append(read[1])
    return (255.0 - np.mean([np.mean(cv2.absdiff(a, b)) for a, b in pairwise(frames)])) / 255.0


def vbench_dynamic_degree(path: Path) -> bool:
    """Restate VBench's loop, with another flow."""
    video, frames = cv2.VideoCapture(str(path)), []
    while (read := video.read())[0]:
        frames.append(cv2.cvtColor(read[1], cv2.COLOR_BGR2GRAY))
    height, width = frames[0].shape
    threshold, need, count = 6 * min(height, width) / 256, round(4 * len(frames) / 16), 0
    for first, second in pairwise(frames):
        flow = dense_flow(first, second)
        length = np.sort(np.sqrt((flow**2).sum(-1)).ravel())[::-1]
        count += length[: int(0.05 * length.size)].mean() > threshold
        if count >= need:
            return True
    return False


def cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the least CPU time of several runs."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--height", type=int, default=320)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, panning(options.height, options.width, options.frames))
        clip = read_clip(path)
        rows: dict[str, Callable[[], object]] = {
            "decoding, flickering, scaling": lambda: read_clip(path),
            "motion, camera, steadiness, drift": lambda: measure_motion(clip),
            "everything, as `measure` does": lambda: measure_videos([VideoSource(path)]),
            "VBench's flickering, restated": lambda: vbench_flickering(path),
            "VBench's dynamic degree with DIS, restated": lambda: vbench_dynamic_degree(path),
        }
        print(f"{options.frames} frames of {options.height} x {options.width}, CPU seconds")
        for name, work in rows.items():
            print(f"{name:44}{cpu_seconds(work, options.repeats):8.2f}")
    values = np.random.default_rng(0).normal(size=5_590)
    seconds = cpu_seconds(lambda: bootstrap_mean(values), options.repeats)
    print(f"{'interval of 5,590 videos (BCa, 10,000 draws)':44}{seconds:8.2f}")


if __name__ == "__main__":
    main()
