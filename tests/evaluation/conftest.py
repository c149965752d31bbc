"""A pocket model that has learned nothing, for running the machinery around it."""

from __future__ import annotations

import pytest
import torch

from motionmerge.io.weights import save_weights
from motionmerge.models.pocket.components import VARIANTS, build_pocket_model, denoiser_weights
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
