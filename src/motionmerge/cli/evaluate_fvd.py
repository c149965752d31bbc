"""`motionmerge evaluate fvd`: how far generated videos are from real ones, as sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from motionmerge.cli.merge import counting_bar, parse_inputs
from motionmerge.cli.options import JsonOption, output_option
from motionmerge.cli.printing import harmless, print_json
from motionmerge.errors import ConfigError, DataError

if TYPE_CHECKING:
    from motionmerge.evaluation.backbones.protocol import ImageEncoder
    from motionmerge.evaluation.frechet import Features
    from motionmerge.evaluation.sources import Photos
    from motionmerge.evaluation.vbench.sources import Networks
    from motionmerge.evaluation.video_features import VideoNetwork

_FEATURE_FILES = (".npy", ".safetensors")
_DREAMSIM = ("dreamsim-dino", "dreamsim-clip", "dreamsim-open-clip", "dreamsim-lora")


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
    c3d: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also compute the inception score (IS) of the generated videos: StyleGAN-V's "
            "c3d_ucf101.pt, a TorchScript file from somebody you trust.",
        ),
    ] = None,
    efflite0: Annotated[
        bool,
        typer.Option(
            "--efflite0",
            help="Also compute an inception score by ImageNet's classes, `is_efflite0`, with the "
            "extra eval-features.",
        ),
    ] = False,
    photos: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Also compute the input conformity (PIC) of the generated videos to these first "
            "photos; needs DreamSim's --weights.",
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="DreamSim's: dreamsim-dino, -clip, -open-clip and -lora; repeatable.",
        ),
    ] = None,
    features: Annotated[
        Path | None,
        output_option(
            metavar="FOLDER",
            help="Keep each video's features there; a second run goes on from them.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compute Frechet's video distance (FVD), its value at infinity, and the kernel distance.

    Numbers of different presets, networks, frames or numbers of videos are not comparable.
    """
    from motionmerge.evaluation import frechet, kernel_and_inception
    from motionmerge.evaluation.video_features import load_i3d, preset_named

    chosen = preset_named(preset)
    listed = {path: _videos(path) for path in (real, generated) if _holds_videos(path)}
    more = _OneSet.checked(
        generated, c3d=c3d, efflite0=efflite0, photos=photos, weights=weights, frames=frames
    )
    if gamma is not None:
        kernel_and_inception.checked_gamma(gamma, dim=1)  # before hours of features
    loaded: VideoNetwork | None = None
    sets: list[frechet.Features] = []
    failures: dict[Path, str] = {}
    for path in (real, generated):
        if path not in listed:
            sets.append(frechet.read_features(path))
            continue
        if network is None:
            raise ConfigError(
                f"{path} holds videos, and no network is given for their features.",
                fix="Pass --network i3d_pretrained_400.pt, or feature files.",
            )
        loaded = loaded or load_i3d(network)
        found, failed = _features(listed[path], loaded, preset, frames, features, label=path.name)
        sets.append(found)
        failures |= failed
    others = more.compute(features, preset)
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
            "fvd_at_infinity": at_infinity and at_infinity.to_dict(),
            "kvd": kernel and kernel.to_dict(),
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
            **others,
        }
        print_json(result)
        return
    if doubts:
        typer.echo(f"Warning: {doubts}", err=True)
    _print_left_out(failures)
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
    _print_others(others)


def _features(
    videos: Sequence[Path],
    network: VideoNetwork,
    preset: str,
    frames: int,
    folder: Path | None,
    *,
    label: str,
) -> tuple[Features, dict[Path, str]]:
    """Compute the features of videos under a bar."""
    from motionmerge.evaluation.video_features import clip_features

    with counting_bar(len(videos), shown=True) as tell:
        return clip_features(
            videos,
            network,
            preset,
            num_frames=frames,
            folder=folder,
            on_clip=partial(tell, label, 1),
        )


