"""The compiled kernels have the bits of NumPy and torch, and say when a result is not finite."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from motionmerge.merging.compute import compiled
from motionmerge.merging.compute.compiled import STREAMS, Kernels, compiled_kernels
from motionmerge.rng import MASK_BLOCK, mask_bits, mask_digest
from motionmerge.tensors import DType, storable


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
    kernels.draw_keep([mask_digest(3, *place) for place in places], threshold, keep[:-1])
    for place, drawn in zip(places, keep[:-1].reshape(num_streams, count), strict=True):
        assert np.array_equal(drawn, mask_bits(3, *place, count) < threshold)
    assert keep[-1] == 7


@pytest.mark.parametrize("num_words", range(5))
def test_streams_are_seeded_as_numpy_does_also_from_few_words(kernels: Kernels, num_words: int):
    digest = bytes(range(200, 200 + 4 * num_words)).ljust(16, b"\0")
    stream = np.random.SFC64(int.from_bytes(digest, "little"))
    bits = np.asarray(stream.random_raw(64), dtype="<u8").view("<u2")
    for threshold in (13_000, 50_000):
        keep = np.empty(len(bits), dtype=np.uint8)
        kernels.draw_keep([digest], threshold, keep)
        assert np.array_equal(keep, bits < threshold)


HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]


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
    assert kernels.step_along(storable(dtype), *map(raw, sides), factors, mask, raw(result))
    assert torch.equal(bits_of(result), bits_of(expected))


@pytest.mark.parametrize("dtype", HALVES)
def test_every_stored_number_is_widened_and_rounded_as_torch_does(
    kernels: Kernels, dtype: torch.dtype
):
    patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = patterns[patterns.isfinite()]
    zeros, result = torch.zeros_like(finite), torch.empty_like(finite)
    for factor in (1.0, 0.3, 1 / 3, 2.0**-11, 3 * 2.0**-12):  # also ties, also below the smallest
        sides = map(raw, (zeros, finite, zeros))
        is_finite = kernels.step_along(
            storable(dtype), *sides, (1.0, 1.0, factor), None, raw(result)
        )
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
    arguments = (storable(dtype), *map(raw, sides), (1.0, 1.0, 4.0))
    assert kernels.step_along(*arguments, None, raw(result))
    overflows = bad == "large"  # only if it is multiplied
    sides[side][4321] = 0.99 * torch.finfo(dtype).max if overflows else float(bad)
    assert kernels.step_along(*arguments, None, raw(result)) == (overflows and side == 0)
    # What is too large for fp16 is not for fp32, in which it is dropped.
    fits = overflows and (side == 0 or dtype == torch.float16)
    assert kernels.step_along(*arguments, dropped, raw(result)) == fits


def every_half(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)


def numbers_to_round() -> torch.Tensor:
    """Every upper half of an fp32 number, with what bf16 and fp16 drop at ties and beside them."""
    near = [0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF]
    low = torch.tensor([(step << 13) + one for step in range(8) for one in near])
    bits = (torch.arange(65536)[:, None] << 16) + low
    return bits.flatten().to(torch.uint32).view(torch.float32)


def check_conversions(
    dtype: torch.dtype,
    widen: Callable[[np.ndarray, np.ndarray], None],
    round_: Callable[[np.ndarray, np.ndarray], None],
) -> None:
    halves = every_half(dtype)
    wide = np.empty(halves.numel(), dtype=np.float32)
    widen(raw(halves), wide)
    assert torch.equal(bits_of(torch.from_numpy(wide)), bits_of(halves.float()))

    values = numbers_to_round()
    rounded = torch.empty(len(values), dtype=dtype)
    round_(values.numpy(), raw(rounded))
    is_nan = values.isnan()
    assert torch.equal(bits_of(rounded)[~is_nan], bits_of(values.to(dtype))[~is_nan])
    assert rounded[is_nan].isnan().all()


@pytest.mark.parametrize("dtype", HALVES)
def test_halves_are_widened_and_fp32_is_rounded_as_torch_does(
    kernels: Kernels, dtype: torch.dtype
) -> None:
    stored = storable(dtype)
    check_conversions(dtype, partial(kernels.widen, stored), partial(kernels.round, stored))


@pytest.mark.parametrize("count", [1, 7, 8, 1001])
def test_fp16_is_converted_alike_with_and_without_the_processors_instruction(
    kernels: Kernels, count: int
) -> None:
    (path,) = Path(compiled.__file__).parent.glob("_kernels*")
    library = ctypes.CDLL(str(path))

    def plainly(name: str) -> Callable[[np.ndarray, np.ndarray], None]:
        function = getattr(library, f"{name}_fp16_plainly")
        return lambda given, made: function(
            given.ctypes.data_as(ctypes.c_void_p),
            made.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_size_t(given.nbytes // (2 if name == "widen" else 4)),
        )

    if count == 1:
        check_conversions(torch.float16, plainly("widen"), plainly("round_to"))
    values = numbers_to_round()[-count - 50_000 : -50_000].numpy()  # among them NaN
    ways = [np.full(2 * count + 2, 7, dtype=np.uint8) for _ in range(2)]
    kernels.round(DType.FP16, values, ways[0][: 2 * count])
    plainly("round_to")(values, ways[1])
    assert np.array_equal(*ways) and (ways[0][2 * count :] == 7).all()


@pytest.mark.parametrize("place", ["elsewhere", "first", "second"])
def test_what_is_kept_is_added_with_the_bits_of_the_operations_one_by_one(
    kernels: Kernels, place: str
):
    generator = np.random.default_rng(0)
    first, second = generator.standard_normal((2, 1003)).astype(np.float32)
    keep = (generator.random(1003) < 0.5).astype(np.uint8)
    expected = first + (np.float32(0.3) * second) * keep.astype(np.float32)
    target = {"elsewhere": np.empty_like(first), "first": first, "second": second}[place]
    kernels.add_dropped(first, second, 0.3, keep, target)
    assert np.array_equal(target, expected)
