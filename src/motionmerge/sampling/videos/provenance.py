"""What made a video, as its metadata say it: the same keys for one video and for thousands."""

from __future__ import annotations

from collections.abc import Mapping

import diffusers
import torch

from motionmerge.sampling.videos.settings import VideoSettings
from motionmerge.version import __version__


def made_with(
    family: str, model: Mapping[str, object], experts: Mapping[str, object]
) -> dict[str, object]:
    """Return what the videos of a run have in common, with the hashes of all files.

    Args:
        family: The model's family.
        model: The model's `fingerprint()`.
        experts: The experts' `fingerprint()`: their recipe, with hashes in place of paths.

    Returns:
        Versions, `family`, `weights` (hashes), what else decides the model's videos, `recipe`,
        `boundary`. No names of the user's: a model from the hub and its copy in a folder make the
        same bytes.
    """
    return {
        "motionmerge": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "family": family,
        **{"weights" if key == "model" else key: value for key, value in model.items()},
        **experts,
    }


def provenance(common: dict[str, object], settings: VideoSettings) -> dict[str, object]:
    """Return the metadata of one video.

    Args:
        common: What `made_with` returned.
        settings: Those of the video, with the model's own values filled in.
    """
    return {**common, **settings.model_dump(exclude_none=True)}
