"""Features of whole videos for Frechet's distance: a network, and how clips get to its size.

Each published code resizes in its own way and divides the covariance by another number, so their
distances differ; a preset names one way.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from motionmerge.errors import CheckpointError, ConfigError, DataError
from motionmerge.evaluation.backbones.i3d import FEWEST_FRAMES, I3D
from motionmerge.evaluation.backbones.protocol import check_finite
from motionmerge.evaluation.frechet import Covariance, Features, read_features
from motionmerge.evaluation.runs import reason_of
from motionmerge.io.atomic import atomic_path
from motionmerge.io.hashing import hash_file
from motionmerge.io.video import read_video
from motionmerge.io.weights import open_weights
from motionmerge.text import fix_unknown_name

_SIZE = 224
"""Pixels of I3D's input."""


@dataclass(frozen=True)
class Preset:
    """How a published code comes to its distance.

    Attributes:
        geometry: From clips `[frames, 3, height, width]` in [0, 1] to `[frames, 3, 224, 224]`.
        covariance: What the covariance is divided by.
        source: Whose code.
    """

    geometry: Callable[[torch.Tensor], torch.Tensor]
    covariance: Covariance
    source: str


def _squashed(clip: torch.Tensor) -> torch.Tensor:
    return functional.interpolate(clip, (_SIZE, _SIZE), mode="bilinear", align_corners=False)


