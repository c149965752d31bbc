"""Faster layers: the same parameters, and the same numbers up to rounding."""

from __future__ import annotations

import accelerate
import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from torch import nn

from motionmerge.models.dynamicrafter import fast_layers
from motionmerge.models.dynamicrafter.fast_layers import (
    FastFeedForward,
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


@pytest.mark.parametrize("num_rows", [1, 6, 7, 15, 16])
def test_rows_of_a_feed_forward_layer_are_taken_in_pieces(
    num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = FeedForward(6, dim_out=5)
    x = torch.randn(6, 3, 5).transpose(0, 2)  # 15 rows, not contiguous
    with torch.no_grad():
        expected = layer(x)
        use_fast_layers(nn.Sequential(layer))
        fast = FastFeedForward.like(layer)
        monkeypatch.setattr(fast_layers, "_PIECE_BYTES", {"cpu": num_rows * 48 * 4})
        seen = []
        fast.net[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel() // 6))
        torch.testing.assert_close(fast(x), expected)
    assert sum(seen) == 15 and max(seen) == min(num_rows, 15)
    fast(x).sum().backward()
    assert seen[-1] == 15, "training takes all rows at once"
    assert fast.net[2].weight.grad is not None


def test_layers_whose_weights_are_brought_for_a_call_are_called_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fast_layers, "_PIECE_BYTES", {"cpu": 1})
    fast, calls = FastFeedForward.like(FeedForward(4)), []
    accelerate.cpu_offload(fast.net[2], torch.device("cpu"))
    fast.net[2].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        fast(torch.randn(3, 4))
    assert calls == [1], "diffusers prefetches the next layer after each call"


def test_a_row_is_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_layers, "_PIECE_BYTES", {"cpu": 1})
    with torch.no_grad():
        assert FastFeedForward.like(FeedForward(4))(torch.randn(3, 4)).shape == (3, 4)


def test_parameters_and_their_names_stay() -> None:
    model = nn.Sequential(
        nn.GroupNorm(2, 4), nn.ModuleList([FeedForward(4), GEGLU(4, 4), nn.GroupNorm(1, 4)])
    )
    before = dict(model.named_parameters())
    use_fast_layers(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    kinds = {FastGroupNorm, FastFeedForward, FastGEGLU}
    assert kinds <= {type(module) for module in model.modules()}
    assert isinstance(model[1][0].net[0], FastGEGLU)


def test_the_unet_has_them_and_a_gradient_takes_torch_s_way() -> None:
    unet = build_pocket_model().unet
    kinds = {type(module) for module in unet.modules()}
    assert {FastGroupNorm, FastFeedForward, FastGEGLU} <= kinds
    assert not {nn.GroupNorm, FeedForward, GEGLU} & kinds
    x = torch.randn(1, 4, 3, 3).bfloat16()
    for layer in (FastGroupNorm(2, 4), FastGEGLU(3, 5)):
        layer.to(torch.bfloat16)
        assert torch.equal(layer(x), type(layer).__mro__[1].forward(layer, x))


def test_a_cpu_norms_groups_as_before() -> None:
    layer, x = FastGroupNorm(2, 4), torch.randn(1, 4, 3, 3)
    with torch.no_grad():
        assert torch.equal(layer(x), nn.GroupNorm.forward(layer, x))
