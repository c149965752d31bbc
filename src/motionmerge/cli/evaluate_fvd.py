"""`motionmerge evaluate fvd`: how far generated videos are from real ones, as sets."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from motionmerge.cli.merge import counting_bar
from motionmerge.cli.options import OUTPUT, JsonOption

if TYPE_CHECKING:
    from motionmerge.evaluation.statistics import Estimate
    from motionmerge.evaluation.video_features import VideoNetwork

FVD_EXAMPLE = "Example: motionmerge evaluate fvd real generated --network i3d_400.pt"

_FEATURE_FILES = (".npy", ".safetensors")


def fvd(
    real: Annotated[
        Path, typer.Argument(metavar="REAL", help="Folder of real videos, or a feature file.")
    ],
    generated: Annotated[
        Path,
        typer.Argument(metavar="GENERATED", help="Folder of generated videos, or a feature file."),
    ],
    network: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="I3D: i3d_pretrained_400.pt, or a TorchScript file from somebody you trust. Not "
            "needed for feature files.",
        ),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Whose resizing and covariance: styleganv, cd-fvd, common-metrics or videogpt.",
        ),
    ] = "styleganv",
    frames: Annotated[
        int, typer.Option(min=9, max=1024, metavar="NUMBER", help="First frames of each video.")
    ] = 16,
    gamma: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER",
            help="Of the kernel distance, above 0.",
            show_default="1 / dim, as KID",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="NUMBER", help="Of the subsets.")] = 0,
    features: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Keep each video's features there; a second run goes on from them.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compute Frechet's video distance (FVD), its value at infinity, and the kernel distance.

    Numbers of different presets, networks, frames or numbers of videos are not comparable.
    """
    from motionmerge.errors import ConfigError
    from motionmerge.evaluation import frechet, kernel_and_inception
    from motionmerge.evaluation.video_features import clip_features, load_i3d, preset_named

    chosen = preset_named(preset)
    if gamma is not None:
        kernel_and_inception.checked_gamma(gamma, dim=1)  # before hours of features
    loaded: VideoNetwork | None = None
    sets: list[frechet.Features] = []
    failures: dict[Path, str] = {}
    for path in (real, generated):
        if path.suffix in _FEATURE_FILES:
            sets.append(frechet.read_features(path))
            continue
        videos = _videos(path)
        if network is None:
            raise ConfigError(
                f"{path} holds videos, and no network is given for their features.",
                fix="Pass --network i3d_pretrained_400.pt, or feature files.",
            )
        loaded = loaded or load_i3d(network)
        with counting_bar(len(videos), shown=True) as tell:
            found, failed = clip_features(
                videos,
                loaded,
                preset,
                num_frames=frames,
                folder=features,
                on_clip=partial(tell, path.name, 1),
            )
        sets.append(found)
        failures |= failed
    num = min(map(len, sets))
    covariance, real_clips, generated_clips = chosen.covariance, *sets
    distance = frechet.frechet_distance(real_clips, generated_clips, covariance=covariance)
    at_infinity = kernel = None
    if num >= frechet.FEWEST_TO_EXTRAPOLATE:
        at_infinity = frechet.frechet_distance_at_infinity(
            real_clips, generated_clips, covariance=covariance, seed=seed
        )
    if num >= kernel_and_inception.FEWEST_FOR_KERNEL:
        kernel = kernel_and_inception.kernel_distance(real_clips, generated_clips, gamma=gamma)
    dim = real_clips.shape[1]
    doubts = frechet.doubts(len(real_clips), len(generated_clips), dim=dim)
    used_gamma = kernel_and_inception.checked_gamma(gamma, dim=dim)
    if as_json:
        result = {
            "fvd": distance,
            "fvd_at_infinity": _as_json(at_infinity),
            "kvd": _as_json(kernel),
            "num_real": len(real_clips),
            "num_generated": len(generated_clips),
            "failed": {str(path): reason for path, reason in failures.items()},
            "preset": preset,
            "covariance": covariance,
            "frames": frames if loaded else None,
            "network": loaded.fingerprint if loaded else None,
            "gamma": used_gamma,
            "seed": seed,
            "doubts": doubts,
        }
        print(json.dumps(result))
        return
    if doubts:
        typer.echo(f"Warning: {doubts}", err=True)
    for path, reason in failures.items():
        typer.echo(f"left out: {path}: {reason}", err=True)
    print(
        f"FVD {distance:.2f}, {len(real_clips)} real and {len(generated_clips)} generated videos, "
        f"preset {preset} ({chosen.source})"
    )
    if at_infinity:
        print(f"FVD at infinity {at_infinity.text(2)}")
    if kernel:
        print(f"KVD {kernel.text(4)}, gamma {used_gamma:g}")
    if loaded:
        print(f"network {loaded.fingerprint}")


def _as_json(estimate: Estimate | None) -> dict[str, float | None] | None:
    """Return an estimate as JSON has it: ends of an interval that there is not are null."""
    if estimate is None:
        return None
    return {key: None if value != value else value for key, value in asdict(estimate).items()}


def _videos(folder: Path) -> list[Path]:
    from motionmerge.errors import DataError
    from motionmerge.evaluation.clips import SUFFIXES

    if not folder.is_dir():
        raise DataError(
            f"{folder} is no folder and no feature file.",
            fix="Give a folder of videos, or a .npy or .safetensors file.",
        )
    found = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()
    )
    if not found:
        raise DataError(f"{folder} holds no video.", fix="Give a folder of videos such as mp4.")
    return found
