"""Scores of generated videos that need no real ones: classes for IS, and input conformity (PIC)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from motionmerge.errors import CheckpointError, DataError
from motionmerge.evaluation.backbones.protocol import ImageEncoder
from motionmerge.evaluation.frechet import Features
from motionmerge.evaluation.runs import reason_of
from motionmerge.evaluation.sources import Photos, source_of
from motionmerge.evaluation.vbench.frames import ERAS, dreamsim_frames, dreamsim_image
from motionmerge.evaluation.video_features import Preset, VideoNetwork, load_torch_script, one_row
from motionmerge.io.hashing import hash_file
from motionmerge.io.video import fit_image, load_image, read_frames

C3D_FRAMES = 16
SPLITS, SHUFFLE_SEED = 10, 42
"""Of IS, as StyleGAN-V has them; TGAN2 does not shuffle."""


@dataclass(frozen=True)
class C3D(VideoNetwork):
    """C3D trained on UCF101: its features are class probabilities."""

    def features(self, clip: torch.Tensor, preset: Preset) -> Features:
        """Compute the class probabilities of a clip `[16, 3, height, width]` in [0, 1].

        The network takes bytes of any size, resizes them itself and needs no preset.

        Raises:
            CheckpointError: The network gives no probabilities.
            DataError: The clip has another length, or the network gives no numbers for it.
        """
        if len(clip) != C3D_FRAMES:
            raise DataError(
                f"C3D takes {C3D_FRAMES} frames, not {len(clip)}.",
                fix=f"Give `frames=` as {C3D_FRAMES}.",
            )
        video = (clip * 255).round().to(torch.uint8).transpose(0, 1)[None].contiguous()
        with torch.inference_mode():
            found = self.compute(video)
        fix = "Give StyleGAN-V's c3d_ucf101.pt, whose output is after the softmax."
        row = one_row(found, fix=fix)
        if (row < 0).any() or abs(float(row.sum()) - 1) > 1e-3:
            raise CheckpointError(
                f"What the network gives for a clip, {len(row)} numbers, are no probabilities.",
                fix=fix,
            )
        return row


def load_c3d(path: Path) -> C3D:
    """Load C3D from StyleGAN-V's TorchScript file, a program: use one from somebody you trust.

    Raises:
        DataError: The file is missing, or no TorchScript.
    """
    network = load_torch_script(path, fix="Give c3d_ucf101.pt.")
    return C3D(network, f"sha256:{hash_file(path)}")


def input_conformities(
    paths: Sequence[Path],
    photos: Photos,
    network: ImageEncoder,
    *,
    num_frames: int,
    on_clip: Callable[[], None] | None = None,
) -> tuple[dict[Path, float], dict[Path, str]]:
    """Compute the perceptual input conformity (PIC) of videos to their photos.

        mean over frames, the first as well, of cos(embedding of the photo, of the frame)

    which is 1 minus the mean DreamSim distance; it is not clamped. The photo is scaled to cover the
    frames' size and cut, as the model's input is; both are squashed to 224 x 224.

    Args:
        paths: The videos.
        photos: Where their photos are.
        network: DreamSim's ensemble, whose embeddings have unit length.
        num_frames: First frames of each video.
        on_clip: Called after every video.

    Returns:
        The value of each video, and why each of the others has none.

    Source: Xing et al. 2023 (DynamiCrafter).
    """
    found, failures = {}, {}
    for path in paths:
        try:
            found[path] = _conformity(path, photos, network, num_frames)
        except (DataError, OSError) as error:
            failures[path] = reason_of(error)
        if on_clip is not None:
            on_clip()
    return found, failures


def _conformity(path: Path, photos: Photos, network: ImageEncoder, num_frames: int) -> float:
    photo = source_of(path, photos).photo
    if photo is None:
        raise DataError("It has no photo.", fix="Give a folder with a photo of its name.")
    frames, _ = read_frames(path)
    if len(frames) < num_frames:
        raise DataError(
            f"It has {len(frames)} frames; {num_frames} are compared.",
            fix="Make a longer video, or give fewer `frames=`.",
        )
    image = fit_image(load_image(photo), *frames.shape[1:3])
    pixels = torch.from_numpy(frames[:num_frames]).permute(0, 3, 1, 2).float()
    reference = network.encode(dreamsim_image(image))[0].double()
    embeddings = network.encode(dreamsim_frames(pixels, era=ERAS[0])).double()
    value = float((embeddings @ reference).mean())
    if not np.isfinite(value):
        raise DataError("DreamSim gives NaN for it.", fix="Give DreamSim's own weights.")
    return value
