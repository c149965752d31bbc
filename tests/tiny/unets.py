"""Every U-Net of ours in a tiny size, and what it is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from motionmerge.models.text_adapters import add_text_adapter

from . import builders as build
from .consisti2v import tiny_consisti2v_unet
from .dynamicrafter import tiny_unet


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class TinyUNet:
    """A U-Net whose weights are the same at every building.

    Attributes:
        build: Makes it.
        inputs: What it is called with, made anew for each call.
    """

    build: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]

    def make(self) -> Any:
        """Build it; adapters do something, and nothing is dropped."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            unet = self.build()
            for name, parameter in unet.named_parameters():
                if "fusion" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
        return unet.requires_grad_(False).eval()


def _adapted_dynamicrafter() -> Any:
    unet = tiny_unet()
    unet.add_temporal_adapter(num_frames=3, num_heads=2, head_dim=4)
    return unet


def _adapted(pipeline: Callable[[], Any]) -> Any:
    unet = pipeline().unet
    add_text_adapter(unet, text_dim=8, num_frames=2, num_heads=2, head_dim=4)
    return unet


def _dynamicrafter_inputs(channels: int) -> dict[str, Any]:
    return {
        "sample": _noise(2, channels, 3, 8, 8),
        "timestep": torch.tensor([500, 300]),
        "encoder_hidden_states": _noise(2, 8, 16, seed=1),
        "frame_rate": 8.0,
    }


def _consisti2v_inputs() -> dict[str, Any]:
    return {
        "sample": _noise(2, 4, 2, 8, 8),
        "timestep": torch.tensor([500, 300]),
        "encoder_hidden_states": _noise(2, 6, 16, seed=1),
        "frame_stride": 3.0,
        "first_frame_latents": _noise(2, 4, 1, 8, 8, seed=2),
    }


def _svd_inputs() -> dict[str, Any]:
    return {
        "sample": _noise(2, 2, 8, 8, 8),
        "timestep": 500.0,
        "encoder_hidden_states": _noise(2, 1, 8, seed=1),
        "added_time_ids": _noise(2, 3, seed=2),
        "text": _noise(2, 6, 8, seed=3),
    }


def _i2vgen_xl_inputs() -> dict[str, Any]:
    return {
        "sample": _noise(2, 4, 2, 8, 8),
        "timestep": torch.tensor([500, 300]),
        "fps": torch.tensor([8, 8]),
        "image_latents": _noise(2, 4, 2, 8, 8, seed=4),
        "image_embeddings": _noise(2, 8, seed=5),
        "encoder_hidden_states": _noise(2, 6, 8, seed=1),
    }


UNETS = {
    "DynamiCrafter with adapter": TinyUNet(
        _adapted_dynamicrafter, lambda: _dynamicrafter_inputs(8)
    ),
    "VideoCrafter": TinyUNet(lambda: tiny_unet(4), lambda: _dynamicrafter_inputs(4)),
    "ConsistI2V": TinyUNet(tiny_consisti2v_unet, _consisti2v_inputs),
    "SVD with adapter": TinyUNet(lambda: _adapted(build.svd), _svd_inputs),
    "I2VGen-XL with adapter": TinyUNet(lambda: _adapted(build.i2vgen_xl), _i2vgen_xl_inputs),
}