def _cropped(clip: torch.Tensor) -> torch.Tensor:
    height, width = clip.shape[-2:]
    scale = _SIZE / min(height, width)
    sizes = [math.ceil(side * scale - 1e-9) for side in (height, width)]
    clip = functional.interpolate(clip, sizes, mode="bilinear", align_corners=False)
    top, left = ((side - _SIZE) // 2 for side in sizes)
    return clip[..., top : top + _SIZE, left : left + _SIZE]


def _cropped_in_bytes(clip: torch.Tensor) -> torch.Tensor:
    return _cropped((clip * 255).to(torch.uint8).float() / 255)  # truncated, as the code does


PRESETS: Mapping[str, Preset] = {
    "styleganv": Preset(_squashed, "population", "StyleGAN-V"),
    "cd-fvd": Preset(_squashed, "population", "content-debiased FVD, I3D"),
    "common-metrics": Preset(_cropped, "sample", "common_metrics_on_video_quality"),
    "videogpt": Preset(_cropped_in_bytes, "sample", "VideoGPT, TATS"),
}


def preset_named(name: str) -> Preset:
    """Return a preset.

    Raises:
        ConfigError: There is none of this name.
    """
    if name not in PRESETS:
        raise ConfigError(f"There is no preset {name!r}.", fix=fix_unknown_name(name, PRESETS))
    return PRESETS[name]


@dataclass(frozen=True)
class VideoNetwork:
    """A network that turns clips into features.

    Attributes:
        compute: From `[batch, 3, frames, 224, 224]` in [-1, 1] to `[batch, dim]`.
        fingerprint: `sha256:<hex>` of the file with its weights.
    """

    compute: Callable[[torch.Tensor], torch.Tensor]
    fingerprint: str

    def features(self, clip: torch.Tensor, preset: Preset) -> Features:
        """Compute the features `[dim]` of a clip `[frames, 3, height, width]` in [0, 1].

        Raises:
            CheckpointError: The network cannot compute a clip, or gives no features of one.
            DataError: The clip is too short, or the network gives no numbers for it.
        """
        if len(clip) < FEWEST_FRAMES:
            raise DataError(
                f"A clip of {len(clip)} frames is too short for I3D.",
                fix=f"Use clips of at least {FEWEST_FRAMES} frames.",
            )
        video = preset.geometry(clip).transpose(0, 1)[None] * 2 - 1
        with torch.inference_mode():
            found = self.compute(video)
        return one_row(found, fix="Use the weights of I3D trained on Kinetics 400.")


def one_row(found: torch.Tensor, *, fix: str) -> Features:
    """Return what a network gives for one clip, `[1, dim]`, as `[dim]`.

    Raises:
        CheckpointError: It has another shape: so it will have for all clips.
        DataError: It has NaN or infinite entries.
    """
    if found.ndim != 2 or len(found) != 1:
        raise CheckpointError(
            f"The network gives {list(found.shape)} for one clip, not [1, features].", fix=fix
        )
    if not bool(torch.isfinite(found).all()):
        raise DataError("The network gives NaN or infinity for it.", fix=fix)
    return found[0].double().numpy()


def load_i3d(path: Path) -> VideoNetwork:
    """Load I3D from its weights (`i3d_pretrained_400.pt`) or from a TorchScript file.

    TorchScript is a program: use a file from somebody you trust (`i3d_torchscript.pt`).

    Raises:
        CheckpointError: Its weights are no finite numbers, or cannot be read.
        DataError: The file is missing, or holds no such network.
    """
    if not path.is_file():
        raise DataError(
            f"There is no network at {path}.",
            fix="Pass the file i3d_pretrained_400.pt or i3d_torchscript.pt.",
        )
    fingerprint = f"sha256:{hash_file(path)}"
    if _is_torch_script(path):
        return VideoNetwork(_torch_script(path), fingerprint)
    network = I3D().eval()
    expected = network.state_dict()
    with open_weights(path) as weights:
        found = {name: weights.read(name) for name in expected if name in weights}
    lacking = [
        name
        for name, tensor in expected.items()
        if not name.endswith("num_batches_tracked")
        and (name not in found or found[name].shape != tensor.shape)
    ]
    if lacking:
        raise DataError(
            f"{path} holds no I3D of 400 classes: {lacking[0]} is not there, or of another shape.",
            fix="Pass i3d_pretrained_400.pt, with tensors such as Conv3d_1a_7x7.conv3d.weight.",
        )
    check_finite(found, source=str(path))
    network.load_state_dict(found, strict=False)
    return VideoNetwork(network, fingerprint)


def clip_features(
    paths: Sequence[Path],
    network: VideoNetwork,
    preset: str,
    *,
    num_frames: int = 16,
    folder: Path | None = None,
    on_clip: Callable[[], None] | None = None,
) -> tuple[Features, dict[Path, str]]:
    """Compute the features of videos, by their first frames.

    Args:
        paths: The videos.
        network: The network.
        preset: A name of `PRESETS`.
        num_frames: Of each video; all must have as many.
        folder: Keeps each video's features by its content, so that a killed run goes on, and
            shards that share it add up.
        on_clip: Called after every video.

    Returns:
        Features `[clips, dim]` in the order of `paths`, and why each of the others has none.

    Raises:
        CheckpointError: The network is another one.
        ConfigError: There is no such preset.
        DataError: No video has features, or the folder cannot be written.
    """
    preset_named(preset)
    found, failures = [], {}
    fix: str | None = None
    for path in paths:
        try:
            found.append(_kept_features(path, network, preset, num_frames, folder))
        except (DataError, OSError) as error:
            failures[path] = reason_of(error)
            fix = fix or getattr(error, "fix", None)
        if on_clip is not None:
            on_clip()
    if not found:
        reason = f" {paths[0]}: {failures[paths[0]]}" if paths else ""
        raise DataError(
            f"None of {len(paths)} videos has features.{reason}",
            fix=fix or f"Give videos of at least {num_frames} frames, or lower `num_frames`.",
        )
    return np.stack(found), failures


def _kept_features(
    path: Path, network: VideoNetwork, preset: str, num_frames: int, folder: Path | None
) -> Features:
    if folder is None:
        return _features(path, network, preset, num_frames)
    key = f"{preset}-{num_frames}-{network.fingerprint.removeprefix('sha256:')[:12]}"
    kept = folder / "features" / key / f"{hash_file(path)}.npy"
    if kept.exists():
        with suppress(DataError):  # a damaged file is made again
            return read_features(kept)[0]
    found = _features(path, network, preset, num_frames)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(kept) as temporary, temporary.open("wb") as file:
        np.save(file, found[None])
    return found


def _features(path: Path, network: VideoNetwork, preset: str, num_frames: int) -> Features:
    clip, _ = read_video(path)
    if len(clip) < num_frames:
        raise DataError(
            f"It has {len(clip)} frames; {num_frames} are compared.",
            fix="Make a longer video, or lower `num_frames`.",
        )
    return network.features(clip[:num_frames], PRESETS[preset])


def _is_torch_script(path: Path) -> bool:
    """Check whether a file is a TorchScript archive, which has its program in a folder `code`."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def load_torch_script(path: Path, *, fix: str) -> Callable[..., torch.Tensor]:
    """Load a TorchScript file, which is a program.

    Raises:
        DataError: The file is missing or is none; `fix` says what to give. Calling what is returned
            raises a CheckpointError if the program is another network's.
    """
    if not path.is_file():
        raise DataError(f"There is no network at {path}.", fix=fix)
    try:
        network: Callable[..., torch.Tensor] = torch.jit.load(str(path), map_location="cpu").eval()
    except RuntimeError as error:
        raise DataError(
            f"{path} is no TorchScript that can be loaded: {str(error)[:300]}", fix=fix
        ) from error

    def compute(*videos: torch.Tensor, **options: bool) -> torch.Tensor:
        try:
            found = network(*videos, **options)
        except (RuntimeError, torch.jit.Error) as error:
            text = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{path} cannot compute a video: {text}", fix=fix) from error
        if not isinstance(found, torch.Tensor):
            raise CheckpointError(
                f"{path} gives a {type(found).__name__} for a video, not a tensor.", fix=fix
            )
        return found

    return compute


def _torch_script(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    network = load_torch_script(path, fix="Download it again, or pass i3d_pretrained_400.pt.")

    def compute(video: torch.Tensor) -> torch.Tensor:
        # StyleGAN-V's file has these words; videos are resized and scaled already.
        return network(video, rescale=False, resize=False, return_features=True)

    return compute
