"""Clips of known motion, and a pocket model that has learned nothing."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from motionmerge.evaluation.camera import Move
from motionmerge.io.weights import save_weights
from motionmerge.models.pocket.components import VARIANTS, build_pocket_model, denoiser_weights
from motionmerge.models.pocket.world import load_photo
from motionmerge.sampling.pipelines.pocket import pipeline_from_model


@pytest.fixture(scope="session")
def random_pocket(tmp_path_factory):
    """A pocket pipeline with random weights, and a weights file for each variant."""
    folder = tmp_path_factory.mktemp("weights")
    model = build_pocket_model()
    inputs = {}
    for seed, name in enumerate(VARIANTS):
        noise = torch.Generator().manual_seed(seed)
        weights = {
            key: value + 0.02 * torch.randn(value.shape, generator=noise)
            for key, value in denoiser_weights(model).items()
        }
        inputs[name] = folder / f"{name}.safetensors"
        save_weights(inputs[name], weights)
    return pipeline_from_model(model), inputs


@pytest.fixture(scope="session")
def moving():
    """Make frames `[num, height, width, 3]` of a photo whose camera moves by this much in all."""
    photo = np.asarray(load_photo("chelsea"))

    def make(height, width, *, num, shift=(0.0, 0.0), zoom=1.0, angle=0.0):
        frames, scale = [], 2.2 * max(height / photo.shape[0], width / photo.shape[1])
        canvas = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        middle = np.eye(3)
        middle[:2, 2] = [(width - canvas.shape[1]) / 2, (height - canvas.shape[0]) / 2]
        for part in np.linspace(0, 1, num):
            way = (float(part * shift[0]), float(part * shift[1]))
            move = Move(height=height, width=width, shift=way, zoom=zoom**part, angle=part * angle)
            frames.append(
                cv2.warpAffine(
                    canvas, (move.matrix @ middle)[:2], (width, height), flags=cv2.INTER_CUBIC
                )
            )
        return np.stack(frames)

    return make
