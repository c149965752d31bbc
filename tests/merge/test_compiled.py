"""The compiled kernels have the bits of NumPy and torch, and say when a result is not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from motionmerge.merge.compiled import Kernels, compiled_kernels
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
@pytest.mark.parametrize("threshold", [1, 19661, 65536])
def test_a_mask_has_the_bits_of_its_definition(kernels: Kernels, count: int, threshold: int):
    keep = np.full(count + 1, 7, dtype=np.uint8)
    kernels.draw_keep(mask_stream(3, "a.weight", 2), threshold, keep[:count])
    assert np.array_equal(keep[:count], mask_bits(3, "a.weight", 2, count) < threshold)
    assert keep[count] == 7


@pytest.mark.parametrize("is_masked", [True, False])
@pytest.mark.parametrize(("scale", "factor"), [(1.0, -0.3), (-0.25, 2.5), (0.1, 0.7)])
def test_a_step_has_the_bits_of_the_operations_one_by_one(
    kernels: Kernels, is_masked: bool, scale: float, factor: float
):
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(10_007, generator=generator).bfloat16() for _ in range(3)]
    tiny = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1e-38, 3e38]).bfloat16()
    sides[0][: len(tiny)], sides[1][3 : 3 + len(tiny)] = tiny, tiny / 4
    keep = torch.rand(10_007, generator=generator) < 0.5
    anchor, minuend, subtrahend = (side.float() for side in sides)
    # one by one: torch's own `alpha` may be fused
    step = torch.tensor(factor) * (torch.tensor(scale) * (minuend - subtrahend))
    expected = (anchor + (step * keep.float() if is_masked else step)).bfloat16()
    result = torch.empty_like(expected)
    mask = keep.view(torch.uint8).numpy() if is_masked else None
    assert kernels.step_along(*map(raw, sides), scale, factor, mask, raw(result))
    assert torch.equal(result.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), 3.3e38])
@pytest.mark.parametrize("side", [0, 1, 2])
def test_what_is_not_finite_is_told_also_where_the_mask_drops_it(
    kernels: Kernels, bad: float, side: int
):
    sides = [torch.ones(5000).bfloat16() for _ in range(3)]
    result, dropped = torch.empty_like(sides[0]), np.zeros(5000, dtype=np.uint8)
    arguments = (*map(raw, sides), 1.0, 4.0)
    assert kernels.step_along(*arguments, None, raw(result))
    sides[side][4321] = bad
    overflows = bad == 3.3e38
    assert kernels.step_along(*arguments, None, raw(result)) == (overflows and side == 0)
    assert kernels.step_along(*arguments, dropped, raw(result)) == (overflows and side == 0)