@dataclass(frozen=True, kw_only=True)
class _OneSet:
    """What is computed of the generated videos alone."""

    frames: int
    videos: Sequence[Path] = ()
    c3d: VideoNetwork | None = None
    classes: VideoNetwork | None = None
    photos: Photos | None = None
    networks: Networks | None = None
    dreamsim: ImageEncoder | None = None

    @classmethod
    def checked(
        cls,
        generated: Path,
        *,
        c3d: Path | None,
        efflite0: bool,
        photos: Path | None,
        weights: list[str] | None,
        frames: int,
    ) -> _OneSet:
        """Check the flags and load the networks, before hours of features.

        Raises:
            ConfigError: They do not fit together, or a package is missing.
            DataError: There are too few videos, or a file is no such network; CheckpointError
                likewise.
        """
        if c3d is None and photos is None and not weights and not efflite0:
            return cls(frames=frames)
        from motionmerge.evaluation.one_set import C3D_FRAMES, SPLITS, load_c3d
        from motionmerge.evaluation.sources import Photos
        from motionmerge.evaluation.vbench.sources import Networks

        if not _holds_videos(generated):
            raise ConfigError(
                "--c3d, --efflite0 and --photos need videos; the generated ones come as features.",
                fix="Give the folder of generated videos.",
            )
        if c3d is not None and frames != C3D_FRAMES:
            raise ConfigError(
                f"C3D takes {C3D_FRAMES} frames, not {frames}.", fix=f"Give --frames {C3D_FRAMES}."
            )
        given = parse_inputs(weights or (), flag="--weights")
        networks = Networks({name: Path(path) for name, path in given.items()}, {})
        missing = networks.missing_for("i2v_background")
        if (photos is None) != (not given) or (photos is not None and missing):
            raise ConfigError(
                "PIC needs --photos and all four files of DreamSim.",
                fix="Give --photos FOLDER, and --weights NAME=PATH with each of "
                f"{', '.join(_DREAMSIM)}.",
            )
        found = None if photos is None else Photos.at(photos)
        classes: VideoNetwork | None = None
        if efflite0:
            from motionmerge.evaluation.semantic import ClassesOfClips

            classes = ClassesOfClips.load()
        videos = _videos(generated)
        if (c3d is not None or efflite0) and len(videos) < SPLITS:
            raise DataError(
                f"The inception score takes at least {SPLITS} videos; {generated} has "
                f"{len(videos)}.",
                fix="Leave --c3d and --efflite0 out, or give more videos.",
            )
        return cls(
            videos=videos,
            c3d=None if c3d is None else load_c3d(c3d),
            classes=classes,
            photos=found,
            networks=networks,
            dreamsim=None if found is None else networks.dreamsim(),
            frames=frames,
        )

    def compute(self, folder: Path | None, preset: str) -> dict[str, Any]:
        """Compute IS and PIC, as far as they were asked for."""
        result: dict[str, Any] = {}
        if self.c3d is not None:
            result["is"] = self._inception(self.c3d, folder, preset, label="C3D")
        if self.classes is not None:
            result["is_efflite0"] = self._inception(
                self.classes, folder, preset, label="EfficientNet"
            )
        if self.dreamsim is not None:
            assert self.photos is not None and self.networks is not None  # see `checked`
            result["pic"] = self._conformity(self.photos, self.networks, self.dreamsim)
        return result

    def _inception(
        self, network: VideoNetwork, folder: Path | None, preset: str, *, label: str
    ) -> dict[str, Any]:
        from motionmerge.evaluation import frechet, one_set
        from motionmerge.evaluation.kernel_and_inception import inception_score

        rows, failures = _features(self.videos, network, preset, self.frames, folder, label=label)
        if len(rows) < one_set.SPLITS:
            path, reason = next(iter(failures.items()))
            raise DataError(
                f"Of {len(self.videos)} videos {len(rows)} can be looked at, and the inception "
                f"score takes at least {one_set.SPLITS}. {path}: {reason}",
                fix="Give more videos, or leave --c3d and --efflite0 out.",
            )
        mean, deviation = inception_score(
            rows, num_splits=one_set.SPLITS, shuffle_seed=one_set.SHUFFLE_SEED
        )
        few = f"fewer than {frechet.ENOUGH_CLIPS} videos: IS is too low"
        return {
            "mean": mean,
            "deviation": deviation,
            "splits": one_set.SPLITS,
            "shuffle_seed": one_set.SHUFFLE_SEED,
            "num": len(rows),
            "network": network.fingerprint,
            "doubts": few if len(rows) < frechet.ENOUGH_CLIPS else None,
            "failed": {str(video): reason for video, reason in failures.items()},
        }

    def _conformity(
        self, photos: Photos, networks: Networks, dreamsim: ImageEncoder
    ) -> dict[str, Any]:
        from motionmerge.evaluation.one_set import input_conformities
        from motionmerge.evaluation.statistics import bootstrap_mean

        with counting_bar(len(self.videos), shown=True) as tell:
            found, failures = input_conformities(
                self.videos, photos, dreamsim, num_frames=self.frames,
                on_clip=partial(tell, "DreamSim", 1),
            )  # fmt: skip
        if not found:
            path, reason = next(iter(failures.items()))
            raise DataError(
                f"None of {len(failures)} videos has an input conformity. {path}: {reason}",
                fix="Give --photos a folder with a photo of each video's name.",
            )
        interval = bootstrap_mean(list(found.values())).to_dict()
        return {
            "mean": interval["value"],
            "low": interval["low"],
            "high": interval["high"],
            "num": len(found),
            "networks": networks.hashes("i2v_background"),
            "failed": {str(video): reason for video, reason in failures.items()},
        }


def _print_others(others: Mapping[str, Mapping[str, Any]]) -> None:
    for name, one in others.items():
        spread = ""
        if "deviation" in one:
            spread = f" +- {one['deviation']:.2f} over {one['splits']} splits"
        elif one["low"] is not None:
            spread = f" [{one['low']:.4f}, {one['high']:.4f}]"
        print(f"{name.upper()} {one['mean']:.4f}{spread}, n = {one['num']}")
        if one.get("doubts"):
            typer.echo(f"Warning: {one['doubts']}", err=True)
        _print_left_out(one["failed"])


def _print_left_out(failures: Mapping[Any, str]) -> None:
    for path, reason in failures.items():
        typer.echo(harmless(f"left out: {path}: {reason}"), err=True)


def _holds_videos(path: Path) -> bool:
    """Return whether a path is not one of a file of features."""
    return path.suffix not in _FEATURE_FILES


def _videos(folder: Path) -> list[Path]:
    """List a folder's videos.

    Raises:
        DataError: It is no folder, or has fewer than two: one has no distribution.
    """
    from motionmerge.evaluation.sources import find_videos

    if not folder.is_dir():
        raise DataError(
            f"{folder} is no folder and no feature file.",
            fix="Give a folder of videos, or a .npy or .safetensors file.",
        )
    found = find_videos([folder])
    if len(found) < 2:
        raise DataError(
            f"{folder} holds one video, and sets of videos are compared.", fix="Give at least two."
        )
    return found
