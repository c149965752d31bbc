"""Features of EfficientNet-Lite0: the package's weights, and what they say of real pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.errors import ConfigError
from motionmerge.evaluation.backbones import efficientnet
from motionmerge.evaluation.runs import Kept, Shard, measure_videos
from motionmerge.evaluation.semantic import ClassesOfClips, SemanticFeatures
from motionmerge.evaluation.sources import Photos, source_of
from motionmerge.io.video import write_video
from motionmerge.models.pocket.world import load_photo

PUBLISHED_CODE = (
    (0.8199, 1.8108, 0.2855, -1.9456, -0.4803, -0.2466),
    (0.7996, 1.8001, 0.4558, -1.8783, -0.4650, -0.1681),
)
"""First logits of two pictures by efficientnet-lite-pytorch 0.1.0 with the same weights."""


@pytest.fixture(scope="module")
def features():
    return SemanticFeatures.load()


def test_logits_are_those_of_the_published_code(features):
    picture = np.fromfunction(
        lambda f, y, x, c: (x * 3 + y * 5 * (c + 1) + f * 40) % 256, (2, 224, 224, 3)
    ).astype(np.uint8)
    network = features.loaded.network
    with torch.inference_mode():
        logits = network._fc(network.encode(efficientnet.network_pixels(picture)))
    torch.testing.assert_close(logits[:, :6], torch.tensor(PUBLISHED_CODE), atol=1e-4, rtol=0)


def test_a_photo_under_a_camera_move_stays_more_alike_than_one_that_becomes_another(
    features, moving
):
    panned = moving(96, 160, num=9, shift=(40.0, 0.0))
    other = np.asarray(load_photo("coffee").resize((160, 96)))
    faded = np.stack(
        [(one * (1 - w) + other * w).astype(np.uint8)
         for one, w in zip(panned, np.linspace(0, 1, 9), strict=True)]
    )  # fmt: skip
    kept, lost = features.of_clip(panned), features.of_clip(faded)
    assert kept["drift_efflite0_8"] > lost["drift_efflite0_8"] + 0.2
    assert kept["subject_consistency_efflite0"] > lost["subject_consistency_efflite0"] + 0.02
    assert kept["drift_efflite0_16"] is None
    own, strange = features.of_photo(panned, panned[0]), features.of_photo(panned, other)
    assert own["i2v_subject_efflite0"] > strange["i2v_subject_efflite0"] + 0.2


def test_rows_without_features_get_them_and_are_measured_once(features, moving, tmp_path):
    write_video(tmp_path / "cat.mp4", moving(64, 64, num=4, shift=(8.0, 0.0)), fps=8)
    load_photo("chelsea").save(tmp_path / "cat.png")
    sources = [source_of(tmp_path / "cat.mp4", Photos.at(tmp_path / "cat.png"))]
    (plain,) = measure_videos(sources, kept=Kept.in_folder(tmp_path, Shard()))
    (both,) = measure_videos(sources, kept=Kept.in_folder(tmp_path, Shard()), features=features)
    assert {name: both.values[name] for name in plain.values} == plain.values
    assert 0.5 < both.values["subject_consistency_efflite0"] <= 1
    assert 0 < both.values["i2v_subject_efflite0"] <= 1
    rows = (tmp_path / "rows.jsonl").read_bytes()
    (again,) = measure_videos(sources, kept=Kept.in_folder(tmp_path, Shard()), features=features)
    assert (again.values, (tmp_path / "rows.jsonl").read_bytes()) == (both.values, rows)


def test_classes_of_a_clip_are_the_mean_of_its_frames(moving):
    network = ClassesOfClips.load()
    frames = moving(64, 64, num=3, shift=(8.0, 0.0))
    clip = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    found = network.features(clip, None)
    each = [network.features(one[None], None) for one in clip]
    np.testing.assert_allclose(found, np.mean(each, 0), atol=1e-6)
    assert found.sum() == pytest.approx(1, abs=1e-4)


def test_the_inception_score_by_image_classes_stands_beside_fvd(tmp_path, moving):
    for number in range(10):
        frames = moving(32, 32, num=9, shift=(number, 0.0))
        write_video(tmp_path / "made" / f"{number}.mp4", frames, fps=8)
    np.save(tmp_path / "real.npy", np.random.default_rng(0).normal(size=(12, 3)))
    torch.jit.script(_Colors()).save(str(tmp_path / "i3d.pt"))
    words = ["evaluate", "fvd", str(tmp_path / "real.npy"), str(tmp_path / "made"), "--frames", "9"]
    words += ["--network", str(tmp_path / "i3d.pt"), "--efflite0", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["is_efflite0"]
    assert (found["mean"], found["num"]) == (pytest.approx(1, abs=0.2), 10)


class _Colors(torch.nn.Module):
    """Stands for I3D, under the words of StyleGAN-V's file."""

    def forward(
        self, video: torch.Tensor, rescale: bool, resize: bool, return_features: bool
    ) -> torch.Tensor:
        return video.mean([2, 3, 4])


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(efficientnet, "_PACKAGE", "no_such_package_of_weights")
    with pytest.raises(ConfigError, match="not installed") as error:
        efficientnet.weights_path()
    assert "motionmerge[eval-features]" in error.value.fix
