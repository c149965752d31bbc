"""Measure one clip in one dimension; a network is built once and used for all clips."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from motionmerge.errors import DataError, ShapeError
from motionmerge.evaluation.backbones.protocol import FlowNetwork, ImageEncoder
from motionmerge.evaluation.vbench import frames as prepare
from motionmerge.evaluation.vbench import rules
from motionmerge.evaluation.vbench.frames import Era
from motionmerge.evaluation.vbench.sources import Networks
from motionmerge.evaluation.vbench.suite import SuiteClip
from motionmerge.io.video import load_image, read_frames

_AT_ONCE = 16
"""Frames that go through a network together."""


@dataclass(frozen=True)
class Decoded:
    """A clip's frames.

    Attributes:
        clip: Where they are from.
        frames: `[frames, height, width, 3]` uint8.
        fps: Frames per second.
    """

    clip: SuiteClip
    frames: npt.NDArray[np.uint8]
    fps: float

    def pixels(self) -> torch.Tensor:
        """Return the frames `[frames, 3, height, width]` as floats in 0..255."""
        return torch.from_numpy(self.frames).permute(0, 3, 1, 2).float()

    def require(self, num_frames: int) -> None:
        """Refuse a clip that is too short.

        Raises:
            DataError: It has fewer frames.
        """
        if len(self.frames) < num_frames:
            raise DataError(
                f"{self.clip.path.name} has {len(self.frames)} of the {num_frames} frames needed.",
                fix="Generate it again with more frames.",
            )


@dataclass(frozen=True)
class DimensionValues:
    """A clip's value in a dimension, in the units of VBench's own result file.

    Attributes:
        value: The score; imaging_quality's is in 0..100, dynamic_degree's is 0 or 1.
        details: What else belongs to it.
    """

    value: float
    details: Mapping[str, Any] = field(default_factory=dict)


Measure = Callable[[Decoded], DimensionValues]


def decode(clip: SuiteClip) -> Decoded:
    """Read a clip.

    Raises:
        DataError: It cannot be read.
    """
    return Decoded(clip, *read_frames(clip.path))


def measure_of(dimension: str, networks: Networks, *, era: Era) -> Measure:
    """Build what measures a dimension.

    Raises:
        CheckpointError: A weights file is another network's.
        ConfigError: A plugin fails.
    """
    builders: Mapping[str, Callable[[], Measure]] = {
        "i2v_subject": lambda: partial(
            _i2v,
            networks.dino(),
            prepare.i2v_subject_image,
            partial(prepare.i2v_subject_frames, era=era),
        ),
        "i2v_background": lambda: partial(
            _i2v,
            networks.dreamsim(),
            prepare.dreamsim_image,
            partial(prepare.dreamsim_frames, era=era),
        ),
        "camera_motion": lambda: partial(_camera_motion, networks.plugin("cotracker")),
        "subject_consistency": lambda: partial(
            _consistency, networks.dino(), prepare.subject_frames
        ),
        "background_consistency": lambda: partial(
            _consistency, networks.clip("clip-b32"), prepare.clip_frames
        ),
        "motion_smoothness": lambda: partial(_smoothness, networks.plugin("amt")),
        "dynamic_degree": lambda: partial(_dynamic_degree, networks.raft()),
        "aesthetic_quality": lambda: partial(
            _aesthetic, networks.clip("clip-l14"), networks.aesthetic_head()
        ),
        "imaging_quality": lambda: partial(_imaging, networks.plugin("musiq")),
        "temporal_flickering": lambda: _flickering,
    }
    return builders[dimension]()


def _features(network: ImageEncoder, pixels: torch.Tensor) -> torch.Tensor:
    return torch.cat([network.encode(some).cpu() for some in pixels.split(_AT_ONCE)])


def _first_image(clip: SuiteClip) -> Path:
    if clip.image is None:
        raise DataError(
            f"{clip.path.name} has no first image.", fix="Give the folder of the first images."
        )
    return clip.image


def _i2v(
    network: ImageEncoder,
    prepared_image: Callable[[Image.Image], torch.Tensor],
    prepared: Callable[[torch.Tensor], torch.Tensor],
    decoded: Decoded,
) -> DimensionValues:
    image = load_image(_first_image(decoded.clip))
    decoded.require(2)
    first = network.encode(prepared_image(image))[0].cpu()
    frames = _features(network, prepared(decoded.pixels()))
    return DimensionValues(rules.similarity_to_image(first, frames))


def _consistency(
    network: ImageEncoder, prepared: Callable[[torch.Tensor], torch.Tensor], decoded: Decoded
) -> DimensionValues:
    decoded.require(2)
    each = rules.consistencies(_features(network, prepared(decoded.pixels())))
    total = float(each.sum())
    return DimensionValues(total / len(each), {"video_sim": total, "cnt_per_video": len(each)})


def _aesthetic(
    network: ImageEncoder, head: tuple[torch.Tensor, torch.Tensor], decoded: Decoded
) -> DimensionValues:
    features = _features(network, prepare.clip_frames(decoded.pixels()))
    weight, bias = head
    if features.shape[-1] != weight.shape[-1]:
        raise ShapeError(
            f"CLIP gives {features.shape[-1]} channels, the aesthetic head takes "
            f"{weight.shape[-1]}.",
            fix="Give CLIP ViT-L/14.",
        )
    unit = features / features.norm(dim=-1, keepdim=True)
    scores = torch.nn.functional.linear(unit, weight, bias) / 10
    return DimensionValues(float(scores.double().mean()))


def _dynamic_degree(network: FlowNetwork, decoded: Decoded) -> DimensionValues:
    sampled = decoded.pixels()[:: rules.sampling_interval(decoded.fps)]
    height, width = sampled.shape[-2:]
    flows = network.flows(prepare.flow_frames(sampled))
    scores = [rules.flow_score(flow) for flow in flows]
    threshold = rules.dynamic_threshold(height, width)
    needed = rules.needed_pairs(len(sampled))
    moves = rules.is_dynamic(scores, threshold=threshold, needed=needed)
    details = {"pair_scores": scores, "threshold": threshold, "needed_pairs": needed}
    return DimensionValues(float(moves), details)


def _flickering(decoded: Decoded) -> DimensionValues:
    decoded.require(2)
    return DimensionValues(rules.flickering(decoded.frames))


def _smoothness(in_between: Callable[..., Any], decoded: Decoded) -> DimensionValues:
    decoded.require(3)
    kept = decoded.frames[::2]
    between = [
        _checked(in_between(first, second), like=first, plugin="amt")
        for first, second in pairwise(kept)
    ]
    return DimensionValues(rules.smoothness(decoded.frames, between))


def _checked(frame: Any, *, like: npt.NDArray[np.uint8], plugin: str) -> npt.NDArray[np.uint8]:
    array = np.asarray(frame)
    if array.shape != like.shape or array.dtype != np.uint8:
        raise ShapeError(
            f"The plugin `{plugin}` returned {array.dtype} {list(array.shape)}.",
            fix=f"Return uint8 {list(like.shape)}.",
        )
    return array


def _imaging(quality: Callable[..., Any], decoded: Decoded) -> DimensionValues:
    scores: list[float] = []
    for some in decoded.pixels().split(_AT_ONCE):
        found = np.asarray(quality(prepare.quality_frames(some)), dtype=np.float64).ravel()
        if len(found) != len(some):
            raise ShapeError(
                f"The plugin `musiq` returned {len(found)} scores of {len(some)} frames.",
                fix="Return one score a frame.",
            )
        scores.extend(found.tolist())
    return DimensionValues(float(np.mean(scores)))


def _camera_motion(track: Callable[..., Any], decoded: Decoded) -> DimensionValues:
    if decoded.clip.camera is None:
        raise DataError(
            f"The prompt of {decoded.clip.path.name} names no move of the camera.",
            fix="End it with one, such as `, camera pans left`.",
        )
    tracks = np.asarray(track(decoded.pixels()), dtype=np.float64)
    if tracks.shape != (len(decoded.frames), rules.GRID**2, 2):
        raise ShapeError(
            f"The plugin `cotracker` returned {list(tracks.shape)}.",
            fix=f"Return [{len(decoded.frames)}, {rules.GRID**2}, 2].",
        )
    if not np.isfinite(tracks).all():  # it would count as static
        raise DataError("The plugin `cotracker` returned NaN.", fix="Return pixels.")
    height, width = decoded.frames.shape[1:3]
    labels = rules.camera_labels(tracks, height=height, width=width)
    details = {"prompt_type": decoded.clip.camera, "predict_type": list(labels)}
    return DimensionValues(float(decoded.clip.camera in labels), details)


def clips_of(dimension: str, clips: list[SuiteClip]) -> Iterator[SuiteClip]:
    """Yield the clips that a dimension is measured on."""
    return (clip for clip in clips if dimension in clip.dimensions)
