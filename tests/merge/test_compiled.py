"""The compiled kernels have the bits of NumPy and torch, and say when a result is not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from motionmerge.merge.compiled import STREAMS, Kernels, compiled_kernels
from motionmerge.rng import MASK_BLOCK, mask_bits, mask_stream


@pytest.fixture
def kernels() -> Kernels:
    found = compiled_kernels()
    if found is None:
        pytest.skip("there was no C compiler when the package was installed")
    return found


def raw(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.uint8).numpy()


@pytest.mark.parametrize("count", [1, 3, 4, 4095, 4096, 4099, MASK_BLOCK])
@pytest.mark.parametrize("threshold", [0, 1, 19661, 65535, 65536])
@pytest.mark.parametrize("num_streams", [1, STREAMS])
def test_masks_have_the_bits_of_their_definition(
    kernels: Kernels, count: int, threshold: int, num_streams: int
) -> None:
    places = [("a.weight", 2), ("b", 0), ("a.weight", 3), ("c", 1)][:num_streams]
    keep = np.full(num_streams * count + 1, 7, dtype=np.uint8)
    streams = [mask_stream(3, *place) for place in places]
    for _ in range(2):  # streams are left as they are
        kernels.draw_keep(streams, threshold, keep[:-1])
        for place, drawn in zip(places, keep[:-1].reshape(num_streams, count), strict=True):
            assert np.array_equal(drawn, mask_bits(3, *place, count) < threshold)
        assert keep[-1] == 7


DTYPES = [torch.bfloat16, torch.float32]


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_masked", [True, False])
@pytest.mark.parametrize("factors", [(1.0, 1.0, -0.3), (1.0, -0.25, 2.5), (-0.25, 3.3, 0.75)])
def test_a_step_has_the_bits_of_the_operations_one_by_one(
    kernels: Kernels, dtype: torch.dtype, is_masked: bool, factors: tuple[float, float, float]
):
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(10_007, generator=generator).to(dtype) for _ in range(3)]
    largest = torch.finfo(dtype).max
    tiny = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1e-38, 3e-8, -5e-6, 0.8 * largest]).to(dtype)
    sides[0][: len(tiny)], sides[1][3 : 3 + len(tiny)] = tiny, tiny / 8
    keep = torch.rand(10_007, generator=generator) < 0.5
    anchor, minuend, subtrahend = (side.float() for side in sides)
    step = minuend - subtrahend
    for factor in factors:  # one by one: torch's own `alpha` may be fused
        step = torch.tensor(factor) * step
    expected = (anchor + (step * keep.float() if is_masked else step)).to(dtype)
    result = torch.empty_like(expected)
    mask = keep.view(torch.uint8).numpy() if is_masked else None
    assert kernels.step_along(dtype, *map(raw, sides), factors, mask, raw(result))
    assert torch.equal(bits_of(result), bits_of(expected))


def test_every_stored_number_is_widened_and_rounded_as_torch_does(kernels: Kernels):
    dtype = torch.bfloat16
    patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = patterns[patterns.isfinite()]
    zeros, result = torch.zeros_like(finite), torch.empty_like(finite)
    for factor in (1.0, 0.3, 1 / 3, 2.0**-11, 3 * 2.0**-12):  # also ties, also below the smallest
        sides = map(raw, (zeros, finite, zeros))
        is_finite = kernels.step_along(dtype, *sides, (1.0, 1.0, factor), None, raw(result))
        expected = (zeros.float() + torch.tensor(factor) * finite.float()).to(dtype)
        assert is_finite and torch.equal(bits_of(result), bits_of(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", ["nan", "-inf", "large"])
@pytest.mark.parametrize("side", [0, 1, 2])
def test_what_is_not_finite_is_told_also_where_the_mask_drops_it(
    kernels: Kernels, dtype: torch.dtype, bad: str, side: int
):
    sides = [torch.ones(5000).to(dtype) for _ in range(3)]
    result, dropped = torch.empty_like(sides[0]), np.zeros(5000, dtype=np.uint8)
    arguments = (dtype, *map(raw, sides), (1.0, 1.0, 4.0))
    assert kernels.step_along(*arguments, None, raw(result))
    overflows = bad == "large"  # only if it is multiplied
    sides[side][4321] = 0.99 * torch.finfo(dtype).max if overflows else float(bad)
    assert kernels.step_along(*arguments, None, raw(result)) == (overflows and side == 0)
    assert kernels.step_along(*arguments, dropped, raw(result)) == (overflows and side == 0)
