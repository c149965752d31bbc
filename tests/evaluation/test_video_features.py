"""I3D and the presets against the logits and distances that the published codes gave."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.errors import DataError, ShapeError
from motionmerge.evaluation.backbones.i3d import I3D
from motionmerge.evaluation.frechet import frechet_distance
from motionmerge.evaluation.video_features import PRESETS, VideoNetwork, clip_features, load_i3d
from motionmerge.io.video import write_video

REFERENCE = load_file(Path(__file__).parents[1] / "data" / "video_distance.safetensors")
PUBLISHED = {"styleganv": "styleganv", "common-metrics": "common_metrics", "videogpt": "videogpt"}


def drawn_by_name(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Draw a tensor as the reference did: by its name, with seed 23."""
    normal = np.random.RandomState((zlib.crc32(name.encode()) + 23) % 2**32).standard_normal
    noise = normal(tuple(tensor.shape))
    if not tensor.is_floating_point():
        values = np.zeros(tensor.shape)
    elif name.endswith("running_var"):
        values = 1 + 0.25 * abs(noise)
    elif name.endswith("running_mean"):
        values = 0.1 * noise
    elif tensor.ndim == 1:
        values = 1 + 0.1 * noise if name.endswith("weight") else 0.05 * noise
    else:
        values = noise / np.sqrt(np.prod(tensor.shape[1:]))
    gain = 1.4 if "conv3d.weight" in name else 1.0
    return torch.tensor(np.asarray(gain * values)).to(tensor.dtype)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("i3d") / "i3d.safetensors"
    state = I3D().state_dict()
    save_file({name: drawn_by_name(name, tensor) for name, tensor in state.items()}, path)
    return path


@pytest.fixture(scope="module")
def network(weights) -> VideoNetwork:
    return load_i3d(weights)


@pytest.mark.parametrize("preset", ["styleganv", "videogpt"])
def test_features_are_those_of_the_published_code(network, preset):
    clip = REFERENCE["clips"][0].permute(0, 3, 1, 2).float() / 255
    found = network.features(clip, PRESETS[preset])
    expected = REFERENCE[f"{PUBLISHED[preset]}.real"][0].double().numpy()
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("styleganv", 0.712826719585598),
        ("common-metrics", 0.7396594257144757),
        ("videogpt", 0.7396595177648335),
    ],
)
def test_the_distance_of_the_published_features_is_theirs(preset, expected):
    real, fake = (REFERENCE[f"{PUBLISHED[preset]}.{of}"].numpy() for of in ("real", "fake"))
    found = frechet_distance(real, fake, covariance=PRESETS[preset].covariance)
    assert found == pytest.approx(expected, abs=1e-9)


def test_short_videos_and_other_shapes_are_refused(network):
    with pytest.raises(DataError, match="too short"):
        network.features(torch.zeros(8, 3, 32, 32), PRESETS["styleganv"])
    with pytest.raises(ShapeError, match="cannot look at"):
        I3D()(torch.zeros(1, 4, 16, 224, 224))


def test_other_weights_are_refused(tmp_path):
    save_file({"conv.weight": torch.ones(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match=r"Conv3d_1a_7x7\.conv3d\.weight"):
        load_i3d(tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="no network at"):
        load_i3d(tmp_path / "nothing.pt")


class Pooled(torch.nn.Module):
    """A network as quick as a test needs, called as StyleGAN-V calls its I3D."""

    def forward(
        self, video: torch.Tensor, rescale: bool, resize: bool, return_features: bool
    ) -> torch.Tensor:
        return video.mean(dim=(2, 3, 4))


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "i3d_torchscript.pt"
    torch.jit.script(Pooled()).save(str(path))
    return path


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    random = torch.Generator().manual_seed(0)
    folders = tmp_path / "real", tmp_path / "generated"
    for folder in folders:
        folder.mkdir()
        for number in range(4):
            write_video(folder / f"{number}.mp4", torch.rand(9, 3, 32, 32, generator=random), fps=8)
    return folders


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in ("evaluate", "fvd", *arguments)])


def test_the_verb_compares_folders_and_goes_on_from_kept_features(folders, script, tmp_path):
    real, generated = folders
    options = ("--network", script, "--frames", 9, "--features", tmp_path / "kept", "--json")
    first = run(real, generated, *options)
    assert first.exit_code == 0, first.output
    kept = sorted((tmp_path / "kept").rglob("*.npy"))
    assert len(kept) == 8
    stamps = [path.stat().st_mtime_ns for path in kept]
    (generated / "broken.mp4").write_bytes(b"no video")
    second = run(real, generated, *options)
    assert [path.stat().st_mtime_ns for path in kept] == stamps
    one, two = json.loads(first.stdout), json.loads(second.stdout)
    assert two["fvd"] == one["fvd"] > 0
    assert one["failed"] == {} and "broken.mp4" in next(iter(two["failed"]))
    assert two["num_real"] == two["num_generated"] == 4


def test_the_verb_compares_feature_files_without_a_network(tmp_path):
    random = np.random.default_rng(0)
    for name in ("real", "generated"):
        np.save(tmp_path / f"{name}.npy", random.standard_normal((40, 6)))
    result = run(tmp_path / "real.npy", tmp_path / "generated.npy", "--preset", "videogpt")
    assert result.exit_code == 0
    assert "FVD at infinity" in result.stdout and "KVD" in result.stdout
    for name in ("real", "generated"):
        np.save(tmp_path / f"{name}.npy", random.standard_normal((40, 60)))
    result = run(tmp_path / "real.npy", tmp_path / "generated.npy", "--json")
    assert json.loads(result.stdout)["fvd_at_infinity"]["low"] is None


def test_the_verb_says_what_it_lacks(folders, tmp_path):
    assert "--gamma" in run(*folders, "--gamma", "0", "--network", "no.pt").stderr
    assert "no network is given" in run(*folders).stderr
    assert "no folder and no feature file" in run(tmp_path / "no", tmp_path / "no").stderr
    assert "Write `styleganv`" in run(*folders, "--preset", "stylegan").stderr


def test_a_damaged_kept_file_is_made_again(folders, script, tmp_path):
    network, videos = load_i3d(script), sorted(folders[0].iterdir())
    options = {"num_frames": 9, "folder": tmp_path / "kept"}
    found, _ = clip_features(videos, network, "styleganv", **options)
    for path in (tmp_path / "kept").rglob("*.npy"):
        path.write_bytes(b"half")
    again, failures = clip_features(videos, network, "styleganv", **options)
    assert np.array_equal(found, again)
    assert not failures


def test_nothing_but_short_videos_is_an_error(folders, script):
    with pytest.raises(DataError, match="None of 4 videos"):
        clip_features(sorted(folders[0].iterdir()), load_i3d(script), "styleganv", num_frames=10)
