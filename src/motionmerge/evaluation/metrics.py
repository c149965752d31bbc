"""The metrics that are measured without any weights: their names, units and meanings.

docs/reference/metrics.md has the same list with the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Group = Literal["clip", "photo", "prompt"]
"""What a metric needs besides the video: nothing, the photo it was made from, or its prompt."""

Value = float | str | None
"""A number, a label, or None where a video does not have the metric."""


@dataclass(frozen=True)
class Metric:
    """One metric.

    Args:
        name: Letters, digits and `_`; what is like a metric of VBench but not it has a suffix.
        unit: Of the value; empty for a share or a similarity.
        about: What it says, in a few words.
        group: See `Group`.
        is_label: The value is a word.
    """

    name: str
    unit: str
    about: str
    group: Group = "clip"
    is_label: bool = False


_DISTANCES = (1, 2, 4, 8, 16)

METRICS = {
    metric.name: metric
    for metric in (
        Metric("width", "px", "width of the file's frames"),
        Metric("height", "px", "height of the file's frames"),
        Metric("num_frames", "", "frames in the file"),
        Metric("frame_rate", "frames/s", "frames per second"),
        Metric("seconds", "s", "length of what was measured"),
        Metric("motion_degree", "px/s", "mean way of all pixels, in a frame 512 px wide"),
        Metric("motion_share", "1/s", "the same as a share of the width"),
        Metric("camera_degree", "px/s", "mean way of all pixels by the camera's moves"),
        Metric("object_motion", "px/s", "mean way of all pixels apart from the camera"),
        Metric("camera_label", "", "dominant camera move of the whole clip", is_label=True),
        Metric("camera_amplitude", "", "how far it carries the picture, share of the width"),
        Metric("camera_pan", "", "share of the width; to the right is positive"),
        Metric("camera_tilt", "", "share of the width; up is positive"),
        Metric("camera_zoom", "", "factor; above 1 is in"),
        Metric("camera_roll", "degrees", "clockwise is positive"),
        Metric("camera_following", "", "share of textured pixels that follow the camera's move"),
        Metric("camera_labels_dis", "", "moves by VBench's rule, joined by +", is_label=True),
        Metric("dynamic_threshold_dis", "px", "largest length for which VBench's rule says yes"),
        Metric("dynamic_degree_dis", "", "VBench's rule of dynamic degree: 1 or 0"),
        Metric("temporal_flickering", "", "VBench's, to the letter; 1 is no change at all"),
        Metric("warp_error", "", "mean difference after following the flow, share of white"),
        Metric("warp_valid", "", "share of pixels that are seen in both frames"),
        Metric("jerk", "", "mean change of the flow over its mean length"),
        Metric("frozen_share", "", "share of the clip in which nothing moves"),
        Metric("looping_share", "", "share of frames that came before"),
        *(
            Metric(f"drift_ssim_{distance}", "", f"structure kept over {distance}/8 s")
            for distance in _DISTANCES
        ),
        *(
            Metric(f"drift_color_{distance}", "", f"colors kept over {distance}/8 s")
            for distance in _DISTANCES
        ),
        Metric("first_frame_psnr", "dB", "first frame against the photo", "photo"),
        Metric("first_frame_ssim", "", "first frame against the photo", "photo"),
        Metric("camera_agreement", "", "label is the move that the prompt names", "prompt"),
        Metric("camera_motion_dis", "", "the same by VBench's rule", "prompt"),
    )
}
"""Every metric by name, in the order of tables."""

NOTES, FAILURE = "notes", "failure"
"""Rows beside the metrics: what is odd about a video, and why it cannot be measured."""
