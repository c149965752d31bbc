"""PIC against the cosines of DreamSim's embeddings, computed one frame at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from motionmerge.errors import CheckpointError
from motionmerge.evaluation.one_set import input_conformities
from motionmerge.evaluation.sources import Photos
from motionmerge.evaluation.ucf101 import write_lossless


def test_a_branch_given_under_the_name_of_another_is_refused(vbench):
    paths = vbench.networks.paths
    swapped = {**paths, "dreamsim-dino": paths["dreamsim-clip"]}
    with pytest.raises(CheckpointError, match="as DreamSim's DINO branch has a projection"):
        replace(vbench.networks, paths=swapped).dreamsim()
    swapped = {**paths, "dreamsim-clip": paths["dreamsim-dino"]}
    with pytest.raises(CheckpointError, match="as DreamSim's CLIP branch lacks a projection"):
        replace(vbench.networks, paths=swapped).dreamsim()


def test_pic_is_the_mean_cosine_of_photo_and_each_frame(vbench, tmp_path):
    random = np.random.default_rng(0)
    frames = random.integers(0, 256, (3, 32, 48, 3), np.uint8)
    write_lossless(tmp_path / "videos" / "one.mkv", frames, fps=8)
    write_lossless(tmp_path / "videos" / "two.mkv", frames, fps=8)
    photo = Image.fromarray(random.integers(0, 256, (32, 48, 3), np.uint8))
    photo.save(tmp_path / "one.png")
    network = vbench.networks.dreamsim()
    videos = sorted((tmp_path / "videos").iterdir())
    photos = Photos(by_name={"one": tmp_path / "one.png"})
    found, failures = input_conformities(videos, photos, network, num_frames=3)

    def embedding(pixels):
        return network.encode(pixels)[0].double().numpy()

    square = np.asarray(photo.resize((224, 224), Image.Resampling.BICUBIC))
    reference = embedding(torch.tensor(square).permute(2, 0, 1)[None].float() / 255)
    cosines = []
    for frame in frames:
        pixels = torch.tensor(frame).permute(2, 0, 1)[None].float()
        pixels = functional.interpolate(
            pixels, (224, 224), mode="bicubic", align_corners=False, antialias=True
        )
        other = embedding(pixels / 255)
        cosines.append(other @ reference / np.linalg.norm(other) / np.linalg.norm(reference))
    assert found == {videos[0]: pytest.approx(np.mean(cosines), abs=1e-5)}
    assert "no photo" in failures[videos[1]]
