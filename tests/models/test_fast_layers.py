"""Layers for GPUs: the same parameters, and the same numbers up to rounding."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.activations import GEGLU
from torch import nn

from motionmerge.models.dynamicrafter.fast_layers import (
    FastGEGLU,
    FastGroupNorm,
    use_fast_layers,
)
from motionmerge.models.pocket.components import build_pocket_model

HALVES = [torch.bfloat16, torch.float16]


def rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("offset", [0.0, 3.0, -30.0])
def test_group_norm_by_reductions_is_as_exact_as_torch_s(dtype: torch.dtype, offset: float) -> None:
    torch.manual_seed(0)
    layer = nn.GroupNorm(8, 32, eps=1e-5)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    layer.to(dtype)
    video = (torch.randn(2, 32, 5, 6, 7) + offset).to(dtype).transpose(3, 4)  # not contiguous
    exact = layer.double()(video.double())
    layer.to(dtype)
    own = layer(video).double()
    fast = FastGroupNorm.like(layer).by_reductions(video)
    assert fast.dtype == dtype and fast.shape == video.shape
    theirs, ours = ((result.double() - exact).abs().max() for result in (own, fast))
    assert ours <= theirs + rounding(dtype) * exact.abs().max()


def test_a_group_of_equal_entries_is_its_bias() -> None:
    layer = FastGroupNorm(2, 4).bfloat16()
    nn.init.constant_(layer.bias, 0.5)
    constant = torch.full((1, 4, 300), 77.0, dtype=torch.bfloat16)
    assert torch.equal(layer.by_reductions(constant), torch.full_like(constant, 0.5))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [True, False])
def test_gated_units_by_halves_are_as_exact_as_diffusers(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    layer = GEGLU(16, 24, bias=bias).to(dtype)
    x = torch.randn(3, 5, 16).to(dtype)
    with torch.no_grad():
        exact = layer.double()(x.double())
        layer.to(dtype)
        theirs, ours = (
            (result.double() - exact).abs().max()
            for result in (layer(x), FastGEGLU.like(layer).by_halves(x))
        )
    assert ours <= theirs + 2 * rounding(dtype) * exact.abs().max()


def test_parameters_and_their_names_stay() -> None:
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.ModuleList([GEGLU(4, 4), nn.GroupNorm(1, 4)]))
    before = dict(model.named_parameters())
    use_fast_layers(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert isinstance(model[0], FastGroupNorm) and isinstance(model[1][0], FastGEGLU)


def test_the_unet_has_them_and_a_cpu_computes_as_before() -> None:
    unet = build_pocket_model().unet
    kinds = [type(module) for module in unet.modules()]
    assert FastGroupNorm in kinds and FastGEGLU in kinds
    assert nn.GroupNorm not in kinds and GEGLU not in kinds
    x = torch.randn(1, 4, 3, 3).bfloat16()
    with torch.no_grad():
        for layer in (FastGroupNorm(2, 4), FastGEGLU(3, 5)):
            layer.to(torch.bfloat16)
            assert torch.equal(layer(x), type(layer).__mro__[1].forward(layer, x))
