"""A second implementation of mask v1, written from its page in docs/, agrees with ours."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

from motionmerge.merging.algebra.sparsify import MaskV1
from motionmerge.rng import MASK_BLOCK, mask_bits

WORD, LONG = 2**32, 2**64


def seed_sequence(number):
    words = []
    while number:
        words.append(number % WORD)
        number //= WORD
    words += [0] * (4 - len(words))
    state = 0x43B0D7E5

    def scramble(value):
        nonlocal state
        value ^= state
        state = state * 0x931E8875 % WORD
        value = value * state % WORD
        return value ^ value >> 16

    def mix(x, y):
        result = (0xCA01F9DD * x - 0x4973F715 * y) % WORD
        return result ^ result >> 16

    pool = [scramble(word) for word in words]
    for i in range(4):
        for j in range(4):
            if i != j:
                pool[j] = mix(pool[j], scramble(pool[i]))
    output, factor = [], 0x8B51F9DD
    for k in range(6):
        value = pool[k % 4] ^ factor
        factor = factor * 0x58F38DED % WORD
        value = value * factor % WORD
        output.append(value ^ value >> 16)
    return [output[k] + WORD * output[k + 1] for k in (0, 2, 4)]


def sfc64(number):
    a, b, c = seed_sequence(number)
    counter, skip = 1, 12
    while True:
        out = (a + b + counter) % LONG
        counter = (counter + 1) % LONG
        a = b ^ b >> 11
        b = (c + (c << 3)) % LONG
        c = ((c << 24 | c >> 40) + out) % LONG
        if skip:
            skip -= 1
        else:
            yield out


def reference_bits(seed, name, block, count):
    key = f"motionmerge mask v1|{seed}|{name}|{block}".encode()
    digest = hashlib.blake2b(key, digest_size=16).digest()
    stream, values = sfc64(int.from_bytes(digest, "little")), []
    while len(values) < count:
        number = next(stream)
        values += [number >> shift & 0xFFFF for shift in (0, 16, 32, 48)]
    return values[:count]


@pytest.mark.parametrize(
    ("seed", "name", "block"),
    [
        (0, "unet.conv_in.weight", 0),
        (1, "unet.conv_in.weight", 7),
        (-5, "größe", 0),
        (2**62, "", 3),
    ],
)
def test_an_independent_implementation_draws_the_same_bits(seed, name, block):
    assert mask_bits(seed, name, block, 401).tolist() == reference_bits(seed, name, block, 401)


@pytest.mark.parametrize("number", [0, 1, 2**32, 2**64 + 5, 2**127 + 3])
def test_the_seeding_agrees_with_numpy_for_short_and_long_numbers(number):
    assert [next(s) for s in [sfc64(number)] * 9] == np.random.SFC64(number).random_raw(9).tolist()


def test_an_independent_implementation_keeps_the_same_entries():
    kept = MaskV1(3, 0.7).keep("w", (20, 11)).flatten().tolist()
    assert kept == [value < 19661 for value in reference_bits(3, "w", 0, 220)]


def test_the_second_block_starts_a_new_stream():
    kept = MaskV1(3, 0.7).keep("w", (MASK_BLOCK + 100,))[MASK_BLOCK:].tolist()
    assert kept == [value < 19661 for value in reference_bits(3, "w", 1, 100)]


def test_the_check_values_of_the_document_are_right():
    page = (Path(__file__).parents[2] / "docs" / "reference" / "mask-format.md").read_text()
    values = re.search(r"first eight values:\s+([\d, ]+)", page)
    expected = reference_bits(0, "unet.conv_in.weight", 0, 8)
    assert values is not None and [int(v) for v in values[1].split(",")] == expected
