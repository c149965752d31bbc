"""The metrics that `measure` measures: their names, units and meanings.

docs/reference/metrics.md has the same list with the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Group = Literal["clip", "photo", "prompt", "features", "photo features"]
"""What a metric needs besides the video: nothing, the photo it was made from, its prompt, a network
for features, or both of these."""

Value = float | str | None
"""A number, a label, or None where a video does not have the metric."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric.

    Args:
        name: Letters, digits and `_`; what is like a metric of VBench but not it has a suffix.
        about: What it says, in a few words.
        unit: Of the value; empty for a share or a similarity.
        group: See `Group`.
        is_label: The value is a word.
    """

    name: str
    about: str
    unit: str = ""
    group: Group = "clip"
    is_label: bool = False


DRIFT_DISTANCES = (1, 2, 4, 8, 16)
"""Samples between two frames that are compared, an eighth of a second each."""

METRICS = {
    metric.name: metric
    for metric in (
        Metric(name="width", unit="px", about="width of the file's frames"),
        Metric(name="height", unit="px", about="height of the file's frames"),
        Metric(name="num_frames", about="frames in the file"),
        Metric(name="frame_rate", unit="frames/s", about="frames per second"),
        Metric(name="seconds", unit="s", about="length of what was measured"),
        Metric(
            name="motion_degree",
            unit="px/s",
            about="how far pixels go on average, in a frame 512 px wide",
        ),
        Metric(name="motion_share", unit="1/s", about="the same as a share of the width"),
        Metric(
            name="camera_degree",
            unit="px/s",
            about="how far the camera's moves carry them on average",
        ),
        Metric(
            name="object_motion",
            unit="px/s",
            about="how far they go on average apart from the camera",
        ),
        Metric(
            name="camera_label",
            about="dominant camera move of the whole clip",
            is_label=True,
        ),
        Metric(
            name="camera_amplitude",
            about="how far it carries the picture, share of the width",
        ),
        Metric(name="camera_pan", about="share of the width; to the right is positive"),
        Metric(name="camera_tilt", about="share of the width; up is positive"),
        Metric(name="camera_zoom", about="factor; above 1 is in"),
        Metric(name="camera_roll", unit="degrees", about="clockwise is positive"),
        Metric(
            name="camera_following",
            about="share of textured pixels that follow the camera's move",
        ),
        Metric(
            name="camera_labels_dis",
            about="moves by VBench's rule, joined by +",
            is_label=True,
        ),
        Metric(
            name="dynamic_threshold_dis",
            unit="px",
            about="largest length for which VBench's rule says yes",
        ),
        Metric(name="dynamic_degree_dis", about="VBench's rule of dynamic degree: 1 or 0"),
        Metric(
            name="temporal_flickering",
            about="VBench's, exactly; 1 where nothing changes",
        ),
        Metric(
            name="warp_error",
            about="mean difference after following the flow, share of white",
        ),
        Metric(name="warp_valid", about="share of pixels that are seen in both frames"),
        Metric(name="jerk", about="mean change of the flow over its mean length"),
        Metric(name="frozen_share", about="share of the clip in which nothing moves"),
        Metric(
            name="unfollowed_share",
            about="share of the picture that moves where nothing could follow it",
        ),
        Metric(
            name="cut_share",
            about="share of the steps in which nothing could be followed",
        ),
        Metric(name="looping_share", about="share of frames that look like an earlier one"),
        *(
            Metric(name=f"drift_ssim_{distance}", about=f"structure kept over {distance}/8 s")
            for distance in DRIFT_DISTANCES
        ),
        *(
            Metric(name=f"drift_color_{distance}", about=f"colors kept over {distance}/8 s")
            for distance in DRIFT_DISTANCES
        ),
        Metric(
            name="first_frame_psnr", unit="dB", about="first frame against the photo", group="photo"
        ),
        Metric(name="first_frame_ssim", about="first frame against the photo", group="photo"),
        Metric(
            name="camera_agreement",
            about="1 where the label is the move that the prompt names, else 0",
            group="prompt",
        ),
        Metric(name="camera_motion_dis", about="the same by VBench's rule", group="prompt"),
        Metric(
            name="subject_consistency_efflite0",
            about="VBench's rule on another network's features",
            group="features",
        ),
        *(
            Metric(
                name=f"drift_efflite0_{distance}",
                about=f"features kept over {distance}/8 s",
                group="features",
            )
            for distance in DRIFT_DISTANCES
        ),
        Metric(
            name="i2v_subject_efflite0",
            about="VBench's rule on another network's features",
            group="photo features",
        ),
    )
}
"""Every metric by name, in the order of tables."""

HEADLINES = {
    "motion_degree": 1,
    "camera_degree": 1,
    "object_motion": 1,
    "camera_agreement": 2,
    "dynamic_degree_dis": 2,
    "first_frame_psnr": 1,
    "first_frame_ssim": 3,
    "drift_ssim_8": 3,
    "drift_color_8": 3,
    "drift_efflite0_8": 3,
    "subject_consistency_efflite0": 3,
    "i2v_subject_efflite0": 3,
    "warp_error": 4,
    "temporal_flickering": 4,
    "jerk": 2,
    "frozen_share": 2,
    "looping_share": 2,
}
"""The metrics that people are shown first, with how many decimals."""

NOTES, FAILURE = "notes", "failure"
"""Rows beside the metrics: what is odd about a video, and why it cannot be measured."""
