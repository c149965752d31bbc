"""How much what is seen stays the same: similarities of a small classifier's features.

Names end in `_efflite0`: the rules are VBench's, and the network is EfficientNet-Lite0 in place of
DINO, so that the numbers are comparable with each other alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from motionmerge.evaluation.backbones.efficientnet import (
    LoadedEfficientNet,
    load_efficientnet,
    network_pixels,
)
from motionmerge.evaluation.flow import Picture
from motionmerge.evaluation.frechet import Features
from motionmerge.evaluation.metrics import DRIFT_DISTANCES, Value
from motionmerge.evaluation.vbench import rules
from motionmerge.evaluation.video_features import Preset, VideoNetwork

_BATCH = 8
"""Frames that are encoded at once."""


@dataclass(frozen=True)
class SemanticFeatures:
    """Measures clips and photos with EfficientNet-Lite0.

    Args:
        loaded: The network and the hash of its weights, which is part of every row.
    """

    loaded: LoadedEfficientNet

    @classmethod
    def load(cls) -> SemanticFeatures:
        """Load the network from its package.

        Raises:
            ConfigError: The package is not installed.
        """
        return cls(load_efficientnet())

    def of_clip(self, samples: Picture) -> dict[str, Value]:
        """Compute the metrics of the group `features`.

        Args:
            samples: Frames an eighth of a second apart, `[samples, height, width, 3]`.
        """
        features = self._encode(samples)
        values: dict[str, Value] = {
            "subject_consistency_efflite0": float(rules.consistencies(features).mean())
        }
        for distance in DRIFT_DISTANCES:
            alike = rules.cosine(features[:-distance], features[distance:])
            values[f"drift_efflite0_{distance}"] = float(alike.mean()) if len(alike) else None
        return values

    def of_photo(self, samples: Picture, photo: Picture) -> dict[str, Value]:
        """Compute the metrics of the group `photo features`.

        Args:
            samples: As in `of_clip`.
            photo: What the clip was made from, cut to the proportions of its frames.
        """
        likeness = rules.similarity_to_image(self._encode(photo[None])[0], self._encode(samples))
        return {"i2v_subject_efflite0": likeness}

    def _encode(self, pictures: Picture) -> torch.Tensor:
        return _in_batches(self.loaded.network.encode, pictures)


@dataclass(frozen=True)
class ClassesOfClips(VideoNetwork):
    """EfficientNet-Lite0 as a network for the inception score: ImageNet's classes of a clip."""

    @classmethod
    def load(cls) -> ClassesOfClips:
        """Load the network from its package.

        Raises:
            ConfigError: The package is not installed.
        """
        loaded = load_efficientnet()
        return cls(loaded.network.classify, loaded.fingerprint)

    def features(self, clip: torch.Tensor, preset: Preset) -> Features:
        """Compute the class probabilities `[1000]` of a clip: the mean over its frames.

        Args:
            clip: `[frames, 3, height, width]` in [0, 1].
            preset: Not used: the frames are squashed to 224 x 224.
        """
        pictures = (clip * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        return np.asarray(_in_batches(self.compute, pictures).double().mean(0).numpy())


def _in_batches(compute: Callable[[torch.Tensor], torch.Tensor], pictures: Picture) -> torch.Tensor:
    parts = [
        compute(network_pixels(pictures[start : start + _BATCH]))
        for start in range(0, len(pictures), _BATCH)
    ]
    return torch.cat(parts)
