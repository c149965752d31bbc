"""A tiny checkpoint, a fine-tuned one, and files of both."""

from __future__ import annotations

import pytest
import torch

from motionmerge.io.weights import save_weights
from motionmerge.merging.algebra.nodes import Checkpoint

SHAPES = {
    "unet.conv_in.weight": (8, 4, 3, 3),
    "unet.conv_in.bias": (8,),
    "unet.down_stages.0.attention.transformer_blocks.0.attn1.to_q.weight": (16, 16),
    "unet.down_stages.0.attention.transformer_blocks.0.attn2.to_k.weight": (16, 12),
    "unet.down_stages.0.temporal_attention.proj_in.weight": (16, 16),
    "unet.down_stages.0.temporal_conv.conv1.2.weight": (8, 8, 3, 1, 1),
    "image_projector.latents": (1, 4, 8),
}


def make_state(seed, *, spread=0.02, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: (spread * torch.randn(shape, generator=generator)).to(dtype)
        for name, shape in SHAPES.items()
    }
    return {**state, "unet.num_updates": torch.tensor(seed), "unet.scale": torch.tensor(0.5 + seed)}


def make_pair(dtype=torch.float32):
    base = make_state(1, dtype=dtype)
    step = make_state(2, spread=0.005)
    tuned = {
        name: (value.float() + step[name]).to(dtype) if value.ndim else step[name]
        for name, value in base.items()
    }
    return base, tuned


@pytest.fixture
def states():
    return make_pair()


@pytest.fixture
def pair(states):
    base, tuned = states
    return Checkpoint.from_tensors(base, name="base"), Checkpoint.from_tensors(tuned, name="tuned")


@pytest.fixture
def folder(tmp_path, states):
    """A folder with base.safetensors, tuned.safetensors and recipe.yaml."""
    base, tuned = states
    save_weights(tmp_path / "base.safetensors", base)
    save_weights(tmp_path / "tuned.safetensors", tuned)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


RECIPE = """\
inputs:
  base: base.safetensors
  tuned: tuned.safetensors
experts:
  dynamics: base + 0.75 * dare(-0.25 * (tuned - base), drop_rate=0.7, seed=0)
  consistency: tuned + 0.25 * dare(tuned - base, drop_rate=0.7, seed=1)
schedule:
  - {expert: dynamics, above: 0.64}
  - {expert: consistency}
"""


def same_bits(first, second):
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and torch.equal(
            first.reshape(-1).view(torch.uint8), second.contiguous().reshape(-1).view(torch.uint8)
        )
    )
